"""`fastdistill.Trainer`: every way to give it a teacher and data, and what it does with them."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from stock_teachers import TEACHERS
from torch.utils.data import DataLoader, Dataset

import fastdistill
from fastdistill.config import OptimizerSettings, TrainingSettings
from fastdistill.diffusion import VP, Epsilon, Uniform
from fastdistill.models import Denoiser
from fastdistill.models.lora import add_lora
from fastdistill.models.pretrained import load_pretrained
from fastdistill.objectives import DistributionMatching

SMALL = {"steps": 10, "batch_size": 4, "lr": 1e-4, "device": "cpu"}


def labelled(count=12, classes=5):
    """Latents and labels of fewer classes than the teacher has."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    return latents, torch.arange(count) % classes


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit") / "teacher"
    TEACHERS["DiTPipeline"](folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "teacher"
    TEACHERS["StableDiffusionXLPipeline"](folder)
    return folder


def test_five_lines_train_sample_and_export(dit, tmp_path):
    trainer = fastdistill.Trainer(dit, "dmd2", labelled(), output=tmp_path / "run", **SMALL)
    before = trainer.student
    trainer.fit()
    samples = trainer.sample(3)
    trainer.export(tmp_path / "student")

    assert samples.shape == (3, 4, 8, 8)
    assert samples.isfinite().all()
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before.parameters(), trainer.student.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2, "the averaged student moved"
    assert trainer.loop.student_updates == 2
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 10
    exported = diffusers.DiTPipeline.from_pretrained(tmp_path / "student").transformer
    student = trainer.student.network.model.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in exported.state_dict().items())
    card = (tmp_path / "student" / "README.md").read_text()
    assert "gan_weight: 0.001" in card
    assert "student/score_gap" in card


def test_a_second_start_in_the_same_folder_continues(dit, tmp_path):
    """And ends with the bits of the run that was not interrupted."""

    def trainer(folder):
        settings = TrainingSettings(
            steps=6,
            batch_size=4,
            critic_updates_per_student_update=2,
            checkpoint_every=2,
            student=OptimizerSettings(lr=1e-3),
            critic=OptimizerSettings(lr=1e-3),
        )
        return fastdistill.Trainer(
            *(dit, "dmd", labelled()), settings=settings, output=folder, device="cpu"
        )

    whole = trainer(tmp_path / "whole").fit()
    first = trainer(tmp_path / "stopped")
    for _ in range(4):
        first.loop.update()
    first.loop.before_checkpoint = lambda: {"metrics_bytes": 0}
    first.loop.save()
    first.loop.checkpoints.wait()
    said = []
    second = trainer(tmp_path / "stopped")
    second.say = said.append
    second.fit()
    assert said[0] == "continuing at step 4"
    for one, other in zip(whole.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_teacher_is_a_folder_a_pipeline_a_pair_or_a_denoiser(dit):
    pipe = diffusers.DiTPipeline.from_pretrained(dit)
    loaded = load_pretrained(dit).denoiser
    teachers = [dit, str(dit), pipe, (pipe.transformer, pipe.scheduler), loaded]
    draws = []
    for teacher in teachers:
        trainer = fastdistill.Trainer(teacher, "dmd", labelled(), **SMALL)
        assert trainer.teacher.process == loaded.process
        assert trainer.student_times == [999.0]
        draws.append(trainer.sample(2, torch.tensor([1, 2])))
    assert all(torch.equal(draws[0], draw) for draw in draws)
    with pytest.raises(ValueError, match="nobody said where the teacher's pipeline is"):
        trainer.export("anywhere")


class Items(Dataset):
    """What a diffusers training script has: dicts with pixel_values and what belongs to them."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return self.make(row)


def test_data_are_tensors_datasets_loaders_or_folders(dit, tmp_path):
    latents, labels = labelled()
    items = Items(lambda row: {"latents": latents[row], "labels": labels[row]})
    pairs = Items(lambda row: (latents[row], labels[row]))
    batches = []
    for data in ((latents, labels), items, DataLoader(items, batch_size=3), pairs):
        trainer = fastdistill.Trainer(dit, "dmd2", data, guidance_scale=2.0, **SMALL)
        found = trainer.data.batch(0, 5, 6)
        assert (found.uncondition == 1000).all(), "the teacher's null class, not the data's"
        batches.append(found)
        trainer.loop.update()
    for other in batches[1:]:
        assert torch.equal(batches[0].samples, other.samples)
        assert torch.equal(batches[0].condition, other.condition)


def prompt(row):
    generator = torch.Generator().manual_seed(row)
    return {
        "encoder_hidden_states": torch.randn(16, 64, generator=generator),
        "text_embeds": torch.randn(32, generator=generator),
        "time_ids": torch.tensor([16.0, 16, 0, 0, 16, 16]),
    }


def test_prompts_alone_train_sdxl_with_guidance(sdxl):
    """Embeddings without samples; the network's own zeros are the null condition, sizes kept."""

    options = {"guidance_scale": 7.5, "student_times": (399.0,), **SMALL}
    trainer = fastdistill.Trainer(sdxl, "dmd", Items(prompt), **options)
    batch = trainer.data.batch(0, 0, 2)
    assert batch.samples is None
    assert not batch.uncondition["text_embeds"].any()
    assert torch.equal(batch.uncondition["time_ids"], batch.condition["time_ids"])
    trainer.fit()
    assert trainer.sample(2).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="learns from real samples: give some, or choose a data-"):
        fastdistill.Trainer(sdxl, "dmd2", Items(prompt), **options)
    given = {"encoder_hidden_states": torch.ones(1, 16, 64), "text_embeds": torch.ones(1, 32)}
    trainer = fastdistill.Trainer(sdxl, "dmd", Items(prompt), uncondition=given, **options)
    uncondition = trainer.data.batch(0, 0, 2).uncondition
    assert (uncondition["text_embeds"] == 1).all()
    assert (uncondition["time_ids"][:, 0] == 16).all()


@pytest.mark.parametrize("name", ["diff-instruct", "dmd", "dmd2", "f-distill"])
def test_every_objective_by_name_trains(dit, name):
    trainer = fastdistill.Trainer(dit, name, labelled(), **SMALL | {"steps": 5})
    assert trainer.fit().sample(1).isfinite().all()


def test_every_part_can_be_replaced(dit):
    loaded = load_pretrained(dit).denoiser
    student, critic = (load_pretrained(dit).denoiser.requires_grad_(True).train() for _ in range(2))
    law = Uniform(0.1, 0.5)
    own = fastdistill.Trainer(
        *(dit, "diff-instruct", labelled()),
        student=student,
        critic=critic,
        matching_law=law,
        student_times=(900.0, 400.0),
        **SMALL,
    )
    assert own.objective.student is student
    assert own.objective.critic is critic
    assert own.objective.matching_law is own.objective.critic_law is law
    assert own.objective.settings.normalise is False
    assert own.student_times == own.objective.student_times == [900.0, 400.0]
    objective = DistributionMatching(student, loaded, critic, (900.0, 400.0), law, law)
    whole = fastdistill.Trainer(dit, objective, labelled(), **SMALL)
    assert whole.objective is objective
    assert whole.student_times == [900.0, 400.0]


def test_a_student_with_lora_layers_is_whole_afterwards(sdxl, tmp_path):
    student = load_pretrained(sdxl).denoiser
    add_lora(student.network, rank=2)
    prompts = Items(prompt)
    trainer = fastdistill.Trainer(sdxl, "dmd", prompts, student=student.train(), **SMALL).fit()
    made = trainer.student.network.model.state_dict()
    teacher = trainer.teacher.network.model.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in teacher.items() if name in made)
    assert any(value.any() for name, value in made.items() if "lora_B" in name)
    trainer.export(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_bfloat16_computes_low_and_keeps_high(dit):
    settings = TrainingSettings(
        steps=2,
        batch_size=2,
        precision="bfloat16",
        student=OptimizerSettings(lr=1e-4),
        critic=OptimizerSettings(lr=1e-4),
    )
    trainer = fastdistill.Trainer(dit, "dmd", labelled(), settings=settings, device="cpu").fit()
    assert trainer.objective.teacher.input_dtype == torch.bfloat16
    assert {value.dtype for value in trainer.student.parameters()} == {torch.float32}
    assert trainer.sample(1).dtype == torch.float32


class Network(torch.nn.Module):
    def forward(self, model_input, noise_condition, condition):
        return model_input


WRONG = [
    ({"objective": "dmd3"}, "objective is 'dmd3'; expected one of distribution_matching, diff_in"),
    ({"guidance": 3}, "guidance is no option of Trainer; options of the objective are critic_a"),
    ({"data": None}, "data is missing"),
    ({"data": 3}, "data is a int; expected a folder, a tensor of samples"),
    ({"data": torch.zeros(4, 3, 8, 8)}, r"samples have shape \[3, 8, 8\]; the teacher's have \[4"),
    ({"data": torch.zeros(4, 4, 8, 8)}, "condition of DiTTransformer2DModel is NoneType; expected"),
    ({"data": Items(lambda row: {"text": "a cat"})}, "text of the dataset's items is no tensor"),
    ({"data": Items(lambda row: [1, 2, 3])}, "an item of the dataset is a list; expected a sample"),
    ({"teacher": 3}, "teacher is a int; expected a pipeline of diffusers"),
    ({"teacher": (Network(), None)}, "no model of diffusers with its scheduler; give a Denoiser"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG)
def test_each_wrong_use_is_one_sentence(dit, wrong, sentence):
    right = {"teacher": dit, "objective": "dmd", "data": labelled(), **SMALL}
    with pytest.raises(ValueError, match=sentence):
        fastdistill.Trainer(**right | wrong)


def test_an_objective_brings_its_own_numbers(dit):
    trainer = fastdistill.Trainer(dit, "dmd", labelled(), **SMALL)
    with pytest.raises(ValueError, match="objective has its own networks, laws and numbers"):
        fastdistill.Trainer(dit, trainer.objective, labelled(), guidance_scale=2.0, **SMALL)


def test_a_plain_network_needs_no_diffusers():
    code = (
        "import sys, torch, fastdistill\n"
        "from fastdistill.diffusion import EDM, EDMPreconditioning\n"
        "class Network(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(2, 2)\n"
        "    def forward(self, model_input, noise_condition, condition):\n"
        "        return self.layer(model_input)\n"
        "teacher = fastdistill.Denoiser(Network(), EDM(), EDMPreconditioning())\n"
        "trainer = fastdistill.Trainer(teacher, 'dmd', torch.randn(64, 2), steps=5, device='cpu')\n"
        "assert trainer.fit().sample(7).shape == (7, 2)\n"
        "assert 'diffusers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_network_that_was_not_saved_by_diffusers_is_not_exported(tmp_path):
    teacher = Denoiser(torch.nn.Linear(2, 2), VP.dit(), Epsilon())
    with pytest.raises(ValueError, match="Linear, not an adapter of a diffusers model"):
        fastdistill.engine.export.export_pipeline(teacher, [999.0], None, tmp_path / "exported")
