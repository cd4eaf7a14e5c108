"""GPUs that a plan can be made for, and what is assumed of them.

Peaks are the vendors' published numbers. The shares of them that kernels reach, and what the host
takes for a launch, are assumptions: no number that follows from them was measured.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping

from fastdistill.engine.counting import Work

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet."""

    name: str
    memory: float
    """Bytes."""
    bfloat16: float
    """Dense floating-point operations a second on tensor cores, accumulated in float32."""
    float32: float
    """Floating-point operations a second outside of tensor cores, torch's default in float32."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second that it sends to its neighbours, in one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-80G", 80 * GIB, 312e12, 19.5e12, 2.039e12, 300e9),
        GPU("H100", 80 * GIB, 989e12, 67e12, 3.35e12, 450e9),
        GPU("H200", 141e9, 989e12, 67e12, 4.8e12, 450e9),
        GPU("B200", 180e9, 2250e12, 75e12, 8.0e12, 900e9),
        GPU("L40S", 48e9, 362e12, 91.6e12, 0.864e12, 32e9),
        GPU("RTX4090", 24 * GIB, 165.2e12, 82.6e12, 1.008e12, 32e9),
    )
}
"""SXM modules with NVLink, but for L40S and RTX 4090 on PCIe 4.0."""


def find_gpu(name: str) -> GPU:
    """The GPU of a name; case, spaces and hyphens do not matter.

    Raises:
        ValueError: for an unknown one, with those that are known.
    """
    known = {_plain(key): gpu for key, gpu in GPUS.items()} | {"a100": GPUS["A100-80G"]}
    found = known.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name), known, n=1)
        hint = f"did you mean {known[near[0]].name}?" if near else f"known: {', '.join(GPUS)}"
        raise ValueError(f"no GPU {name!r} is known; {hint}")
    return found


def parse_size(text: str) -> float:
    """Bytes of a size as 80GiB, 80GB or 80 (GiB).

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(gib|gb|mib|mb|)\s*", text.lower())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"memory is {text!r}; expected a size as 80GiB or 141GB")
    units = {"gib": GIB, "": GIB, "gb": 1e9, "mib": 2**20, "mb": 1e6}
    return float(found[1]) * units[found[2]]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace(" ", "").replace("_", "")


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What is not counted. Shares are those of a GPU's peaks."""

    linear: float = 0.62
    convolution: float = 0.42
    attention: float = 0.34
    attention_backward: float = 0.27
    float32: float = 0.8
    """Of the peak outside of tensor cores, for matrix products and convolutions in float32."""
    bandwidth: float = 0.65
    """Of kernels that are bound by memory, as torch's eager ones."""
    optimizer_bandwidth: float = 0.8
    """Of the one-pass optimizer, and of casts and copies of whole ranges."""
    launch: float = 13e-6
    """Seconds of the host for a kernel of a forward without a graph."""
    launch_graph: float = 17e-6
    """The same with a graph."""
    launch_backward: float = 9e-6
    """The same of a backward."""
    optimizer_launch: float = 100e-6
    """The same for a whole update of an arena."""
    gather_tensor: float = 15e-6
    """Seconds of the host for a tensor in a gather of FSDP2."""
    reduce_tensor: float = 40e-6
    """The same in a reduction."""
    link: float = 0.73
    """Share of the link that collectives reach."""
    node: int = 8
    """GPUs that the link joins; others are reached through the network."""
    network: float = 40e9
    """Bytes a second and GPU that collectives reach between nodes (one 400 Gb/s adapter a GPU)."""
    hidden: float = 0.8
    """Share of collectives that runs behind the networks' work."""
    context: float = 1.5 * GIB
    """Memory of CUDA's context, of libraries and their workspaces."""
    fragmentation: float = 0.05
    """Memory that torch's allocator cannot use, as a share of what activations take."""


def device_seconds(
    work: Work, batch: float, gpu: GPU, dtype: str, assumed: Assumptions, *, backward: bool = False
) -> Mapping[str, float]:
    """Seconds that a GPU takes for counted work: of each class of matrix products, and of memory.

    Args:
        work: what is done.
        batch: samples.
        gpu: where.
        dtype: bfloat16 or float32.
        assumed: the shares of its peaks.
        backward: whether it is a backward pass.
    """
    seconds = {}
    for kind, flops in work.flops.items():
        if dtype == "float32":
            rate = assumed.float32 * gpu.float32
        elif kind == "attention" and backward:
            rate = assumed.attention_backward * gpu.bfloat16
        else:
            rate = getattr(assumed, kind) * gpu.bfloat16
        seconds[kind] = flops.at(batch) / rate
    seconds["memory-bound"] = work.total_bytes.at(batch) / (assumed.bandwidth * gpu.bandwidth)
    return seconds


def host_seconds(work: Work, assumed: Assumptions, *, backward: bool, graph: bool) -> float:
    """Seconds that the host takes to launch counted work."""
    each = assumed.launch_graph if graph else assumed.launch
    return sum(work.kernels.values()) * (assumed.launch_backward if backward else each)


def bus_bandwidth(gpu: GPU, ranks: int, assumed: Assumptions) -> float:
    """Bytes a second that a collective over this many GPUs moves, in NCCL's bus bandwidth."""
    inside = assumed.link * gpu.link
    return inside if ranks <= assumed.node else min(inside, assumed.node * assumed.network)
