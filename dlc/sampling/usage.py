"""How a set of codes uses its tokens, beside the codes that a prior was trained on: perplexity, copies, distances."""

import hashlib
from collections import Counter

import numpy as np

from dlc.data import code_dtype
from dlc.data.codes import perplexity, token_counts
from dlc.machine.cli import progress

AT_ONCE = 8192  # rows compared at once
COMPARED = 1024  # codes whose nearest training code is looked for, at most
COMPARISONS = 3 * 10**10  # of two tokens in that search, at most: half a minute of one core


def digests(codes: np.ndarray) -> Counter:
    """How often each of the codes (n, L) occurs, by a digest of it."""
    return Counter(
        hashlib.blake2b(row, digest_size=8).digest() for row in progress(codes, desc="reading codes", delay=5)
    )


def spread(codes: np.ndarray, count: int) -> np.ndarray:
    """The places of `count` codes that are evenly spaced: rows often go class by class."""
    return np.linspace(0, len(codes) - 1, count).round().astype(np.int64)


def nearest(codes: np.ndarray, others: np.ndarray, compared: int) -> np.ndarray:
    """Of `compared` of the codes, evenly spaced: in how many tokens each differs from the nearest of `others`.

    Where the codes are `others` themselves, each is not compared with itself.
    """
    places, far = spread(codes, compared), np.iinfo(np.int32).max
    least = np.full(compared, far)
    for start in range(0, len(others), AT_ONCE):
        part = others[start : start + AT_ONCE]
        for i, place in enumerate(places):
            apart = np.count_nonzero(part != codes[place], axis=1)
            if codes is others and start <= place < start + len(part):
                apart[place - start] = far
            least[i] = min(least[i], int(apart.min()))
    return least


def usage(codes: np.ndarray, V: int, training: np.ndarray | None = None, heldout: np.ndarray | None = None) -> dict:
    """Statistics of codes (n, L), and of training and held-out codes, which say how far new ones are from the former.

    Returns a dict with "samples", and "training" and "heldout" or None, each a dict of
        count;
        perplexity (list of L), mean_perplexity: of min(count, count of samples) codes;
        repeated: the share of codes that occur earlier in the same set;
        copies: the share that are equal to a training code (of the training codes: to another one);
        nearest_mean, nearest_least: tokens by which codes differ from the nearest (other) training code, of `compared`.
    """
    sets, result = dict(samples=codes, training=training, heldout=heldout), {}
    for name, rows in sets.items():  # in one type, for the digests
        sets[name] = None if rows is None or not len(rows) else rows.astype(code_dtype(V), copy=False)
    training, trained = sets["training"], None if sets["training"] is None else digests(sets["training"])
    for name, rows in sets.items():
        if rows is None:
            result[name] = None
            continue
        count, itself = len(rows), rows is training
        own = trained if itself else digests(rows)
        values = perplexity(token_counts(rows[spread(rows, min(count, len(codes)))], V))
        result[name] = entry = dict(
            count=count,
            mean_perplexity=float(values.mean()),
            perplexity=values.round(3).tolist(),
            repeated=1 - len(own) / count,
        )
        if training is not None:
            compared = max(1, min(count, COMPARED, COMPARISONS // (len(training) * len(values))))
            least = nearest(rows, training, compared)
            entry.update(
                copies=sum(times for one, times in own.items() if trained[one] > itself) / count,
                compared=compared,
                nearest_mean=float(least.mean()),
                nearest_least=int(least.min()),
            )
    return result


def usage_lines(found: dict, V: int) -> list[str]:
    """The statistics as a table, a line each."""
    titles = dict(samples="these codes", training="training codes", heldout="held-out codes")
    names = [name for name in titles if found.get(name)]
    rows = [
        ("codes", "count", "{:,}"),
        (f"perplexity per position, mean (of {V})", "mean_perplexity", "{:.2f}"),
        ("equal to an earlier one", "repeated", "{:.2%}"),
        ("copies of a training code", "copies", "{:.2%}"),
        ("tokens apart from the nearest, mean", "nearest_mean", "{:.2f}"),
        ("tokens apart from the nearest, least", "nearest_least", "{}"),
    ]
    lines = [f"{'':40}" + "".join(f"{titles[name]:>16}" for name in names)]
    for title, key, form in rows:
        if key in found["samples"]:
            lines.append(f"{title:40}" + "".join(f"{form.format(found[name][key]):>16}" for name in names))
    return lines
