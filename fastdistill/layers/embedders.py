"""DiT's embedders: one sinusoid for all blocks, and one GEMM for all blocks where they lie evenly.

Each of DiT's 28 blocks has its own embedder of time and label and its own adaLN projection, and
half of an eager forward's launches are theirs, on [B, C] vectors. Their inputs are known at the
start:

- the sinusoid of the time is the same in all of them, and is computed once;
- where the blocks' parameters lie at equal distances in one piece of memory, as in an arena, they
  are one strided batch of matrices as they are: each layer of all embedders is one batched GEMM.

Elsewhere (weights each of their own, gathered by FSDP2, LoRA, autocast, ``torch.compile``) each
block multiplies by its own weights, as before: stacking would copy them in every forward.
Labels are dropped in training mode exactly as diffusers does, once a block, from the same stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from fastdistill.layers.accelerate import Patch, Undo, in_turn, is_hooked, replace_forward, runs
from fastdistill.layers.dit import _dit_block
from fastdistill.layers.tokens import modulations


class Embedded(NamedTuple):
    """What stands for the time where all blocks' embedders were evaluated at once."""

    modulations: Tensor
    """Of each block  # [L, B, 6 C]"""
    conditioning: Tensor
    """Of the model's output  # [B, C]"""


def _forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """DiT's forward, which hands ``timestep`` on to its blocks and looks at it nowhere itself."""
    norms = [block.norm1 for block in self.transformer_blocks]
    sinusoid = norms[0].emb.time_proj(timestep)
    found: Any = sinusoid
    if _is_one_batch(norms, hidden_states):
        found = _embed(norms, sinusoid.to(hidden_states.dtype), class_labels)
    return type(self).forward(self, hidden_states, found, class_labels, *args, **kwargs)


def _embedder(
    self: Any, timestep: Any, class_labels: Tensor, hidden_dtype: torch.dtype | None = None
) -> Tensor:
    """The embedder's forward, of a time [B], of its sinusoid [B, 256] or of `Embedded`."""
    if isinstance(timestep, Embedded):
        return timestep.conditioning
    if timestep.ndim == 1:
        timestep = self.time_proj(timestep)
    return self.timestep_embedder(timestep.to(hidden_dtype)) + self.class_embedder(class_labels)


def _embed(norms: Sequence[Any], sinusoid: Tensor, labels: Tensor) -> Embedded:
    """Every block's modulations, and the conditioning of the output by block 0's embedder."""
    embedders = [norm.emb for norm in norms]
    times = [embedder.timestep_embedder for embedder in embedders]
    h = F.silu(_linear(sinusoid.expand(len(norms), -1, -1), [t.linear_1 for t in times]))
    h = _linear(h, [t.linear_2 for t in times])  # [L, B, C]
    tables = [embedder.class_embedder for embedder in embedders]
    dropped = torch.stack([_dropped(table, labels) for table in tables])  # [L, B]
    weights = [table.embedding_table.weight for table in tables]
    conditioning = h + _Lookup.apply(dropped, *weights)
    modulations = _linear(F.silu(conditioning), [norm.linear for norm in norms])
    if not _drops(tables[0]):
        return Embedded(modulations, conditioning[0])
    return Embedded(modulations, h[0] + tables[0](labels))


def _drops(table: Any) -> bool:
    return table.training and table.dropout_prob > 0


def _dropped(table: Any, labels: Tensor) -> Tensor:
    return table.token_drop(labels) if _drops(table) else labels


def _linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """Each layer of its own x  # [L, B, I] -> [L, B, O]"""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return _Linears.apply(x, len(layers), *weights, *biases)


class _Linears(torch.autograd.Function):
    """Linear layers of as many batches, whose weights and biases are each evenly spaced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: int, *tensors: Tensor) -> Tensor:
        weights, biases = tensors[:layers], tensors[layers:]
        ctx.save_for_backward(x, *weights)
        return torch.baddbmm(_stacked(biases)[:, None], x, _stacked(weights).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        layers, needed = len(weights), ctx.needs_input_grad
        dx = torch.bmm(grad, _stacked(weights)) if needed[0] else None
        nothing: list[Tensor | None] = [None] * layers
        dw = torch.bmm(grad.transpose(1, 2), x).unbind() if any(needed[2 : 2 + layers]) else nothing
        db = grad.sum(dim=1).unbind() if any(needed[2 + layers :]) else nothing
        return dx, None, *dw, *db


class _Lookup(torch.autograd.Function):
    """Rows of evenly spaced tables  # labels [L, B] -> [L, B, C]"""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.shape = len(tables), *tables[0].shape
        return _stacked(tables)[_rows(labels), labels]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (labels,) = ctx.saved_tensors
        if not any(ctx.needs_input_grad[1:]):
            return (None,) * (1 + ctx.shape[0])
        tables = grad.new_zeros(ctx.shape)
        tables.index_put_((_rows(labels), labels), grad, accumulate=True)
        return None, *tables.unbind()


def _rows(labels: Tensor) -> Tensor:
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Evenly spaced tensors as one, where they lie  # L of [...] -> [L, ...]"""
    first, step = tensors[0], _step(tensors)
    form = (len(tensors), *first.shape), (step, *first.stride())
    return first.detach().as_strided(*form, first.storage_offset())


def _step(tensors: Sequence[Tensor]) -> int:
    """Elements from one tensor to the next, 0 where they are not evenly spaced."""
    offsets = [int(tensor.storage_offset()) for tensor in tensors]
    steps = {after - before for before, after in itertools.pairwise(offsets)}
    step = steps.pop() if len(steps) == 1 else 0
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return step if step > 0 and len(storages) == 1 else 0


def _is_one_batch(norms: Sequence[Any], x: Tensor) -> bool:
    """Whether the blocks' embedders are plain and lie evenly, in the dtype of ``x``."""
    if torch.compiler.is_compiling():
        return False
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return False
    plain = not any(is_hooked(part) for norm in norms for part in norm.modules())
    if not plain or not all(type(layer) in _LAYERS for norm in norms for layer in _layers(norm)):
        return False
    groups = zip(*(norm.parameters() for norm in norms), strict=False)
    return all(_is_even(group, x) for group in groups)


_LAYERS = (nn.Linear, nn.Embedding)


def _layers(norm: Any) -> tuple[nn.Module, ...]:
    """The layers of a block's embedder and projection: a LoRA's are of other classes."""
    time = norm.emb.timestep_embedder
    return time.linear_1, time.linear_2, norm.emb.class_embedder.embedding_table, norm.linear


def _is_even(group: Sequence[Tensor], x: Tensor) -> bool:
    plain = all(
        type(p) is nn.Parameter and p.is_contiguous() and (p.dtype, p.device) == (x.dtype, x.device)
        for p in group
    )
    return plain and len({p.shape for p in group}) == 1 and _step(group) > 0


def _is_dit(module: Any) -> bool:
    """Whether a DiT's blocks all run `dit_block` with the embedders of their class."""
    if not runs(module, DiTTransformer2DModel) or len(module.transformer_blocks) < 2:
        return False
    return all(map(_has_own_embedder, module.transformer_blocks))


def _has_own_embedder(block: Any) -> bool:
    ours = getattr(block.forward, "__func__", None) is _dit_block
    return ours and runs(block.norm1.emb, CombinedTimestepLabelEmbeddings)


def _modulations_of(index: int) -> Any:
    """A block's `modulations`, found among all blocks' where these were made at once."""

    def forward(self: Any, x: Tensor | None, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(timestep, Embedded):
            return timestep.modulations[index]
        return modulations(self, x, timestep, *args, **kwargs)

    return forward


def _replace(module: Any) -> Undo:
    undos = [replace_forward(module, _forward)]
    for index, block in enumerate(module.transformer_blocks):
        undos.append(replace_forward(block.norm1, _modulations_of(index)))
        undos.append(replace_forward(block.norm1.emb, _embedder))
    return in_turn(*undos)


PATCHES = (
    Patch(
        "dit_embedders",
        "DiT's embedders behind dit_block: one sinusoid; one GEMM for all blocks in an arena",
        _is_dit,
        _replace,
    ),
)
