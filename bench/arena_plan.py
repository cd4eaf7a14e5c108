"""The page of what three networks of SDXL's size take on 1, 8 and 64 ranks, to standard output.

python -m bench.arena_plan > docs/results/arena-plan.md
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from bench.networks import sdxl_unet
from fastdistill.parallel import Mode, NetworkPlan, plan_network, plan_table

INTRODUCTION = """\
# What three networks of SDXL's size take

Student, critic and teacher are SDXL's U-Net, 2,567,463,684 parameters in 1,680 tensors each. They
compute in bfloat16; the student has one moving average; gradients are those of one backward pass an
update, moments are float32. Nothing was allocated: `fastdistill.parallel.plan_network` laid the
networks out on the meta device by the functions that lay out real ones, and the tests in
`tests/parallel/test_plan.py` hold it to what real arenas take at a smaller size. Activations are
not part of it. All ranks take the same.

Written by `python -m bench.arena_plan > docs/results/arena-plan.md`, in seconds, on any machine.

- parameter (masters), gradient, moments, average: the arena's ranges; copy: the weights that
  `single` computes with.
- frozen: the teacher's weights in bfloat16, replicated, or sharded in the last table.
- gathered: bfloat16 weights that FSDP2 has gathered. `resident`: all of them, and the largest unit
  twice while it is copied out of the buffer of its gather. `fsdp`: the root and the two largest
  other units.
- unreduced: gradients of the largest unit before their reduce-scatter, as computed (bfloat16) and
  as sent (float32).
- all: the sum of the lines, though no two networks have unreduced gradients at once.
"""


def three_networks(mode: Mode, shards: int, sharded_teacher: bool = False) -> list[NetworkPlan]:
    """Plans of student, critic and teacher."""
    trained, teacher = sdxl_unet(), copy.deepcopy(sdxl_unet()).bfloat16().requires_grad_(False)
    options: dict[str, Any] = {"mode": mode, "shards": shards, "compute_dtype": torch.bfloat16}
    held: dict[str, Any] = options if sharded_teacher else {"mode": "single"}
    return [
        plan_network(trained, name="student", averages=1, **options),
        plan_network(trained, name="critic", **options),
        plan_network(teacher, name="teacher", **held),
    ]


def main() -> None:
    print(INTRODUCTION)
    for title, plans in {
        "One rank": three_networks("single", 1),
        "8 ranks, teacher replicated": three_networks("resident", 8),
        "64 ranks, teacher replicated": three_networks("resident", 64),
        "64 ranks, everything sharded": three_networks("fsdp", 64, sharded_teacher=True),
    }.items():
        print(f"## {title}\n\n{plan_table(plans)}\n")
    units = three_networks("resident", 8)[0].units
    print(f"## The {len(units)} units that are gathered together\n\n| unit | parameters |")
    print("|---|---:|")
    for name, count in units.items():
        print(f"| {f'`{name}`' if name else 'the rest, with the root'} | {count:,} |")


if __name__ == "__main__":
    main()
