"""Runs over several processes, on torch's own distributed engine."""

from fastdistill.parallel.ranks import RankLostError, Ranks

__all__ = ["RankLostError", "Ranks"]
