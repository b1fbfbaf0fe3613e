"""demo/prior.py: the simpler models of codes."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from demo.prior import Mixture


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
