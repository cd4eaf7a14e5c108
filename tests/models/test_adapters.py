"""Adapters: the diffusers model's own output, features with as little graph as needed."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from tiny_models import CONFIGS, FAMILIES, condition_of, tiny_adapter, tiny_model
from torch import Tensor, nn

from fastdistill.models.adapters import ADAPTERS, CallableAdapter, adapt, build_network
from fastdistill.objectives import Discriminator

TIMES = torch.tensor([0.0, 531.0])


def call(family: str, **changes):
    """An adapter and arguments for it."""
    adapter = tiny_adapter(family, **changes)
    x = torch.randn(2, *adapter.sample_shape, generator=torch.Generator().manual_seed(2))
    return adapter, (x, TIMES, condition_of(adapter))


def diffusers_call(family: str, model: nn.Module, x: Tensor, t: Tensor, condition) -> Tensor:
    """What the family's pipeline calls, written out."""
    if family == "dit":
        return model(x, timestep=t, class_labels=condition).sample[:, :4]
    if family == "unet":
        return model(x, t).sample
    if family in ("pixart", "pixart_sized"):
        sizes = {name: condition.get(name) for name in ("resolution", "aspect_ratio")}
        output = model(
            x,
            encoder_hidden_states=condition["encoder_hidden_states"],
            encoder_attention_mask=condition["encoder_attention_mask"],
            timestep=t,
            added_cond_kwargs=sizes,
        )
        return output.sample.chunk(2, dim=1)[0]
    if family == "flux":
        pipeline = diffusers.FluxPipeline
        batch, channels, height, width = x.shape
        packed = pipeline._pack_latents(x, batch, channels, height, width)
        places = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", None)
        text = condition["encoder_hidden_states"]
        output = model(
            packed,
            timestep=t / 1000,
            img_ids=places,
            txt_ids=torch.zeros(text.shape[1], 3),
            **condition,
        )
        return pipeline._unpack_latents(output.sample, 8 * height, 8 * width, 8)
    if family == "sdxl":
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        text = condition["encoder_hidden_states"]
        return model(x, t, text, added_cond_kwargs=added).sample
    return model(x, timestep=t, **condition).sample


@pytest.mark.parametrize("family", FAMILIES)
def test_the_raw_output_is_what_the_pipeline_calls(family):
    adapter, arguments = call(family)
    expected = diffusers_call(family, adapter.model.eval(), *arguments)
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(adapter(*arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_can_be_a_feature_and_the_walk_ends_at_the_models_output(family):
    names = list(tiny_adapter(family).block_shapes)
    adapter, arguments = call(family, features=names)
    raw, features = adapter.forward_with_features(*arguments)
    torch.testing.assert_close(raw, adapter(*arguments), rtol=0, atol=0)
    assert [tuple(value.shape[1:]) for value in features] == adapter.feature_shapes
    assert len({tuple(value.flatten().tolist()[:5]) for value in features}) == len(features)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_discriminator_reads_the_default_features(family):
    adapter, (x, t, condition) = call(family)
    x.requires_grad_()
    heads = Discriminator(adapter.feature_shapes)
    heads(adapter.features(x, t, condition)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_past_the_last_feature_has_a_graph_or_is_computed(family):
    adapter, (x, t, condition) = call(family)
    names, calls = list(adapter.block_shapes), []
    for name in names:
        adapter.model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: calls.append((name, torch.is_grad_enabled()))
        )
    last = names.index(adapter.feature_names[-1])
    assert last < len(names) - 1
    adapter.features(x, t, condition)
    assert [name for name, _ in calls] == names[: last + 1]
    calls.clear()
    raw, features = adapter.forward_with_features(x.requires_grad_(), t, condition)
    assert calls == [(name, k <= last) for k, name in enumerate(names)]
    assert not raw.requires_grad
    assert features[-1].requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_one_pass_gives_output_and_features_with_a_graph_if_asked(name):
    """As for a critic whose loss and whose features are trained by one pass."""
    adapter, arguments = call(name)
    raw, features = adapter.forward_with_features(*arguments, output_graph=True)
    assert raw.requires_grad
    assert all(value.requires_grad for value in features)
    expected, own = adapter(*arguments), adapter.features(*arguments)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(features, own)
    weights = [value for value in adapter.parameters() if value.requires_grad]
    both = torch.autograd.grad([raw.sum(), features[0].sum()], weights, allow_unused=True)
    apart = torch.autograd.grad([expected.sum(), own[0].sum()], weights, allow_unused=True)
    for mine, theirs in zip(both, apart, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_without_a_graph_wanted_features_have_none():
    adapter, arguments = call("dit")
    with torch.no_grad():
        _, features = adapter.forward_with_features(*arguments)
    assert not features[0].requires_grad


def test_features_are_chosen_by_name_or_index():
    adapter = tiny_adapter("sdxl", features=["up_blocks.0", 0, -3])
    assert adapter.feature_names == ["down_blocks.0", "mid_block", "up_blocks.0"]
    with pytest.raises(ValueError, match="features has 'mid', but this UNet2DConditionModel has 5"):
        tiny_adapter("sdxl", features=["mid"])


def test_a_map_holds_each_token_at_its_place():
    adapter = tiny_adapter("dit")
    hidden = torch.arange(2 * 3 * 5.0).reshape(1, 6, 5)
    found = adapter._as_map(hidden, (2, 3))
    assert found.shape == (1, 5, 2, 3)
    assert torch.equal(found[0, :, 1, 0], hidden[0, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_draws_no_random_number(family):
    adapter, arguments = call(family)
    state = torch.get_rng_state()
    expected = adapter.eval()(*arguments)
    torch.testing.assert_close(adapter.train()(*arguments), expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_rebuilt_from_its_configuration_on_the_meta_device(family):
    adapter = tiny_adapter(family)
    config = json.loads(adapter.model.to_json_string())
    size = 8 if family == "flux" else None
    with torch.device("meta"):
        built = build_network(config, sample_size=size)
    assert next(built.parameters()).is_meta
    assert built.feature_shapes == adapter.feature_shapes
    shapes = {name: value.shape for name, value in adapter.state_dict().items()}
    assert {name: value.shape for name, value in built.state_dict().items()} == shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(family):
    adapter, arguments = call(family)
    gradients, kept = [], []
    for recompute in (False, True):
        twin = copy.deepcopy(adapter)
        if recompute:
            twin.enable_gradient_checkpointing()
        for method in (twin, twin.features):
            saved: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda value, saved=saved: (saved.append(value.numel()), value)[1],
                lambda value: value,
            ):
                outputs = method(*arguments)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            sum(value.square().mean() for value in outputs).backward()
            kept.append(sum(saved))
        gradients.append([parameter.grad for parameter in twin.parameters()])
    assert kept[2] < 0.7 * kept[0]  # the model's own forward
    assert kept[3] < 0.7 * kept[1]  # the walk through its blocks
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_in_float32_reach_a_bfloat16_model(family):
    adapter, (x, t, condition) = call(family)
    adapter.to(torch.bfloat16)
    raw = adapter(x.bfloat16(), t, condition)
    assert raw.dtype == torch.bfloat16
    torch.testing.assert_close(
        adapter.forward_with_features(x.bfloat16(), t, condition)[0], raw, rtol=0, atol=0
    )


def test_sdxls_null_condition_is_zero_embeddings_with_the_same_sizes():
    adapter = tiny_adapter("sdxl")
    condition = condition_of(adapter)
    null = adapter.null_condition(condition)
    assert list(null) == list(condition)
    assert torch.equal(null["time_ids"], condition["time_ids"])
    assert not null["encoder_hidden_states"].any()
    assert not null["text_embeds"].any()
    assert null["encoder_hidden_states"].shape == condition["encoder_hidden_states"].shape


def test_dits_null_condition_is_the_class_after_the_last():
    adapter = tiny_adapter("dit")
    assert adapter.classes == 10
    assert adapter.null_condition(torch.tensor([3, 4])).tolist() == [10, 10]


@pytest.mark.parametrize("family", ["sd15", "pixart", "sd3", "flux"])
def test_other_text_models_ask_for_the_empty_prompts_embedding(family):
    adapter = tiny_adapter(family)
    with pytest.raises(ValueError, match="embedding of the empty prompt"):
        adapter.null_condition(condition_of(adapter))


@pytest.mark.parametrize(
    ("family", "change", "sentence"),
    [
        (
            "sdxl",
            lambda c: c.pop("text_embeds"),
            r"no 'text_embeds', which UNet2DConditionModel needs as \[B, 20\]; it has encoder",
        ),
        (
            "pixart_sized",
            lambda c: c.pop("resolution"),
            r"no 'resolution', which PixArtTransformer2DModel needs as \[B, 2\]",
        ),
        ("flux", lambda c: c.pop("guidance"), r"no 'guidance', .* needs as \[B\]"),
        (
            "sd3",
            lambda c: c.update(pooled_projections=torch.zeros(2, 11)),
            r"'pooled_projections' .* \[2, 11\]; SD3Transformer2DModel expects \[B, 10\]",
        ),
        (
            "sd15",
            lambda c: c.update(encoder_hidden_states=torch.zeros(3, 5, 24)),
            r"\[3, 5, 24\]; UNet2DConditionModel expects \[B, T, 24\] with B = 2",
        ),
        (
            "pixart",
            lambda c: c.update(time_ids=torch.zeros(2, 6)),
            "has 'time_ids', which this PixArtTransformer2DModel does not use",
        ),
    ],
)
def test_a_condition_that_does_not_fit_is_named(family, change, sentence):
    adapter, (x, t, condition) = call(family)
    change(condition)
    for method in (adapter, adapter.features, adapter.forward_with_features):
        with pytest.raises(ValueError, match=sentence):
            method(x, t, condition)


def test_labels_must_be_labels():
    adapter, (x, t, _) = call("dit")
    with pytest.raises(ValueError, match=r"is dict; expected class labels int64 \[B\]"):
        adapter(x, t, {})
    with pytest.raises(ValueError, match=r"shape \[3\]; expected \[B\] with B = 2"):
        adapter(x, t, torch.zeros(3, dtype=torch.int64))
    unconditional, (x, t, _) = call("unet")
    with pytest.raises(ValueError, match="is unconditional; expected None"):
        unconditional(x, t, torch.zeros(2, dtype=torch.int64))


def test_a_unet_with_classes_takes_labels_and_has_no_null_class():
    adapter, (x, t, _) = call("unet", num_class_embeds=7)
    labels = torch.tensor([1, 6])
    expected = adapter.model(x, t, class_labels=labels).sample
    torch.testing.assert_close(adapter(x, t, labels), expected, rtol=0, atol=0)
    assert adapter.classes == 7
    with pytest.raises(ValueError, match="no null class"):
        adapter.null_condition(labels)


@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("sd15", {"class_embed_type": "timestep"}),
        ("unet", {"time_embedding_type": "fourier"}),
    ],
)
def test_options_that_are_not_supported_are_refused(family, option):
    with pytest.raises(ValueError, match=f"has {next(iter(option))} = "):
        adapt(tiny_model(family, **option))


def test_a_model_that_reads_more_than_the_sample_is_refused():
    with pytest.raises(ValueError, match="has 9 input and 4 output channels"):
        adapt(tiny_model("sd15", in_channels=9))


def test_another_architecture_is_refused():
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    with pytest.raises(ValueError, match="no adapter for AutoencoderKL; expected one of UNet2DC"):
        adapt(model)
    with pytest.raises(ValueError, match="_class_name 'SanaTransformer2DModel'; expected one of"):
        build_network({"_class_name": "SanaTransformer2DModel"})


def test_every_family_is_tested():
    assert {name for name, _ in CONFIGS.values()} == set(ADAPTERS)


def test_a_plain_callable_is_a_network_without_features():
    layer = nn.Linear(3, 3)
    network = adapt(lambda x, t, condition: layer(x) * t[:, None])
    assert isinstance(network, CallableAdapter)
    x, t = torch.ones(2, 3), torch.tensor([1.0, 2.0])
    assert torch.equal(network(x, t, None), layer(x) * t[:, None])
    with pytest.raises(ValueError, match="has no features"):
        _ = network.feature_shapes
