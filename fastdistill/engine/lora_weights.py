"""LoRA weights inside a diffusers model: merged into it, or saved as diffusers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdistill.engine.stock_pipeline import StockPipeline


def has_lora(model: nn.Module) -> bool:
    """Whether peft has put LoRA layers into the model."""
    return bool(getattr(model, "peft_config", None))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it was before LoRA layers, with their updates added."""
    if not has_lora(model):
        return model.state_dict()
    from peft.tuners.lora import LoraLayer

    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    state = {}
    for name, value in model.state_dict().items():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner not in layers:
            state[name] = value
        elif rest == "weight":
            state[f"{owner}.weight"] = value + _update(layers[owner])
        else:
            state[f"{owner}.{rest}"] = value
    return {name: value for name, value in state.items() if ".lora_" not in name}


def _update(layer: Any) -> Tensor:
    """What a LoRA layer adds to its weight."""
    deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
    return sum(deltas[1:], deltas[0]).detach()


def save_lora(model: Any, pipeline: StockPipeline, folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors``, which the pipeline's load_lora_weights reads.

    Raises:
        ValueError: for a model with several adapters.
    """
    import diffusers
    from peft import get_peft_model_state_dict

    if len(model.peft_config) != 1:
        raise ValueError(f"the student has {len(model.peft_config)} LoRA adapters; expected one")
    (adapter,) = model.peft_config
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    weights = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    place = pipeline.component
    options = {
        f"{place}_lora_layers": weights,
        f"{place}_lora_adapter_metadata": model.peft_config[adapter].to_dict(),
    }
    getattr(diffusers, pipeline.name).save_lora_weights(folder, **options)
