"""LoRA (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x with W frozen.

`add_lora` makes a student, or a critic of its own, of few trained weights, by peft. A
`shared_lora_critic` is a critic on the teacher's own weights: there is one set of them in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.adapters import Adapter
from fastdistill.models.denoiser import Condition, Denoiser

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
"""Ends of the names of the attention projections, of image and text, in diffusers models."""


def add_lora(
    adapter: Adapter,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Freeze a network and add LoRA weights to it through peft, in place.

    The LoRA weights are float32 masters whatever the dtype of the base, and alone trainable. The
    network computes as before until they are trained. Names of weights change as peft changes
    them: ``to_q.weight`` is then ``to_q.base_layer.weight``. Checkpoints leave the base out.

    Args:
        adapter: the network.
        rank: rank of each update.
        alpha: scale of the updates, times rank; ``rank`` if None.
        target_modules: names, or ends of names, of linear and convolution layers; `ATTENTION` if
            None.
        seed: of A; B begins at zero.

    Raises:
        ValueError: for a rank below one, a network that has LoRA weights already, and targets of
            which it has none.
        ImportError: where peft is not installed.
    """
    if adapter.rebuilt:
        raise ValueError("the network has LoRA weights already; merge them first")
    targets = _targets(adapter.model, rank, target_modules)
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets))
    frozen = dict.fromkeys(map(id, adapter.parameters()))
    adapter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, adapter.model)
    names = set()
    for name, parameter in adapter.named_parameters():
        if id(parameter) in frozen:
            names.add(name)
        else:  # peft makes them in the base's dtype
            parameter.data = parameter.data.float()
    adapter.rebuilt = frozenset(names)


def lora_weights(adapter: Adapter) -> dict[str, Tensor]:
    """The LoRA weights by peft's names, as diffusers' ``save_lora_weights`` of a pipeline takes.

    Raises:
        ValueError: for a network without them.
    """
    if not adapter.rebuilt:
        raise ValueError("the network has no LoRA weights; add_lora adds them")
    return _peft().get_peft_model_state_dict(adapter.model)


@torch.no_grad()
def merge_lora(adapter: Adapter) -> None:
    """Add the updates to the base's weights and remove the LoRA layers, in place.

    Names of weights are the diffusers model's again. In a low-precision base the sums are rounded
    to it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(adapter.model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            adapter.model.set_submodule(name, layer.get_base_layer())
    with contextlib.suppress(AttributeError):
        del adapter.model.peft_config
    adapter.rebuilt = frozenset()


def shared_lora_critic(
    teacher: Denoiser,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> Denoiser:
    """A critic that is the teacher's own network with LoRA updates switched on.

    The teacher's weights, state dict and outputs stay what they are. The critic's parameters and
    state dict hold LoRA weights alone, in float32. It begins as the teacher.

    Args:
        teacher: a denoiser whose network is an `Adapter`; it must not be copied or replaced while
            the critic is used.
        rank: rank of each update.
        alpha: scale of the updates, times rank; ``rank`` if None.
        target_modules: names, or ends of names, of linear and convolution layers; `ATTENTION` if
            None.
        seed: of A; B begins at zero.

    Raises:
        ValueError: for a rank below one, and targets that the network has none of.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SharedLora(teacher.network, rank, alpha or rank, target_modules)
    return Denoiser(network, teacher.process, teacher.parametrisation, teacher.input_dtype)


class SharedLora(nn.Module):
    """LoRA updates of another module's network, which is not a part of this one.

    Each target layer adds the update where a switch is on, which it is during this network's calls
    and where activations of those are computed again in the backward pass.

    Args:
        base: the network that is shared.
        rank: rank of each update.
        alpha: scale of the updates, times rank.
        target_modules: names, or ends of names, of layers; `ATTENTION` if None.
    """

    def __init__(
        self, base: Adapter, rank: int, alpha: float, target_modules: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self._base = (base,)  # a tuple: not a registered module
        self._switch = _Switch()
        self.updates = nn.ModuleDict()
        for name in _targets(base.model, rank, target_modules):
            layer = base.model.get_submodule(name)
            update = _Update(layer, rank, alpha / rank)
            self.updates[name.replace(".", "/")] = update
            layer.register_forward_hook(_Hook(update, self._switch))
        base.checkpoint_context = self._switch.contexts

    @property
    def base(self) -> Adapter:
        """The network whose weights are shared."""
        return self._base[0]

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Those of the base."""
        return self.base.feature_shapes

    def forward(self, model_input: Tensor, noise_condition: Tensor, condition: Condition) -> Tensor:
        """Raw output of the base with the updates."""
        with self._switch.set(True):
            return self.base(model_input, noise_condition, condition)

    def features(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition
    ) -> list[Tensor]:
        """The base's features with the updates."""
        with self._switch.set(True):
            return self.base.features(model_input, noise_condition, condition)

    def forward_with_features(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition,
        output_graph: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Raw output, with a graph if asked for, and the features, from one pass."""
        with self._switch.set(True):
            return self.base.forward_with_features(
                model_input, noise_condition, condition, output_graph
            )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the base in backward passes."""
        self.base.enable_gradient_checkpointing()


class _Switch:
    """Whether updates are added."""

    def __init__(self) -> None:
        self.on = False

    @contextlib.contextmanager
    def set(self, on: bool) -> Iterator[None]:
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def contexts(self) -> tuple[Any, Any]:
        """What surrounds a checkpointed forward, and its recomputation: as it is now."""
        return contextlib.nullcontext(), self.set(self.on)


class _Update(nn.Module):
    """The update (alpha / rank) B A of one layer, float32; a convolution's A has its geometry."""

    def __init__(self, layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        place: dict[str, Any] = {"device": layer.weight.device, "bias": False}
        self.down: Any
        self.up: Any
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, **place)
            self.up = nn.Linear(rank, layer.out_features, **place)
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            geometry = ("kernel_size", "stride", "padding", "dilation")
            place |= {name: getattr(layer, name) for name in geometry}
            self.down = nn.Conv2d(layer.in_channels, rank, **place)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, device=place["device"], bias=False)
        else:
            raise ValueError(f"a target is {layer}; expected linear and plain convolution layers")
        nn.init.zeros_(self.up.weight)

    def forward(self, value: Tensor) -> Tensor:
        update = self.up(self.down(value.to(self.down.weight.dtype)))
        return (update * self.scale).to(value.dtype)


class _Hook:
    """A layer's forward hook that adds its update."""

    def __init__(self, update: _Update, switch: _Switch) -> None:
        self.update, self.switch = update, switch

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.update(arguments[0]) if self.switch.on else output


def _targets(model: nn.Module, rank: int, ends: Sequence[str] | None) -> list[str]:
    """Names of the layers that get an update."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1")
    ends = ATTENTION if ends is None else ends
    names = [
        name
        for name, _ in model.named_modules()
        if any(name == end or name.endswith(f".{end}") for end in ends)
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no layer whose name ends in {', '.join(ends)}; choose "
            "others by target_modules="
        )
    return names


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'fastdistill[lora]'") from error
    return peft
