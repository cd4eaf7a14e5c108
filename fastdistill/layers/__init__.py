"""Faster layers for diffusers' models: opt-in, exact, and undone by one call."""

from fastdistill.layers.accelerate import Accelerated, Patch, accelerate, patches

__all__ = ["Accelerated", "Patch", "accelerate", "patches"]
