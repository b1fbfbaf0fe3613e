"""How a set of codes uses its tokens, beside the codes that a prior was trained on: perplexity, copies, distances."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from dlc.data.codes import perplexity, token_counts
from dlc.machine.cli import progress

AT_ONCE = 8192  # rows in memory
COMPARED = 1024  # codes whose nearest training code is looked for, at most
COMPARISONS = 3 * 10**10  # of two tokens in that search, at most: half a minute of one core


class Rows:
    """Codes (n, L) that are read in parts: gather(rows) gives those rows, as any integers."""

    def __init__(self, count: int, gather: Callable[[np.ndarray], np.ndarray], rows: np.ndarray | None = None):
        self.count, self._gather, self.rows = count, gather, rows

    def take(self, places: np.ndarray) -> np.ndarray:
        """The codes at these places among the `count`, as int32."""
        return np.asarray(self._gather(places if self.rows is None else self.rows[places])).astype(np.int32)

    def spread(self, count: int) -> np.ndarray:
        """The places of `count` codes that are evenly spaced: rows often go class by class."""
        return np.linspace(0, self.count - 1, count).round().astype(np.int64)

    def parts(self, count: int | None = None) -> Iterator[np.ndarray]:
        """All codes, or `count` of them, AT_ONCE at a time."""
        places = np.arange(self.count) if count is None else self.spread(count)
        for start in range(0, len(places), AT_ONCE):
            yield self.take(places[start : start + AT_ONCE])

    def counts(self, V: int, count: int | None = None) -> np.ndarray:
        """See `token_counts`, of all codes or `count` of them."""
        return sum(token_counts(part, V) for part in self.parts(count))


def digests(codes: Rows, desc: str | None = None) -> list[bytes]:
    """A digest of each code, in order."""
    found = []
    with progress(total=codes.count, desc=desc, unit="code", delay=5, disable=desc is None) as bar:
        for part in codes.parts():
            found += [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in part]
            bar.update(len(part))
    return found


def nearest(codes: Rows, others: Rows, compared: int, leave_out: bool = False) -> np.ndarray:
    """Of `compared` of the codes, evenly spaced: in how many tokens each differs from the nearest of `others`.

    Args:
        leave_out: whether the codes are `others` themselves: each is then not compared with itself.
    """
    places = codes.spread(compared)
    these, least = codes.take(places), np.full(compared, np.iinfo(np.int32).max)
    small = np.min_scalar_type(max(1, int(these.max())))
    start = 0
    for part in others.parts():
        small = np.promote_types(small, np.min_scalar_type(int(part.max())))
        part = part.astype(small)
        for i, code in enumerate(these.astype(small)):
            apart = np.count_nonzero(part != code, axis=1)
            if leave_out and start <= places[i] < start + len(part):
                apart[places[i] - start] = np.iinfo(np.int32).max
            least[i] = min(least[i], int(apart.min()))
        start += len(part)
    return least


def usage(codes: Rows, V: int, training: Rows | None = None, heldout: Rows | None = None) -> dict:
    """Statistics of codes, and where there are training codes those of both beside each other, as JSON holds them.

    Args:
        codes, training, heldout: `Rows`. Held-out codes, never trained on, say what distances to the training codes
            and what share of copies new codes have.

    Returns a dict with "samples", and "training" and "heldout" or None, each a dict of
        count;
        perplexity (list of L), mean_perplexity: of min(count, count of samples) codes;
        repeated: the share of codes that occur earlier in the same set;
        copies: the share that are equal to a training code (of the training codes: to another one);
        nearest_mean, nearest_least: tokens by which codes differ from the nearest (other) training code, of `compared`.
    """
    result, trained = {}, None
    if training is not None:
        trained = digests(training, "reading the training codes")
    known = set(trained or ())
    for name, rows in (("samples", codes), ("training", training), ("heldout", heldout)):
        if rows is None or not rows.count:
            result[name] = None
            continue
        own = trained if name == "training" else digests(rows)
        values = perplexity(rows.counts(V, min(rows.count, codes.count)))
        L = len(values)
        entry = dict(
            count=rows.count,
            mean_perplexity=float(values.mean()),
            perplexity=[round(float(value), 3) for value in values],
            repeated=1 - len(set(own)) / len(own),
        )
        if training is not None:
            times = {}
            if name == "training":
                for one in own:
                    times[one] = times.get(one, 0) + 1
            copies = [times[one] > 1 for one in own] if times else [one in known for one in own]
            compared = max(1, min(rows.count, COMPARED, COMPARISONS // (training.count * L)))
            least = nearest(rows, training, compared, name == "training")
            entry.update(
                copies=float(np.mean(copies)),
                compared=compared,
                nearest_mean=float(least.mean()),
                nearest_least=int(least.min()),
            )
        result[name] = entry
    return result


def usage_lines(found: dict, V: int) -> list[str]:
    """The statistics as a table, a line each."""
    names = [name for name in ("samples", "training", "heldout") if found.get(name)]
    titles = dict(samples="these codes", training="training codes", heldout="held-out codes")
    rows = [
        ("codes", "count", "{:,}"),
        (f"perplexity per position, mean (of {V})", "mean_perplexity", "{:.2f}"),
        ("equal to an earlier one", "repeated", "{:.2%}"),
        ("copies of a training code", "copies", "{:.2%}"),
        ("tokens apart from the nearest, mean", "nearest_mean", "{:.2f}"),
        ("tokens apart from the nearest, least", "nearest_least", "{}"),
    ]
    lines = ["".join([f"{'':40}", *(f"{titles[name]:>16}" for name in names)])]
    for title, key, form in rows:
        if key in found["samples"]:
            lines.append("".join([f"{title:40}", *(f"{form.format(found[name][key]):>16}" for name in names)]))
    return lines
