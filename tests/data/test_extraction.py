"""The shard pipeline without images or networks: batches, whole shards, and the order of what is written."""

import threading

import numpy as np
import pytest
import torch

from dlc.data import Features, FeatureWriter, Manifest
from dlc.data.extraction import BatchEncoder, batches_of, extract, whole_shards
from dlc.machine.exact import in_batches, side_by_side

CPU = torch.device("cpu")


@pytest.mark.parametrize("count, shard_size, batch_size", [(15, 4, 2), (15, 4, 8), (7, 7, 3), (1, 4, 2), (8, 4, 4)])
def test_batches_never_cross_a_shard(count, shard_size, batch_size):
    shards = range(-(-count // shard_size))
    batches = batches_of(shards, count, shard_size, batch_size)
    assert sum(batches, []) == list(range(count))
    assert all(len(batch) <= batch_size and batch[0] // shard_size == batch[-1] // shard_size for batch in batches)
    assert batches_of([shards[-1]], count, shard_size, batch_size) == [
        batch for batch in batches if batch[0] // shard_size == shards[-1]
    ]


def test_batches_are_joined_to_whole_shards():
    """With what was skipped; a batch without a readable image counts; the bar is told of each."""
    batches, seen = batches_of(range(3), 9, 4, 3), []
    encoded = [
        (
            batch,
            dict(x=np.array([i for i in batch if i % 4 != 3])),
            [[str(i), "broken"] for i in batch if i % 4 == 3],
            1,
        )
        for batch in batches
    ]
    shards = list(whole_shards(encoded, 9, 4, seen.append))
    assert [(shard, transparent) for shard, *_, transparent in shards] == [(0, 2), (1, 2), (2, 1)] and seen == [
        3,
        1,
        3,
        1,
        1,
    ]
    assert [arrays["x"].tolist() for _, arrays, *_ in shards] == [[0, 1, 2], [4, 5, 6], [8]]
    assert [skipped for *_, skipped, _ in shards] == [[["3", "broken"]], [["7", "broken"]], []]


def test_work_is_side_by_side_and_its_results_in_order():
    """The first item waits for the second, which a single thread would never begin."""
    second = threading.Event()

    def work(item):
        return item, second.set() if item else second.wait(30)

    assert [item for item, _ in side_by_side(work, range(2), CPU, threads=2)] == [0, 1]
    assert list(side_by_side(str, range(20), CPU)) == [str(item) for item in range(20)]


def test_batches_of_one_size():
    """The last one is filled up with copies of its first row."""
    seen = []

    def network(batch):
        seen.append(batch[:, 0].tolist())
        return batch * 10

    rows = torch.arange(1, 7).unsqueeze(1).expand(-1, 2)
    assert torch.equal(in_batches(network, rows, 4), rows * 10)
    assert seen == [[1, 2, 3, 4], [5, 6, 5, 5]]


class Pixels:
    """In place of the networks: latents whose numbers are the crops' first pixel, with std 0."""

    device, vae = CPU, None

    def moments(self, crops, batch_size):
        mean = crops[:, :, :1, :1, :1].float().expand(-1, -1, 4, 2, 2)
        return torch.cat([mean, torch.zeros_like(mean)], dim=2)


class Names:
    image_size = 16

    def name(self, index):
        return f"a/{index}"

    path = name
    source = property(lambda self: self)


@pytest.mark.parametrize("latents", ["sample", "mean", "moments"])
def test_extract_writes_every_row(latents, tmp_path):
    manifest = Manifest(
        image_size=16, latents=latents, dtype="float32", shard_size=4, L=None, V=None, classes=["a"], images=9, seed=0
    )
    writer = FeatureWriter(tmp_path, manifest)
    writer.start()
    batches = batches_of(range(3), 9, 4, 3)
    crops = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1, 1).expand(9, 2, 16, 16, 3)
    loaded = [(crops[batch], None, 0, [(5, "bad", True)] if 5 in batch else []) for batch in batches]
    extract(BatchEncoder(Pixels(), Names(), np.arange(9), manifest, 3), zip(batches, loaded), writer, 9)
    assert [path for path, _ in writer.finish(3).skipped] == ["a/5"]
    features, indices = Features(tmp_path), np.array([0, 1, 2, 3, 4, 6, 7, 8]).repeat(2)  # two crops per image
    rows = features.latents.gather(np.arange(features.count))
    assert rows.shape == (16, manifest.stored_channels, 2, 2)
    np.testing.assert_array_equal(rows[:, :4], np.broadcast_to(indices[:, None, None, None], (16, 4, 2, 2)))
    assert features.paths.gather(np.arange(16)).tolist() == [f"a/{index}" for index in indices]

    strict = BatchEncoder(Pixels(), Names(), np.arange(9), manifest, 3, strict=True)
    with pytest.raises(OSError, match="cannot read 'a/5' .bad.: fix the file, or leave out --strict"):
        extract(strict, zip(batches, loaded), writer, 9)
