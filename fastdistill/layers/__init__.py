"""Faster layers for diffusers' models: opt-in, exact, and undone by one call."""

from fastdistill.layers.accelerate import Accelerated, Patch, accelerate, is_accelerated, patches

__all__ = ["Accelerated", "Patch", "accelerate", "is_accelerated", "patches"]
