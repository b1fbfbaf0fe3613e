"""The arithmetic of evaluation against ADM's own evaluator, closed forms, and a second way to compute each."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT

from evaluation import distances, notes
from evaluation.inception import resize_tf1
from evaluation.metrics import (
    METRICS,
    FeatureStatistics,
    Pair,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

GOLDENS = [np.load(ROOT / "tests/goldens" / f"{name}.npz") for name in ("adm_metrics", "adm_metrics_more")]
CASES = {
    case: {key.split("/")[1]: golden[key] for key in golden if key.startswith(f"{case}/")}
    for golden in GOLDENS
    for case in dict.fromkeys(key.split("/")[0] for key in golden)
}
RANDOM = np.random.default_rng(0)


def gaussian(n, d, mean=0.0, scale=1.0):
    return (RANDOM.normal(size=(n, d)) * scale + mean).astype(np.float32)


def distance_of(reference, samples):
    return frechet_distance(*map(FeatureStatistics.of, (reference, samples)))


@pytest.mark.parametrize("case", [case for case in CASES if "resize" not in case])
def test_adm_metrics(case):
    """Distances to 1e-5 relative (equal sets: 1e-9 absolute), precision and recall to 2 images; 1 was reached."""
    golden = CASES[case]
    for features, key in (("pool", "fid"), ("spatial", "sfid")):
        if f"ref_{features}" in golden:
            found = distance_of(golden[f"ref_{features}"], golden[f"sample_{features}"])
            assert found == pytest.approx(float(golden[key]), rel=1e-5, abs=1e-9), key
    if "ref_pool" in golden:
        precision, recall = precision_recall(golden["ref_pool"], golden["sample_pool"])
        assert abs(precision - golden["precision"]) * len(golden["sample_pool"]) < 2
        assert abs(recall - golden["recall"]) * len(golden["ref_pool"]) < 2
    if "precision_exact" in golden:
        exact = precision_recall(golden["ref_pool"], golden["sample_pool"], precision="float32")
        assert exact == (pytest.approx(float(golden["precision_exact"])), pytest.approx(float(golden["recall_exact"])))
    for key, size in (("is_5000", 5000), ("is_100", 100), ("is_one", 10**9)):
        if key in golden:
            assert inception_score(golden["probs"], size) == pytest.approx(float(golden[key]), rel=1e-5)


@pytest.mark.parametrize("size", [64, 256])
def test_resize_is_tensorflows(size):
    golden = CASES[f"resize{size}"]
    resized = resize_tf1(torch.from_numpy(golden["in"]).permute(0, 3, 1, 2).float())
    assert torch.equal(resized[:, :, 100:164, 100:164].permute(0, 2, 3, 1), torch.from_numpy(golden["out"]))


@pytest.mark.parametrize("n, m", [(20, 30), (900, 20), (2, 2), (64, 65)])
def test_sets_smaller_than_their_dimension(n, m):
    """Singular covariances: the distance by the singular values of the centred rows themselves, which is exact."""
    one, other = gaussian(n, 64, 3).astype(float), gaussian(m, 64, 2.9, 1.5).astype(float)
    a, b = (rows - rows.mean(axis=0) for rows in (one, other))
    cross = np.linalg.svd(a @ b.T / math.sqrt((n - 1) * (m - 1)), compute_uv=False).sum()
    wanted = ((one.mean(0) - other.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    assert distance_of(one, other) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("sizes", [(1, 7, 92, 600, 300), (64,) * 15 + (40,)])
def test_streaming_equals_one_pass(sizes):
    rows = gaussian(1000, 24, mean=1e4)
    batches, exact = np.split(rows, np.cumsum(sizes)[:-1]), rows.astype(np.float64)
    streamed = FeatureStatistics(24)
    for batch in batches:
        streamed.update(batch)
    for statistics in (streamed, FeatureStatistics.merged([*map(FeatureStatistics.of, batches)])):
        np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


GOOD, MOMENTS = gaussian(9, 4), FeatureStatistics.from_moments


@pytest.mark.parametrize(
    "function, arrays, words",
    [
        (FeatureStatistics.of, [np.full((9, 4), np.nan)], "NaN or infinite"),
        (FeatureStatistics.of, [np.zeros((2, 4), int)], "int64, wanted floats"),
        (MOMENTS, [np.zeros(4), np.triu(np.ones((4, 4)))], "not symmetric"),
        (MOMENTS, [np.zeros(4), -np.eye(4)], "negative variances"),
        (distance_of, [GOOD[:1], GOOD], "at least 2 images, and there are 1"),
        (kernel_distance, [GOOD, np.full((9, 4), np.nan)], "samples' features hold values that are NaN"),
        (density_coverage, [GOOD, gaussian(9, 5)], "4 dimensions in the reference, 5 in the samples"),
        (precision_recall, [GOOD[:1], GOOD[:1]], "at least"),
    ],
)
def test_wrong_features_are_refused(function, arrays, words):
    with pytest.raises(ValueError, match=words):
        _ = getattr(function(*arrays), "mean", None)  # rows are looked at when they are needed


@pytest.mark.parametrize("tile, block", [(7, 20), (2000, 10_000)])
def test_blocks_change_nothing(monkeypatch, tile, block):
    """Against all distances at once, in float64: precision, recall, density and coverage."""
    monkeypatch.setattr(distances, "TILE", tile)
    monkeypatch.setattr(distances, "ADM_BLOCK", block)
    random = np.random.default_rng(5)
    reference, samples = random.normal(size=(60, 8)), random.normal(size=(45, 8)) * 1.2 + 0.3
    between = ((reference[:, None] - samples[None]) ** 2).sum(-1)

    def radii(rows, k):
        return np.sort(((rows[:, None] - rows[None]) ** 2).sum(-1), axis=1)[:, k]

    exact = [(between <= radii(reference, 3)[:, None]).any(0).mean(), (between <= radii(samples, 3)).any(1).mean()]
    assert precision_recall(reference, samples, precision="float32") == pytest.approx(exact)
    assert precision_recall(reference, samples) == pytest.approx(exact, abs=0.1)
    inside = between < radii(reference, 5)[:, None]
    assert density_coverage(reference, samples) == pytest.approx((inside.sum() / (5 * 45), inside.any(1).mean()))


def test_one_block_that_is_not_finite_in_float16(monkeypatch):
    monkeypatch.setattr(distances, "ADM_BLOCK", 50)
    far = gaussian(100, 4)
    far[70] = 300  # its squared norm is 360,000, beyond float16
    is_half = {}
    for rows, columns, tile in distances.distance_tiles(torch.from_numpy(far), torch.from_numpy(far), half=True):
        assert tile.isfinite().all()
        is_half[rows.start // 50, columns.start // 50] = torch.equal(tile, tile.half().float())
    assert is_half == {(0, 0): True, (0, 1): False, (1, 0): False, (1, 1): False}


def test_kernel_distance_is_unbiased():
    """Of all rows, KID is the U-statistic; of two sets of one distribution it is 0 on average."""
    reference, samples = gaussian(40, 6), gaussian(40, 6, 0.5)

    def kernel(x, y):
        return (x.astype(float) @ y.T.astype(float) / 6 + 1) ** 3

    off = ~np.eye(40, dtype=bool)
    wanted = kernel(reference, reference)[off].mean() + kernel(samples, samples)[off].mean()
    wanted -= 2 * kernel(reference, samples).mean()
    mean, deviation = kernel_distance(reference, samples, subsets=3)
    assert mean == pytest.approx(wanted, rel=1e-9) and math.isnan(deviation)  # all subsets are the whole set
    assert math.isnan(kernel_distance(reference, samples, subset_size=30)[1])  # and mostly the same rows here
    assert kernel_distance(reference, samples, subset_size=20)[1] > 0
    mean, deviation = kernel_distance(gaussian(3000, 6), gaussian(3000, 6), subsets=20, subset_size=300)
    assert abs(mean) < 3 * deviation / math.sqrt(20) + 0.01 and deviation > 0
    one, two = (kernel_distance(reference, samples, 5, 10, torch.Generator().manual_seed(4)) for _ in range(2))
    assert one == two


def test_samples_sorted_by_class_are_noticed():
    classes = np.arange(10_000) % 100
    for order, warned in ((np.sort(classes), True), (np.random.default_rng(0).permutation(classes), False)):
        probs = torch.full((10_000, 100), 0.1 / 99)
        probs[torch.arange(10_000), torch.from_numpy(order)] = 0.9
        values = METRICS["is"].function(Pair(probabilities=probs))
        assert any("sorted by class" in line for line in notes.of_order(values)) == warned
        assert (values["inception_score"] < 0.9 * values["inception_score_shuffled"]) == warned
