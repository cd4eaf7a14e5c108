"""`Adapter`: a diffusers model as the network of a `Denoiser`."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from fastdistill.models.denoiser import Condition

Shape = tuple[int | None, ...]
"""Shape of one sample of a part of a condition; None is any size."""

OUTPUT = "output"


class Adapter(nn.Module, abc.ABC):
    """A diffusers model behind the `Network` protocol; its weights are under ``model.``.

    Dropout is switched off, that of labels too: a run's random numbers are functions of its seed
    and step, and distillation uses none. `forward` calls the model. `features` and
    `forward_with_features` walk through its blocks one by one, so that what lies past the last
    feature is not computed, or computed without a graph.

    Args:
        model: the diffusers model.
        features: names or indices of the blocks whose outputs are features; the family's usual ones
            if None.
        sample_size: height and width of the samples; those of the model's configuration if None.

    Raises:
        ValueError: for a model, or an option of it, that the adapter does not know, and for a block
            that the model does not have.
    """

    architecture: ClassVar[str]
    """Name of the diffusers class."""
    called_apart: tuple[str, ...] = ()
    """Submodules that are called from outside of the block that holds them."""
    classes: int = 0
    """Number of classes; 0 if the model is not class-conditional."""

    def __init__(
        self,
        model: nn.Module,
        features: Sequence[int | str] | None = None,
        sample_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.recompute = False
        self.checkpoint_context = noop_context_fn
        """What surrounds the forward and the recomputation of a checkpointed block."""
        self.rebuilt: frozenset[str] = frozenset()
        """Names of weights that are found elsewhere, as a LoRA student's base in its teacher, and
        that checkpoints leave out."""
        size = sample_size if sample_size is not None else self._configured_size()
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (self._sample_channels(), height, width)
        self._check_channels()
        _switch_dropout_off(model)
        self.feature_names = self._choose(features)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's diffusers configuration."""
        return self.model.config

    @property
    @abc.abstractmethod
    def block_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Names of the blocks in the order of the forward, and the shapes of their outputs."""

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Shapes (C, H, W) of what `features` returns, for one sample of ``sample_shape``."""
        shapes = self.block_shapes
        return [shapes[name] for name in self.feature_names]

    @property
    def tokens(self) -> int | None:
        """Image tokens of one sample, on which flow models' time shift depends; None in a UNet."""
        return None

    @property
    def condition_shapes(self) -> dict[str, Shape]:
        """Shape of each tensor of a condition, for one sample; empty if labels or nothing."""
        return {}

    @property
    def optional_conditions(self) -> dict[str, Shape]:
        """The same of those that may be left out."""
        return {}

    @abc.abstractmethod
    def null_condition(self, condition: Condition) -> Condition:
        """The condition of no condition, of the same structure: null class or empty prompt.

        Raises:
            ValueError: where the model has none, or it must come from a text encoder.
        """

    @abc.abstractmethod
    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""

    @abc.abstractmethod
    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        """The model's forward, pausing with each block's output as a map, and at the raw output."""

    @abc.abstractmethod
    def _sample_channels(self) -> int:
        """Channels of a sample."""

    @abc.abstractmethod
    def _default_features(self) -> list[str]:
        """Names of the blocks whose outputs are features unless others are asked for."""

    def forward(self, model_input: Tensor, noise_condition: Tensor, condition: Condition) -> Tensor:
        """Raw output of the shape of ``model_input`` [B, C, H, W].

        Args:
            model_input: scaled samples [B, C, H, W], in the dtype that the model computes in.
            noise_condition: what the model is told of the noise level [B].
            condition: see `condition_shapes`; labels int64 [B] in a class-conditional model.

        Raises:
            ValueError: naming the part of the condition that is missing, unknown or of another
                shape.
        """
        self.check_condition(condition, model_input.shape[0])
        arguments = self._arguments(model_input, noise_condition, condition)
        return self._raw(self.model(**arguments, return_dict=False)[0], model_input)

    def features(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition
    ) -> list[Tensor]:
        """Outputs [B, C, H, W] of the chosen blocks; what follows the last is not computed."""
        self.check_condition(condition, model_input.shape[0])
        return self._walk_to_the_last(self._walk(model_input, noise_condition, condition))

    def forward_with_features(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition,
        output_graph: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Raw output, with a graph if asked for, and the features, from one pass."""
        self.check_condition(condition, model_input.shape[0])
        walk = self._walk(model_input, noise_condition, condition)
        features = self._walk_to_the_last(walk)
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_graph):
            for _, value in walk:
                output = value  # the last one is the raw output
            return self._raw(output, model_input), features

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.recompute = True
        self.model.enable_gradient_checkpointing(self._recomputing)

    def check_condition(self, condition: Condition, batch: int) -> None:
        """Make sure that a condition is what the model needs.

        Raises:
            ValueError: naming the part that is missing, unknown or of another shape.
        """
        if self.classes:
            _check_labels(condition, batch, self.architecture)
            return
        needed, optional = self.condition_shapes, self.optional_conditions
        if not needed:
            if condition is not None:
                raise ValueError(f"this {self.architecture} is unconditional; expected None")
            return
        if not isinstance(condition, Mapping):
            raise ValueError(
                f"the condition of {self.architecture} is {type(condition).__name__}; expected a "
                f"dict with {_describe(needed)}"
            )
        for name, shape in needed.items():
            if name not in condition:
                raise ValueError(
                    f"the condition has no {name!r}, which {self.architecture} needs as "
                    f"{_text(shape)}; it has {', '.join(condition) or 'nothing'}"
                )
        for name, value in condition.items():
            expected = needed.get(name, optional.get(name))
            if expected is None:
                raise ValueError(
                    f"the condition has {name!r}, which this {self.architecture} does not use; "
                    f"expected {_describe(needed | optional)}"
                )
            if not _fits(value, batch, expected):
                raise ValueError(
                    f"{name!r} of the condition has shape {list(value.shape)}; "
                    f"{self.architecture} expects {_text(expected)} with B = {batch}"
                )

    def example_condition(
        self,
        batch: int,
        *,
        text_tokens: int = 77,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Condition:
        """Ones in the shapes of a condition, or labels 0, as for planning and compiling."""
        if self.classes:
            return torch.zeros(batch, dtype=torch.int64, device=device)
        if not self.condition_shapes:
            return None
        sizes = {
            name: [batch, *(text_tokens if size is None else size for size in shape)]
            for name, shape in self.condition_shapes.items()
        }
        return {name: torch.ones(size, dtype=dtype, device=device) for name, size in sizes.items()}

    def _check_channels(self) -> None:
        inputs, outputs = self.config["in_channels"], self.config["out_channels"] or 0
        if outputs and outputs not in (inputs, 2 * inputs):
            raise ValueError(
                f"this {self.architecture} has {inputs} input and {outputs} output channels, as "
                "for inpainting; expected as many, or twice as many with a learned variance"
            )

    def _configured_size(self) -> int | tuple[int, int]:
        size = self.config.get("sample_size")
        if size is None:
            raise ValueError(
                f"this {self.architecture} does not say its sample_size; give sample_size="
            )
        return size if isinstance(size, int) else (size[0], size[1])

    def _call(self, block: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        """Call a block of a transformer, recomputing it in the backward pass where that is on."""
        if self.recompute and torch.is_grad_enabled():
            return self._recomputing(block, *arguments, **keywords)
        return block(*arguments, **keywords)

    def _recomputing(self, block: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        return checkpoint(
            block, *arguments, use_reentrant=False, context_fn=self.checkpoint_context, **keywords
        )

    def _walk_to_the_last(self, walk: Iterator[tuple[str, Tensor]]) -> list[Tensor]:
        """The features, leaving the walk where the last was met."""
        found: list[Tensor] = []
        while len(found) < len(self.feature_names):
            name, value = next(walk)
            if name in self.feature_names:
                found.append(value)
        return found

    def _raw(self, output: Tensor, model_input: Tensor) -> Tensor:
        """The prediction alone, where the model also predicts a variance."""
        channels = model_input.shape[1]
        if output.shape[1] == channels:
            return output
        return output[:, :channels].clone(memory_format=torch.contiguous_format)

    def _choose(self, features: Sequence[int | str] | None) -> list[str]:
        names = list(self.block_shapes)
        if features is None:
            return self._default_features()
        chosen = set()
        for one in features:
            if isinstance(one, int) and -len(names) <= one < len(names):
                chosen.add(names[one])
            elif one in names:
                chosen.add(one)
            else:
                raise ValueError(
                    f"features has {one!r}, but this {self.architecture} has {len(names)} blocks, "
                    f"{names[0]} to {names[-1]}; give names or indices of them"
                )
        if not chosen:
            raise ValueError("features is empty; expected at least one block")
        return [name for name in names if name in chosen]


class TransformerAdapter(Adapter):
    """What the transformers share: patches of the image as tokens [B, N, C]."""

    @property
    def patch(self) -> int:
        """Width of a patch in pixels of a sample."""
        return self.config["patch_size"]

    @property
    def tokens(self) -> int:
        height, width = self._grid(self.sample_shape)
        return height * width

    @property
    def block_shapes(self) -> dict[str, tuple[int, int, int]]:
        shape = (self.model.inner_dim, *self._grid(self.sample_shape))
        return dict.fromkeys(self._block_names(), shape)

    def _block_names(self) -> list[str]:
        return [f"transformer_blocks.{k}" for k in range(len(self.model.transformer_blocks))]

    def _default_features(self) -> list[str]:
        """The last blocks of the first three quarters of the depth."""
        names = self._block_names()
        return [names[k] for k in sorted({max(len(names) * q // 4 - 1, 0) for q in (1, 2, 3)})]

    def _sample_channels(self) -> int:
        return self.config["in_channels"]

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[-2] // self.patch, shape[-1] // self.patch

    def _as_map(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, C] as a map [B, C, H, W]."""
        return hidden.transpose(1, 2).unflatten(2, grid)

    def _unpatchify(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches [B, N, P * P * C] as an image [B, C, H, W]."""
        patches = hidden.unflatten(2, (self.patch, self.patch, self.model.out_channels))
        patches = patches.unflatten(1, grid)  # [B, h, w, p, q, C]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def needs_text_encoder(architecture: str) -> ValueError:
    """What to say where the empty prompt is not zeros."""
    return ValueError(
        f"the unconditional input of {architecture} is the text encoder's embedding of the empty "
        "prompt, which the model does not hold; give it with the data"
    )


def like(value: Tensor, model_input: Tensor) -> Tensor:
    """An embedding in the dtype that the model computes in."""
    return value.to(model_input.dtype)


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # type: ignore[assignment]


def _check_labels(condition: Condition, batch: int, architecture: str) -> None:
    if not isinstance(condition, Tensor) or condition.is_floating_point():
        found = condition.dtype if isinstance(condition, Tensor) else type(condition).__name__
        raise ValueError(
            f"the condition of {architecture} is {found}; expected class labels int64 [B]"
        )
    if condition.shape != (batch,):
        raise ValueError(
            f"the class labels have shape {list(condition.shape)}; expected [B] with B = {batch}"
        )


def _fits(value: Tensor, batch: int, shape: Shape) -> bool:
    expected = (batch, *shape)
    return value.ndim == len(expected) and all(
        want is None or have == want for have, want in zip(value.shape, expected, strict=True)
    )


def _text(shape: Shape) -> str:
    return f"[B{''.join(f', {size or chr(84)}' for size in shape)}]"


def _describe(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {_text(shape)}" for name, shape in shapes.items())
