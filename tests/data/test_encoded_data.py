"""An encoded set is read by rows, with its null condition, and refused by name if damaged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdistill.data import EncodedData, Order
from fastdistill.engine.encoded_writer import EncodedWriter, verify_encoded
from fastdistill.engine.folder import DamagedFolderError

COUNT, SHAPE = 10, (4, 3, 3)


def row_values(*shape):
    """Rows that say their number."""
    return torch.arange(COUNT).view(-1, *[1] * len(shape)).expand(COUNT, *shape).contiguous()


def texts_set(folder, dtype=torch.float16):
    """SDXL's conditions in shards of four."""
    null = {"encoder_hidden_states": torch.full((1, 7, 5), -1.0), "text_embeds": torch.zeros(1, 6)}
    null = {name: value.to(dtype) for name, value in null.items()}
    writer = EncodedWriter(folder, COUNT, SHAPE, shard_size=4, null=null)
    for shard in writer.missing:
        rows = slice(writer.rows(shard).start, writer.rows(shard).stop)
        tensors = {
            "samples": row_values(*SHAPE)[rows].to(dtype),
            "encoder_hidden_states": row_values(7, 5)[rows].to(dtype),
            "text_embeds": row_values(6)[rows].to(dtype),
            "time_ids": row_values(6)[rows].float(),
        }
        writer.write(shard, tensors)
    assert writer.finish()
    return folder


def labels_set(folder, labels=None, classes=5):
    null = {"labels": torch.tensor([classes])}
    writer = EncodedWriter(folder, COUNT, SHAPE, shard_size=COUNT, classes=classes, null=null)
    labels = torch.arange(COUNT) // 2 if labels is None else labels
    writer.write(0, {"samples": row_values(*SHAPE).half(), "labels": labels})
    assert writer.finish()
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_follow_the_order_and_are_float32(tmp_path, dtype):
    data = EncodedData(texts_set(tmp_path, dtype))
    batch = data.batch(3, 2, 6, slice(1, 5))
    rows = Order(COUNT).rows(3, 2, 6)[1:5].float()
    assert batch.samples.shape == (4, *SHAPE)
    assert torch.equal(batch.samples[:, 0, 0, 0], rows)
    for name, shape in (("encoder_hidden_states", (7, 5)), ("text_embeds", (6,))):
        assert batch.condition[name].shape == (4, *shape)
        assert torch.equal(batch.condition[name].flatten(1)[:, 0], rows)
    tensors = [batch.samples, *batch.condition.values(), *batch.uncondition.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_the_null_condition_is_one_row_for_all_and_sizes_stay_each_sample_s_own(tmp_path):
    batch = EncodedData(texts_set(tmp_path)).batch(0, 0, 4)
    null = batch.uncondition["encoder_hidden_states"]
    assert null.shape == batch.condition["encoder_hidden_states"].shape
    assert null.stride(0) == 0
    assert (null == -1).all()
    assert (batch.uncondition["text_embeds"] == 0).all()
    assert torch.equal(batch.uncondition["time_ids"], batch.condition["time_ids"])


def test_labels_are_a_tensor_and_the_null_class_is_one_more(tmp_path):
    data = EncodedData(labels_set(tmp_path))
    batch = data.batch(0, 0, 6)
    assert data.classes == 5
    assert torch.equal(batch.condition, batch.samples[:, 0, 0, 0].long() // 2)
    assert batch.uncondition.tolist() == [5] * 6


def test_prompts_alone_have_no_samples_but_the_denoiser_s_shape(tmp_path):
    null = {"encoder_hidden_states": torch.zeros(1, 7, 5)}
    writer = EncodedWriter(tmp_path, COUNT, SHAPE, null=null)
    writer.write(0, {"encoder_hidden_states": row_values(7, 5).half()})
    assert writer.finish()
    data = EncodedData(tmp_path)
    assert data.shape == SHAPE
    assert data.batch(0, 0, 2).samples is None
    with pytest.raises(ValueError, match="holds prompts alone, but real samples are needed"):
        data.require(samples=True)


def test_samples_alone_have_no_condition(tmp_path):
    writer = EncodedWriter(tmp_path, COUNT, (3, 2, 2), shard_size=3)
    pixels = torch.randint(0, 256, (COUNT, 3, 2, 2), dtype=torch.uint8)
    for shard in writer.missing:
        writer.write(shard, {"samples": pixels[list(writer.rows(shard))]})
    assert writer.finish()
    batch = EncodedData(tmp_path).batch(0, 0, COUNT)
    expected = pixels[Order(COUNT).rows(0, 0, COUNT)].float() / 127.5 - 1
    torch.testing.assert_close(batch.samples, expected)
    assert (batch.condition, batch.uncondition) == (None, None)


def test_opening_and_reading_a_row_leave_the_rest_on_the_disk(tmp_path):
    """64 MiB of samples, of which one row is read."""
    save_file({"samples": torch.zeros(1024, 4, 64, 64)}, tmp_path / "a.safetensors")
    from fastdistill.data.tensor_files import TensorFiles

    def resident() -> int:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * 4096

    TensorFiles([tmp_path / "a.safetensors"])  # whatever the first one imports
    before = resident()
    tensors = TensorFiles([tmp_path / "a.safetensors"])
    tensors.read("samples", [500])
    assert resident() - before < 8 * 2**20


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"shape": (4, 4, 4)}, r"shape \[4, 3, 3\], but the model needs \[4, 4, 4\]"),
        ({"conditions": ("pooled_projections",)}, "has no pooled_projections, .*it has encoder_hi"),
        ({"conditions": ("labels",)}, "has no labels"),
        ({"classes": 7}, "labels of 0 classes, but the model has 7"),
    ],
)
def test_a_set_that_does_not_fit_the_model_says_so(tmp_path, needs, message):
    data = EncodedData(texts_set(tmp_path))
    data.require(SHAPE, ("encoder_hidden_states", "text_embeds", "time_ids"), 0, samples=True)
    with pytest.raises(ValueError, match=message):
        data.require(**needs)


def _edit(folder, **changes):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def _other_shape(folder):
    _edit(folder, shape=[4, 9, 9])


def _other_null(folder):
    null = load_file(folder / "null.safetensors")
    save_file(null | {"text_embeds": torch.zeros(1, 9)}, folder / "null.safetensors")
    index = json.loads((folder / "index.json").read_text())
    index["null"]["bytes"] = (folder / "null.safetensors").stat().st_size
    _edit(folder, null=index["null"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard-00001.safetensors").unlink(), "shard-00001.* is missing"),
        (lambda folder: _truncate(folder / "shard-00001.safetensors"), "shard-00001.* truncated"),
        (lambda folder: _truncate(folder / "null.safetensors"), r"null.safetensors has \d+ bytes"),
        (lambda folder: (folder / "null.safetensors").unlink(), "null.safetensors is missing"),
        (lambda folder: (folder / "index.json").unlink(), "is not finished: repeat the"),
        (lambda folder: _truncate(folder / "index.json"), "index.json cannot be read"),
        (lambda folder: _edit(folder, format=99), "format 99; this version of fastdistill reads 1"),
        (lambda folder: _edit(folder, samples=11), "holds 10 samples .* says 11"),
        (_other_shape, r"shape \[4, 3, 3\], but its index.json says .*\[4, 9, 9\]"),
        (_other_null, "text_embeds is not one row of the set's text_embeds"),
    ],
)
def test_a_damaged_set_is_refused_and_the_file_is_named(tmp_path, damage, message):
    damage(texts_set(tmp_path))
    with pytest.raises(ValueError, match=message):
        EncodedData(tmp_path)


def test_a_folder_that_is_no_set_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"is no encoded set: index.json is missing"):
        EncodedData(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_out_of_range_are_named(tmp_path, wrong):
    labels = torch.tensor([0, 1, wrong, 3, 4, 4, 4, 4, 4, 4])
    with pytest.raises(ValueError, match=f"sample 2 has label {wrong}; expected 0 to 4"):
        EncodedData(labels_set(tmp_path, labels))


def test_a_flipped_bit_is_found_by_verifying(tmp_path):
    texts_set(tmp_path)
    verify_encoded(tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFolderError, match=r"shard-00001.safetensors was altered"):
        verify_encoded(tmp_path)


def test_a_writer_refuses_what_cannot_be_a_set(tmp_path):
    writer = EncodedWriter(tmp_path, COUNT, SHAPE, shard_size=4)
    with pytest.raises(ValueError, match="shard 0 has 3 samples, expected 4"):
        writer.write(0, {"samples": torch.zeros(3, *SHAPE)})
    samples = torch.zeros(4, *SHAPE)
    samples[2, 1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="sample 6 has samples with nan or infinite values"):
        writer.write(1, {"samples": samples})
    assert writer.missing == [0, 1, 2]
    assert not writer.finish()
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="was begun with samples 10, but now it is 11"):
        EncodedWriter(tmp_path, COUNT + 1, SHAPE, shard_size=4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").touch()
    with pytest.raises(ValueError, match="holds other things; choose an empty or new folder"):
        EncodedWriter(tmp_path / "other", COUNT, SHAPE)
