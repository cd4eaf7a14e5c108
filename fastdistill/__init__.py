"""fastdistill: a kernel-accelerated training engine that distils diffusion models.

Public names load what they need on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Denoiser": "fastdistill.models",
    "Gaussian": "fastdistill.gaussian",
    "Job": "fastdistill.engine.job",
    "Noise": "fastdistill.diffusion",
    "TeleportScheduler": "fastdistill.gaussian",
    "Trainer": "fastdistill.engine.dropin",
    "accelerate": "fastdistill.layers",
    "export": "fastdistill.engine.export",
    "functional": "fastdistill.functional",
    "fit_gaussian": "fastdistill.gaussian",
    "load_denoiser": "fastdistill.engine.saved",
    "load_gaussian": "fastdistill.gaussian",
    "load_recipe": "fastdistill.config",
    "ops": "fastdistill.ops",
    "optim": "fastdistill.optim",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastdistill' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__ == f"fastdistill.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
