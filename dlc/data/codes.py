"""How codes (n, L), integers in 0..V-1, use their tokens: counts per position, which add up over parts of a set."""

import numpy as np


def token_counts(codes: np.ndarray, V: int) -> np.ndarray:
    """How often each token occurs at each position of codes (n, L): (L, V) int64."""
    L = codes.shape[1]
    places = codes.astype(np.int64) + V * np.arange(L)
    return np.bincount(places.ravel(), minlength=L * V).reshape(L, V)


def perplexity(counts: np.ndarray) -> np.ndarray:
    """exp of the entropy of the tokens at each position, (L,): how many tokens are in use there, 1 to V.

    It grows with the number of codes that were counted (L, V), so compare equal numbers.
    """
    p = counts / counts.sum(axis=1, keepdims=True)
    return np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=1))
