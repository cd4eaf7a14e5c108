"""Plans: what a layout holds, what fits, what is predicted, and what people are told."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from rich.console import Console
from small import small_recipe

from fastdistill import cli
from fastdistill.engine.counting import Size, Work
from fastdistill.engine.gpus import (
    GIB,
    GPUS,
    Assumptions,
    bus_bandwidth,
    device_seconds,
    find_gpu,
    host_seconds,
    parse_size,
)
from fastdistill.engine.plan_recipe import job_of_recipe
from fastdistill.engine.plan_report import Plan
from fastdistill.engine.planning import Layout, Planner, explain_misfit

H200 = GPUS["H200"]
FIVE = "training.critic_updates_per_student_update=5"
BF16 = "training.precision=bfloat16"


def planner(*options: str, gpus: int = 1, model_config: str | None = None) -> Planner:
    recipe = small_recipe("teacher.condition_dropout=0.1", *options)
    return Planner(job_of_recipe(recipe, model_config), gpus, H200)


@pytest.fixture(scope="module")
def alone() -> Planner:
    return planner(BF16, FIVE, "training.batch_size=64")


@pytest.fixture(scope="module")
def eight() -> Planner:
    return planner(BF16, FIVE, "training.batch_size=64", gpus=8)


class TestGPUs:
    @pytest.mark.parametrize("name", ["rtx 4090", "RTX-4090", "rtx4090"])
    def test_names_are_read_as_people_write_them(self, name):
        assert find_gpu(name).name == "RTX4090"

    def test_an_unknown_one_is_refused_with_the_nearest(self):
        with pytest.raises(ValueError, match=r"no GPU 'H10' is known; did you mean H100\?"):
            find_gpu("H10")

    @pytest.mark.parametrize(
        ("text", "size"), [("80GiB", 80 * GIB), ("141 GB", 141e9), ("24", 24 * GIB)]
    )
    def test_sizes(self, text, size):
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["eighty", "0", "-3GiB", "80TB"])
    def test_other_sizes_are_refused(self, text):
        with pytest.raises(ValueError, match="expected a size as 80GiB"):
            parse_size(text)

    def test_time_is_operations_over_the_assumed_rate_and_bytes_over_bandwidth(self):
        assumed = Assumptions(linear=0.5, attention_backward=0.25, bandwidth=0.5)
        work = Work({"linear": Size(1e12, 1e12), "attention": Size(0, 1e12)}, {"add": Size(0, 1e9)})
        seconds = device_seconds(work, 3, H200, "bfloat16", assumed, backward=True)
        assert seconds == {
            "linear": pytest.approx(4e12 / (0.5 * 989e12)),
            "attention": pytest.approx(3e12 / (0.25 * 989e12)),
            "memory-bound": pytest.approx(3e9 / (0.5 * 4.8e12)),
        }
        slow = device_seconds(work, 3, H200, "float32", assumed)
        assert slow["linear"] == pytest.approx(4e12 / (assumed.float32 * 67e12))

    def test_launches_cost_the_host(self):
        work, assumed = Work(kernels={"matmul": 10, "memory": 20}), Assumptions()
        forward = host_seconds(work, assumed, backward=False, graph=False)
        assert forward == pytest.approx(30 * assumed.launch)
        assert host_seconds(work, assumed, backward=False, graph=True) > forward
        assert host_seconds(work, assumed, backward=True, graph=False) < forward

    def test_collectives_over_nodes_are_bound_by_the_network(self):
        assumed = Assumptions(network=10e9)
        assert bus_bandwidth(H200, 8, assumed) == pytest.approx(0.73 * 450e9)
        assert bus_bandwidth(H200, 16, assumed) == pytest.approx(80e9)


class TestMemory:
    def test_it_is_networks_and_activations_and_reserve(self, alone):
        layout = alone.own_layout()
        memory = alone.memory(layout, 64)
        assert [plan.name for plan in memory.networks] == ["student", "critic", "teacher"]
        assert memory.states == sum(plan.total for plan in memory.networks) + memory.buffers
        assert memory.total == memory.states + memory.activations + memory.reserve
        assert memory.activations == alone.cycle(False).peak.at(64)

    def test_the_student_alone_has_an_average(self, alone):
        student, critic, teacher = alone.networks(alone.own_layout())
        assert "ema_0" in student.bytes
        assert "ema_0" not in critic.bytes
        assert list(teacher.bytes) == ["frozen"]
        assert teacher.bytes["frozen"] == 2 * teacher.parameters

    def test_shards_share_what_one_holds_alone(self, alone, eight):
        held = {
            count: {plan.name: plan.bytes for plan in one.networks(one.own_layout())}
            for count, one in ((1, alone), (8, eight))
        }
        for role in ("parameter", "exp_avg", "ema_0"):
            whole = held[1]["student"][role]
            assert held[8]["student"][role] == pytest.approx(whole / 8, rel=0.2)  # and padding
        assert held[8]["teacher"] == held[1]["teacher"]

    def test_only_one_network_has_unreduced_gradients(self, eight):
        memory = eight.memory(eight.own_layout(), 8)
        unreduced = [plan.bytes.get("unreduced", 0) for plan in memory.networks]
        total = sum(plan.total for plan in memory.networks) + memory.buffers
        assert memory.states == total - sum(unreduced) + max(unreduced)
        assert 0 < max(unreduced) < sum(unreduced)

    def test_accumulation_and_resident_roles_are_those_of_the_recipe(self):
        fsdp = ["parallel.mode=fsdp", "training.accumulation=2", BF16]
        held = {plan.name: plan for plan in _own(planner(*fsdp, gpus=2))}
        roles = [*fsdp, "parallel.resident_roles=[student]"]
        resident = {plan.name: plan for plan in _own(planner(*roles, gpus=2))}
        assert resident["student"].mode == "resident"
        assert resident["critic"] == held["critic"]
        once = {plan.name: plan for plan in _own(planner("parallel.mode=fsdp", BF16, gpus=2))}
        extra = held["critic"].bytes["unreduced"] - once["critic"].bytes["unreduced"]
        assert extra == 4 * held["critic"].parameters

    def test_reused_samples_are_kept(self):
        reuse = planner(FIVE, "training.sample_reuse=2")
        layout = reuse.own_layout()
        kept = reuse.memory(layout, 32).activations - reuse.cycle(False).peak.at(32)
        assert kept == 32 * 64 * 4


def _own(one: Planner):
    return one.networks(one.own_layout())


class TestSearch:
    @pytest.mark.parametrize("limit", [1.6 * GIB, 2 * GIB, 8 * GIB])
    def test_the_largest_batch_fits_and_the_next_does_not(self, alone, limit):
        layout = alone.own_layout()
        largest = alone.largest_batch(layout, limit)
        assert alone.memory(layout, largest).total <= limit
        assert alone.memory(layout, largest + 1).total > limit

    def test_none_fits(self, alone):
        assert alone.largest_batch(alone.own_layout(), GIB) == 0

    def test_layouts_of_one_and_of_several(self, alone, eight):
        assert alone.layouts(False) == [Layout("single", False)]
        assert [str(layout) for layout in eight.layouts(True)] == [
            "resident, checkpoint_blocks",
            "fsdp, checkpoint_blocks",
            "fsdp, teacher sharded, checkpoint_blocks",
        ]

    def test_a_batch_that_cannot_fit_is_one_sentence_with_what_to_change(self, eight):
        resident = eight.own_layout()
        limit = eight.memory(resident, 5).total
        others = [(resident, 5), (Layout("fsdp", False), 8), (Layout("resident", True), 9)]
        assert explain_misfit(eight, resident, 8, limit, others) == (
            f"training.batch_size=64 needs {eight.memory(resident, 8).total / GIB:.1f} GiB on each "
            f"of 8 GPUs (resident), and there are {limit / GIB:.1f}; set training.batch_size=32 "
            "training.accumulation=2, or parallel.mode=fsdp"
        )

    def test_where_only_another_layout_holds_a_smaller_batch_both_are_named(self, eight):
        resident, fsdp = eight.own_layout(), Layout("fsdp", False, sharded_teacher=True)
        sentence = explain_misfit(eight, resident, 8, GIB, [(resident, 0), (fsdp, 3)])
        assert sentence.endswith(
            "set parallel.mode=fsdp parallel.teacher=sharded training.batch_size=24"
        )

    def test_where_nothing_fits_it_says_so(self, alone):
        layout = alone.own_layout()
        sentence = explain_misfit(alone, layout, 64, GIB, [(layout, 0)])
        assert "not even one sample a GPU fits in any mode: take more GPUs" in sentence

    def test_a_batch_that_gpus_cannot_share_is_refused(self):
        with pytest.raises(ValueError, match="batch_size is 60, which 8 GPUs cannot share equally"):
            planner("training.batch_size=60", gpus=8).own_batch()

    def test_shards_that_do_not_divide_the_gpus_are_refused(self):
        with pytest.raises(ValueError, match="shards is 3, which does not divide 8 GPUs"):
            planner("parallel.shards=3", gpus=8)

    def test_single_is_for_one_gpu(self):
        with pytest.raises(ValueError, match="mode is single, for one process, but --gpus is 8"):
            planner("parallel.mode=single", gpus=8).own_layout()


class TestPrediction:
    def test_shares_add_up_to_the_cycle(self, alone, eight):
        for one in (alone, eight):
            prediction = one.predict(one.own_layout(), 64)
            assert sum(prediction.shares().values()) == pytest.approx(prediction.cycle)
            assert prediction.samples_per_second * prediction.cycle == pytest.approx(
                64 * one.gpus * 5
            )

    def test_small_networks_wait_for_the_host_unless_a_graph_launches_them(self, alone):
        assert alone.predict(alone.own_layout(), 1).bottleneck == "host"
        graph = planner(BF16, FIVE, "training.cuda_graph=true")
        prediction = graph.predict(graph.own_layout(), 1)
        assert prediction.host == 0
        assert prediction.cycle == prediction.device

    def test_one_gpu_has_no_collectives(self, alone, eight):
        assert alone.predict(alone.own_layout(), 64).collectives == 0
        assert eight.predict(eight.own_layout(), 64).collectives > 0

    @pytest.mark.parametrize(
        ("mode", "gathers"),
        # resident: one for each update. fsdp: one for each forward, and one more for each backward
        [("resident", {"student": 1, "critic": 5}), ("fsdp", {"student": 6, "critic": 11})],
    )
    def test_gathers_of_a_cycle(self, eight, mode, gathers):
        names = [row.name for row in eight.predict(Layout(mode, False), 8).rows]
        reductions = {"student": 1, "critic": 5}
        for role, count in gathers.items():
            assert f"{role}: gathers {count}, reductions {reductions[role]}" in names

    def test_links_carry_two_bytes_a_gathered_and_four_a_reduced_parameter(self, eight):
        layout = eight.own_layout()
        student, critic, _ = eight.networks(layout)
        sent = (2 + 4) * (student.parameters + 5 * critic.parameters) * 7 / 8
        prediction, assumed = eight.predict(layout, 8), Assumptions()
        assert prediction.collectives == pytest.approx(sent / bus_bandwidth(H200, 8, assumed))
        assert prediction.exposed == pytest.approx((1 - assumed.hidden) * prediction.collectives)

    def test_the_optimizer_moves_46_bytes_a_parameter_with_an_average(self, alone):
        """38 of the norm and the update, 2 to clear the gradient, 6 to accumulate into it."""
        rows = {row.name: row for row in alone.predict(alone.own_layout(), 64).rows}
        held = {plan.name: plan.bytes["parameter"] / 4 for plan in _own(alone)[:2]}
        assert rows["student optimizer"].bytes == 46 * held["student"]
        assert rows["critic optimizer"].bytes == 38 * held["critic"]
        assert rows["critic optimizer"].times == 5

    def test_dropped_gradients_are_copied_and_not_added(self, alone):
        """4 of 8 bytes, and no kernel for each tensor; gradients are there twice meanwhile."""
        dropping = planner(BF16, FIVE, "training.batch_size=64", "training.drop_gradients=true")
        layout = dropping.own_layout()
        rows = {row.name: row for row in dropping.predict(layout, 64).rows}
        student = dropping.networks(layout)[0]
        assert rows["student optimizer"].bytes == 42 * student.bytes["parameter"] / 4
        assert rows["student optimizer"].kernels == 3
        tensors = len(list(job_of_recipe(small_recipe()).objective(False).student.parameters()))
        adding = {row.name: row for row in alone.predict(layout, 64).rows}["student optimizer"]
        assert adding.kernels == 3 + tensors
        assert adding.host > rows["student optimizer"].host
        extra = dropping.memory(layout, 1).activations - alone.memory(layout, 1).activations
        assert extra > 2 * student.parameters
        twice = planner(BF16, FIVE, "training.drop_gradients=true", "training.accumulation=2")
        critic = dropping.networks(layout)[1].bytes["gradient"]
        more = twice.memory(layout, 1).activations - dropping.memory(layout, 1).activations
        assert more == critic


@pytest.mark.slow
def test_sdxl_on_one_h200_is_what_the_performance_map_predicted():
    """Its 26 forwards' worth of a cycle, less one: the student's turn shares its samples."""
    guided = "objective.guidance_scale=7"
    sdxl = planner(BF16, FIVE, guided, "training.batch_size=2", model_config="sdxl")
    layout = sdxl.own_layout()
    cycle = sdxl.cycle(False)
    assert cycle.work.total_flops.at(1) / 1e12 == pytest.approx(177.8 - 6.76, rel=0.01)
    assert sdxl.networks(layout)[0].parameters == 2_567_463_684
    shares = sdxl.predict(layout, 2).shares()
    matmul = sum(shares[kind] for kind in ("linear", "convolution", "attention"))
    assert matmul == pytest.approx(0.726 * (1 - 6.76 / 177.8), rel=0.03)
    assert sdxl.memory(layout, 2).states / GIB == pytest.approx(86 + 4.8, rel=0.01)
    slope = cycle.peak.at(8) - cycle.peak.at(7)
    assert slope / GIB == pytest.approx(6.42 + 0.31, rel=0.01)  # and the teacher's temporaries


class TestRecipe:
    @pytest.fixture
    def config(self) -> dict:
        from fastdistill.models.configs import model_configuration

        return model_configuration("dit_xl2_256") | {"num_layers": 2, "num_attention_heads": 2}

    @pytest.mark.parametrize("place", ["", "transformer"])
    def test_a_folder_or_a_file_gives_the_architecture(self, tmp_path, config, place):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        for source in (tmp_path, folder / "config.json"):
            job = job_of_recipe(small_recipe(), source)
            assert job.shape == (4, 32, 32)
            student = job.objective(False).student
            assert {value.device.type for value in student.parameters()} == {"meta"}
            assert len(student.network.model.transformer_blocks) == 2

    def test_what_is_no_configuration_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no config\.json, neither in unet/ nor"):
            job_of_recipe(small_recipe(), tmp_path)
        (tmp_path / "other.json").write_text("[1]")
        with pytest.raises(ValueError, match="is no diffusers configuration"):
            job_of_recipe(small_recipe(), tmp_path / "other.json")
        with pytest.raises(ValueError, match=r"no configuration of a model 'sdxi'.*sdxl"):
            job_of_recipe(small_recipe(), "sdxi")

    def test_prompts_have_the_length_that_is_asked_for(self):
        job = job_of_recipe(small_recipe(), "sd15", text_tokens=11)
        assert job.inputs(3).condition["encoder_hidden_states"].shape == (3, 11, 768)

    def test_real_samples_are_there_where_a_discriminator_needs_them(self):
        assert job_of_recipe(small_recipe()).inputs(3).samples is None
        gan = small_recipe("objective.gan_weight=0.1", "training.discriminator={lr: 0.001}")
        assert job_of_recipe(gan).inputs(3).samples.shape == (3, 1, 8, 8)


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastdistill", "plan", *arguments])
    monkeypatch.setattr(cli, "console", Console(width=160, highlight=False, soft_wrap=True))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


class TestCommand:
    def test_it_prints_what_is_counted_and_what_is_predicted(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "plan.json"
        assert (
            run(monkeypatch, "digits", "--gpus", "8", "--gpu", "H200", "--output", str(path)) == 0
        )
        shown = capsys.readouterr().out
        for text in ("counted on the meta device", "not measured", "it fits:", "critic optimizer"):
            assert text in shown
        found = json.loads(path.read_text())
        assert found["fits"]
        assert found["gpus"] == 8
        assert found["layout"]["mode"] == "resident"
        assert found["time"]["basis"].endswith("not measured")
        assert found["memory"]["total"] < found["memory_limit"] == 141e9
        assert found["assumptions"] == dataclasses.asdict(Assumptions())

    def test_a_batch_that_cannot_fit_ends_with_one_sentence(self, monkeypatch, capsys):
        code = run(monkeypatch, "digits", "training.batch_size=4000000", "--memory", "4GiB")
        assert code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: training.batch_size=4000000 needs ")
        assert error.count("\n") == 1

    def test_recomputed_blocks_are_counted_where_nothing_fits_without(self):
        made = Plan.of("digits", planner("training.batch_size=16384"), 1.55 * GIB)
        assert not made.fits
        assert [option.layout.checkpoint_blocks for option in made.options] == [False, True]
        fits = Plan.of("digits", planner(), 80 * GIB)
        assert [option.layout.checkpoint_blocks for option in fits.options] == [False]

    def test_nothing_is_allocated(self, monkeypatch):
        """Networks of two billion parameters are planned on a machine that could not hold them."""
        job = job_of_recipe(small_recipe(), "sd3_medium")
        devices = {value.device.type for value in job.objective(False).parameters()}
        assert devices == {"meta"}
        assert torch.utils._pytree.tree_all(lambda value: value.is_meta, job.inputs(2).condition)
