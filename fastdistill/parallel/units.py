"""Gathering units: the parts of a network whose weights FSDP2 gathers, and frees, together."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

LARGEST_UNIT = 400_000_000
"""Parameters: 0.8 GB of bfloat16 weights, a sixth of SDXL, enough to keep a fabric busy."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def gathering_units(module: nn.Module, largest: int = LARGEST_UNIT) -> list[str]:
    """Names of the submodules that are units of their own, in order of registration.

    From the network downwards the first submodules of at most ``largest`` parameters are units, but
    for those below a sixteenth of it: they stay in the unit of the module above, at last the
    root's, whose name "" is not in the list. Containers are passed through, since their parents may
    call their entries one by one; so is a network's only child, as the model in an adapter, which
    is the root's unit itself. Submodules that a network names in ``called_apart``, since it calls
    them from outside of the unit that they are in, are units of their own before that one.

    Args:
        module: the network, on any device.
        largest: bound of the parameters of a unit; one single parameter may exceed it.
    """
    if largest < 1:
        raise ValueError(f"largest is {largest}; expected a positive number of parameters")
    prefix, root = _innermost(module)
    units = [
        name for child, name in _children(root, prefix) for name in _units(child, name, largest)
    ]
    for name in getattr(module, "called_apart", ()):
        above = owner(name, units)
        if above and above != name:
            units.insert(units.index(above), name)
    tied = _tied_across(module, units)
    return [name for name in units if name not in tied]


def unit_of_parameters(module: nn.Module, units: list[str]) -> dict[str, int]:
    """Index of each parameter's unit by its name: 0 is the root's, 1 that of ``units[0]``, ..."""
    numbers = {"": 0} | {name: index for index, name in enumerate(units, start=1)}
    return {name: numbers[owner(name, numbers)] for name, _ in module.named_parameters()}


def owner(name: str, units: Collection[str]) -> str:
    """The unit that holds a parameter: the nearest module above it that is one, or the root."""
    while name and name not in units:
        name = name.rpartition(".")[0]
    return name


def _tied_across(module: nn.Module, units: list[str]) -> set[str]:
    """Units that share a parameter with another: FSDP2 needs it in one, so the root takes all."""
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(owner(name, units))
    return {name for shared in owners.values() if len(shared) > 1 for name in shared}


def _innermost(module: nn.Module) -> tuple[str, nn.Module]:
    """The module below all that do nothing but hold one other, and its name."""
    name, children = "", list(_children(module, ""))
    while len(children) == 1 and not list(module.parameters(recurse=False)):
        module, name = children[0]
        children = list(_children(module, name))
    return name, module


def _units(module: nn.Module, name: str, largest: int) -> Iterator[str]:
    size = sum(parameter.numel() for parameter in module.parameters())
    children = list(_children(module, name))
    if not isinstance(module, _CONTAINERS) and (size <= largest or not children):
        if size >= largest / 16:
            yield name
        return
    for child, child_name in children:
        yield from _units(child, child_name, largest)


def _children(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    for child_name, child in module.named_children():
        yield child, f"{name}.{child_name}" if name else child_name
