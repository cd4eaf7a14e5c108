"""Sources give every record by its number, and name what cannot be read."""

from __future__ import annotations

import json
import time

import numpy
import pytest
import raw_samples
import torch
from safetensors.torch import save_file

from fastdistill.data import open_source, tar_shards

WHOLE = raw_samples.encoded(raw_samples.pixels(0))


def test_sub_folders_of_images_are_classes_in_the_order_of_their_names(tmp_path):
    source = open_source(raw_samples.image_folder(tmp_path))
    assert len(source) == raw_samples.COUNT
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    record = source.record(5)
    assert record.content == raw_samples.encoded(raw_samples.pixels(5))
    assert (record.label, record.text) == (1, None)
    assert record.name.endswith("class-1/0005.png")


def test_texts_beside_images_are_captions_and_folders_then_are_no_classes(tmp_path):
    raw_samples.image_folder(tmp_path)
    for file in list(tmp_path.rglob("*.png")):
        file.with_suffix(".txt").write_text(f"caption of {file.stem}\n")
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.record(7).text == "caption of 0007"


def test_metadata_says_which_images_in_which_order_with_text_and_label(tmp_path):
    raw_samples.image_folder(tmp_path)
    rows = [
        {"file_name": "class-2/0011.png", "text": "last", "label": 4},
        {"file_name": "class-0/0000.png", "text": "first", "label": 1},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    source = open_source(tmp_path)
    assert [source.record(index).text for index in range(len(source))] == ["last", "first"]
    assert source.labels.tolist() == [4, 1]


def test_tar_shards_are_read_at_random(tmp_path):
    source = open_source(raw_samples.tar_shards(tmp_path))
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for index in (11, 0, 6):
        record = source.record(index)
        assert record.content == raw_samples.encoded(raw_samples.pixels(index))
        assert (record.text, record.label) == (f"image {index}", index // 4)
    assert record.name.endswith("shard-1.tar, member 0006.png")


def test_a_json_member_holds_caption_and_label(tmp_path):
    facts = json.dumps({"caption": "a cat", "label": 3, "width": 8}).encode()
    raw_samples.tar(tmp_path / "a.tar", {"x/0.seg.png": b"", "x/1.png": WHOLE, "x/1.json": facts})
    with pytest.raises(ValueError, match=r"a.tar, sample x/0 has seg.png, but no image"):
        open_source(tmp_path)
    raw_samples.tar(tmp_path / "a.tar", {"x/1.png": WHOLE, "x/1.json": facts})
    record = open_source(tmp_path).record(0)
    assert (record.text, record.label) == ("a cat", 3)


def test_long_member_names_are_read(tmp_path):
    key = "folder/" * 30 + "image"
    raw_samples.tar(tmp_path / "a.tar", {f"{key}.png": WHOLE, f"{key}.txt": b"deep"})
    assert open_source(tmp_path).record(0).text == "deep"


def test_the_index_of_a_shard_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    raw_samples.tar_shards(tmp_path)
    expected = [open_source(tmp_path).record(index) for index in range(raw_samples.COUNT)]

    def refuse(file):
        raise AssertionError(f"{file} was scanned again")

    scan = tar_shards._scan
    monkeypatch.setattr(tar_shards, "_scan", refuse)
    again = open_source(tmp_path)
    assert [again.record(index) for index in range(raw_samples.COUNT)] == expected
    monkeypatch.setattr(tar_shards, "_scan", scan)
    time.sleep(0.01)
    raw_samples.tar(tmp_path / "shard-1.tar", {"new.png": WHOLE, "new.cls": b"9"})
    assert open_source(tmp_path).labels.tolist() == [0] * 4 + [9] + [2] * 4


def test_a_damaged_index_is_made_again(tmp_path):
    raw_samples.tar_shards(tmp_path)
    open_source(tmp_path)
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert len(open_source(tmp_path)) == raw_samples.COUNT


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    raw_samples.tar_shards(tmp_path)

    def refuse(stream, **arrays):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(numpy, "savez", refuse)
    assert len(open_source(tmp_path)) == raw_samples.COUNT


def test_arrays_of_safetensors_files_with_their_labels(tmp_path):
    source = open_source(raw_samples.array_files(tmp_path))
    assert len(source) == raw_samples.COUNT
    expected = torch.from_numpy(raw_samples.pixels(9)).permute(2, 0, 1)
    assert torch.equal(source.record(9).content, expected)
    assert source.record(9).label == 2


def test_prompts_are_lines_and_blank_lines_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog  \n", encoding="utf-8-sig")
    source = open_source(tmp_path / "a.txt")
    assert [source.record(index).text for index in range(len(source))] == ["a cat", "a dog"]
    (tmp_path / "a.jsonl").write_text('{"text": "two\\nlines"}\n')
    assert open_source(tmp_path / "a.jsonl").record(0).text == "two\nlines"


def test_a_fingerprint_tells_other_samples_and_another_order_apart(tmp_path):
    prompts = tmp_path / "a.txt"
    found = set()
    for text in ("cat\ndog", "dog\ncat", "cat\ndog\nbird"):
        prompts.write_text(text)
        found.add(open_source(prompts).fingerprint())
    folder = raw_samples.image_folder(tmp_path / "images")
    found.add(open_source(folder).fingerprint())
    (folder / "class-0" / "0000.png").unlink()
    found.add(open_source(folder).fingerprint())
    assert len(found) == 5
    assert open_source(folder).fingerprint() in found


def _empty(folder):
    return folder


def _truncated_tar(folder):
    raw_samples.tar_shards(folder)
    file = folder / "shard-1.tar"
    file.write_bytes(file.read_bytes()[:700])


def _tar_without_end(folder):
    """Cut where a member ends, as a writer that was killed leaves it."""
    raw_samples.tar(folder / "shard-1.tar", {"0.png": WHOLE, "1.png": WHOLE})
    size = 2 * (512 + -(-len(WHOLE) // 512) * 512)
    (folder / "shard-1.tar").write_bytes((folder / "shard-1.tar").read_bytes()[:size])


def _damaged_tar(folder):
    """A header in the middle that is none: Python's tarfile would end there without a word."""
    raw_samples.tar(folder / "shard-1.tar", {"0.png": WHOLE, "1.png": WHOLE})
    content = bytearray((folder / "shard-1.tar").read_bytes())
    second = 512 + -(-len(WHOLE) // 512) * 512
    content[second : second + 512] = b"x" * 512
    (folder / "shard-1.tar").write_bytes(content)


def _compressed_tar(folder):
    import gzip

    raw_samples.tar_shards(folder)
    file = folder / "shard-1.tar"
    file.write_bytes(gzip.compress(file.read_bytes()))


def _class_that_is_none(folder):
    raw_samples.tar(folder / "shard-1.tar", {"0.png": WHOLE, "0.cls": b"cat"})


def _class_that_is_missing(folder):
    raw_samples.tar(folder / "shard-1.tar", {"0.png": WHOLE, "0.cls": b"1", "1.png": WHOLE})


def _metadata_of_a_missing_file(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png"}')


def _metadata_that_is_no_json(folder):
    (folder / "metadata.jsonl").write_text("file_name=a.png")


def _truncated_arrays(folder):
    raw_samples.array_files(folder)
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _arrays_of_another_shape(folder):
    raw_samples.array_files(folder)
    save_file(
        {"samples": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(2).long()},
        folder / "part-2.safetensors",
    )


def _arrays_of_another_name(folder):
    save_file({"latents": torch.zeros(2, 3)}, folder / "a.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "holds no samples"),
        (_truncated_tar, r"shard-1.tar is truncated"),
        (_tar_without_end, r"shard-1.tar is truncated"),
        (_damaged_tar, r"shard-1.tar is damaged at byte 1024"),
        (_compressed_tar, r"shard-1.tar is truncated, compressed or no tar"),
        (_class_that_is_none, r"shard-1.tar, member 0.cls has label 'cat'"),
        (_class_that_is_missing, r"shard-1.tar, sample 1 has no label"),
        (_metadata_of_a_missing_file, r"gone.png is missing, but metadata.jsonl names it"),
        (_metadata_that_is_no_json, r"metadata.jsonl, line 1 is not JSON"),
        (_truncated_arrays, r"part-1.safetensors is truncated"),
        (_arrays_of_another_shape, r"part-2.safetensors holds .*\[3, 4, 4\].* part-0"),
        (_arrays_of_another_name, r"a.safetensors holds latents; expected samples"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "gone", "empty.txt", "latin.txt"])
def test_a_path_that_is_no_source_is_refused_with_its_name(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=name):
        open_source(tmp_path / name)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path):
    raw_samples.tar_shards(tmp_path)
    source = open_source(tmp_path)
    (tmp_path / "shard-2.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-2.tar is truncated"):
        source.record(11)
