"""Speed and memory of evaluation at the size of published numbers, beside ADM's way in NumPy and SciPy.

    python -m benchmarks.evaluation

Features are made up: 50,000 samples and 10,000 reference images of 2048 dimensions, non-negative, with correlations and
norms as Inception's have. Each part runs in a process of its own on the same files; memory is that process's peak,
its imports and the features included. CPU seconds count all threads: on a machine shared with other work they say more
than seconds, and on a CPU the ratio is theirs. ADM's way computes distances in blocks of 10,000 x 10,000, and takes the
root of the covariances' product by SciPy's sqrtm. The Inception pass runs the real network with random weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.npz import peak_kilobytes
from benchmarks.record import record

DIM, K = 2048, 3


def clock():
    """Seconds, and CPU seconds of all threads."""
    return time.perf_counter(), time.process_time()


def since(start):
    return tuple(now - then for now, then in zip(clock(), start))


def make_features(path, count, seed):
    """Write features (count, DIM) float32 to a .npy."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(96, DIM)).astype(np.float32) / 12
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (count, DIM))
    for start in range(0, count, 2000):
        n = min(2000, count - start)
        common, own = (random.standard_normal((n, width), dtype=np.float32) for width in (96, DIM))
        rows[start : start + n] = np.abs(common @ mix + 0.3 * own + 0.02 * seed) * 0.5


#################################################################################
#                           ADM's way, in NumPy and SciPy                       #
#################################################################################


def numpy_statistics(rows):
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def scipy_distance(a, b):
    from scipy.linalg import sqrtm

    (mean_a, A), (mean_b, B) = a, b
    root = sqrtm(A @ B)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * np.trace(root).real)


def numpy_distances(u, v, half):
    """Squared distances of a block, in float16 as ADM rounds them, or in float32."""
    if half:
        u, v = (one.astype(np.float16).astype(np.float32) for one in (u, v))
        norms = [(one.astype(np.float16) ** 2).astype(np.float32).sum(axis=1).astype(np.float16) for one in (u, v)]
        product = (u @ v.T).astype(np.float16)
    else:
        norms, product = [(one**2).sum(axis=1) for one in (u, v)], u @ v.T
    return np.maximum(norms[0][:, None] - 2 * product + norms[1], 0).astype(np.float32)


def numpy_precision_recall(reference, samples, half, block=10_000):
    def blocks(rows):
        return [rows[start : start + block] for start in range(0, len(rows), block)]

    def radii(rows):
        found = []
        for part in blocks(rows):
            distances = np.concatenate([numpy_distances(part, other, half) for other in blocks(rows)], axis=1)
            found.append(np.partition(distances, K, axis=1)[:, K].copy())
        return np.concatenate(found)

    radii_reference, radii_samples = radii(reference), radii(samples)
    in_reference, in_samples = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for i, one in enumerate(blocks(reference)):
        for j, other in enumerate(blocks(samples)):
            r, c = slice(i * block, i * block + len(one)), slice(j * block, j * block + len(other))
            distances = numpy_distances(one, other, half)
            in_reference[c] |= (distances <= radii_reference[r, None]).any(axis=0)
            in_samples[r] |= (distances <= radii_samples[c]).any(axis=1)
    return float(in_reference.mean()), float(in_samples.mean())


#################################################################################
#                                    Parts                                      #
#################################################################################


def inception_pass(root):
    """The images per second of the real pass over an .npz of 256 x 256 pixels, with random weights."""
    from dlc.machine.processes import start_processes
    from evaluation.inception import InceptionV3
    from evaluation.measuring import measure
    from evaluation.networks import InceptionNetwork
    from evaluation.sets import open_images

    state = start_processes()
    network = InceptionNetwork.__new__(InceptionNetwork)
    network.module, network.device = InceptionV3().to(state.device), state.device
    images = open_images(root / "images.npz", "SAMPLES")
    measure(images, [network], state, outputs={})  # once, to warm up
    start = clock()
    measure(images, [network], state, keep=("inception",))
    return start, images.count


def work(part, root):
    """One part: its seconds, and its result as numbers."""
    if part == "Inception pass":
        start, count = inception_pass(root)
        return since(start), [count]
    ours = part.startswith("ours")
    name = part.split(": ")[1]
    if name == "Frechet distance":  # of statistics as they are stored
        moments = [np.load(root / f"{one}.moments.npz") for one in ("reference", "samples")]
        moments = [(one["mean"], one["covariance"]) for one in moments]
        if ours:
            from evaluation.metrics import FeatureStatistics, frechet_distance

            moments = [FeatureStatistics.from_moments(*one) for one in moments]
        start = clock()
        distance = frechet_distance(*moments) if ours else scipy_distance(*moments)
        return since(start), [distance]
    samples = np.load(root / ("samples.npy" if name == "statistics" else "some.npy"))
    if name == "statistics":
        from evaluation.metrics import FeatureStatistics

        start = clock()
        if ours:
            statistics = FeatureStatistics(DIM)
            for rows in np.array_split(samples, len(samples) // 64):
                statistics.update(torch.from_numpy(rows))
            found = statistics.mean.numpy(), statistics.covariance.numpy()
        else:
            found = numpy_statistics(samples)
        seconds = since(start)
        return seconds, [float(one.sum()) for one in found]
    reference, half = np.load(root / "reference.npy"), name.endswith("float16")
    start = clock()
    if ours:
        from evaluation.metrics import precision_recall

        device = "cuda" if torch.cuda.is_available() else "cpu"
        pair = [torch.from_numpy(one).to(device) for one in (reference, samples)]
        found = precision_recall(*pair, K, "adm" if half else "float32")
    else:
        found = numpy_precision_recall(reference, samples, half)
    return since(start), list(found)


PARTS = ("statistics", "Frechet distance", "precision and recall, float32", "precision and recall, float16")


def measure_part(part, root, threads):
    """Seconds and CPU seconds, peak of memory in GiB, and result of a part in a process of its own."""
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluation", "--part", part, "--root", root],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **{f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    seconds, cpu_seconds, kilobytes, *result = said.splitlines()[-1].split()
    return (float(seconds), float(cpu_seconds)), int(kilobytes) / 2**20, list(map(float, result))


def row_of(part, size, seconds, memory, first, difference):
    by = 0 if torch.cuda.is_available() else 1
    return {
        "": part,
        "size": size,
        "seconds": seconds[0],
        "CPU s": seconds[1],
        "images/s": None,
        "memory GiB": memory,
        "times ADM's way": None if first is None else first[by] / seconds[by],
        "differs by": difference,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=50_000, help="samples [%(default)s]")
    parser.add_argument("--pr-rows", type=int, default=50_000, help="samples of precision and recall [%(default)s]")
    parser.add_argument("--reference-rows", type=int, default=10_000, help="reference images [%(default)s]")
    parser.add_argument(
        "--images",
        type=int,
        default=4096 if on_gpu else 48,
        help="images of the Inception pass [4096 on GPUs, else 48]",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="threads of each part [the cores, %(default)s here]")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        seconds, result = work(args.part, args.root)
        print(*seconds, peak_kilobytes(), *result)
        return
    rows, reference = [], args.reference_rows
    sizes = (f"{args.rows:,} x {DIM}", f"{DIM} x {DIM}", *2 * [f"{reference:,} and {args.pr_rows:,} x {DIM}"])
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        for name, count, seed in (("samples", args.rows, 1), ("reference", reference, 0)):
            make_features(root / f"{name}.npy", count, seed)
            mean, covariance = numpy_statistics(np.load(root / f"{name}.npy"))
            np.savez(root / f"{name}.moments.npz", mean=mean, covariance=covariance)
        np.save(root / "some.npy", np.load(root / "samples.npy", mmap_mode="r")[: args.pr_rows])
        images = np.random.default_rng(0).integers(0, 256, (args.images, 256, 256, 3), dtype=np.uint8)
        np.savez(root / "images.npz", arr_0=images)
        seconds, memory, _ = measure_part("Inception pass", root, args.threads)
        rows.append(row_of("Inception pass", f"{args.images} images", seconds, memory, None, None))
        rows[-1]["images/s"] = args.images / seconds[0]
        for part, size in zip(PARTS, sizes):
            theirs, their_memory, wanted = measure_part(f"ADM's way: {part}", root, args.threads)
            seconds, memory, found = measure_part(f"ours: {part}", root, args.threads)
            difference = max(abs(a - b) / (1 if "recall" in part else abs(b)) for a, b in zip(found, wanted))
            rows.append(row_of(f"ADM's way: {part}", size, theirs, their_memory, theirs, None))
            rows.append(row_of(f"ours: {part}", size, seconds, memory, theirs, difference))
            record("evaluation", rows)  # after each part: the last ones take long


if __name__ == "__main__":
    main()
