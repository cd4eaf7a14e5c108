"""Data sets as deterministic functions of (seed, step)."""

from fastdistill.data.base import Data, Order, RealBatch
from fastdistill.data.digits import digits
from fastdistill.data.encoded import EncodedData
from fastdistill.data.images import ImageData
from fastdistill.data.labels import Labels
from fastdistill.data.memory import InMemoryData
from fastdistill.data.mixtures import MixtureData
from fastdistill.data.prefetch import Prefetched
from fastdistill.data.sources import Record, Source, open_source

__all__ = [
    "Data",
    "EncodedData",
    "ImageData",
    "InMemoryData",
    "Labels",
    "MixtureData",
    "Order",
    "Prefetched",
    "RealBatch",
    "Record",
    "Source",
    "digits",
    "open_source",
]
