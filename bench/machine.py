"""What a run was made on and with, so that nobody compares what cannot be compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "apex", "numpy")

Machine = dict[str, str]


def describe(device: torch.device) -> Machine:
    """Hardware, versions, date, command and commit."""
    facts = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        **(_gpu(device) if device.type == "cuda" else {}),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts |= {name: value for name, value in os.environ.items() if name.startswith("OMP_")}
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    program = [Path(part).name if part.startswith("/") else part for part in sys.orig_argv[:2]]
    facts["command"] = shlex.join([*program, *sys.orig_argv[2:]])
    facts["commit"] = _commit()
    return facts


def hardware(machine: Machine) -> str:
    """The part of a description that must agree for times to be comparable."""
    names = ("device", "gpu", "cpu", "cores", "threads")
    return ", ".join(f"{name} {machine[name]}" for name in names if name in machine)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _gpu(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "l2_cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "cuda": str(torch.version.cuda or torch.version.hip),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        facts["driver_and_power_limit"] = _output(query)
    return facts


def _commit() -> str:
    git = ["git", "--no-optional-locks", "-C", str(CHECKOUT)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}, with changes" if commit and changed else commit or "unknown"


def _output(command: list[str]) -> str:
    """First line that a command prints; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]
