"""One pass over a set of images: statistics of networks' outputs, and, where a metric needs them, the outputs.

    measured = measure(images, [network], state, keep={("inception", "pool"): torch.float32})
    measured.statistics["inception", "pool"], measured.rows["inception", "pool"]          # on rank 0

Every process takes a range of batches. A batch is the same images whatever the number of processes, so features are
equal to the bit on a CPU, and statistics, which are merged, to about 1e-15 relative. Everything else is computed on
rank 0 from the features in the order of the images.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from dlc.machine.cli import progress
from dlc.machine.exact import set_exact_numerics, side_by_side
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


@contextlib.contextmanager
def exact_numerics() -> Iterator[None]:
    """Sums that depend neither on the cores nor on the processes: see `set_exact_numerics`."""
    threads = torch.get_num_threads()
    set_exact_numerics()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(
    images: ImageSet,
    networks: Iterable[Callable],
    state: "PartialState",
    statistics: list[Output] | None = None,
    keep: dict[Output, torch.dtype] | None = None,
    batch_size: int | None = None,
    desc: str = "features",
) -> Measured:
    """Run networks over a set of images, in all processes.

    Args:
        networks: as those of NETWORKS; may be none, for digests alone.
        state: accelerate's PartialState.
        statistics: the outputs whose statistics are wanted; None: all of all networks.
        keep: the outputs whose rows are kept, and as which type.
        batch_size: images per batch; another one changes how features round.

    Raises ValueError, naming the file, for images that cannot be read, and for features that are not finite.
    """
    widths = {(one.name, output): width for one in networks for output, width in one.outputs.items()}
    sums = {key: FeatureStatistics(widths[key]) for key in (widths if statistics is None else statistics)}
    kept = {key: [torch.empty(0, widths[key], dtype=dtype)] for key, dtype in (keep or {}).items()}
    batch_size = batch_size or BATCH[state.device.type]
    shares = [share(images.count, batch_size, rank, state.num_processes) for rank in range(state.num_processes)]
    start, stop = shares[state.process_index]
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

    with (
        exact_numerics(),
        progress(total=stop - start, unit="img", desc=desc, disable=not state.is_main_process, delay=1) as bar,
    ):
        batches = images.batches(start, stop, batch_size)
        for digests, one_colour, found in side_by_side(run, batches, state.device):
            hashes += digests
            blank += one_colour
            for key, one in sums.items():
                one.update(found[key])
            for key, rows in kept.items():
                rows.append(found[key].to(rows[0].dtype).cpu())
            bar.update(len(digests))

    # ---------------------------------------------------------------------- what all processes found, on rank 0
    counts = [stop - start for start, stop in shares]
    hashes = torch.frombuffer(bytearray(b"".join([bytes(DIGEST), *hashes])), dtype=torch.uint8).view(-1, DIGEST)[1:]
    hashes, blank = gathered(hashes, counts, state), gathered(torch.tensor(blank, dtype=torch.uint8), counts, state)
    rows = {key: gathered(torch.cat(parts), counts, state) for key, parts in kept.items()}
    sums = {key: merged(one, counts, state) for key, one in sums.items()}
    if not state.is_main_process:
        return Measured(images.count)
    digest, twins = summary(hashes.numpy(), images.size)
    return Measured(images.count, sums, rows, digest, twins, blank.nonzero().flatten().tolist())


def gathered(rows: torch.Tensor, counts: list[int], state: "PartialState") -> torch.Tensor | None:
    """The rows (n, ...) of all processes in the order of the ranks, on rank 0's CPU; None elsewhere."""
    if state.num_processes == 1:
        return rows
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=state.device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if state.is_main_process else None
    dist.gather(padded, parts, dst=0)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts)]) if parts else None


def merged(statistics: FeatureStatistics, counts: list[int], state: "PartialState") -> FeatureStatistics | None:
    """The statistics of all processes, merged in the order of the ranks, on rank 0; None elsewhere."""
    if state.num_processes == 1:
        return statistics
    packed = torch.cat([statistics.mean[None], statistics.scatter]).to(state.device)
    parts = [torch.empty_like(packed) for _ in counts] if state.is_main_process else None
    dist.gather(packed, parts, dst=0)
    if not parts:
        return None
    total = FeatureStatistics(statistics.dim)
    for count, part in zip(counts, parts):
        part = part.cpu()
        total.add_moments(count, part[0], part[1:])
    return total


def summary(hashes: np.ndarray, size: tuple[int, int]) -> tuple[str, list[tuple[int, int]]]:
    """A digest of all images (N, DIGEST) and their size, and the pairs of equal ones: (an earlier one, the index)."""
    digest = hashlib.sha256(f"{len(hashes)} x {size[0]} x {size[1]}".encode() + hashes.tobytes()).hexdigest()
    seen, twins = {}, []
    for index, one in enumerate(map(bytes, hashes)):
        first = seen.setdefault(one, index)
        if first != index:
            twins.append((first, index))
    return digest, twins
