"""Optimizer steps without host synchronisation: clip, skip what is not finite, AdamW, EMA."""

from fastdistill.optim.ema import EMA
from fastdistill.optim.schedule import learning_rate_factor
from fastdistill.optim.step import OptimizerStep

__all__ = ["EMA", "OptimizerStep", "learning_rate_factor"]
