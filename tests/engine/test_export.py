"""Exported students: stock diffusers, alone in its process, draws what the run's sampler draws."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from stock_teachers import TEACHERS

from fastdistill.diffusion import (
    EDM,
    VP,
    EDMPreconditioning,
    Epsilon,
    Flow,
    Noise,
    RectifiedFlow,
    V,
    few_step,
)
from fastdistill.engine.export import export_pipeline
from fastdistill.models import Denoiser, lora
from fastdistill.models.pretrained import load_pretrained

PROMPT = "a photograph of a lighthouse"
SD, DIT = VP.stable_diffusion(), VP.dit()
CASES = {
    "sdxl-399": ("StableDiffusionXLPipeline", SD, Epsilon(), [399.0]),
    "sdxl-four": ("StableDiffusionXLPipeline", SD, Epsilon(), [999.0, 749.0, 499.0, 249.0]),
    "sd15-v": ("StableDiffusionPipeline", SD, V(), [999.0]),
    "sd15-uneven": ("StableDiffusionPipeline", SD, Epsilon(), [999.0, 600.0]),
    "dit": ("DiTPipeline", DIT, Epsilon(), [400.0]),
    "dit-two": ("DiTPipeline", DIT, Epsilon(), [799.0, 399.0]),
    "pixart": ("PixArtAlphaPipeline", DIT, Epsilon(), [400.0]),
    "pixart-between": ("PixArtAlphaPipeline", DIT, Epsilon(), [439.82]),
    "sd15-between": ("StableDiffusionPipeline", SD, Epsilon(), [399.5]),
    "pixart-two": ("PixArtAlphaPipeline", DIT, Epsilon(), [999.0, 499.0]),
    "sd3": ("StableDiffusion3Pipeline", RectifiedFlow(3.0), Flow(1000.0), [1.0]),
    "sd3-scaled": ("StableDiffusion3Pipeline", RectifiedFlow(3.0), Flow(1000.0), [0.97]),
    "sd3-four": ("StableDiffusion3Pipeline", RectifiedFlow(), Flow(1000.0), [1.0, 0.9, 0.75, 0.5]),
    "pixels": ("DDPMPipeline", DIT, Epsilon(), [500.0]),
    "pixels-edm": ("DDPMPipeline", EDM(), EDMPreconditioning(), [2.5]),
    "sdxl-lora": ("StableDiffusionXLPipeline", SD, Epsilon(), [399.0]),
    "sdxl-lora-merged": ("StableDiffusionXLPipeline", SD, Epsilon(), [399.0]),
    "flux": ("FluxPipeline", RectifiedFlow(), Flow(1000.0), [1.0]),
    "flux-two": ("FluxPipeline", RectifiedFlow(), Flow(1000.0), [1.0, 0.6]),
    "sd3-lora": ("StableDiffusion3Pipeline", RectifiedFlow(), Flow(1000.0), [1.0]),
    "dit-lora-merged": ("DiTPipeline", DIT, Epsilon(), [400.0]),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder for each pipeline, made when it is first asked for."""
    made = {}

    def teacher(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "teacher"
            TEACHERS[name](made[name])
        return made[name]

    return teacher


def student_of(folder, process, parametrisation):
    """The teacher's model with other weights."""
    sample_size = (8, 8) if "Flux" in folder.parent.name else None
    network = load_pretrained(folder, sample_size=sample_size).denoiser.network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.02)
    return Denoiser(network, process, parametrisation).eval()


def add_lora(student):
    """LoRA layers whose update shows, on the teacher's own weights, with alpha not the rank."""
    model = student.network.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.02)
    lora.add_lora(student.network, rank=4, alpha=10)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    student.eval()


def condition_of(pipe):
    """What the teacher's pipeline makes of the prompt."""
    kind = type(pipe).__name__
    if kind == "DiTPipeline":
        return torch.tensor([0])
    if kind == "DDPMPipeline":
        return None
    asked = {
        "StableDiffusionPipeline": {"device": "cpu", "num_images_per_prompt": 1},
        "StableDiffusion3Pipeline": {"prompt_2": None, "prompt_3": None},
        "FluxPipeline": {"prompt_2": None},
    }.get(kind, {})
    if kind != "FluxPipeline":
        asked["do_classifier_free_guidance"] = False
    encoded = pipe.encode_prompt(PROMPT, **asked)
    condition = {"encoder_hidden_states": encoded[0]}
    if kind == "StableDiffusionXLPipeline":
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
        condition |= {"text_embeds": encoded[2], "time_ids": time_ids}
    if kind == "PixArtAlphaPipeline":
        condition["encoder_attention_mask"] = encoded[1]
    if kind == "StableDiffusion3Pipeline":
        condition["pooled_projections"] = encoded[2]
    if kind == "FluxPipeline":
        condition |= {"pooled_projections": encoded[1], "guidance": torch.tensor([3.5])}
    return condition


@torch.no_grad()
def drawn_by_the_run(student, times, pipe, noise):
    """The image that the student's own sampler draws  # [3, H, W]"""
    condition = condition_of(pipe)
    shape = student.network.sample_shape
    index = torch.tensor([3])

    def denoise(x_t, t):
        return student(x_t, t, condition)

    x = few_step(denoise, student.process, times, noise, index, shape)
    if hasattr(pipe, "vae"):
        config = pipe.vae.config
        x = pipe.vae.decode(x / config.scaling_factor + (config.shift_factor or 0)).sample
    streams = "latents", *(f"renoise-{k}" for k in range(1, len(times)))
    drawn = {f"{k}": noise.normal(stream, index, shape) for k, stream in enumerate(streams)}
    if hasattr(pipe, "_pack_latents"):  # Flux renoises packed latents
        for name in list(drawn)[1:]:
            drawn[name] = pipe._pack_latents(drawn[name], 1, *shape)
    return (x[0] / 2 + 0.5).clamp(0, 1), drawn


@pytest.fixture(scope="module")
def drawn(teachers, tmp_path_factory):
    """Images of every case, drawn by the run and, all in one process, by stock diffusers."""
    home, expected = tmp_path_factory.mktemp("exported"), {}
    for name, (kind, process, parametrisation, times) in CASES.items():
        teacher = teachers(kind)
        student = student_of(teacher, process, parametrisation)
        if "lora" in name:
            add_lora(student)
        options = {"merge_lora": name.endswith("merged")}
        if kind == "FluxPipeline":
            options["guidance"] = 3.5
        export_pipeline(student, times, teacher, home / name, **options)
        pipe = diffusers.DiffusionPipeline.from_pretrained(teacher)
        expected[name], noises = drawn_by_the_run(student, times, pipe, Noise(11))
        safetensors.torch.save_file(noises, f"{home / name}.noise.safetensors")
    run_cards(*(home / name for name in CASES))
    return home, expected


def run_cards(*folders):
    script = Path(__file__).with_name("run_model_cards.py")
    done = subprocess.run(
        [sys.executable, script, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_draws_the_runs_image(drawn, name):
    home, expected = drawn
    found = safetensors.torch.load_file(f"{home / name}.image.safetensors")["image"]
    assert expected[name].std() > 0.05, "an image, not a plane"
    # Between timesteps diffusers finds t from sigma / alpha in float32; merged weights are rounded.
    exact = 2e-5 if name.endswith(("between", "merged")) else 2e-6
    torch.testing.assert_close(found, expected[name], rtol=0, atol=exact)
    assert Path(f"{home / name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_is_whole_and_holds_safetensors_alone(drawn, teachers):
    folder, teacher = drawn[0] / "sdxl-399", teachers("StableDiffusionXLPipeline")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        for file in (teacher / name).iterdir():
            assert (folder / name / file.name).samefile(file), "linked, not copied"
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= {
        *(".json", ".safetensors", ".txt", ".md")
    }
    assert not list(folder.parent.glob(".partial-*"))


def test_a_lora_student_is_a_small_file_beside_the_teacher(drawn):
    folder = drawn[0] / "sdxl-lora"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.*")}
    assert files == {
        *("README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json")
    }
    merged = drawn[0] / "sdxl-lora-merged" / "unet" / "diffusion_pytorch_model.safetensors"
    assert not any("lora" in name for name in safetensors.torch.load_file(merged))
    assert (drawn[1]["sdxl-lora"] - drawn[1]["sdxl-399"]).abs().max() > 0.01, "the update shows"


def test_where_diffusers_loads_no_lora_files_merging_is_asked_for(teachers, tmp_path):
    teacher = teachers("DiTPipeline")
    student = student_of(teacher, DIT, Epsilon())
    add_lora(student)
    with pytest.raises(ValueError, match="DiTPipeline of diffusers loads no LoRA files; merge"):
        export_pipeline(student, [400.0], teacher, tmp_path / "exported")


def test_the_model_card_holds_recipe_and_metrics(teachers, tmp_path):
    teacher = teachers("DiTPipeline")
    student = student_of(teacher, DIT, Epsilon())
    metrics = {"frechet_pixel_student": 0.24512, "samples": 5000}
    folder = export_pipeline(
        student, [400.0], teacher, tmp_path / "dit", recipe="name: dit\nseed: 3\n", metrics=metrics
    )
    card = (folder / "README.md").read_text()
    assert "| frechet_pixel_student | 0.2451 |" in card
    assert "| samples | 5000 |" in card
    assert "```yaml\nname: dit\nseed: 3\n```" in card


def test_weights_of_a_teacher_in_another_precision_alone_are_renamed(teachers, tmp_path):
    """As after ``download(variant="fp16")``; what has plain weights too keeps those."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers("StableDiffusionXLPipeline"), teacher)
    vae, encoder = teacher / "vae", teacher / "text_encoder"
    (vae / "diffusion_pytorch_model.safetensors").rename(
        vae / "diffusion_pytorch_model.fp16.safetensors"
    )
    (encoder / "model.fp16.safetensors").write_bytes(b"half")
    (encoder / "pytorch_model.bin").write_bytes(b"pickle")
    student = student_of(teacher, SD, Epsilon())
    folder = export_pipeline(student, [399.0], teacher, tmp_path / "exported")
    names = {f"{file.parent.name}/{file.name}" for file in folder.rglob("*")}
    assert "vae/diffusion_pytorch_model.safetensors" in names
    assert (folder / "text_encoder" / "model.safetensors").stat().st_size > 1000
    assert "text_encoder/pytorch_model.bin" not in names
    diffusers.DiffusionPipeline.from_pretrained(folder)


def test_each_wrong_use_is_one_sentence(teachers, tmp_path):
    dit, sdxl = teachers("DiTPipeline"), teachers("StableDiffusionXLPipeline")
    student, target = student_of(dit, DIT, Epsilon()), tmp_path / "exported"
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists; choose another folder"):
        export_pipeline(student, [400.0], dit, tmp_path / "there")
    with pytest.raises(
        ValueError, match="without a DiTTransformer2DModel: it is not the student's"
    ):
        export_pipeline(student, [400.0], sdxl, target)
    with pytest.raises(ValueError, match=r"model_index.json is missing"):
        export_pipeline(student, [400.0], dit / "transformer", target)
    with pytest.raises(ValueError, match="is no folder; expected the teacher's pipeline"):
        export_pipeline(student, [400.0], tmp_path / "nowhere", target)
    with pytest.raises(
        ValueError, match="lies between two timesteps, and DiTPipeline of diffusers"
    ):
        export_pipeline(student, [439.82], dit, target)
    with pytest.raises(ValueError, match="DiTPipeline of diffusers takes no timesteps"):
        export_pipeline(student, [999.0, 600.0], dit, target)
    flow = Denoiser(student.network, RectifiedFlow(), Flow(1000.0))
    with pytest.raises(ValueError, match="cannot use FlowMatchEulerDiscreteScheduler"):
        export_pipeline(flow, [1.0], dit, target)
    with pytest.raises(ValueError, match="Linear, not an adapter of a diffusers model"):
        export_pipeline(Denoiser(torch.nn.Linear(1, 1), DIT, Epsilon()), [400.0], dit, target)
    with pytest.raises(
        ValueError, match=r"guidance is 3.5, but this DiTTransformer2DModel is told"
    ):
        export_pipeline(student, [400.0], dit, target, guidance=3.5)
    assert not target.exists()


def test_a_teacher_that_is_not_whole_or_not_safe_is_named(teachers, tmp_path):
    teacher, target = tmp_path / "teacher", tmp_path / "exported"
    shutil.copytree(teachers("DiTPipeline"), teacher)
    student = student_of(teacher, DIT, Epsilon())
    weights = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        ValueError, match=r"diffusion_pytorch_model.bin alone, which is not safeten"
    ):
        export_pipeline(student, [400.0], teacher, target)
    shutil.rmtree(teacher / "vae")
    with pytest.raises(ValueError, match=r"is not whole: model_index.json names vae"):
        export_pipeline(student, [400.0], teacher, target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["teacher"]
