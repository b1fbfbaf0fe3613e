"""Batches of training, by their place in the endless row of epochs."""
import signal
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dlc.cli import is_killed_reader
from dlc.features.rows import NpyRows, file_order
from dlc.noise import Stream, normal, permutation


class TrainingBatches(Dataset):
    """One process's part of each step's global batch; item `step` is gathered at once from the memory maps.

    Places in the endless row of epochs: step `first_step` covers the global_batch places from `first_place` on, and so
    forth. Of each step's places every process takes an equal run.

    Args:
        features: a `Features`.
        condition: the `NpyRows` to take conditions from.
        limit: codes or labels are 0..limit-1; None for vectors.
    """

    def __init__(self, features, condition, limit, seed, global_batch, rank=0, world_size=1, first_step=0,
                 first_place=0):
        self.features, self.condition, self.limit, self.seed = features, condition, limit, seed
        self.global_batch, self.local_batch, self.rank = global_batch, global_batch // world_size, rank
        self.first_step, self.first_place = first_step, first_place
        self.orders = {}                                    # the current epoch's

    def first_of(self, step):
        """The place that a step begins with."""
        return self.first_place + (step - self.first_step) * self.global_batch

    def rows(self, places):
        """The feature row at each place."""
        epochs, offsets = places // self.features.count, places % self.features.count
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self.orders:
                self.orders = {epoch: permutation(self.seed, Stream.TRAIN_ORDER, epoch, self.features.count)}
            rows[epochs == epoch] = self.orders[epoch][offsets[epochs == epoch]]
        return rows

    def __getitem__(self, step):
        """Places (n,), latents as stored (n, 4 or 8, S/8, S/8), conditions (n, ...)."""
        first = self.first_of(step) + self.rank * self.local_batch
        places = np.arange(first, first + self.local_batch)
        return torch.from_numpy(places), *self.gather(self.rows(places))

    def gather(self, rows):
        """Latents and conditions of feature rows, tensors."""
        condition = self.condition.gather(rows, limit=self.limit)
        # uint16 codes as int32: torch can do little with uint16
        condition = condition.astype(np.int32) if condition.dtype == np.uint16 else condition
        return torch.from_numpy(self.features.latents.gather(rows)), torch.from_numpy(condition)


def open_vectors(path, count):
    """The `NpyRows` of a folder of `.npy` (n, in_dim), count rows in all. Raises ValueError where it is not that."""
    paths = sorted(Path(path).glob("*.npy"), key=file_order)
    if not paths:
        raise ValueError(f"--condition-path {path} is not a folder of .npy files")
    vectors = NpyRows(paths, sample_ndim=1)
    if vectors.array(0).dtype.kind != "f":
        raise ValueError(f"--condition-path {path} holds values of type {vectors.array(0).dtype}, wanted floats")
    if len(vectors) != count:
        raise ValueError(f"--condition-path {path} has {len(vectors)} rows, the data {count}")
    return vectors


def draw_posterior(moments, seed, places):
    """Latents (n, 4, h, w) drawn from moments (n, 8, h, w), anew at each place in the row of epochs."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * normal(seed, Stream.TRAIN_POSTERIOR, places, mean.shape[1:])


def steps_from(loader, batches, steps, stop_request):
    """The loader's batch of each of these steps; should one of its readers be killed, batches read here from then on.

    The kernel kills a reader where memory is short. All processes then stop with a checkpoint, but until they have
    agreed on it this one must take part in their steps.
    """
    iterator = iter(loader)
    # torch raises this in the midst of whatever runs; without its handler it is noticed where a batch is waited for
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for step in steps:
        if stop_request.reason is None:
            try:
                yield next(iterator)
                continue
            except RuntimeError as error:
                if not is_killed_reader(error):
                    raise
                stop_request.ask("a data reader was killed, by the kernel where memory or /dev/shm is short: lower "
                                 "--num-workers")
        yield batches[step]
