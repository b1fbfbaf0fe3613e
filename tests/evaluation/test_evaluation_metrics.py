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


def statistics_of(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(torch.as_tensor(batch))
    return statistics


def gaussian(n, d, mean=0.0, scale=1.0):
    return (RANDOM.normal(size=(n, d)) * scale + mean).astype(np.float32)


@pytest.mark.parametrize("case", [case for case in CASES if "ref_pool" in CASES[case]])
def test_adm_metrics(case):
    """Distances to 1e-5 relative (equal sets: 1e-9 absolute), precision and recall to 2 images; 1 was reached."""
    golden = CASES[case]
    for features, key in (("pool", "fid"), ("spatial", "sfid")):
        if f"ref_{features}" in golden:
            found = frechet_distance(*(statistics_of(golden[f"{which}_{features}"]) for which in ("ref", "sample")))
            assert found == pytest.approx(float(golden[key]), rel=1e-5, abs=1e-9), key
    precision, recall = precision_recall(golden["ref_pool"], golden["sample_pool"])
    assert abs(precision - golden["precision"]) * len(golden["sample_pool"]) < 2
    assert abs(recall - golden["recall"]) * len(golden["ref_pool"]) < 2
    if "precision_exact" in golden:
        exact = precision_recall(golden["ref_pool"], golden["sample_pool"], precision="float32")
        assert exact == (pytest.approx(float(golden["precision_exact"])), pytest.approx(float(golden["recall_exact"])))


@pytest.mark.parametrize("case", [case for case in CASES if "probs" in CASES[case]])
def test_adm_inception_score(case):
    golden = CASES[case]
    for key, size in (("is_5000", 5000), ("is_100", 100), ("is_one", 10**9)):
        if key in golden:
            assert inception_score(golden["probs"], size) == pytest.approx(float(golden[key]), rel=1e-5)


@pytest.mark.parametrize("size", [64, 256])
def test_resize_is_tensorflows(size):
    golden = CASES[f"resize{size}"]
    resized = resize_tf1(torch.from_numpy(golden["in"]).permute(0, 3, 1, 2).float())
    assert torch.equal(resized[:, :, 100:164, 100:164].permute(0, 2, 3, 1), torch.from_numpy(golden["out"]))


@pytest.mark.parametrize("n, m", [(20, 30), (20, 900), (900, 20), (2, 2), (64, 65)])
def test_sets_smaller_than_their_dimension(n, m):
    """Singular covariances: the distance by the singular values of the centred rows themselves, which is exact."""
    one, other = gaussian(n, 64, 3), gaussian(m, 64, 2.9, 1.5)
    a, b = (rows - rows.mean(axis=0, dtype=np.float64) for rows in (one, other))
    cross = np.linalg.svd(a @ b.T / math.sqrt((n - 1) * (m - 1)), compute_uv=False).sum()
    wanted = ((one.mean(0, dtype=float) - other.mean(0, dtype=float)) ** 2).sum()
    wanted += a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    assert frechet_distance(statistics_of(one), statistics_of(other)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("sizes", [(1000,), (1, 7, 92, 600, 300), (64,) * 15 + (40,)])
def test_streaming_equals_one_pass(sizes):
    """However the rows are cut, also where the mean is large, and however processes share them."""
    rows = gaussian(1000, 24, mean=1e4)
    batches = np.split(rows, np.cumsum(sizes)[:-1])
    streamed = statistics_of(*batches)
    merged = statistics_of(batches[0])
    if len(batches) > 1:
        merged.merge(statistics_of(*batches[1:]))
    exact = rows.astype(np.float64)
    for statistics in (streamed, merged):
        assert statistics.count == 1000
        np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


def test_wrong_statistics_are_refused():
    statistics = FeatureStatistics(4)
    for wrong, words in (
        (np.full((2, 4), np.nan), "NaN or infinite"),
        (np.zeros((2, 5)), "5 dimensions, wanted 4"),
        (np.zeros(4), r"shape \(4,\), wanted \(N, D\)"),
        (np.zeros((2, 4), int), "int64, wanted floats"),
    ):
        with pytest.raises(ValueError, match=words):
            statistics.update(wrong)
            _ = statistics.mean
    with pytest.raises(ValueError, match="4 dimensions in the reference, 6 in the samples"):
        frechet_distance(statistics_of(gaussian(9, 4)), statistics_of(gaussian(9, 6)))
    with pytest.raises(ValueError, match="at least 2 images, and there are 1"):
        frechet_distance(statistics_of(gaussian(1, 4)), statistics_of(gaussian(9, 4)))
    for mean, covariance, words in (
        (np.zeros(3), np.eye(4), "wanted"),
        (np.zeros(4), np.full((4, 4), np.inf), "NaN or infinite"),
        (np.zeros(4), np.triu(np.ones((4, 4))), "not symmetric"),
        (np.zeros(4), -np.eye(4), "negative variances"),
    ):
        with pytest.raises(ValueError, match=words):
            FeatureStatistics.from_moments(mean, covariance)


@pytest.mark.parametrize("tile, block", [(7, 20), (50, 50), (2000, 10_000)])
def test_blocks_change_nothing(monkeypatch, tile, block):
    """Against all distances at once, in float64: precision, recall, density and coverage."""
    monkeypatch.setattr(distances, "TILE", tile)
    monkeypatch.setattr(distances, "ADM_BLOCK", block)
    random = np.random.default_rng(5)
    reference, samples = random.normal(size=(60, 8)), random.normal(size=(45, 8)) * 1.2 + 0.3
    between = ((reference[:, None] - samples[None]) ** 2).sum(-1)

    def radii(rows, k):
        return np.sort(((rows[:, None] - rows[None]) ** 2).sum(-1), axis=1)[:, k]

    precision = (between <= radii(reference, 3)[:, None]).any(0).mean()
    recall = (between <= radii(samples, 3)).any(1).mean()
    assert precision_recall(reference, samples, precision="float32") == (
        pytest.approx(precision),
        pytest.approx(recall),
    )
    inside = between < radii(reference, 5)[:, None]
    wanted = inside.sum() / (5 * 45), inside.any(1).mean()
    assert density_coverage(reference, samples) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))
    half = precision_recall(reference, samples)
    assert abs(half[0] - precision) < 0.1 and abs(half[1] - recall) < 0.1


def test_one_block_that_is_not_finite_in_float16(monkeypatch):
    """Only that block is computed in float32; the others stay in float16."""
    monkeypatch.setattr(distances, "ADM_BLOCK", 50)
    far = gaussian(100, 4)
    far[70] = 300  # its squared norm is 360,000, beyond float16
    blocks = {}
    for rows, columns, tile in distances.distance_tiles(torch.from_numpy(far), torch.from_numpy(far), half=True):
        blocks[rows.start // 50, columns.start // 50] = tile
    assert all(one.isfinite().all() for one in blocks.values())
    is_half = {place: torch.equal(one, one.half().float()) for place, one in blocks.items()}
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
    assert mean == pytest.approx(wanted, rel=1e-9) and deviation < 1e-12
    mean, deviation = kernel_distance(gaussian(3000, 6), gaussian(3000, 6), subsets=20, subset_size=300)
    assert abs(mean) < 3 * deviation / math.sqrt(20) + 0.01 and deviation > 0
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    two = [kernel_distance(reference, samples, 5, 10, generator) for generator in generators]
    assert two[0] == two[1]


@pytest.mark.parametrize("function", [precision_recall, density_coverage, kernel_distance])
def test_features_that_do_not_fit(function):
    good = gaussian(9, 4)
    with pytest.raises(ValueError, match="samples' features hold values that are NaN"):
        function(good, np.full((9, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="4 dimensions in the reference, 5 in the samples"):
        function(good, gaussian(9, 5))
    with pytest.raises(ValueError, match="at least"):
        function(good[:1], good[:1])


def test_samples_sorted_by_class_are_noticed():
    """Made-up certain classes, 10,000 of 100: sorted, the score of the splits falls; shuffled, it does not."""
    classes = np.arange(10_000) % 100
    for order, warned in ((np.sort(classes), True), (np.random.default_rng(0).permutation(classes), False)):
        probs = torch.full((10_000, 100), 0.1 / 99)
        probs[torch.arange(10_000), torch.from_numpy(order)] = 0.9
        values = METRICS["is"].function(Pair(probabilities=probs))
        assert any("sorted by class" in line for line in notes.of_order(values)) == warned
        assert (values["inception_score"] < 0.9 * values["inception_score_shuffled"]) == warned
