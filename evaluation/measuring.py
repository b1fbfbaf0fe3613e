"""One pass over a set of images: statistics of each network's features, and, where a metric needs them, the features.

    measured = measure(images, [network], state, keep=True)
    measured.statistics["inception", "pool"], measured.features["inception"]          # on rank 0

Every process takes a range of batches. A batch is the same images whatever the number of processes, so features are
equal to the bit on a CPU, and statistics, which are merged, to about 1e-15 relative. Everything else is computed on
rank 0 from the features in the order of the images.
"""

import contextlib
import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from dlc.machine.cli import progress
from dlc.machine.exact import in_batches, set_exact_numerics, side_by_side
from evaluation.metrics import FeatureStatistics
from evaluation.sets import ImageSet

DIGEST = 16  # bytes per image
BATCH = dict(cuda=64, cpu=8)  # images, which decide rounding; on a CPU each core has a batch


@dataclass
class Measured:
    """What a pass found. All but `count` only on rank 0.

    statistics: {(network, output): FeatureStatistics}. features: {network: `pool` (N, D) float32 on the CPU}, empty
    unless kept. digest: of all pixels and their size; the same for a folder and its .npz. twins: index of an image and
    of an earlier one that it equals. blank: indices of images of one colour.
    """

    count: int
    statistics: dict[tuple[str, str], FeatureStatistics] = field(default_factory=dict)
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    digest: str = ""
    twins: list[tuple[int, int]] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)


def share(count: int, batch: int, rank: int, processes: int) -> tuple[int, int]:
    """The range of images of one process: whole batches, about equally many per process."""
    batches = -(-count // batch)
    low, high = (batches * k // processes * batch for k in (rank, rank + 1))
    return min(low, count), min(high, count)


def counts_of(count: int, batch: int, state) -> list[int]:
    """How many of `count` images each process has."""
    shares = [share(count, batch, rank, state.num_processes) for rank in range(state.num_processes)]
    return [stop - start for start, stop in shares]


@contextlib.contextmanager
def exact_numerics():
    """Sums that depend neither on the cores nor on the processes: see `set_exact_numerics`."""
    threads = torch.get_num_threads()
    set_exact_numerics()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(
    images: ImageSet,
    networks,
    state,
    keep: tuple[str, ...] = (),
    outputs: dict[str, tuple[str, ...]] | None = None,
    batch_size: int | None = None,
    desc: str = "features",
) -> Measured:
    """Run networks over a set of images, in all processes.

    Args:
        networks: as NETWORKS makes them; may be none, for digests alone.
        state: accelerate's PartialState.
        keep: names of the networks whose features `pool` are kept.
        outputs: {network: outputs of which statistics are wanted}; None: all of all.
        batch_size: images per batch; another one changes how features round.

    Raises ValueError, naming the file, for images that cannot be read, and for features that are not finite.
    """
    outputs = {one.name: tuple(one.outputs) for one in networks} if outputs is None else outputs
    batch_size = batch_size or BATCH[state.device.type]
    start, stop = share(images.count, batch_size, state.process_index, state.num_processes)
    statistics = {
        (one.name, output): FeatureStatistics(one.outputs[output])
        for one in networks
        for output in outputs.get(one.name, ())
    }
    kept = {name: [] for name in keep}
    digests, blank = [], []

    @torch.inference_mode()
    def run(batch):
        batch = torch.from_numpy(batch.copy())  # the arrays of a stream are read-only
        hashes = [hashlib.blake2b(image.numpy(), digest_size=DIGEST).digest() for image in batch]
        one_colour = (batch == batch[:, :1, :1]).flatten(1).all(dim=1).tolist()
        return hashes, one_colour, {one.name: outputs_of(one, batch, batch_size) for one in networks}

    with (
        exact_numerics(),
        progress(total=stop - start, unit="img", desc=desc, disable=not state.is_main_process, delay=1) as bar,
    ):
        batches = images.batches(start, stop, batch_size)
        for hashes, one_colour, features in side_by_side(run, batches, state.device):
            blank += [start + len(digests) + i for i, is_blank in enumerate(one_colour) if is_blank]
            digests += hashes
            for name, found in features.items():
                for output in outputs.get(name, ()):
                    statistics[name, output].update(found[output])
                if name in kept:
                    kept[name].append(found["pool"].cpu())
            bar.update(len(hashes))
    return joined(images, state, batch_size, statistics, kept, digests, blank, networks)


def outputs_of(network, batch, size):
    """A network's outputs for a batch, which is filled up to `size` with copies: rounding depends on the shape."""
    outputs = in_batches(lambda rows: torch.cat(list(network(rows).values()), dim=1), batch, size)
    return dict(zip(network.outputs, outputs.split(list(network.outputs.values()), dim=1)))


#################################################################################
#                               Joining processes                               #
#################################################################################


def joined(images, state, batch_size, statistics, kept, digests, blank, networks) -> Measured:
    """What all processes measured, on rank 0; elsewhere the count alone."""
    counts = counts_of(images.count, batch_size, state)
    hashes = gather(
        torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST)
        if digests
        else torch.empty(0, DIGEST, dtype=torch.uint8),
        counts,
        state,
    )
    flags = torch.zeros(images.count, dtype=torch.uint8)
    flags[blank] = 1
    start, stop = share(images.count, batch_size, state.process_index, state.num_processes)
    flags = gather(flags[start:stop, None], counts, state)
    measured = Measured(images.count)
    widths = {one.name: one.outputs["pool"] for one in networks}
    for name, rows in kept.items():
        rows = torch.cat(rows) if rows else torch.empty(0, widths[name])
        rows = gather(rows, counts, state)
        if rows is not None:
            measured.features[name] = rows
    for key, one in statistics.items():
        merged = merge(one, counts, state)
        if merged is not None:
            measured.statistics[key] = merged
    if state.is_main_process:
        measured.digest, measured.twins = summary(hashes.numpy(), images.size)
        measured.blank = flags[:, 0].nonzero().flatten().tolist()
    return measured


def gather(rows: torch.Tensor, counts: list[int], state) -> torch.Tensor | None:
    """The rows (n, ...) of all processes in the order of the ranks, on rank 0's CPU; None elsewhere."""
    if state.num_processes == 1:
        return rows
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=state.device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if state.is_main_process else None
    dist.gather(padded, parts, dst=0)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts)]) if parts else None


def merge(statistics: FeatureStatistics, counts: list[int], state) -> FeatureStatistics | None:
    """The statistics of all processes, merged in the order of the ranks, on rank 0; None elsewhere."""
    if state.num_processes == 1:
        return statistics
    packed = torch.cat([statistics.mean[None], statistics.scatter]).to(state.device)
    parts = [torch.empty_like(packed) for _ in counts] if state.is_main_process else None
    dist.gather(packed, parts, dst=0)
    if not parts:
        return None
    merged = FeatureStatistics(statistics.dim)
    for part, count in zip(parts, counts):
        part = part.cpu()
        merged.add_moments(count, part[0], part[1:])
    return merged


def summary(hashes: np.ndarray, size) -> tuple[str, list[tuple[int, int]]]:
    """A digest of all images (N, DIGEST) and their size, and the pairs of equal ones: (an earlier one, the index)."""
    digest = hashlib.sha256(f"{len(hashes)} x {size[0]} x {size[1]}".encode() + hashes.tobytes()).hexdigest()
    seen, twins = {}, []
    for index, one in enumerate(map(bytes, hashes)):
        first = seen.setdefault(one, index)
        if first != index:
            twins.append((first, index))
    return digest, twins
