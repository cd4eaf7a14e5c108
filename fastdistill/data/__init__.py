"""Data sets as deterministic functions of (seed, step)."""

from fastdistill.data.base import Data, Order, RealBatch
from fastdistill.data.digits import digits
from fastdistill.data.memory import InMemoryData

__all__ = ["DATA_SETS", "Data", "InMemoryData", "Order", "RealBatch", "digits"]

DATA_SETS = {"digits": digits}
