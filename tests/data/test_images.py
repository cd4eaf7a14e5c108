"""Images are cut, resized and ordered as the documents say; broken ones are named."""

from __future__ import annotations

import io

import numpy
import pytest
import raw_samples
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdistill.data import EncodedData, ImageData, InMemoryData, Prefetched, Record
from fastdistill.data.pixels import decode
from fastdistill.engine.encode import EncodeSettings, encode

SIDE, COUNT = raw_samples.SIDE, raw_samples.COUNT


def as_tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1


def test_an_image_of_the_right_size_is_its_pixels_in_the_unit_range():
    array = raw_samples.pixels(0)
    found = decode(Record("a", raw_samples.encoded(array)), SIDE)
    torch.testing.assert_close(found.as_float(), as_tensor(array))
    assert found.as_float().dtype == torch.float32
    assert (found.original_size, found.crop) == ((SIDE, SIDE), (0, 0))


def test_the_central_square_is_kept_and_its_place_in_the_resized_image_is_said():
    array = numpy.zeros((40, 100, 3), dtype=numpy.uint8)
    array[:, 30:70] = 255  # the central square
    found = decode(Record("a", raw_samples.encoded(array)), 20)
    assert found.pixels.shape == (3, 20, 20)
    assert (found.pixels[:, :, 1:-1] == 255).all()
    assert (found.pixels > 200).all()  # at its border the filter sees beyond the square
    assert found.original_size == (40, 100)
    assert found.crop == (0, 15)  # 50 wide when resized


def test_resizing_averages_what_it_makes_smaller():
    array = numpy.tile(numpy.array([[0, 255], [255, 0]], dtype=numpy.uint8)[..., None], (32, 32, 3))
    found = decode(Record("a", raw_samples.encoded(array)), 16)
    assert found.as_float().abs().max() < 0.15  # grey, without the pattern


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_eight_bits_are_read_as_colours(mode):
    stream = io.BytesIO()
    Image.fromarray(raw_samples.pixels(0)).convert(mode).save(stream, "TIFF")
    assert decode(Record("a", stream.getvalue()), SIDE).pixels.shape == (3, SIDE, SIDE)


def test_the_camera_s_orientation_is_applied():
    array = raw_samples.pixels(0, 6, 6)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = decode(Record("a", raw_samples.encoded(array, exif=exif)), 6)
    assert torch.equal(found.pixels, torch.from_numpy(array[::-1, ::-1].copy()).permute(2, 0, 1))


def test_float_arrays_are_samples_as_they_are():
    latent = torch.randn(4, 5, 5)
    assert torch.equal(decode(Record("a", latent), 99).as_float(), latent)


def _truncated():
    array = raw_samples.pixels(0, 64, 64)
    return raw_samples.encoded(array, "JPEG")[:1000]


def _deep():
    stream = io.BytesIO()
    Image.fromarray(raw_samples.pixels(0)[..., 0].astype(numpy.uint16)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "no image that Pillow knows"),
        (b"", "no image that Pillow knows"),
        (_truncated(), "truncated"),
        (_deep(), "8 bits"),
        (torch.tensor([[[float("nan")]]]), "nan"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"shape \[1, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "int32"),
    ],
)
def test_what_cannot_be_decoded_is_named(content, message):
    with pytest.raises(ValueError, match=f"shard, 7.*{message}"):
        decode(Record("shard, 7", content), SIDE)


def storages(folder):
    """The same data set in every storage."""
    images = torch.stack([as_tensor(raw_samples.pixels(index)) for index in range(COUNT)])
    yield InMemoryData(images, torch.arange(COUNT) // 4)
    yield ImageData(raw_samples.image_folder(folder / "images"), SIDE)
    yield ImageData(raw_samples.tar_shards(folder / "tar"), SIDE)
    yield ImageData(raw_samples.array_files(folder / "arrays"), SIDE, workers=1)
    settings = EncodeSettings(size=SIDE, shard_size=5)
    encode(folder / "images", folder / "encoded", None, settings, say=lambda line: None)
    yield EncodedData(folder / "encoded")
    yield Prefetched(EncodedData(folder / "encoded"))


def test_the_order_is_the_same_in_every_storage_at_every_number_of_processes(tmp_path):
    """Batches of 8 over 12 samples cross the ends of epochs."""
    first, *others = storages(tmp_path)
    for step in range(4):
        expected = first.batch(5, step, 8)
        for data in others:
            for size in (1, 2, 4):
                share = 8 // size
                shares = [
                    data.batch(5, step, 8, slice(rank * share, (rank + 1) * share))
                    for rank in range(size)
                ]
                for field in ("samples", "condition", "uncondition"):
                    whole = torch.cat([getattr(part, field) for part in shares])
                    torch.testing.assert_close(whole, getattr(expected, field))
    assert not torch.equal(first.batch(5, 0, 8).condition, first.batch(6, 0, 8).condition)


def test_every_epoch_visits_every_sample_once(tmp_path):
    data = ImageData(raw_samples.image_folder(tmp_path), SIDE)
    seen = torch.cat([data.batch(0, step, 6).samples for step in range(2)])
    assert len(seen.flatten(1).unique(dim=0)) == COUNT


def test_a_broken_image_is_named_by_the_batch_that_meets_it(tmp_path):
    data = ImageData(raw_samples.image_folder(tmp_path), SIDE)
    (tmp_path / "class-1" / "0005.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0005.png cannot be used"):
        data.batch(0, 0, COUNT)


def test_an_image_that_is_gone_is_named(tmp_path):
    data = ImageData(raw_samples.image_folder(tmp_path), SIDE)
    (tmp_path / "class-1" / "0005.png").unlink()
    with pytest.raises(ValueError, match=r"0005.png cannot be read: No such file"):
        data.batch(0, 0, COUNT)


def test_latents_of_npy_files_are_a_data_set(tmp_path):
    for index in range(3):
        numpy.save(tmp_path / f"{index}.npy", numpy.full((4, 2, 2), index, dtype=numpy.float16))
    data = ImageData(tmp_path, SIDE)
    assert data.shape == (4, 2, 2)
    assert sorted(data.batch(0, 0, 3).samples[:, 0, 0, 0].tolist()) == [0, 1, 2]
    numpy.save(tmp_path / "1.npy", numpy.zeros((4, 3, 3), dtype=numpy.float16))
    with pytest.raises(ValueError, match=r"1.npy has shape \[4, 3, 3\], expected \[4, 2, 2\]"):
        data.batch(0, 0, 3)


def test_arrays_are_never_unpickled(tmp_path):
    numpy.save(tmp_path / "0.npy", numpy.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"0.npy is no array that can be read"):
        ImageData(tmp_path, SIDE)


def test_labels_out_of_range_are_named(tmp_path):
    folder = raw_samples.image_folder(tmp_path)
    assert ImageData(folder, SIDE, classes=10).batch(0, 0, 4).uncondition.tolist() == [10] * 4
    with pytest.raises(ValueError, match=r"0008.png has label 2; expected 0 to 1"):
        ImageData(folder, SIDE, classes=2)


def test_prompts_are_no_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=r"prompts.txt, prompt 1 is text alone; expected images"):
        ImageData(tmp_path / "prompts.txt", SIDE)


def test_negative_labels_of_arrays_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"samples": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([0, -1])}, file)
    with pytest.raises(ValueError, match=r"a.safetensors: expected labels from 0"):
        ImageData(file, SIDE)
