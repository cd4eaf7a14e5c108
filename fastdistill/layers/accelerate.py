"""`accelerate`: replace what layers compute with, in place, and leave what they are.

A patch is one entry of an explicit list. It changes how instances of one kind of module run, by
giving them another ``forward`` or another attention processor. Parameters, buffers, submodules,
hooks, names and so ``state_dict`` stay the same objects under the same keys: optimizers, FSDP2,
checkpoints and exports notice nothing, before the call or after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

Undo = Callable[[], None]
# Attributes of an instance that runs something else than its class does.
_CHANGES = frozenset(("forward", "_conv_forward"))
_MARK = "_has_accelerated_layers"


@dataclass(frozen=True)
class Patch:
    """One kind of replacement."""

    name: str
    """What users name it by in `accelerate`'s ``only``"""
    summary: str
    """What it replaces by what, in one line"""
    applies_to: Callable[[nn.Module], bool]
    """Whether a module is of the kind, with options that the patch knows"""
    apply: Callable[[nn.Module], Undo]
    """Change the module in place; returns what changes it back"""


def patches() -> dict[str, Patch]:
    """Every patch by name, in the order in which they are applied.

    Raises:
        ModuleNotFoundError: without diffusers, whose layers the patches are for.
    """
    from fastdistill.layers import dit, embedders, joint, priority, transformer, unet

    files = (unet, transformer, dit, embedders, joint, priority)
    return {patch.name: patch for file in files for patch in file.PATCHES}


class Accelerated:
    """What `accelerate` did to a model, and the way back.

    Attributes:
        replaced: how many modules each patch changed, by the name of the patch.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, int] = {}
        self._undo: list[Undo] = []

    def undo(self) -> None:
        """Restore exactly what was there; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        if not self.replaced:
            return "nothing to accelerate: no layer of this model is one that a patch knows"
        known = patches()
        lines = [f"{count:5} x {name}: {known[name].summary}" for name, count in self._counts()]
        return "\n".join(["accelerated in place (undo() restores)", *lines])

    def __repr__(self) -> str:
        return f"Accelerated({', '.join(f'{name}={count}' for name, count in self._counts())})"

    def _counts(self) -> list[tuple[str, int]]:
        return list(self.replaced.items())


def accelerate(model: nn.Module, only: Sequence[str] | None = None) -> Accelerated:
    """Replace a model's layers by faster ones of the same mathematics, in place.

    Call it before or after weights are loaded, wrapped or sharded, and before ``torch.compile``.
    A layer with options that no patch knows is left as it is, and so is one already replaced.

    Args:
        model: any module; its submodules are walked.
        only: names of the patches to apply; all of them if absent.

    Returns:
        `Accelerated`, which says what was replaced and undoes it.

    Raises:
        ValueError: for a name that no patch has.
        ModuleNotFoundError: without diffusers.
    """
    known = patches()
    chosen = list(known) if only is None else list(only)
    unknown = [name for name in chosen if name not in known]
    if unknown or isinstance(only, str):
        named = repr(only) if isinstance(only, str) else ", ".join(map(repr, unknown))
        raise ValueError(f"only names {named}; expected a list of some of {', '.join(known)}")
    result = Accelerated()
    for patch in (known[name] for name in known if name in chosen):
        for module in model.modules():
            if patch.applies_to(module):
                result._undo.append(patch.apply(module))
                result.replaced[patch.name] = result.replaced.get(patch.name, 0) + 1
    if result.replaced:
        result._undo.append(replace_attribute(model, _MARK, True))
    return result


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` replaced layers of this very module, or of what it is a copy of."""
    return _MARK in vars(model)


def runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calls of ``module`` run the ``forward`` of ``kind``, not a subclass's nor its own.

    FSDP2's classes, which inherit ``forward``, count as ``kind``.
    """
    own = "forward" in vars(module)
    return isinstance(module, kind) and type(module).forward is kind.forward and not own


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this instance does more than run its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_changed(module: nn.Module) -> bool:
    """Whether a call of this instance does more, or else, than its class's ``forward``."""
    return is_hooked(module) or not _CHANGES.isdisjoint(vars(module))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Let this instance run ``forward(module, ...)``; returns what restores its own."""
    return replace_attribute(module, "forward", MethodType(forward, module))


def replace_attribute(owner: Any, name: str, value: Any) -> Undo:
    """Set an instance's attribute, past ``nn.Module.__setattr__``; returns what restores it."""
    own = vars(owner)
    before = (own[name],) if name in own else ()
    own[name] = value
    return functools.partial(_restore, owner, name, before)


def in_turn(*undos: Undo) -> Undo:
    """One undo of several replacements, the last one first."""
    return functools.partial(_undo_all, undos)


def _undo_all(undos: tuple[Undo, ...]) -> None:
    for undo in reversed(undos):
        undo()


def _restore(owner: Any, name: str, before: tuple[Any, ...]) -> None:
    if before:
        vars(owner)[name] = before[0]
    else:
        del vars(owner)[name]
