"""demo/prior.py: the simpler models of codes, and what judges images of codes."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from demo.digits import DigitReader, load_split
from demo.prior import BARS, Judge, Mixture, distances, missed_bars


@pytest.fixture(scope="module")
def codes():
    """500 codes of 3 tokens out of 4 that come from two clusters."""
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 2, (500, 1))
    return np.where(rng.random((500, 3)) < 0.8, cluster * 2, rng.integers(0, 4, (500, 3)))


def test_one_component_is_independent_positions(codes):
    shares = np.stack([(codes == value).mean(axis=0) for value in range(4)], axis=1)  # (L, V)
    np.testing.assert_allclose(np.exp(Mixture(codes, 4, 1).log_p[0]), shares, atol=1e-3)


def test_mixture_is_a_distribution_and_better(codes):
    """Its probabilities of all codes add up to 1, its draws follow them, and it is above independent positions."""
    every = np.array(list(itertools.product(range(4), repeat=3)))
    mixture, independent = Mixture(codes, 4, 6), Mixture(codes, 4, 1)
    p = np.exp(-3 * mixture.nats(every))
    assert p.sum() == pytest.approx(1)
    assert mixture.nats(codes).mean() < independent.nats(codes).mean() - 0.1
    drawn = mixture.draw(5000) @ [16, 4, 1]
    seen = np.bincount(drawn, minlength=64)
    often = p > 1e-3
    assert chisquare([*seen[often], seen[~often].sum()], [*(5000 * p[often]), 5000 * p[~often].sum()]).pvalue > 1e-3


def test_distances_to_train_codes():
    train = np.array([[0, 0, 0, 0], [1, 1, 1, 1]])
    found = distances(np.array([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 2, 1], [2, 2, 2, 2]]), train)
    assert found == dict(copies=0.25, within_two=0.75)


@pytest.mark.slow
def test_judge_of_images():
    """Real digits clear the bars for images; images without ink and shuffled pixels do not."""
    judge = Judge()
    scans = DigitReader.scans(load_split("heldout")[0])
    real = judge(scans, judge.labels)
    shuffled = judge(np.random.default_rng(0).permuted(scans, axis=1))
    assert real["asked"] > 0.95 and real["frechet_pca"] < 1e-6 and real["recall"] == 1 and real["classes"] < 0.03
    assert shuffled["confident"] < real["confident"] and shuffled["frechet_pca"] > 1 and shuffled["recall"] < 0.1
    floor = judge.floor(2)
    assert 0.03 < floor["frechet_pca"] < 0.1 and floor["recall"] > 0.8
    figures = dict(prior=dict(real, copies=0.0, within_two=0.0), **{"class": real})
    assert missed_bars(1.0, figures) == []
    worse = {key: bar + 0.01 if sign < 0 else bar - 0.01 for key, (sign, bar) in BARS.items()}
    assert len(missed_bars(worse["bound"], dict(prior=worse, **{"class": worse}))) == len(BARS)
