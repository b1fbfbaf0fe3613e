"""One pass over a set of images: statistics of networks' outputs, and, where a metric needs them, the outputs.

    measured = measure(images, [network], state, keep=[("inception", "pool")])
    measured.statistics["inception", "pool"], measured.rows["inception", "pool"]          # on rank 0

Every process takes a range of batches. A batch is the same images whatever the number of processes, so features are
equal to the bit on a CPU, and statistics, which are merged, to about 1e-15 relative. Everything else is computed on
rank 0 from the features in the order of the images.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dlc.machine.cli import progress
from dlc.machine.exact import set_exact_numerics, side_by_side
from dlc.machine.processes import files_group
from evaluation.metrics import FeatureStatistics
from evaluation.sets import ImageSet

if TYPE_CHECKING:
    from accelerate import PartialState

DIGEST = 16  # bytes per image
BATCH = dict(cuda=64, cpu=8)  # images, which decide rounding; on a CPU each core has a batch
Output = tuple[str, str]  # name of a network, name of one of its outputs


@dataclass
class Measured:
    """What a pass found. All but `count` only on rank 0.

    statistics: of outputs. rows: {output: (N, D) on the CPU} of the outputs that were to be kept. digest: of all pixels
    and their size; the same for a folder and its .npz. twins: index of an image and of an earlier one that it equals.
    blank: indices of images of one colour.
    """

    count: int
    statistics: dict[Output, FeatureStatistics] = field(default_factory=dict)
    rows: dict[Output, torch.Tensor] = field(default_factory=dict)
    digest: str = ""
    twins: list[tuple[int, int]] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)


def share(count: int, batch: int, rank: int, processes: int) -> tuple[int, int]:
    """The range of images of one process: whole batches, about equally many per process."""
    batches = -(-count // batch)
    low, high = (batches * k // processes * batch for k in (rank, rank + 1))
    return min(low, count), min(high, count)


def measure(
    images: ImageSet,
    networks: Iterable[Callable],
    state: "PartialState",
    statistics: list[Output] | None = None,
    keep: Iterable[Output] = (),
    batch_size: int | None = None,
    desc: str = "features",
) -> Measured:
    """Run networks over a set of images, in all processes, by sums that depend neither on them nor on the cores.

    Args:
        networks: as those of NETWORKS; may be none, for digests alone.
        state: accelerate's PartialState.
        statistics: the outputs whose statistics are wanted; None: all of all networks.
        keep: the outputs whose rows are kept.
        batch_size: images per batch; another one changes how features round.

    Raises ValueError, naming the file, for images that cannot be read, and for features that are not finite.
    """
    widths = {(one.name, output): width for one in networks for output, width in one.outputs.items()}
    sums = {key: FeatureStatistics(widths[key]) for key in (widths if statistics is None else statistics)}
    kept = {key: [] for key in keep}
    batch_size = batch_size or BATCH[state.device.type]
    start, stop = share(images.count, batch_size, state.process_index, state.num_processes)
    hashes, blank = [], []

    @torch.inference_mode()
    def run(batch):
        batch = torch.from_numpy(batch.copy())  # the arrays of a stream are read-only
        digests = [hashlib.blake2b(image.numpy(), digest_size=DIGEST).digest() for image in batch]
        one_colour = (batch == batch[:, :1, :1]).flatten(1).all(dim=1).tolist()
        # filled up with copies of the first image: rounding depends on the shape
        full = torch.cat([batch, batch[:1].expand(batch_size - len(batch), -1, -1, -1)])
        found = {(one.name, name): rows[: len(batch)] for one in networks for name, rows in one(full).items()}
        return digests, one_colour, found

    set_exact_numerics()
    with progress(total=stop - start, unit="img", desc=desc, disable=not state.is_main_process, delay=1) as bar:
        batches = images.batches(start, stop, batch_size)
        for digests, one_colour, found in side_by_side(run, batches, state.device):
            hashes += digests
            blank += one_colour
            for key, one in sums.items():
                one.update(found[key])
            for key, rows in kept.items():
                rows.append(found[key].cpu())
            bar.update(len(digests))

    # ---------------------------------------------------------------------- what all processes found, on rank 0
    for one in sums.values():
        one.add_waiting()
    # one tensor each: many small ones travel slowly, and views would travel with all that they are views of
    kept = {key: [torch.cat(rows)] if rows else [] for key, rows in kept.items()}
    parts = on_rank_0((hashes, blank, kept, sums), state)
    if parts is None:
        return Measured(images.count)
    hashes, blank, kept, sums = zip(*parts)
    digest, twins = summary([*itertools.chain(*hashes)], images.size)
    return Measured(
        images.count,
        {key: FeatureStatistics.merged([one[key] for one in sums]) for key in sums[0]},
        {key: torch.cat([rows for one in kept for rows in one[key]]) for key in kept[0]},
        digest,
        twins,
        [index for index, one_colour in enumerate(itertools.chain(*blank)) if one_colour],
    )


def on_rank_0(value: object, state: "PartialState") -> list | None:
    """A picklable object of each process, in the order of the ranks, on rank 0; None elsewhere."""
    if state.num_processes == 1:
        return [value]
    values = [None] * state.num_processes if state.is_main_process else None
    dist.gather_object(value, values, group=files_group())
    return values


def summary(hashes: list[bytes], size: tuple[int, int]) -> tuple[str, list[tuple[int, int]]]:
    """A digest of the digests of all images and of their size; and the pairs of equal ones: (an earlier, the index)."""
    digest = hashlib.sha256(f"{len(hashes)} x {size[0]} x {size[1]}".encode() + b"".join(hashes)).hexdigest()
    seen, twins = {}, []
    for index, one in enumerate(hashes):
        first = seen.setdefault(one, index)
        if first != index:
            twins.append((first, index))
    return digest, twins
