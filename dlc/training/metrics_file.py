"""metrics.jsonl, what a run logged as JSON lines, and loss.png, the picture of it."""

import errno
import json
import math
import os
from pathlib import Path

from dlc.machine.cli import warn_once
from dlc.machine.files import failed, write_whole

FEW = 30  # points that a line alone may hide: one is no line
BOUNDS = dict(  # keys of the lines of a prior's bounds, and words for the plot
    heldout_nats="the prior",
    heldout_no_class_nats="the prior, not told the class",
    independent_nats="independent positions",
)


def append_metrics(path: Path, line: dict) -> None:
    """Append a dict to a file of JSON lines. NaN and infinities, which JSON does not have, become null.

    Raises OSError, naming the file, if the disk does not take the line; no part of it is left then.
    """
    text = json.dumps(json.loads(json.dumps(line), parse_constant=lambda name: None)) + "\n"
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(text.encode()) < len(text):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise failed(f"cannot write {path}", error, path.parent) from error


def finite_number(text: str) -> float:
    """The number in a text. Raises ValueError for one too large for a float, as for NaN, which are never written."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def read_metrics(path: Path) -> list[dict]:
    """The dicts of a file of JSON lines, without damaged lines, which a crash of the machine may leave."""
    if not path.is_file():
        return []
    lines, damaged = [], 0
    decode = json.JSONDecoder(parse_float=finite_number, parse_constant=finite_number).decode
    for text in path.read_text(errors="replace").split("\n")[:-1]:  # a last line without its end is dropped
        try:
            line = decode(text.strip("\0"))
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int and line["step"] < 2**63:
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        warn_once(
            f"metrics {path}", f"{path}: {damaged} damaged lines, such as a crash of the machine leaves, are left out"
        )
    return lines


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines after the step from which a run resumes."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    if path.is_file():
        write_whole(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))


def draw_losses(metrics: list[dict], path: Path) -> None:
    """Plot the logged losses over the steps, 800 x 400 pixels, from the dicts of `read_metrics`.

    Losses above the 98th percentile, which are the first few, are cut off. Where a prior's bounds on held-out codes
    were measured, they are drawn below. Without any losses, nothing is written. What a head or alignment adds to the
    loss is left out, because it is not measured on held-out rows.
    """

    own = [
        dict(line, loss=line["mse"] + (line.get("vb") or 0)) if isinstance(line.get("mse"), float) else line
        for line in metrics
    ]

    def points_of(key):
        return sorted((line["step"], line[key]) for line in own if isinstance(line.get(key), float))

    points, heldout = points_of("loss"), points_of("heldout_loss")
    bounds = {words: found for key, words in BOUNDS.items() if (found := points_of(key))}
    if not points:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; no pyplot, which keeps all figures
    from matplotlib.figure import Figure

    steps, losses = zip(*points)
    low, high = min(losses), sorted(losses)[int(0.98 * (len(losses) - 1))]
    figure = Figure(figsize=(8, 8 if bounds else 4), dpi=100, layout="constrained")
    axes, *below = figure.subplots(2 if bounds else 1, sharex=True, squeeze=False).ravel()
    axes.plot(steps, losses, marker="." if len(steps) < FEW else "", label="training")
    if heldout:
        axes.plot(*zip(*heldout), marker=".", label="held out, of the EMA")
    axes.legend()
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    cut = f" (higher losses cut off: {sum(loss > high for loss in losses):,})" if max(losses) > high > low else ""
    axes.set(xlabel="step", ylabel="loss", title=f"loss, last {losses[-1]:.4f}{cut}")
    for panel in below:
        for words, found in bounds.items():
            panel.plot(*zip(*found), marker="o", markersize=3, label=f"{words}, last {found[-1][1]:.4f}")
        panel.set(xlabel="step", ylabel="nats per token", title="bounds on held-out codes")
        panel.legend()
    for panel in (axes, *below):
        panel.grid(alpha=0.3)
    write_whole(path, FigureCanvasAgg(figure).print_png)
