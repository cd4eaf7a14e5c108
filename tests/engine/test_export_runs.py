"""From images to stock diffusers: encode, train, crash, resume, export, the run's own image."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from small_jobs import SMALL, WARMUP
from stock_teachers import TEACHERS, pixels
from test_export import PROMPT, run_cards
from test_job import command

from fastdistill.config import load_recipe
from fastdistill.diffusion import Noise
from fastdistill.engine.drawing import draw
from fastdistill.engine.encode import EncodeSettings, encode
from fastdistill.engine.export import export
from fastdistill.engine.job import Job
from fastdistill.engine.sampling import EVALUATION_STEP
from fastdistill.engine.trainer import Trainer

LORA = ["model.student_lora=2", "model.critic_lora=2"]
RUNS = {
    "sdxl-one": ("sdxl_dmd2_1step", "StableDiffusionXLPipeline", WARMUP),
    "sdxl-four-lora": ("sdxl_dmd2_4step", "StableDiffusionXLPipeline", LORA),
    "sd15": ("sd15_dmd2", "StableDiffusionPipeline", []),
    "pixart": ("pixart_sim", "PixArtAlphaPipeline", []),
    "sd3": ("sd3_medium", "StableDiffusion3Pipeline", []),
    "dit": ("dit_xl2_256", "DiTPipeline", []),
    "edm": ("edm_cifar10", "DDPMPipeline", []),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def make_inputs(kind: str, home: Path) -> list[str]:
    """A teacher's pipeline and encoded captioned images, made once, as overrides of a recipe."""
    teacher, data, source = home / kind / "teacher", home / kind / "data", home / kind / "source"
    pixel = kind == "DDPMPipeline"
    if not teacher.exists():
        source.mkdir(parents=True)
        for k in range(6):
            image = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(k))
            diffusers.utils.numpy_to_pil(image.numpy())[0].save(source / f"{k}.png")
            if not pixel:
                (source / f"{k}.txt").write_text(PROMPT)
        if pixel:
            pixels(teacher, diffusers.EDMEulerScheduler)
        else:
            TEACHERS[kind](teacher)
        if kind != "DiTPipeline":
            settings = EncodeSettings(dtype="float32", size=8 if pixel else None)
            encode(source, data, None if pixel else teacher, settings, say=lambda line: None)
    if kind == "DiTPipeline":
        return [f"teacher={teacher}"]
    given = f"data={{name: encoded, path: {data}}}" if pixel else f"data={data}"
    return [f"teacher={teacher}", given]


def train_with_a_crash(folder: Path, recipe) -> None:
    """A run that ends without warning in the middle of its distillation, and is resumed."""

    class Crash(Exception):
        pass

    update = Trainer.update

    def crashing(self):
        if self.stage == "distill" and self.step == 4:
            raise Crash
        update(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", crashing)
        with pytest.raises(Crash):
            Job.create(folder, recipe, lambda line: None).run()
    Job.open(folder, lambda line: None).run()


@pytest.fixture(scope="module")
def drawn(home):
    """What every run draws, and what stock diffusers draws with its export."""
    expected = {}
    for name, (recipe, kind, more) in RUNS.items():
        run, exported = home / f"{name}-run", home / name
        given = make_inputs(kind, home)
        train_with_a_crash(run, load_recipe(recipe, [*SMALL, *given, *more]))
        export(run, exported)
        label = 0 if kind == "DiTPipeline" else None
        samples, _ = draw(run, 1, seed=7, label=label)
        expected[name] = picture(home / kind / "teacher", samples)
        times = load_recipe(recipe).objective.student_times
        noise, index = Noise(7).at(EVALUATION_STEP), torch.tensor([0])
        streams = "latents", *(f"renoise-{k}" for k in range(1, len(times)))
        noises = {
            f"{k}": noise.normal(stream, index, samples.shape[1:])
            for k, stream in enumerate(streams)
        }
        safetensors.torch.save_file(noises, f"{exported}.noise.safetensors")
    run_cards(*(home / name for name in RUNS))
    return expected


@torch.no_grad()
def picture(teacher: Path, samples: torch.Tensor) -> torch.Tensor:
    """An image [3, H, W] of one sample, by the teacher's VAE where it has one."""
    if (teacher / "vae").is_dir():
        vae = diffusers.AutoencoderKL.from_pretrained(teacher, subfolder="vae")
        shift = vae.config.shift_factor or 0
        samples = vae.decode(samples / vae.config.scaling_factor + shift).sample
    return (samples[0] / 2 + 0.5).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_stock_diffusers_draws_what_the_run_draws(home, drawn, name):
    found = safetensors.torch.load_file(home / f"{name}.image.safetensors")["image"]
    exact = 2e-5 if name == "edm" else 5e-6  # Euler's step from sigma = 80 rounds what it subtracts
    torch.testing.assert_close(found, drawn[name], rtol=0, atol=exact)
    card = (home / name / "README.md").read_text()
    assert "| evaluations_student |" in card
    assert "## Recipe" in card


@pytest.mark.slow
def test_the_command_exports_and_says_where(home, drawn, tmp_path):
    done = command("export", home / "dit-run", "--to", tmp_path / "dit")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'dit'} holds the student" in done.stdout
    (weights,) = (tmp_path / "dit" / "transformer").glob("*.safetensors")
    assert weights.read_bytes() == (home / "dit" / "transformer" / weights.name).read_bytes()
    again = command("export", home / "dit-run", "--to", tmp_path / "dit")
    assert again.returncode == 1
    assert "exists; choose another folder, or remove it first" in again.stderr


def test_a_run_of_digits_is_refused(tmp_path):
    from small import small_recipe

    run = tmp_path / "run"
    Job.create(run, small_recipe(), lambda line: None).run()
    with pytest.raises(ValueError, match="DigitsNetwork, not an adapter of a diffusers model"):
        export(run, tmp_path / "exported")
    with pytest.raises(ValueError, match="has no student/ yet; finish it with `fastdistill resume"):
        export(tmp_path, tmp_path / "exported")
