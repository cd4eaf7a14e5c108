"""What encode writes is what the pipeline computes; killed and continued, to the same bytes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy
import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdistill.cli import app
from fastdistill.data import EncodedData
from fastdistill.diffusion import Noise
from fastdistill.engine import encoded_writer, encoders
from fastdistill.engine.encode import EncodeSettings, Place, encode

CAPTIONS = ["a cat", "two dogs on the grass", "", "abc def ghi", "z"]
SIZE = tiny_pipelines.SIDE
EXACT = EncodeSettings(SIZE, dtype="float32", shard_size=2, posterior="mean")


def silent(line):
    """For what is said."""


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Folder of a pipeline by the name of the function that makes it."""
    folders = {}

    def get(name, *arguments):
        if (name, arguments) not in folders:
            folder = tmp_path_factory.mktemp(name)
            tiny_pipelines.save(getattr(tiny_pipelines, name)(*arguments), folder)
            folders[name, arguments] = folder
        return folders[name, arguments]

    return get


@pytest.fixture
def images(tmp_path):
    """Five images, 24 x 20, with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, caption in enumerate(CAPTIONS):
        array = numpy.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=numpy.uint8)
        Image.fromarray(array).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    return folder


@pytest.fixture
def classes(tmp_path):
    """Five images in two classes."""
    for index in range(5):
        file = tmp_path / "classes" / str(index // 3) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        array = numpy.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=numpy.uint8)
        Image.fromarray(array).save(file)
    return tmp_path / "classes"


def pixels(folder):
    """The images as the VAE sees them, resized by Pillow alone."""
    batch = []
    for file in sorted(folder.rglob("*.png")):
        image = Image.open(file)
        side, left = min(image.size), (max(image.size) - min(image.size)) / 2
        image = image.resize((SIZE, SIZE), Image.BICUBIC, (left, 0, left + side, side))
        batch.append(torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(batch)


def stored(folder):
    """All tensors of a set, in the order of its source."""
    shards = [load_file(file) for file in sorted(folder.glob("shard-*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name[0] != "."}


def own_stable_diffusion(pipeline, texts):
    prompts, negative = pipeline.encode_prompt(texts, "cpu", 1, True)
    return {"encoder_hidden_states": (prompts, negative)}


def own_stable_diffusion_xl(pipeline, texts):
    prompts, negative, pooled, negative_pooled = pipeline.encode_prompt(texts)
    assert not negative.any()  # force_zeros_for_empty_prompt
    return {
        "encoder_hidden_states": (prompts, negative),
        "text_embeds": (pooled, negative_pooled),
    }


def own_pixart(pipeline, texts):
    prompts, mask, negative, negative_mask = pipeline.encode_prompt(texts)
    return {
        "encoder_hidden_states": (prompts, negative),
        "encoder_attention_mask": (mask, negative_mask),
    }


def own_stable_diffusion_3(pipeline, texts):
    prompts, negative, pooled, negative_pooled = pipeline.encode_prompt(texts, texts, texts)
    return {
        "encoder_hidden_states": (prompts, negative),
        "pooled_projections": (pooled, negative_pooled),
    }


def own_flux(pipeline, texts):
    (prompts, pooled, _), (null, null_pooled, _) = (
        pipeline.encode_prompt(given, given) for given in (texts, [""] * len(texts))
    )
    return {"encoder_hidden_states": (prompts, null), "pooled_projections": (pooled, null_pooled)}


@pytest.mark.parametrize(
    ("name", "own", "arguments"),
    [
        ("stable_diffusion", own_stable_diffusion, ()),
        ("stable_diffusion_xl", own_stable_diffusion_xl, ()),
        ("pixart", own_pixart, ()),
        ("stable_diffusion_3", own_stable_diffusion_3, ()),
        ("stable_diffusion_3", own_stable_diffusion_3, (False,)),
        ("flux", own_flux, ()),
    ],
)
@torch.no_grad()
def test_embeddings_are_those_of_the_pipeline_and_latents_those_of_its_vae(
    teacher, images, tmp_path, name, own, arguments
):
    folder = teacher(name, *arguments)
    assert encode(images, tmp_path / "set", folder, EXACT, Place(batch_size=2), silent)
    found, data = stored(tmp_path / "set"), EncodedData(tmp_path / "set")
    pipeline = getattr(tiny_pipelines, name)(*arguments)
    uncondition = data.batch(0, 0, 1).uncondition
    for key, (expected, null) in own(pipeline, CAPTIONS).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            uncondition[key], null[:1].to(uncondition[key].dtype), rtol=1e-5, atol=1e-5
        )
    config = pipeline.vae.config
    z = pipeline.vae.encode(pixels(images)).latent_dist.mean
    latents = (z - (config.shift_factor or 0)) * config.scaling_factor
    torch.testing.assert_close(found["samples"], latents, rtol=1e-4, atol=1e-4)
    assert data.shape == (4, SIZE // 2, SIZE // 2)
    assert data.index["scaling_factor"] == config.scaling_factor


def test_the_null_is_the_pipeline_s_where_zeros_are_not_forced(images, tmp_path):
    pipeline = tiny_pipelines.stable_diffusion_xl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    folder = tiny_pipelines.save(pipeline, tmp_path / "teacher")
    encode(images, tmp_path / "set", folder, EXACT, say=silent)
    _, negative, _, _ = pipeline.encode_prompt(CAPTIONS)
    found = EncodedData(tmp_path / "set").batch(0, 0, 2).uncondition["encoder_hidden_states"]
    assert found.any()
    torch.testing.assert_close(found[0], negative[0], rtol=1e-5, atol=1e-5)


def test_sdxl_is_told_original_size_crop_and_target(teacher, images, tmp_path):
    encode(images, tmp_path / "set", teacher("stable_diffusion_xl"), say=silent)
    data = EncodedData(tmp_path / "set")
    expected = [20.0, 24.0, 0.0, 2.0, SIZE, SIZE]  # 19.2 x 16 when resized: 1.6 cut on each side
    batch = data.batch(0, 0, 3)
    assert batch.condition["time_ids"].tolist() == [expected] * 3
    assert torch.equal(batch.uncondition["time_ids"], batch.condition["time_ids"])
    data.require((4, 8, 8), ("encoder_hidden_states", "text_embeds", "time_ids"), samples=True)


def test_sizes_keep_their_precision_in_a_set_of_half_precision(teacher, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2049, 3001)).save(tmp_path / "images" / "0.jpg")
    (tmp_path / "images" / "0.txt").write_text("large")
    encode(tmp_path / "images", tmp_path / "set", teacher("stable_diffusion_xl"), say=silent)
    found = EncodedData(tmp_path / "set").batch(0, 0, 1).condition["time_ids"][0, :2]
    assert found.tolist() == [3001, 2049]


def test_pixart_of_1024_pixels_is_told_resolution_and_aspect_ratio(teacher, tmp_path):
    """Its transformer's configuration says so by sample_size 128 alone."""
    (tmp_path / "prompts.txt").write_text("\n".join(filter(None, CAPTIONS)))
    for sample_size, expected in ((8, True), (16, False), (128, True)):
        if sample_size == 8:
            folder = teacher("pixart")
        else:
            folder = _with_sample_size(teacher("pixart"), tmp_path / f"t{sample_size}", sample_size)
        to = tmp_path / f"set-{sample_size}"
        encode(tmp_path / "prompts.txt", to, folder, say=silent)
        data = EncodedData(to)
        assert data.shape == (4, sample_size, sample_size)
        condition = data.batch(0, 0, 2).condition
        assert ("resolution" in condition) is expected
        if expected:
            assert condition["resolution"].tolist() == [[2.0 * sample_size] * 2] * 2
            assert condition["aspect_ratio"].tolist() == [[1.0]] * 2


def _with_sample_size(folder, copy, sample_size):
    import json
    import shutil

    shutil.copytree(folder, copy)
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"sample_size": sample_size}
    file.write_text(json.dumps(config | {"use_additional_conditions": None}))
    return copy


def test_flux_is_told_its_guidance_and_prompts_have_the_length_asked_for(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = EncodeSettings(size=SIZE, max_length=20, guidance=2.5)
    encode(tmp_path / "prompts.txt", tmp_path / "set", teacher("flux"), settings, say=silent)
    batch = EncodedData(tmp_path / "set").batch(0, 0, 1)
    assert batch.condition["guidance"].tolist() == [2.5]
    assert batch.condition["encoder_hidden_states"].shape == (1, 20, 32)
    assert batch.samples is None


def test_dit_has_labels_of_its_own_classes(teacher, classes, tmp_path):
    encode(classes, tmp_path / "set", teacher("dit"), EXACT, say=silent)
    data = EncodedData(tmp_path / "set")
    assert data.classes == 3  # the model's, not the two of the folder
    batch = data.batch(0, 0, 5)
    assert sorted(batch.condition.tolist()) == [0, 0, 0, 1, 1]
    assert batch.uncondition.tolist() == [3] * 5
    assert batch.samples.shape == (5, 4, 8, 8)


@torch.no_grad()
def test_a_sampled_posterior_is_a_function_of_the_seed_and_the_number_of_the_sample(
    teacher, classes, tmp_path
):
    for number, size in enumerate((1, 5)):
        settings = dataclasses.replace(EXACT, posterior="sample", seed=7, shard_size=5)
        place = Place(batch_size=size)
        encode(classes, tmp_path / str(number), teacher("dit"), settings, place, silent)
    vae = tiny_pipelines.dit().vae
    posterior = vae.encode(pixels(classes)).latent_dist
    noise = Noise(7).normal("posterior", torch.arange(5), (4, 8, 8))
    expected = (posterior.mean + posterior.std * noise) * 0.18215
    for number in range(2):
        found = stored(tmp_path / str(number))["samples"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latents_normalised_by_channel_are_undone_as_the_pipeline_does(images, tmp_path):
    """As Playground's VAE; SDXL's pipeline decodes z * std / factor + mean."""
    pipeline = tiny_pipelines.stable_diffusion_xl()
    mean, std = [0.1, -0.2, 0.3, 0.4], [2.0, 3.0, 4.0, 5.0]
    pipeline.vae = tiny_pipelines.vae(latents_mean=mean, latents_std=std)
    folder = tiny_pipelines.save(pipeline, tmp_path / "teacher")
    encode(images, tmp_path / "set", folder, EXACT, say=silent)
    found = stored(tmp_path / "set")["samples"]
    by_channel = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    decoded = found * by_channel[1] / 0.5 + by_channel[0]
    expected = pipeline.vae.encode(pixels(images)).latent_dist.mean
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_float_arrays_are_latents_already(teacher, tmp_path):
    latents = torch.randn(3, 4, 8, 8)
    save_file({"samples": latents, "labels": torch.tensor([0, 2, 1])}, tmp_path / "a.safetensors")
    encode(tmp_path / "a.safetensors", tmp_path / "set", teacher("dit"), EXACT, say=silent)
    assert torch.equal(stored(tmp_path / "set")["samples"], latents)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_in_half_precision_rounds_once(teacher, images, tmp_path, dtype):
    settings = dataclasses.replace(EXACT, dtype=dtype)
    encode(images, tmp_path / "exact", teacher("stable_diffusion_xl"), EXACT, say=silent)
    encode(images, tmp_path / "half", teacher("stable_diffusion_xl"), settings, say=silent)
    exact, half = stored(tmp_path / "exact"), stored(tmp_path / "half")
    for name in ("samples", "encoder_hidden_states", "text_embeds"):
        assert torch.equal(half[name], exact[name].to(getattr(torch, dtype)))


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdistill.engine import encoded_writer
from fastdistill.engine.encode import EncodeSettings, encode

write = encoded_writer.write_tensors
written = []

def write_and_die(file, tensors):
    entry = write(file, tensors)
    written.append(file)
    if len(written) == 2:
        file.write_bytes(file.read_bytes()[:50])  # as if the disk had no more of it yet
        os.kill(os.getpid(), signal.SIGKILL)
    return entry

encoded_writer.write_tensors = write_and_die
settings = EncodeSettings(size=16, shard_size=1)
encode(Path(sys.argv[1]), Path(sys.argv[2]), None, settings, say=lambda line: None)
"""


def test_a_killed_encode_continues_at_the_next_shard_and_ends_with_the_same_bytes(
    classes, tmp_path
):
    settings = EncodeSettings(size=SIZE, shard_size=1)
    encode(classes, tmp_path / "whole", None, settings, say=silent)
    program = [sys.executable, "-c", KILLED, str(classes), str(tmp_path / "killed")]
    shards = []
    for _ in range(2):
        assert subprocess.run(program, timeout=600).returncode == -9
        shards.append(
            sorted(file.name for file in (tmp_path / "killed").glob("shard-*.safetensors"))
        )
    assert [len(names) for names in shards] == [1, 2]
    with pytest.raises(ValueError, match="is not finished"):
        EncodedData(tmp_path / "killed")
    said = []
    assert encode(classes, tmp_path / "killed", None, settings, say=said.append)
    assert len([line for line in said if line.startswith("shard")]) == 3
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_processes_share_the_shards_and_make_the_same_bytes(teacher, images, tmp_path):
    settings, folder = dataclasses.replace(EXACT, shard_size=1), teacher("stable_diffusion_xl")
    encode(images, tmp_path / "one", folder, settings, Place(batch_size=1), silent)
    places = [Place(batch_size=1, rank=rank, ranks=3) for rank in range(3)]
    finished = [encode(images, tmp_path / "three", folder, settings, at, silent) for at in places]
    assert finished == [False, False, True]
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_torchrun_s_processes_know_their_share(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    place = Place.of_process(torch.device("cuda"))
    assert (place.rank, place.ranks, place.device) == (5, 8, torch.device("cuda", 1))


def test_a_finished_set_is_verified_and_a_lost_shard_alone_is_made_again(classes, tmp_path):
    settings = EncodeSettings(size=SIZE, shard_size=2)
    encode(classes, tmp_path / "set", None, settings, say=silent)
    before, said = files(tmp_path / "set"), []
    (tmp_path / "set" / "shard-00001.safetensors").unlink()
    encode(classes, tmp_path / "set", None, settings, say=said.append)
    assert files(tmp_path / "set") == before
    assert said[0].startswith("shard 1: 2 of 2 samples")
    shard = tmp_path / "set" / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"shard-00002.safetensors was altered"):
        encode(classes, tmp_path / "set", None, settings, say=silent)


def test_an_encode_is_not_continued_with_something_else(teacher, classes, images, tmp_path):
    encode(classes, tmp_path / "set", teacher("dit"), EXACT, say=silent)
    changed = dataclasses.replace(EXACT, dtype="float16")
    with pytest.raises(ValueError, match="begun with dtype float32, but now it is float16"):
        encode(classes, tmp_path / "set", teacher("dit"), changed, say=silent)
    (classes / "1" / "4.png").unlink()
    with pytest.raises(ValueError, match="begun with"):
        encode(classes, tmp_path / "set", teacher("dit"), EXACT, say=silent)


def test_an_encode_is_not_continued_by_other_weights(classes, tmp_path):
    for number, seed in enumerate((1, 2)):
        pipeline = tiny_pipelines.dit()
        pipeline.vae = tiny_pipelines.vae(seed)
        tiny_pipelines.save(pipeline, tmp_path / str(number) / "teacher")
    encode(classes, tmp_path / "set", tmp_path / "0" / "teacher", EXACT, say=silent)
    with pytest.raises(ValueError, match="begun with vae_checksum"):
        encode(classes, tmp_path / "set", tmp_path / "1" / "teacher", EXACT, say=silent)


def test_two_encodes_do_not_share_a_share(classes, tmp_path, monkeypatch):
    settings = EncodeSettings(size=SIZE, shard_size=2)
    inner = []

    def interrupted(line):
        with pytest.raises(BlockingIOError, match="another process encodes into") as error:
            encode(classes, tmp_path / "set", None, settings, say=silent)
        inner.append(error)

    encode(classes, tmp_path / "set", None, settings, say=interrupted)
    assert inner


def test_values_that_half_precision_cannot_hold_are_named(teacher, tmp_path):
    save_file(
        {"samples": torch.full((3, 4, 8, 8), 1e6), "labels": torch.zeros(3).long()},
        tmp_path / "a.safetensors",
    )
    settings = EncodeSettings(shard_size=2)
    with pytest.raises(ValueError, match=r"sample 0 has samples with nan or .* take bfloat16"):
        encode(tmp_path / "a.safetensors", tmp_path / "set", teacher("dit"), settings, say=silent)


def test_nan_latents_name_the_image(classes, tmp_path):
    pipeline = tiny_pipelines.dit()
    pipeline.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    folder = tiny_pipelines.save(pipeline, tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"0.png has samples with nan"):
        encode(classes, tmp_path / "set", folder, EXACT, say=silent)


def test_a_broken_image_is_named_and_what_was_encoded_stays(classes, tmp_path):
    (classes / "1" / "4.png").write_bytes(b"broken")
    settings = EncodeSettings(size=SIZE, shard_size=2)
    with pytest.raises(ValueError, match=r"4.png cannot be used"):
        encode(classes, tmp_path / "set", None, settings, say=silent)
    assert len(list((tmp_path / "set").glob("shard-*.safetensors"))) == 2
    assert not list((tmp_path / "set").glob(".partial*"))


def test_a_full_disk_leaves_whole_shards_alone(classes, tmp_path, monkeypatch):
    write, settings = encoded_writer.write_tensors, EncodeSettings(size=SIZE, shard_size=2)

    def full(file, tensors):
        if "00001" in file.name:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(encoded_writer, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        encode(classes, tmp_path / "set", None, settings, say=silent)
    assert [file.name for file in (tmp_path / "set").glob("shard-*.safetensors")] == [
        "shard-00000.safetensors"
    ]
    monkeypatch.setattr(encoded_writer, "write_tensors", write)
    assert encode(classes, tmp_path / "set", None, settings, say=silent)


def test_wrong_uses_are_one_sentence(teacher, images, classes, tmp_path):
    cases = [
        (classes, teacher("stable_diffusion_xl"), {}, r"0.png has no text, which a StableDiff"),
        (images, teacher("dit"), {}, r"0.png has no label, but the teacher is told classes"),
        (images, tmp_path, {}, "is not the folder of a diffusers pipeline"),
        (images, None, {"size": None}, "without a teacher, size must say"),
        (images, teacher("dit"), {"size": 17}, "size is 17; this VAE needs a multiple of 2"),
        (images, teacher("stable_diffusion"), {"max_length": 9}, "prompts of its encoder's length"),
    ]
    for number, (source, folder, changes, message) in enumerate(cases):
        settings = dataclasses.replace(EXACT, **changes)
        with pytest.raises(ValueError, match=message):
            encode(source, tmp_path / f"set-{number}", folder, settings, say=silent)
    for name in ("dtype", "precision", "posterior"):
        with pytest.raises(ValueError, match=f"{name} is 'int8'; expected"):
            EncodeSettings(**{name: "int8"})


def test_a_missing_transformers_is_named_with_the_extra_that_brings_it(
    teacher, images, tmp_path, monkeypatch
):
    folder = teacher("stable_diffusion_xl")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'fastdistill\[text\]'"):
        encode(images, tmp_path / "set", folder, EXACT, say=silent)


def test_more_classes_than_the_model_has_are_named(classes, tmp_path):
    folder = tiny_pipelines.save(tiny_pipelines.dit(1), tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"3.png has label 1; expected 0 to 0"):
        encode(classes, tmp_path / "set", folder, EXACT, say=silent)


def test_pipelines_and_vaes_that_are_not_known_are_named(images, tmp_path):
    ddpm = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            8,
            norm_num_groups=4,
            block_out_channels=(4,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        diffusers.DDPMScheduler(),
    )
    folder = tiny_pipelines.save(ddpm, tmp_path / "ddpm")
    with pytest.raises(
        ValueError, match=r"is a DDPMPipeline; encode knows .*keeps pixels where no"
    ):
        encode(images, tmp_path / "set", folder, EXACT, say=silent)
    pipeline = tiny_pipelines.dit()
    pipeline.register_modules(
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            num_encoder_blocks=(1,),
            num_decoder_blocks=(1,),
        )
    )
    folder = tiny_pipelines.save(pipeline, tmp_path / "tiny")
    with pytest.raises(ValueError, match="has a VAE of class AutoencoderTiny"):
        encode(images, tmp_path / "set", folder, EXACT, say=silent)


def test_the_denoiser_is_not_loaded(teacher, tmp_path, monkeypatch):
    """A teacher's folder without the denoiser's weights is enough."""
    import shutil

    folder = tmp_path / "teacher"
    shutil.copytree(teacher("stable_diffusion_xl"), folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    for file in (folder / "vae").glob("*.safetensors"):  # of no use for prompts
        file.unlink()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    encoder = encoders.PipelineEncoder(folder, images=False)
    assert encoder.shape == (4, 8, 8)
    assert encode(tmp_path / "prompts.txt", tmp_path / "set", folder, say=silent)


def test_the_command_line_encodes(classes, tmp_path, capsys):
    to = tmp_path / "set"
    arguments = ["--size", "8", "--shard-size", "3", "--to", str(to), "--device", "cpu"]
    app(["encode", str(classes), *arguments], standalone_mode=False)
    assert "5 samples of shape [3, 8, 8] are in" in capsys.readouterr().out
    assert len(EncodedData(Path(to))) == 5
