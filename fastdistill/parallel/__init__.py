"""Runs over several processes, on torch's own distributed engine."""

from fastdistill.parallel.modes import Mode, Parallel
from fastdistill.parallel.plan import NetworkPlan, plan_network, plan_table
from fastdistill.parallel.ranks import RankLostError, Ranks
from fastdistill.parallel.sharded import ShardedArena, shard
from fastdistill.parallel.units import gathering_units

__all__ = [
    "Mode",
    "NetworkPlan",
    "Parallel",
    "RankLostError",
    "Ranks",
    "ShardedArena",
    "gathering_units",
    "plan_network",
    "plan_table",
    "shard",
]
