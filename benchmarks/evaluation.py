"""Speed of evaluation at the size of published numbers: Inception, and FID beside ADM's way in NumPy and SciPy.

    python -m benchmarks.evaluation

The features are random: 50,000 samples and 10,000 reference images with 2048 dimensions, non-negative and correlated as
Inception's. ADM's way takes the root of the product of both covariances by SciPy's sqrtm. `differs by` is the relative
difference between the results. Inception runs with random weights on images of 256 x 256 pixels. Seconds are CPU
seconds of all threads, less affected by other work; on a GPU they are seconds.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm

from benchmarks.record import flags_of, in_turns, record
from dlc.machine.processes import start_processes
from evaluation.feature_networks import InceptionNetwork
from evaluation.inception import InceptionV3
from evaluation.measuring import measure
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.sets import open_images


def random_features(count: int, shift: float, mix: np.ndarray) -> np.ndarray:
    """Features (count, D) float32 with correlations by mix (96, D)."""
    random = np.random.default_rng(count)
    rows = random.standard_normal((count, len(mix)), dtype=np.float32) @ mix
    for some in np.array_split(rows, -(-count // 2000)):
        some += 0.3 * random.standard_normal(some.shape, dtype=np.float32) + shift
    return np.abs(rows, out=rows)


def our_statistics(rows: np.ndarray) -> FeatureStatistics:
    """In batches of 64, as the evaluation of images computes them."""
    found = FeatureStatistics(rows.shape[1])
    for some in np.array_split(rows, -(-len(rows) // 64)):
        found.update(torch.from_numpy(some))
    found.covariance  # noqa: B018  computed when it is asked for
    return found


def scipy_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    A, B = a.covariance.numpy(), b.covariance.numpy()
    return float((a.mean - b.mean).square().sum() + np.trace(A + B - 2 * sqrtm(A @ B).real))


def inception_seconds(count: int) -> float:
    """Seconds for a pass of evaluation over an .npz of so many images."""
    network = InceptionNetwork.__new__(InceptionNetwork)  # without the file of weights
    state = start_processes()
    network.module, network.device = InceptionV3().to(state.device), state.device
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "images.npz"
        np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), dtype=np.uint8))
        images = open_images(path, "SAMPLES")
        seconds = in_turns({"Inception": lambda: measure(images, [network], state)}, 2)
    return min(seconds["Inception"])


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--rows", "draw features of this many samples", 50_000)
    add("--dim", "give features this many dimensions", 2048)
    add("--images", "run Inception on this many images", 4096, on_cpu=48)
    add("--turns", "measure each part this many times", 3)
    args = parser.parse_args()
    seconds, missing = inception_seconds(args.images), {"times ADM's way": None, "differs by": None}
    row = {"": "Inception pass", "size": f"{args.images} images", "seconds": seconds, "images/s": args.images / seconds}
    table, mix = [row | missing], np.random.default_rng(9).normal(size=(96, args.dim)).astype(np.float32) / 12
    samples, reference = random_features(args.rows, 0.02, mix), random_features(args.rows // 5, 0, mix)
    both = our_statistics(samples), our_statistics(reference)
    parts = {
        "statistics": (lambda: np.cov(samples, rowvar=False).sum(), lambda: our_statistics(samples).covariance.sum()),
        "Frechet distance": (lambda: scipy_distance(*both), lambda: frechet_distance(*both)),
    }
    for part, (adm, ours) in parts.items():
        wanted, found = float(adm()), float(ours())
        took = in_turns({"ADM's way": adm, "ours": ours}, args.turns)
        for way, seconds in took.items():
            row = {"": f"{way}: {part}", "size": f"{args.rows:,} x {args.dim}", "seconds": statistics.median(seconds)}
            times = statistics.median(took["ADM's way"]) / row["seconds"]
            differs = abs(found - wanted) / abs(wanted) if way == "ours" else None
            table.append({**row, "images/s": None, "times ADM's way": times, "differs by": differs})
    record("evaluation", table)


if __name__ == "__main__":
    main()
