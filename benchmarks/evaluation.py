"""Speed and memory of evaluation at the size of published numbers, beside ADM's way in NumPy and SciPy.

    python -m benchmarks.evaluation

Features are made up: 50,000 samples and 10,000 reference images of 2048 dimensions, non-negative, with correlations and
norms like Inception's. Each part runs in a process of its own on the same files; memory is that process's peak, its
imports and features included. CPU seconds count all threads: on a machine shared with other work they say more than
seconds, and on a CPU the ratio is theirs. ADM's way takes the root of the covariances' product by SciPy's sqrtm. The
Inception pass runs the real network with random weights. `OMP_NUM_THREADS=1` runs all of it on one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import ON_GPU, flags, peak_kilobytes, record, run_script
from dlc.machine.processes import start_processes
from evaluation.feature_networks import InceptionNetwork
from evaluation.inception import InceptionV3
from evaluation.measuring import measure
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.sets import open_images

DIM = 2048
Moments = tuple[np.ndarray, np.ndarray]  # mean and covariance
INCEPTION = "Inception pass"
PARTS = STATISTICS, DISTANCE = "statistics", "Frechet distance"


def make_features(path: Path, count: int, seed: int) -> None:
    """Write features (count, DIM) float32 to a .npy."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(96, DIM)).astype(np.float32) / 12
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (count, DIM))
    for start in range(0, count, 2000):
        n = min(2000, count - start)
        common, own = (random.standard_normal((n, width), dtype=np.float32) for width in (96, DIM))
        rows[start : start + n] = np.abs(common @ mix + 0.3 * own + 0.02 * seed) * 0.5


def numpy_statistics(rows: np.ndarray) -> Moments:
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def scipy_distance(a: Moments, b: Moments) -> float:
    from scipy.linalg import sqrtm

    (mean_a, A), (mean_b, B) = a, b
    root = sqrtm(A @ B)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * np.trace(root).real)


def inception_pass(root: Path) -> tuple:
    """The real pass, timed, over an .npz of 256 x 256 pixels, with random weights."""
    state = start_processes()
    network = InceptionNetwork.__new__(InceptionNetwork)
    network.module, network.device = InceptionV3().to(state.device), state.device
    images = open_images(root / "images.npz", "SAMPLES")
    measure(images, [network], state, statistics=[])  # once, to warm up
    keep = {("inception", "pool"): torch.float32}
    return timed(lambda: measure(images, [network], state, keep=keep) and [images.count])


def our_statistics(rows: np.ndarray) -> Moments:
    statistics = FeatureStatistics(DIM)
    for some in np.array_split(rows, len(rows) // 64):
        statistics.update(torch.from_numpy(some))
    return statistics.mean.numpy(), statistics.covariance.numpy()


def timed(function: Callable) -> tuple:
    """The seconds and the CPU seconds of all threads that function() takes, and the numbers it returns."""
    start, cpu_start = time.perf_counter(), time.process_time()
    found = function()
    return time.perf_counter() - start, time.process_time() - cpu_start, *found


def work(part: str, root: Path) -> tuple:
    """One part, timed; see `timed`."""
    if part == INCEPTION:
        return inception_pass(root)
    ours, name = part.startswith("ours"), part.split(": ")[1]
    if name == DISTANCE:  # of statistics as they are stored
        moments = [np.load(root / f"{one}.moments.npz") for one in ("reference", "samples")]
        moments = [(one["mean"], one["covariance"]) for one in moments]
        statistics = [FeatureStatistics.from_moments(*one) for one in moments]
        return timed(lambda: [frechet_distance(*statistics) if ours else scipy_distance(*moments)])
    samples = np.load(root / "samples.npy")
    return timed(lambda: [one.sum() for one in (our_statistics if ours else numpy_statistics)(samples)])


def measure_part(part: str, root: Path) -> tuple[tuple[float, float], float, list[float]]:
    """Seconds, CPU seconds, peak of memory in GiB, and result of a part in a process of its own."""
    said = run_script("-m", "benchmarks.evaluation", *flags(part=part, root=root))
    kilobytes, seconds, cpu_seconds, *result = map(float, said.splitlines()[-1].split())
    return (seconds, cpu_seconds), kilobytes / 2**20, result


def row_of(
    part: str, size: str, seconds: tuple, memory: float, first: tuple = (), difference: float | None = None
) -> dict:
    by = 0 if ON_GPU else 1
    measured = {"seconds": seconds[0], "CPU s": seconds[1], "images/s": None, "memory GiB": memory}
    times = first[by] / seconds[by] if first else None
    return {"": part, "size": size, **measured, "times ADM's way": times, "differs by": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=50_000, help="samples [%(default)s]")
    add("--images", type=int, default=4096 if ON_GPU else 48, help="images of the Inception pass [%(default)s here]")
    add("--part", help=argparse.SUPPRESS)  # in a process of its own
    add("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        found = work(args.part, args.root)
        return print(peak_kilobytes(), *found)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        for name, count, seed in (("samples", args.rows, 1), ("reference", 10_000, 0)):
            make_features(root / f"{name}.npy", count, seed)
            mean, covariance = numpy_statistics(np.load(root / f"{name}.npy"))
            np.savez(root / f"{name}.moments.npz", mean=mean, covariance=covariance)
        images = np.random.default_rng(0).integers(0, 256, (args.images, 256, 256, 3), dtype=np.uint8)
        np.savez(root / "images.npz", arr_0=images)
        seconds, memory, _ = measure_part(INCEPTION, root)
        rows.append(row_of(INCEPTION, f"{args.images} images", seconds, memory))
        rows[-1]["images/s"] = args.images / seconds[0]
        for part, size in ((STATISTICS, f"{args.rows:,} x {DIM}"), (DISTANCE, f"{DIM} x {DIM}")):
            theirs, their_memory, wanted = measure_part(f"ADM's way: {part}", root)
            seconds, memory, found = measure_part(f"ours: {part}", root)
            difference = max(abs(a - b) / abs(b) for a, b in zip(found, wanted))
            rows.append(row_of(f"ADM's way: {part}", size, theirs, their_memory, theirs))
            rows.append(row_of(f"ours: {part}", size, seconds, memory, theirs, difference))
            record("evaluation", rows)  # after each part: the last ones take long


if __name__ == "__main__":
    main()
