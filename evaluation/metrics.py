"""The numbers that papers report about sets of images, from features: arrays in, floats out.

    statistics = FeatureStatistics(2048)
    statistics.update(features)                                    # (n, 2048), as often as there are batches
    fid = frechet_distance(reference, statistics)

The definitions are those of ADM's evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233), whose numbers people publish,
and of the papers that each function names. No file, no network and no rank is known here; randomness is passed in.

To add a metric, write a function of a `Pair` and give it a row in METRICS, at the end of this file.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike

from evaluation.distances import distance_tiles

EPS = torch.finfo(torch.float64).eps
ROWS_AT_ONCE = 2048  # rows that are added to statistics at once: fewer make sums of D x D a large share


def checked(features: ArrayLike, name: str = "features", finite: bool = True) -> torch.Tensor:
    """Features as a tensor (N, D). Raises ValueError for another shape, no rows, values that are no floats, and where
    they have to be `finite`, for others."""
    features = torch.as_tensor(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} have shape {tuple(features.shape)}, wanted (N, D)")
    if not features.is_floating_point():
        raise ValueError(f"{name} have type {str(features.dtype).removeprefix('torch.')}, wanted floats")
    if finite and not features.isfinite().all():
        raise ValueError(f"{name} hold values that are NaN or infinite")
    return features


def checked_pair(reference: ArrayLike, samples: ArrayLike, fewest: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of both sets, (N, D) and (M, D). Raises ValueError as `checked` does, where they differ in D, and where
    one has fewer rows than the fewest that are wanted."""
    reference, samples = checked(reference, "the reference's features"), checked(samples, "the samples' features")
    (N, D), (M, d) = reference.shape, samples.shape
    if D != d:
        raise ValueError(f"the features have {D} dimensions in the reference, {d} in the samples")
    if min(N, M) < fewest:
        raise ValueError(f"at least {fewest} images are needed in each set, and one has {min(N, M)}")
    return reference, samples


#################################################################################
#                               Frechet distance                                #
#################################################################################


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64.

    Each batch is centred before its outer products are summed, and sums are merged as in Chan, Golub & LeVeque 1983, so
    that a large mean costs no digits. However the rows are cut into batches and processes, mean and covariance agree to
    rounding: about 1e-15 relative.
    """

    def __init__(self, dim: int):
        self.dim, self._count = dim, 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of outer products of centred rows
        self._waiting, self._rows = [], 0
        self._covariance = None  # where it is given rather than measured

    @classmethod
    def of(cls, rows: ArrayLike) -> "FeatureStatistics":
        """Those of rows (N, D) of floats."""
        statistics = cls(rows.shape[1])
        statistics.update(rows)
        return statistics

    @classmethod
    def merged(cls, parts: Sequence["FeatureStatistics"]) -> "FeatureStatistics":
        """Those of the rows of all parts."""
        total = cls(parts[0].dim)
        for one in parts:
            one.add_waiting()
            total._add(one._count, one._mean, one._scatter)
        return total

    @classmethod
    def from_moments(cls, mean: ArrayLike, covariance: ArrayLike) -> "FeatureStatistics":
        """Statistics that somebody else computed: mean (D,), covariance (D, D).

        Raises ValueError where they are no mean and covariance of one set.
        """
        mean, covariance = (torch.as_tensor(one).to(torch.float64) for one in (mean, covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"the mean has shape {tuple(mean.shape)} and the covariance {tuple(covariance.shape)}, "
                "wanted (D,) and (D, D)"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("the mean or the covariance holds values that are NaN or infinite")
        largest = covariance.abs().max()
        if (covariance - covariance.T).abs().max() > 1e-6 * largest or covariance.diagonal().min() < -1e-6 * largest:
            raise ValueError("the covariance is not symmetric, or has negative variances")
        statistics = cls(len(mean))
        statistics._mean, statistics._covariance = mean, (covariance + covariance.T) / 2
        return statistics

    def update(self, features: ArrayLike) -> None:
        """Add rows (n, dim) of floats. Raises ValueError for another width.

        Values that are not finite raise it here or where the statistics are read: rows are looked at in large batches.
        """
        features = checked(features, finite=False)
        if features.shape[1] != self.dim:
            raise ValueError(f"features have {features.shape[1]} dimensions, wanted {self.dim}")
        self._waiting.append(features)
        self._rows += len(features)
        if self._rows >= ROWS_AT_ONCE:
            self.add_waiting()

    @property
    def mean(self) -> torch.Tensor:
        """(dim,) float64."""
        self.add_waiting()
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """(dim, dim) float64, by N - 1. Raises ValueError for fewer than two rows, which have none."""
        self.add_waiting()
        if self._covariance is not None:
            return self._covariance
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 images, and there are {self._count}")
        return self._scatter / (self._count - 1)

    def add_waiting(self) -> None:
        """Add the rows of `update` that wait for more, after which all is on the CPU."""
        if not self._waiting:
            return
        rows = torch.cat(self._waiting).to(torch.float64, copy=True)
        self._waiting, self._rows = [], 0
        mean = rows.mean(dim=0)
        if not mean.isfinite().all():
            raise ValueError("features hold values that are NaN or infinite")
        rows.sub_(mean)
        if rows.device.type == "cpu":  # NumPy sees the symmetry, and computes one half
            scatter = torch.from_numpy(np.dot(rows.numpy().T, rows.numpy()))
        else:
            scatter = (rows.T @ rows).cpu()
        self._add(len(rows), mean.cpu(), scatter)

    def _add(self, count, mean, scatter):
        if not count:
            return
        total, difference = self._count + count, mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(difference, difference, alpha=self._count * count / total)
        self._mean = self._mean + difference * (count / total)
        self._count = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr A + tr B - 2 tr sqrt(A B): FID for Inception's features (Heusel et al. 2017, 1706.08500).

    tr sqrt(A B) is the sum of the roots of the eigenvalues of L' B L, where A = L L', which is symmetric: nothing turns
    complex. Eigenvalues of a singular product are zeros with a rounding error, whose roots would be large: then it is
    the sum of the singular values of F' G, where A = F F' and B = G G', which has the error itself. Equal sets give 0
    to rounding, which may be below 0, as ADM's is.

    Raises ValueError where the sets have other dimensions or fewer than two rows.
    """
    if a.dim != b.dim:
        raise ValueError(f"the statistics are of {a.dim} and of {b.dim} features")
    A, B = a.covariance, b.covariance
    constant = (a.mean - b.mean).square().sum() + A.trace() + B.trace()
    # where a feature is constant in one of the sets, its row and column add nothing to the root
    varies = (A.diagonal() > 0) & (B.diagonal() > 0)
    if not varies.any():
        return float(constant)
    A, B = (one if varies.all() else one[varies][:, varies] for one in (A, B))
    L, fault = torch.linalg.cholesky_ex(A)
    if not fault:
        eigenvalues = torch.linalg.eigvalsh(L.T @ B @ L)
        if eigenvalues[0] > 64 * EPS * eigenvalues[-1]:
            return float(constant - 2 * eigenvalues.sqrt().sum())
    return float(constant - 2 * torch.linalg.svdvals(square_root(A).T @ square_root(B)).sum())


def square_root(covariance: torch.Tensor) -> torch.Tensor:
    """F (D, rank) with F F' equal to a covariance (D, D) but for eigenvalues that are 0 to rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * EPS * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


#################################################################################
#                                Inception Score                                #
#################################################################################


def inception_score(probs: ArrayLike, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of p(y|x) from its mean over a split, averaged over splits (Salimans et al. 2016).

    Args:
        probs: (N, classes), each row a distribution.
        split_size: rows of a split, in the order of the rows, as in ADM: N of them, not a number of splits. The
            remainder is a split of its own, with equal weight. Rows sorted by class give too low a score.

    A probability of 0 counts as 0 log 0 = 0, where ADM's is NaN.
    """
    scores = []
    for split in checked(probs, "probabilities").split(split_size):
        split = split.double()
        mean = split.mean(dim=0)
        divergence = torch.special.xlogy(split, split) - torch.special.xlogy(split, mean)
        scores.append(divergence.sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


#################################################################################
#                  Precision and recall, density and coverage                   #
#################################################################################


def squared_radii(features: torch.Tensor, k: int, half: bool) -> torch.Tensor:
    """The squared distance (N,) of each row to its k-th nearest other: the (k + 1)-th smallest, its own 0 included."""
    nearest = {}  # tile of rows: the smallest distances so far, since tiles do not come row by row
    for rows, _, distances in distance_tiles(features, features, half):
        known = torch.cat([nearest[rows.start], distances], dim=1) if rows.start in nearest else distances
        nearest[rows.start] = known.topk(min(k + 1, known.shape[1]), dim=1, largest=False).values
    return torch.cat([nearest[start][:, k] for start in sorted(nearest)])


def precision_recall(
    reference: ArrayLike, samples: ArrayLike, k: int = 3, precision: str = "adm"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), on the device of the features.

    Precision is the share of samples within the ball of some reference image, whose radius is the distance to its k-th
    nearest other one; recall is the same with the roles exchanged.

    Args:
        reference, samples: features (N, D), (M, D).
        precision: "adm": distances in float16, which are the published numbers, in float32 where a block is not
            finite; or "float32". Inception's features have squared norms of hundreds, where float16 has steps of 0.25
            and more, and a tie counts as inside: the published numbers are a few tenths of a point above exact ones.

    Raises ValueError where a set has fewer than k + 1 rows, or the sets have other dimensions.
    """
    reference, samples = checked_pair(reference, samples, k + 1)
    half = precision == "adm"
    radii_reference, radii_samples = squared_radii(reference, k, half), squared_radii(samples, k, half)
    in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, columns, distances in distance_tiles(reference, samples, half):
        in_reference[columns] |= (distances <= radii_reference[rows, None]).any(dim=0)
        in_samples[rows] |= (distances <= radii_samples[columns]).any(dim=1)
    return float(in_reference.double().mean()), float(in_samples.double().mean())


def density_coverage(reference: ArrayLike, samples: ArrayLike, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797), with distances in float32, strictly within balls.

    Density counts, per sample, the reference balls that it lies in, over k; it may exceed 1. Coverage is the share of
    reference images whose ball holds a sample. A ball's radius is the distance to the k-th nearest other one.
    """
    reference, samples = checked_pair(reference, samples, k + 1)
    radii = squared_radii(reference, k, half=False)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    balls = 0
    for rows, _, distances in distance_tiles(reference, samples, half=False):
        inside = distances < radii[rows, None]
        covered[rows] |= inside.any(dim=1)
        balls = balls + inside.sum()
    return int(balls) / (k * len(samples)), float(covered.double().mean())


#################################################################################
#                                Kernel distance                                #
#################################################################################


def kernel_distance(
    reference: ArrayLike,
    samples: ArrayLike,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv 1801.01401): the unbiased squared MMD of the kernel (x.y / D + 1)^3.

    Returns mean and standard deviation over subsets, each so many rows of both sets without repetition, fewer where a
    set has fewer. Where a set is smaller than two subsets, these are mostly the same rows: the deviation is NaN.

    Args:
        generator: draws the subsets; None: one with seed 0.
    """
    reference, samples = checked_pair(reference, samples)
    size = min(subset_size, len(reference), len(samples))
    generator = generator or torch.Generator().manual_seed(0)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(matrix):
        return (matrix.sum() - matrix.trace()) / (size * (size - 1))

    # all at once: after a copy to a GPU, the CPU waits until what it asked of it before is done
    counts = [len(reference), len(samples)] * subsets
    places = torch.stack([torch.randperm(count, generator=generator)[:size] for count in counts]).to(samples.device)
    values = []
    for of_reference, of_samples in places.view(subsets, 2, size):
        x, y = reference[of_reference].double(), samples[of_samples].double()
        values.append(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())
    values = torch.stack(values)
    apart = subsets > 1 and 2 * size <= min(len(reference), len(samples))
    return float(values.mean()), float(values.std(correction=0)) if apart else math.nan


#################################################################################
#                                The table of metrics                           #
#################################################################################

SPLIT_SIZE = 5000  # rows of a split of the Inception Score, in the order of the samples: ADM's
ALONE = ("samples", "probabilities")  # what a metric needs that compares with no reference
K_PRECISION, K_DENSITY = 3, 5  # nearest neighbours, of ADM and of the paper on density and coverage


@dataclass
class Pair:
    """The reference and the samples as one network sees them: what a metric is computed from.

    Attributes:
        statistics: {output of the network: (the reference's, the samples')}, of the outputs that a wanted metric names.
        features: `pool` (N, D) of the reference and (M, D) of the samples, on the device, if a wanted metric needs it.
        samples: `pool` (M, D) of the samples, on the device, if a wanted metric needs it alone.
        probabilities: of the samples' classes (M, classes), if a wanted metric needs them.
        pr_precision: see `precision_recall`. seed: of whatever a metric draws.
    """

    statistics: dict[str, tuple[FeatureStatistics, FeatureStatistics]] = field(default_factory=dict)
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    samples: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    pr_precision: str = "adm"
    seed: int = 0

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return precision_recall(*self.features, K_PRECISION, self.pr_precision)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        return density_coverage(*self.features, K_DENSITY)


@dataclass(frozen=True)
class Metric:
    """A metric that --metrics can name: a row of METRICS.

    Attributes:
        label, digits: its name in tables, and digits after the point in the line for a paper.
        needs: the attribute of a Pair that it is computed from: "statistics", "features", "samples" or
            "probabilities".
        function: of a Pair: the number; or {key: number}, where another number belongs to it.
        network: whose features; None: the network that --features names.
        output: the network's output that "statistics" are of.
        is_default: computed where --metrics is not given and --features names its network.
        neighbours: k of its balls, which k + 1 images in each set define; 0: it has none.
        key: in metrics.json, where it is not the name; the number KEY_std is shown after ±.
        paper: whose definition it follows, where that is not ADM's.
    """

    label: str
    digits: int
    needs: str
    function: Callable[[Pair], float | dict[str, float]]
    network: str | None = None
    output: str = "pool"
    is_default: bool = False
    neighbours: int = 0
    key: str | None = None
    paper: str | None = None


def distance(pair: Pair, output: str = "pool") -> float:
    return frechet_distance(*pair.statistics[output])


def score(pair: Pair) -> dict[str, float]:
    """The Inception Score in the order of the samples, and in random order where there is more than one split."""
    probs, found = pair.probabilities, dict(inception_score=inception_score(pair.probabilities, SPLIT_SIZE))
    if len(probs) > SPLIT_SIZE:
        order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(pair.seed))
        found["inception_score_shuffled"] = inception_score(probs[order], SPLIT_SIZE)
    return found


def kid(pair: Pair) -> dict[str, float]:
    mean, deviation = kernel_distance(*pair.features, generator=torch.Generator().manual_seed(pair.seed))
    return dict(kid=mean) if math.isnan(deviation) else dict(kid=mean, kid_std=deviation)


# fmt: off
METRICS = {
    "fid": Metric("FID", 2, "statistics", distance, "inception", is_default=True),
    "fd_dinov2": Metric("FD-DINOv2", 1, "statistics", distance, "dinov2", is_default=True, paper="Stein et al. 2023"),
    "sfid": Metric("sFID", 2, "statistics", lambda pair: distance(pair, "spatial"), "inception", "spatial",
                   is_default=True),
    "is": Metric("IS", 1, "probabilities", score, "inception", is_default=True, key="inception_score"),
    "precision": Metric("precision", 3, "features", lambda pair: pair.precision_recall[0], is_default=True,
                        neighbours=K_PRECISION),
    "recall": Metric("recall", 3, "features", lambda pair: pair.precision_recall[1], is_default=True,
                     neighbours=K_PRECISION),
    "kid": Metric("KID", 5, "features", kid, paper="Binkowski et al. 2018"),
    "density": Metric("density", 3, "features", lambda pair: pair.density_coverage[0], neighbours=K_DENSITY,
                      paper="Naeem et al. 2020"),
    "coverage": Metric("coverage", 3, "features", lambda pair: pair.density_coverage[1], neighbours=K_DENSITY,
                       paper="Naeem et al. 2020"),
}
# fmt: on
