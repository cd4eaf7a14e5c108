"""Loading: what a folder or the Hub holds, and one sentence for each that does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, condition_of, save_pipeline, scheduler_config, tiny_adapter

from fastdistill.diffusion import EDM, VP, Epsilon, RectifiedFlow, V
from fastdistill.models.pretrained import (
    build_network,
    check_agrees,
    load_pretrained,
    parametrisation_of,
    process_of,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipelines_folder_gives_its_network_with_its_scheduler(tmp_path, family):
    size = 8 if family == "flux" else None
    loaded = load_pretrained(save_pipeline(tmp_path, family), sample_size=size)
    expected = tiny_adapter(family)
    network = loaded.denoiser.network
    weights = network.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], v) for name, v in expected.state_dict().items())
    assert loaded.scheduler_config["_class_name"] == scheduler_config(family)["_class_name"]
    assert loaded.denoiser.process == process_of(loaded.scheduler_config, network.tokens)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert str(tmp_path) not in json.dumps(loaded.model_config)
    rebuilt = build_network(loaded.model_config, sample_size=size)
    rebuilt.load_state_dict(weights)
    x = torch.randn(2, *network.sample_shape)
    arguments = x, torch.tensor([0.2, 0.9]), condition_of(network)
    assert torch.equal(rebuilt(*arguments), network(*arguments))


def test_weights_come_in_the_precision_and_with_the_features_asked_for(tmp_path):
    loaded = load_pretrained(
        save_pipeline(tmp_path, "dit"), torch_dtype=torch.bfloat16, features=[-1]
    ).denoiser
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.input_dtype == torch.bfloat16
    assert loaded.network.feature_names == ["transformer_blocks.3"]
    x = torch.randn(2, 4, 8, 8)
    assert loaded(x, torch.tensor([10.0, 900.0]), torch.tensor([1, 2])).dtype == torch.float32


def test_a_models_own_folder_finds_the_scheduler_beside_it_or_is_told(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", "sd3")
    assert load_pretrained(folder / "transformer").denoiser.process == RectifiedFlow(3.0)
    assert load_pretrained(folder, subfolder="transformer").denoiser.process == RectifiedFlow(3.0)
    alone = shutil.copytree(folder / "transformer", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"no scheduler/scheduler_config\.json"):
        load_pretrained(alone)
    told = load_pretrained(alone, scheduler=scheduler_config("sd3"))
    assert told.denoiser.process == RectifiedFlow(3.0)


def test_a_repository_on_the_hub_is_found_by_its_name(tmp_path):
    """In the cache of the Hub's client, in a process that may not ask the Hub itself."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--somebody--tiny-dit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_pipeline(repository / "snapshots" / commit, "dit")
    program = (
        "from fastdistill.models.pretrained import load_pretrained\n"
        "found = load_pretrained('somebody/tiny-dit')\n"
        "print(type(found.denoiser.network).__name__, found.source)\n"
        "try: load_pretrained('somebody/else')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0] == "DiTAdapter somebody/tiny-dit", result.stderr
    assert lines[1].startswith("somebody/else is neither a folder nor a diffusers model that")


def test_a_folder_without_safetensors_is_refused(tmp_path):
    folder = save_pipeline(tmp_path, "dit")
    for file in (folder / "transformer").glob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"no \.safetensors file, and nothing is unpickled"):
        load_pretrained(folder)


def test_what_is_no_known_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; expected a diffusers model"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(ValueError, match="is a SanaTransformer2DModel; expected one of UNet2DC"):
        load_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(ValueError, match="names neither of unet and transformer; expected one"):
        load_pretrained(tmp_path)


def test_a_scheduler_that_contradicts_the_model_is_refused(tmp_path):
    folder = save_pipeline(tmp_path, "sd3")
    config = scheduler_config("sd15")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PNDMScheduler contradicts SD3Transformer2DModel"):
        load_pretrained(folder)


DDPM = {"_class_name": "DDPMScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "_class_name 'ScoreSdeVeScheduler'; expected one"),
        ({}, "_class_name None; expected one of DDIM"),
        (DDPM | {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'; expected linear, scaled"),
        (DDPM | {"trained_betas": [0.1] * 99}, r"trained_betas = \[0.1, .* \.\.\., which is not"),
        (DDPM | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True, which is not"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type = 'continuous', which is not supported",
        ),
        (FLOW | {"use_dynamic_shifting": True}, "depends on the image's size; give tokens="),
        (FLOW | {"shift_terminal": 0.1}, "shift_terminal = 0.1, which is not supported"),
    ],
)
def test_a_process_that_is_not_known_is_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        process_of(config)


@pytest.mark.parametrize(
    ("config", "model", "sentence"),
    [
        (DDPM | {"prediction_type": "noise"}, {}, "prediction_type 'noise'; expected one of eps"),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
            {},
            "prediction_type 'v_prediction'; expected 'epsilon'",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            {},
            "use_flow_sigmas, but prediction_type 'epsilon'; expected 'flow_prediction'",
        ),
        (
            DDPM | {"variance_type": "learned_range"},
            {"_class_name": "DiTTransformer2DModel", "in_channels": 4, "out_channels": 4},
            "has 4 output channels for 4 input channels; expected 8",
        ),
    ],
)
def test_a_parametrisation_that_is_not_known_is_refused(config, model, sentence):
    with pytest.raises(ValueError, match=sentence):
        parametrisation_of(config, model)


def test_what_a_recipe_states_must_be_what_the_scheduler_says():
    for found, stated in [
        (VP.dit(), VP.dit()),
        (VP.dit(), None),
        (EDM(), EDM(sigma_max=700.0)),  # the grid is the recipe's
        (RectifiedFlow(3.0), RectifiedFlow()),
    ]:
        check_agrees("process", found, stated, "teacher")
    for what, found, stated in [
        ("process", VP.dit(), VP.stable_diffusion()),
        ("process", VP.dit(), EDM()),
        ("parametrisation", Epsilon(), V()),
        ("parametrisation", Epsilon(), Epsilon(1000.0)),
    ]:
        with pytest.raises(ValueError, match=f"scheduler of teacher says {what} .* was asked for"):
            check_agrees(what, found, stated, "teacher")
