"""Parameter-sized state in one flat place, and updates of it without host synchronisation."""

from fastdistill.optim.adamw import ArenaAdamW
from fastdistill.optim.arena import Arena, arena_roles, plan_arena
from fastdistill.optim.layout import Entry, Layout, Shard
from fastdistill.optim.schedule import learning_rate_factor
from fastdistill.optim.step import OptimizerStep

__all__ = [
    "Arena",
    "ArenaAdamW",
    "Entry",
    "Layout",
    "OptimizerStep",
    "Shard",
    "arena_roles",
    "learning_rate_factor",
    "plan_arena",
]
