"""Training from files, prefetched, killed and resumed, is bitwise training from memory."""

from __future__ import annotations

import torch
from small import small_recipe
from test_trainer import assert_bitwise, trainer, weights

from fastdistill.data import EncodedData, Prefetched, digits
from fastdistill.engine.checkpoint import Checkpoint
from fastdistill.engine.encoded_writer import EncodedWriter


def encoded_digits(folder) -> EncodedData:
    data = digits()
    null = {"labels": torch.tensor([data.classes])}
    writer = EncodedWriter(
        folder, len(data.samples), data.shape, shard_size=500, classes=data.classes, null=null
    )
    for shard in writer.missing:
        rows = slice(writer.rows(shard).start, writer.rows(shard).stop)
        writer.write(shard, {"samples": data.samples[rows], "labels": data.labels[rows]})
    assert writer.finish()
    return EncodedData(folder)


def test_files_give_bitwise_the_training_that_memory_gives(tmp_path):
    recipe = small_recipe("training.steps=12", "training.checkpoint_every=5")
    reference = trainer(recipe=recipe)
    reference.fit()
    with Prefetched(encoded_digits(tmp_path / "set")) as data:
        made = trainer(tmp_path / "checkpoints", data, recipe=recipe)
        made.fit()
        assert_bitwise(weights(made), weights(reference))
        assert (data.batches, data.foreseen) == (12, 11)
        again = trainer(tmp_path / "checkpoints", data, recipe=recipe)
        again.resume(Checkpoint(tmp_path / "checkpoints" / "distill-000000005", "distill", 5))
        again.fit()
        assert_bitwise(weights(again), weights(reference))
        assert (data.batches, data.foreseen) == (19, 16)
