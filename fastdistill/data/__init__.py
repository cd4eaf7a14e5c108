"""Data sets as deterministic functions of (seed, step)."""

from fastdistill.data.base import Data, Order, RealBatch
from fastdistill.data.digits import digits
from fastdistill.data.labels import Labels
from fastdistill.data.memory import InMemoryData

__all__ = ["Data", "InMemoryData", "Labels", "Order", "RealBatch", "digits"]
