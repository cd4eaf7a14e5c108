"""The degradation path on disk, and runs of objective backtracking: stages, kills, nodes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import SMALL, small_recipe
from torch import nn

from fastdistill.engine.folder import DamagedFolderError
from fastdistill.engine.job import Job
from fastdistill.engine.nodes import NodeFolder, low_rank
from fastdistill.engine.roles import RunNetworks
from fastdistill.engine.saved import load_denoiser

BACKTRACKING = [
    *SMALL,
    "objective=backtracking",
    "teacher.training.steps=6",
    "training.steps=24",
    "training.sample_every=null",
    "training.checkpoint_every=4",
    "evaluation.samples=100",
    "objective.interval=6",
    "degradation.nodes=3",
    "degradation.training.steps=9",
    "degradation.training.batch_size=16",
    "degradation.training.checkpoint_every=2",
    "degradation.training.log_every=4",
]

_KILLS = """
import sys
from kill_jobs import Death, command
folder, arguments = sys.argv[1], sys.argv[2:]
assert command("train", "digits", *arguments, "-o", folder + "/whole") == [0]
deaths = [Death("degradation", 5), Death("distill", 9)]
for number, death in enumerate(deaths):
    action = ["resume"] if number else ["train", "digits", *arguments, "-o"]
    assert command(*action, folder + "/killed", death=death) == [-9], death
assert command("resume", folder + "/killed") == [0]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run, and the same killed in the degradation and between two nodes of the distillation."""
    folder = tmp_path_factory.mktemp("backtracking")
    done = subprocess.run(
        [sys.executable, "-c", _KILLS, str(folder), *BACKTRACKING],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_killed_in_each_stage_the_run_is_bitwise_the_uninterrupted_one(runs):
    whole, killed = runs / "whole", runs / "killed"
    names = ["metrics.jsonl", "student/model.safetensors", "teacher/model.safetensors"]
    names += [f"nodes/{number:03d}/model.safetensors" for number in range(4)]
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.slow
def test_the_path_begins_at_the_teacher_and_moves_with_every_node(runs):
    folder = runs / "whole"
    nodes = NodeFolder(folder / "nodes", 3)
    teacher = load_denoiser(folder / "teacher").denoiser.network.state_dict()
    found = [nodes.weights(number) for number in range(4)]
    assert all(torch.equal(found[0][name], value) for name, value in teacher.items())
    distances = [sum(float((a[k] - teacher[k]).square().sum()) for k in a) for a in found]
    assert distances == sorted(distances)
    assert distances[1] > 0
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").open()]
    assert list(dict.fromkeys(stages)) == ["teacher", "degradation", "distill"]
    assert "Degradation" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_critic_begins_at_the_last_node_and_the_target_ends_bit_for_bit(runs, precision):
    folder = runs / "whole"
    job = Job.open(folder, lambda line: None)
    training = job.recipe.training.model_copy(update={"precision": precision})
    recipe = job.recipe.model_copy(update={"training": training})
    nodes = NodeFolder(folder / "nodes", 3)
    networks = RunNetworks(recipe, job._take_teacher(), path=nodes)
    before = {k: v.clone() for k, v in networks.teacher.network.state_dict().items()}
    method = recipe.objective.build(networks)
    for name, value in nodes.weights(3).items():
        assert torch.equal(method.critic.network.state_dict()[name], value)
    addresses = [value.data_ptr() for value in method.teacher.network.parameters()]
    for step, node in ((0, 2), (6, 1), (12, 0), (6, 1), (23, 0)):
        method.before_step(step)
        for name, value in nodes.weights(node).items():
            kept = method.teacher.network.state_dict()[name]
            assert torch.equal(kept, value.to(kept.dtype)), (step, name)
    kept_at = [value.data_ptr() for value in method.teacher.network.parameters()]
    assert kept_at == addresses, "a CUDA graph reads where it did"
    after = method.teacher.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_a_run_does_not_go_on_from_a_node_that_is_missing_or_altered(runs, tmp_path):
    for number, (spoil, message) in enumerate(
        (
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "was altered"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(runs / "whole", folder, symlinks=True)
        for checkpoint in (folder / "checkpoints").glob("distill-*"):
            shutil.rmtree(checkpoint)
        path = folder / "nodes" / "001" / "model.safetensors"
        spoil(path)
        with pytest.raises(DamagedFolderError, match=message):
            Job.open(folder, lambda line: None).run()


class Small(nn.Module):
    def __init__(self, rows: int = 12, **more: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(10, rows)
        for name, module in more.items():
            self.add_module(name, module)


def weights_of(seed: int, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return Small(**options).state_dict()


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize("rank", [None, 1])
def test_a_node_of_another_network_is_refused_and_fills_nothing(tmp_path, rank):
    nodes = NodeFolder(tmp_path, 1, rank)
    nodes.save(0, weights_of(0), silent)
    nodes.save(1, weights_of(1), silent)
    for network, message in (
        (Small(13), r"differs body\.(weight|bias)"),
        (Small(tail=nn.Linear(1, 1)), r"lacks tail\.bias and 1 more"),
        (nn.Linear(10, 12), "another network"),
    ):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            nodes.load_(1, network)
        assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_low_rank_differences_of_another_teacher_are_refused(tmp_path):
    nodes = NodeFolder(tmp_path, 1, 1)
    nodes.save(0, weights_of(0, tail=nn.Linear(1, 1)), silent)
    nodes.save(1, weights_of(1, tail=nn.Linear(1, 1)), silent)
    NodeFolder(tmp_path, 1).save(0, weights_of(0), silent)
    with pytest.raises(ValueError, match=r"the teacher has no tail\.bias"):
        nodes.weights(1)


def test_a_node_in_another_ones_place_is_refused(tmp_path):
    nodes = NodeFolder(tmp_path, 2)
    for number in range(3):
        nodes.save(number, weights_of(number), silent)
    (tmp_path / "002").rename(tmp_path / "old")
    (tmp_path / "001").rename(tmp_path / "002")
    with pytest.raises(ValueError, match="is node 1: it was moved"):
        nodes.load_(2, Small())


def test_low_rank_differences_keep_what_their_rank_can(tmp_path):
    """A difference of rank two is kept by rank two, and by rank one as its largest part."""
    base = {"w": torch.randn(40, 5, 6), "b": torch.randn(40), "tiny": torch.randn(2, 2)}
    left, right = torch.linalg.qr(torch.randn(40, 2))[0], torch.linalg.qr(torch.randn(30, 2))[0]
    delta = (left * torch.tensor([3.0, 1.0])) @ right.T
    new = {"w": base["w"] + delta.reshape(40, 5, 6), "b": base["b"] + 1, "tiny": base["tiny"] * 2}
    said: list[str] = []
    for rank, share in ((2, 1.0), (1, None)):
        nodes = NodeFolder(tmp_path / str(rank), 1, rank)
        nodes.save(0, base, said.append)
        nodes.save(1, new, said.append)
        found = nodes.weights(1)
        assert torch.allclose(found["b"], new["b"])
        assert torch.allclose(found["tiny"], new["tiny"]), "kept whole, as factors would be larger"
        lost = float((found["w"] - new["w"]).square().sum())
        assert lost == pytest.approx(0 if share else 1.0, abs=1e-3)
        file = tmp_path / str(rank) / "001" / "model.safetensors"
        assert file.stat().st_size < 4 * 40 * 30
    assert low_rank(base, new, 1).kept < low_rank(base, new, 2).kept <= 1.0
    assert "rank 2 keeps 100.0%" in said[1]


def test_a_run_keeps_low_rank_differences_where_asked(tmp_path):
    recipe = small_recipe(*BACKTRACKING[len(SMALL) :], "degradation.rank=2")
    said: list[str] = []
    job = Job.create(tmp_path / "run", recipe, said.append)
    job._train_teacher(None, None)
    nodes = job._degrade(None, None, None)
    assert [line[:6] for line in said if "rank 2 keeps" in line] == ["node 1", "node 2", "node 3"]
    size = [(nodes.folder / f"{k:03d}" / "model.safetensors").stat().st_size for k in range(4)]
    assert max(size[1:]) < size[0] / 2
    method = recipe.objective.build(RunNetworks(recipe, job._take_teacher(), path=nodes))
    method.before_step(0)
    for name, value in nodes.weights(2).items():
        assert torch.equal(method.teacher.network.state_dict()[name], value)
