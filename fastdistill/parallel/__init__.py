"""Runs over several processes, on torch's own distributed engine."""

from fastdistill.parallel.modes import Mode, Parallel
from fastdistill.parallel.ranks import RankLostError, Ranks
from fastdistill.parallel.sharded import ShardedArena, shard
from fastdistill.parallel.units import gathering_units

__all__ = ["Mode", "Parallel", "RankLostError", "Ranks", "ShardedArena", "gathering_units", "shard"]
