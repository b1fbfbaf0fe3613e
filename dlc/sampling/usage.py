"""How a set of codes uses its tokens, beside the codes that a prior was trained on: perplexity, copies, distances."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from dlc.data import code_dtype
from dlc.data.codes import perplexity, token_counts
from dlc.machine.cli import progress

AT_ONCE = 8192  # rows in memory
COMPARED = 1024  # codes whose nearest training code is looked for, at most
COMPARISONS = 3 * 10**10  # of two tokens in that search, at most: half a minute of one core


class Rows:
    """Codes (n, L) that are read in parts: gather(rows) gives those of `rows`, as any integers below V."""

    def __init__(self, gather: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, V: int):
        self.gather, self.rows, self.V = gather, rows, V

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> np.ndarray:
        """The codes at these places among all, in the smallest type."""
        return np.asarray(self.gather(self.rows[places])).astype(code_dtype(self.V))

    def spread(self, count: int) -> np.ndarray:
        """The places of `count` codes that are evenly spaced: rows often go class by class."""
        return np.linspace(0, len(self) - 1, count).round().astype(np.int64)

    def parts(self, count: int | None = None) -> Iterator[np.ndarray]:
        """All codes, or `count` of them, AT_ONCE at a time."""
        places = self.spread(len(self) if count is None else count)
        for start in range(0, len(places), AT_ONCE):
            yield self.take(places[start : start + AT_ONCE])


def digests(codes: Rows) -> Counter:
    """How often each code occurs, by a digest of it."""
    found = Counter()
    with progress(total=len(codes), desc="reading codes", unit="code", delay=5) as bar:
        for part in codes.parts():
            found.update(hashlib.blake2b(row, digest_size=8).digest() for row in part)
            bar.update(len(part))
    return found


def nearest(codes: Rows, others: Rows, compared: int, leave_out: bool = False) -> np.ndarray:
    """Of `compared` of the codes, evenly spaced: in how many tokens each differs from the nearest of `others`.

    leave_out: the codes are `others` themselves, and each is not compared with itself.
    """
    places, start = codes.spread(compared), 0
    these, least = codes.take(places), np.full(compared, np.iinfo(np.int32).max)
    for part in others.parts():
        for i, code in enumerate(these):
            apart = np.count_nonzero(part != code, axis=1)
            if leave_out and start <= places[i] < start + len(part):
                apart[places[i] - start] = np.iinfo(np.int32).max
            least[i] = min(least[i], int(apart.min()))
        start += len(part)
    return least


def usage(codes: Rows, training: Rows | None = None, heldout: Rows | None = None) -> dict:
    """Statistics of codes, and where there are training codes those of both beside each other, as JSON holds them.

    Held-out codes, never trained on, say what distances to the training codes and what share of copies new codes have.

    Returns a dict with "samples", and "training" and "heldout" or None, each a dict of
        count;
        perplexity (list of L), mean_perplexity: of min(count, count of samples) codes;
        repeated: the share of codes that occur earlier in the same set;
        copies: the share that are equal to a training code (of the training codes: to another one);
        nearest_mean, nearest_least: tokens by which codes differ from the nearest (other) training code, of `compared`.
    """
    result, trained = {}, None if training is None else digests(training)
    for name, rows in (("samples", codes), ("training", training), ("heldout", heldout)):
        if not rows:
            result[name] = None
            continue
        count, own, itself = len(rows), trained if rows is training else digests(rows), rows is training
        values = perplexity(sum(token_counts(part, rows.V) for part in rows.parts(min(count, len(codes)))))
        entry = dict(
            count=count,
            mean_perplexity=float(values.mean()),
            perplexity=[round(float(value), 3) for value in values],
            repeated=1 - len(own) / count,
        )
        if training is not None:
            compared = max(1, min(count, COMPARED, COMPARISONS // (len(training) * len(values))))
            least = nearest(rows, training, compared, itself)
            entry.update(
                copies=sum(times for one, times in own.items() if trained[one] > itself) / count,
                compared=compared,
                nearest_mean=float(least.mean()),
                nearest_least=int(least.min()),
            )
        result[name] = entry
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
