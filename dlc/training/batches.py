"""Batches of training: which rows each step trains on, and their latents and conditions.

The data are an endless sequence of shuffled epochs, cut into global batches: no row is repeated or left out within an
epoch, and a batch may span two. The global sample index counts the samples of this sequence. The row at each index is a
function of (seed, index), so neither a restart nor the number of processes changes what is trained on.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from dlc.machine.noise import Stream, normal, permutation
from dlc.machine.readers import read_ahead
from dlc.training.stop import StopRequest

if TYPE_CHECKING:
    from dlc.data import Features
    from dlc.training.image_batches import Images

Batch = dict[str, torch.Tensor]


def gather(arrays: Mapping[str, object], rows: np.ndarray) -> Batch:
    """Rows (n,) of arrays, such as `NpyRows`, by name; of those that are not None."""
    found = {name: array.gather(rows) for name, array in arrays.items() if array is not None}
    # uint16 codes become int32: torch has few operations on uint16
    return {
        name: torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)
        for name, values in found.items()
    }


class TrainingBatches(Dataset):
    """One process's share of each step's global batch; item `step` is gathered at once.

    Step s covers global_batch sample indices from first_of(s) on, of which each process takes an equal run.

    Args:
        data: what has the rows: a `Features`, for example.
        arrays: what a batch holds, by name: aligned with the rows.
        only: the rows to train on, (n,) int64 [all].
        first_step, first_index: where the run resumes: this step begins with this sample index.
    """

    def __init__(
        self,
        data: "Features | Images",
        arrays: Mapping[str, object],
        *,
        only: np.ndarray | None = None,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        first_index: int = 0,
    ):
        self.data, self.arrays, self.seed = data, arrays, seed
        self.only, self.rows_per_epoch = only, data.count if only is None else len(only)
        self.global_batch, self.local_batch, self.rank = global_batch, global_batch // world_size, rank
        self.first_step, self.first_index = first_step, first_index
        self.orders = {}  # only the current epoch's

    def first_of(self, step: int) -> int:
        """The sample index that a step begins with."""
        return self.first_index + (step - self.first_step) * self.global_batch

    def last_step(self, epochs: int) -> int:
        """The number, counted from 1, of the step that completes these epochs; at least first_step."""
        left = epochs * self.rows_per_epoch - self.first_index
        return self.first_step + max(0, -(-left // self.global_batch))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The feature row at each sample index."""
        epochs, offsets = indices // self.rows_per_epoch, indices % self.rows_per_epoch
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self.orders:
                self.orders = {epoch: permutation(self.seed, Stream.TRAIN_ORDER, epoch, self.rows_per_epoch)}
            rows[epochs == epoch] = self.orders[epoch][offsets[epochs == epoch]]
        return rows if self.only is None else self.only[rows]

    def __getitem__(self, step: int) -> Batch | OSError:
        """indices (n,) of the samples, and the arrays (n, ...) by name; or why they cannot be read, as a value: readers
        are other processes."""
        first = self.first_of(step) + self.rank * self.local_batch
        indices = np.arange(first, first + self.local_batch)
        try:
            return dict(indices=torch.from_numpy(indices), **self.gather(self.rows(indices)))
        except (ValueError, OSError) as error:
            return OSError(f"step {step + 1:,}: {error}")

    def gather(self, rows: np.ndarray) -> Batch:
        """The arrays of these rows of the data."""
        return gather(self.arrays, rows)

    def shown(self, count: int, device: torch.device) -> Batch:
        """The arrays of at most `count` rows that are trained on, evenly spaced: rows often go class by class."""
        rows = np.unique(np.linspace(0, self.rows_per_epoch - 1, count).astype(int))
        found = self.gather(rows if self.only is None else self.only[rows])
        return {name: tensor.to(device) for name, tensor in found.items()}


def draw_posterior(moments: torch.Tensor, seed: int, indices: torch.Tensor) -> torch.Tensor:
    """Latents (n, C, h, w) drawn from moments (n, 2C, h, w), anew at each sample index."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * normal(seed, Stream.TRAIN_POSTERIOR, indices, mean.shape[1:])


def load_batches(
    batches: Dataset, steps: range, stop_request: StopRequest, num_workers: int, pin_memory: bool
) -> Iterator[Batch | OSError]:
    """The batch of each of these steps, read as many steps ahead as the processes need to agree on a stop.

    So all of them stop with a checkpoint before one that cannot be read has its turn, unless it is one of the first.
    """
    ahead = deque()
    try:
        for batch in read_ahead(batches.__getitem__, steps, num_workers, pin_memory):
            if isinstance(batch, OSError):
                raise batch
            ahead.append(batch)
            if len(ahead) > stop_request.steps:
                yield ahead.popleft()
    except OSError as error:
        stop_request.ask(str(error))
        ahead.append(error)
    yield from ahead
