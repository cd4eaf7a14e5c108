"""Every recipe that ships, end to end on a small teacher of its kind, and its wrong uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small_teachers
import torch
from small_jobs import RECIPES as KINDS
from small_jobs import overrides, small_job

from fastdistill.config import RECIPES, RecipeError, load_recipe
from fastdistill.diffusion import VP
from fastdistill.engine import judge
from fastdistill.engine.drawing import draw
from fastdistill.engine.job import Job
from fastdistill.engine.pairs import PairData
from fastdistill.engine.roles import make_objective
from fastdistill.engine.saved import load_denoiser
from fastdistill.engine.shards import read_tensors
from fastdistill.models.configs import model_configuration
from fastdistill.models.pretrained import load_pretrained
from fastdistill.parallel import Ranks


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    """Where small teachers and their data are made as they are needed."""
    return tmp_path_factory.mktemp("teachers")


def run(folder: Path, recipe) -> dict:
    return Job.create(folder, recipe, lambda line: None).run()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_recipe_is_run_here():
    shipped = {path.stem for path in RECIPES.glob("*.yaml")} - {
        "digits",
        "mixture_2d",
        "mixture_64d",
    }
    assert shipped == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_runs_from_teacher_to_student(name, teachers, tmp_path, monkeypatch):
    """The saved student, which needs no teacher's folder, draws what the run's own student drew."""
    drawn = []
    original = judge.Judge.student_samples
    monkeypatch.setattr(
        judge.Judge,
        "student_samples",
        lambda self, *arguments: drawn.append(original(self, *arguments)) or drawn[-1],
    )
    folder = tmp_path / "run"
    summary = run(folder, small_job(name, teachers))
    assert summary["evaluations_student"] == len(load_recipe(name).objective.student_times)
    for file in ("grid.png", "report.html", "summary.json", "samples/distill-000000006.png"):
        assert (folder / file).stat().st_size > 0
    distilled = [row for row in rows(folder) if row["stage"] == "distill"]
    assert [row["step"] for row in distilled] == [3, 6]
    assert all(row["student/skipped"] == 0.0 and row["critic/loss"] > 0 for row in distilled)

    job = Job.open(folder, lambda line: None)
    student = load_denoiser(folder / "student")
    assert student.description.times == job.recipe.objective.student_times
    assert torch.equal(job.judge.student_samples(student.denoiser, 4), drawn[-2])
    teacher = load_pretrained(teachers / KINDS[name]).denoiser
    moved = [
        not torch.equal(value, teacher.network.state_dict()[key])
        for key, value in student.denoiser.network.state_dict().items()
    ]
    assert sum(moved) > len(moved) / 2, "the student is trained"


def test_recipes_are_of_published_models_and_of_times_that_schedulers_know():
    """diffusers' samplers of DDPM's process take whole timesteps."""
    for name in KINDS:
        recipe = load_recipe(name)
        model_configuration(recipe.model.config)
        if isinstance(recipe.process, VP):
            assert all(t == int(t) >= 1 for t in recipe.objective.student_times), name


@pytest.mark.parametrize("name", ["sdxl_dmd2_4step", "dit_xl2_256", "sd3_medium"])
def test_accelerated_layers_leave_a_job_what_it_was(name, teachers, tmp_path):
    """In float32 to rounding, and the weights keep their names."""
    short = ("training.steps=2", "training.log_every=1", "training.student.eps=1.0e-3")
    for switch in ("false", "true"):
        run(tmp_path / switch, small_job(name, teachers, *short, f"training.accelerate={switch}"))
    for plain, fast in zip(rows(tmp_path / "false"), rows(tmp_path / "true"), strict=True):
        for key in {"student/loss", "critic/loss"} & plain.keys():
            assert fast[key] == pytest.approx(plain[key], rel=1e-4), key
    saved = [load_denoiser(tmp_path / switch / "student").denoiser for switch in ("false", "true")]
    plain, fast = (value.network.state_dict() for value in saved)
    assert plain.keys() == fast.keys()


LORA = ["model.student_lora=2", "model.critic_lora=3", "training.precision=bfloat16"]


@pytest.fixture(scope="module")
def low_rank(teachers, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    run(folder, small_job("sdxl_dmd2_4step", teachers, *LORA))
    return folder


def test_low_rank_roles_share_one_set_of_base_weights(teachers, tmp_path):
    job = Job.create(tmp_path / "run", small_job("sdxl_dmd2_4step", teachers, *LORA), print)
    objective = make_objective(job.recipe, job._take_teacher())
    base = {value.data_ptr() for value in objective.teacher.parameters()}
    frozen = [value for value in objective.student.parameters() if not value.requires_grad]
    assert len(frozen) == len(base)
    assert {value.data_ptr() for value in frozen} == base
    assert all(value.requires_grad for value in objective.critic.parameters())
    trained = {value.data_ptr() for value in objective.critic.parameters()}
    assert not trained & base


def test_a_low_rank_student_is_saved_whole_and_checkpointed_without_its_base(low_rank, teachers):
    student = load_denoiser(low_rank / "student")
    assert student.description.model.lora == 2
    assert Job.open(low_rank, lambda line: None).evaluate()["evaluations_student"] == 4
    [newest] = sorted((low_rank / "checkpoints").glob("distill-*06"))
    kept = read_tensors(newest, "networks")
    assert kept
    assert all("lora_" in name or "updates" in name or "heads" in name for name in kept)


def test_a_low_rank_run_resumes_bitwise(low_rank, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(low_rank, folder)
    shutil.rmtree(folder / "checkpoints" / "distill-000000006")
    Job.open(folder, lambda line: None).run()
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (folder / name).read_bytes() == (low_rank / name).read_bytes(), name


def test_a_student_starts_where_another_run_ended(low_rank, teachers, tmp_path):
    start = [*LORA, f"start={low_rank / 'student'}"]
    job = Job.create(tmp_path / "run", small_job("sdxl_dmd2_4step", teachers, *start), print)
    student = make_objective(job.recipe, job._take_teacher(), Path(job.recipe.start)).student
    saved = load_denoiser(low_rank / "student").denoiser.network.state_dict()
    for name, value in student.network.state_dict().items():
        assert torch.equal(value.float(), saved[name]), name
    with pytest.raises(ValueError, match="those of another network"):
        run(tmp_path / "full", small_job("sdxl_dmd2_4step", teachers, start[-1]))


def test_samples_follow_the_prompts_in_their_order(low_rank, teachers):
    """More than there are begin anew; another seed is another noise."""
    samples, _ = draw(low_rank, small_teachers.ROWS + 1)
    assert torch.isfinite(samples).all()
    again, _ = draw(low_rank, 3, data=teachers / "sdxl-data", batch=2)
    torch.testing.assert_close(again, samples[:3], rtol=1e-4, atol=1e-4)
    other, _ = draw(low_rank, 3, seed=1)
    assert not torch.allclose(other, samples[:3], atol=1e-2)
    with pytest.raises(ValueError, match="--label is 0; expected none: no classes"):
        draw(low_rank, 1, label=0)


def pairs(teachers: Path, folder: Path) -> tuple[PairData, Job]:
    job = Job.create(folder, small_job("sdxl_dmd2_1step", teachers), lambda line: None)
    return job._pairs(job.recipe.warmup), job


def test_pairs_are_the_teachers_trajectories_of_noise_that_is_not_stored(teachers, tmp_path):
    made, job = pairs(teachers, tmp_path / "run")
    teacher = job._take_teacher()
    made.make(teacher, 3, 2.0, Ranks(), lambda line: None)
    assert made.batches == 3  # ten pairs in batches of four
    batch = made.read(1)
    assert batch.samples.shape == (4, 2, 4, 8, 8)
    given = made.data.batch(job.recipe.seed, 1, 4)
    assert torch.equal(batch.condition["text_embeds"], given.condition["text_embeds"])

    alone = PairData(tmp_path / "other", made.data, made.seed, 4, 3, torch.device("cpu"))
    alone.make(teacher, 3, 2.0, Ranks(), lambda line: None)
    assert torch.equal(alone.read(1).samples, batch.samples)
    noise = torch.cat([made.read(number).samples[:, 0] for number in range(3)])
    assert len({float(value) for value in noise[:, 0, 0, 0]}) == 12, "each pair has its own"
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)

    file = made._file(2)
    before = file.read_bytes()
    file.write_bytes(before[:-10])
    (made._file(0)).unlink()
    made.make(teacher, 3, 2.0, Ranks(), lambda line: None)
    assert file.read_bytes() == before, "what is damaged or missing is made again"


def test_a_share_of_pairs_is_a_slice_of_the_batch(teachers, tmp_path):
    made, job = pairs(teachers, tmp_path / "run")
    made.make(job._take_teacher(), 2, 1.0, Ranks(), lambda line: None)
    whole, half = made.batch(5, 7, 4), made.batch(5, 7, 4, slice(2, 4))
    assert torch.equal(half.samples, whole.samples[2:])
    assert torch.equal(half.condition["text_embeds"], whole.condition["text_embeds"][2:])


def test_a_warm_up_brings_the_student_to_the_teachers_solutions(teachers, tmp_path):
    folder = tmp_path / "run"
    more = ["warmup.training.steps=60", "warmup.pairs=4", "warmup.training.checkpoint_every=60"]
    more += ["warmup.training.log_every=20", "warmup.training.student.lr=1.0e-2"]
    run(folder, small_job("sdxl_dmd2_1step", teachers, *more, "training.steps=2"))
    losses = [row["student/loss"] for row in rows(folder) if row["stage"] == "warmup"]
    assert losses[-1] < 0.5 * losses[0]
    first = next(row for row in rows(folder) if row["stage"] == "distill")
    assert first["student/skipped"] == 0.0
    warm, student = (load_denoiser(folder / name).denoiser for name in ("warmup", "student"))
    apart = [
        float((a - b).detach().abs().max())
        for a, b in zip(warm.parameters(), student.parameters(), strict=True)
    ]
    assert max(apart) < 0.05, "the distillation starts at the warmed-up student"


def test_latents_are_decoded_by_the_pipelines_vae_or_said_not_to_be(teachers, tmp_path):
    for name, note in (("sdxl_dmd2_4step", ""), ("pixart_sim", "no VAE")):
        job = Job.create(tmp_path / name, small_job(name, teachers), lambda line: None)
        pictures = job.judge.scores.pictures(torch.randn(3, 4, 8, 8))
        side = 16 if name == "sdxl_dmd2_4step" else 8
        assert pictures.shape == (3, 3, side, side)
        assert note in job.judge.scores.pictures.note


def refused(name: str, teachers: Path, folder: Path, *more: str) -> str:
    """What a job that cannot run says, having left nothing behind."""
    with pytest.raises((RecipeError, ValueError)) as error:
        Job.create(folder, small_job(name, teachers, *more), lambda line: None)
    assert not folder.exists()
    message = str(error.value)
    assert len(message) < 600
    return message


def test_a_teacher_of_another_architecture_is_refused(teachers, tmp_path):
    overrides("sd15_dmd2", teachers)  # makes the teacher
    more = [f"teacher={teachers / 'sd15'}", "model.config=sdxl"]
    message = refused("sdxl_dmd2_4step", teachers, tmp_path / "run", *more)
    assert "the recipe is for sdxl" in message
    overrides("dit_xl2_256", teachers)
    more = [f"teacher={teachers / 'dit'}", "model.config=sdxl"]
    message = refused("sdxl_dmd2_4step", teachers, tmp_path / "run", *more)
    assert "has _class_name DiTTransformer2DModel, but the recipe is for sdxl" in message


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("sd15_dmd2", "process={name: edm}", "process"),
        ("sd15_dmd2", "parametrisation={name: v}", "parametrisation"),
        ("sd3_medium", "process={name: vp, beta_start: 1, beta_end: 2, spacing: linear}", "flow"),
    ],
)
def test_a_scheduler_that_contradicts_the_recipe_is_refused(
    name, override, message, teachers, tmp_path
):
    found = refused(name, teachers, tmp_path / "run", override)
    assert message in found.lower()
    assert "drop" in found


def test_missing_embeddings_are_named(teachers, tmp_path):
    data = small_teachers.save_data("sdxl", tmp_path / "data", without="text_embeds")
    message = refused("sdxl_dmd2_4step", teachers, tmp_path / "run", f"data={data}")
    assert "has no text_embeds, which the model needs" in message
    message = refused("sdxl_dmd2_4step", teachers, tmp_path / "run", "data.path=null")
    assert "needs data: make a set with `fastdistill encode`" in message
    data = small_teachers.save_data("sdxl", tmp_path / "prompts", samples=False)
    message = refused("sdxl_dmd2_4step", teachers, tmp_path / "run", f"data={data}")
    assert "prompts alone, but real samples are needed" in message


def test_data_of_another_teacher_are_refused(teachers, tmp_path):
    overrides("sd3_medium", teachers)
    message = refused("sd15_dmd2", teachers, tmp_path / "run", f"data={teachers / 'sd3-data'}")
    assert "[16, 8, 8], but the model needs [4, 8, 8]" in message
    message = refused("sd15_dmd2", teachers, tmp_path / "run", "data={name: labels}",
                      "objective.gan_weight=0", "training.discriminator=null")  # fmt: skip
    assert "class-conditional" in message


def test_a_folder_without_a_teacher_is_refused(teachers, tmp_path):
    broken = small_teachers.save_teacher("dit", tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused("dit_xl2_256", teachers, tmp_path / "run", f"teacher={broken}")
    assert "no .safetensors file" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused("dit_xl2_256", teachers, tmp_path / "run", f"teacher={empty}")
    assert "config.json" in message
    message = refused("dit_xl2_256", teachers, tmp_path / "run", "teacher.path=null")
    assert "give teacher=FOLDER" in message


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_is_loaded(teachers, tmp_path):
    ranks = Ranks()
    ranks.size = 3
    recipe = small_job("dit_xl2_256", teachers, f"teacher={tmp_path / 'nowhere'}")
    with pytest.raises(RecipeError, match=r"training\.batch_size is 4, which 3 ranks cannot share"):
        Job.create(tmp_path / "run", recipe, ranks=ranks)


def test_guidance_of_a_network_without_a_null_class_is_refused(teachers, tmp_path):
    message = refused("edm_imagenet64", teachers, tmp_path / "run", "objective.guidance_scale=2")
    assert "null" in message
