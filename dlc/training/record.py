"""What a training run writes about itself: loss means, metrics.jsonl, loss.png."""

import errno
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dlc.machine.cli import warn_once
from dlc.machine.files import write_whole

FOLDERS = ("checkpoints", "previews", "best")  # of RESULTS/
FILES = ("args.json", "log.txt", "metrics.jsonl", "loss.png")
QUARTERS = 4  # of the time t; losses differ much between them


@dataclass(frozen=True)
class Losses:
    """Which losses a trainer logs: means over the samples since the last line, summed up without a device sync.

    Attributes:
        names: keys of the dict that the loss function returns, "loss" first.
        by_quarter: the one that is also logged by quarter of t.
        unit: what a sample is, in the plural, for rates.
    """

    names: tuple[str, ...]
    by_quarter: str
    unit: str = "images"

    def zeros(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(len(self.names) + 2 * QUARTERS, device=device)

    def sums(self, terms: dict[str, torch.Tensor], t: torch.Tensor, num_timesteps: int) -> torch.Tensor:
        """What a batch adds to the sums, (len(names) + 2 * QUARTERS,).

        Args:
            terms: (n,) values by name.
            t: (n,) times in 0..num_timesteps, without the end.
        """
        quarters = t * QUARTERS // num_timesteps == torch.arange(QUARTERS, device=t.device).unsqueeze(1)  # (4, n)
        return torch.cat(
            [
                torch.stack([terms[name].detach().sum() for name in self.names]),
                (quarters * terms[self.by_quarter].detach()).sum(dim=1),
                quarters.sum(dim=1),
            ]
        )

    def means(self, sums: torch.Tensor) -> dict:
        """The means by name, and a list of those by quarter; NaN for a quarter without samples."""
        totals, quarters = sums.tolist()[: len(self.names)], sums.tolist()[len(self.names) :]
        counts = quarters[QUARTERS:]
        n = sum(counts) or math.nan
        return {
            **{name: total / n for name, total in zip(self.names, totals)},
            f"{self.by_quarter}_by_quarter_of_t": [
                total / (count or math.nan) for total, count in zip(quarters, counts)
            ],
        }

    def scalars(self, line: dict) -> dict[str, float]:
        """The numbers of a line of metrics.jsonl, as a tracker takes them: one by one."""
        quarters = {
            f"{self.by_quarter}_quarter_{number}": mean
            for number, mean in enumerate(line[f"{self.by_quarter}_by_quarter_of_t"], 1)
        }
        return {key: value for key, value in {**line, **quarters}.items() if isinstance(value, (int, float))}

    def words(self, means: dict) -> str:
        parts = ", ".join(f"{name} {means[name]:.5f}" for name in self.names[1:])
        return f"loss {means['loss']:.4f}" + (f" ({parts})" if parts else "")


def refuse_wrong_kinds(folder: Path) -> None:
    """Raise ValueError for a file of RESULTS/ that is a folder, or the other way round: it would stop the run later."""
    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise ValueError(
                f"{folder / name} is a file, where a run has a folder: remove it, or give another --results-dir"
            )
    for name in FILES:
        if (folder / name).is_dir():
            raise ValueError(
                f"{folder / name} is a folder, where a run has a file: remove it, or give another --results-dir"
            )


def append_metrics(path: Path, line: dict) -> None:
    """Append a dict to a file of JSON lines. NaN and infinities, which JSON does not have, become null.

    Raises OSError, naming the file, if the disk does not take the line; no part of it is left then.
    """

    def known(value):
        if isinstance(value, list):
            return [known(item) for item in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    text = json.dumps({key: known(value) for key, value in line.items()}) + "\n"
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(text.encode()) < len(text):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(f"cannot write {path} ({error})") from error


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


def draw_losses(metrics: list[dict], path: Path, width: int = 800, height: int = 400) -> None:
    """Plot the logged losses over the steps, from the dicts of `read_metrics`; without any, write nothing.

    Losses above the 98th percentile, which are the first few, are clipped.
    """
    points = [(line["step"], line["loss"]) for line in metrics if isinstance(line.get("loss"), float)]
    if not points:
        return
    steps, losses = np.array(points).T
    low, high = losses.min(), np.quantile(losses, 0.98)
    left, top, right, bottom = 60, 20, width - 20, height - 40
    x = left + (right - left) * (steps - steps[0]) / max(1, steps[-1] - steps[0])
    y = bottom - (bottom - top) * np.clip((losses - low) / max(high - low, 1e-12), 0, 1)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right, bottom), outline="gray")
    draw.line(list(zip(x.tolist(), y.tolist())), fill=(31, 90, 180), width=2)
    for value, at in ((high, top), (low, bottom)):
        draw.text((4, at - 6), f"{value:.4f}", fill="black")
    draw.text((left, bottom + 6), f"step {int(steps[0]):,}", fill="black")
    draw.text((right - 90, bottom + 6), f"step {int(steps[-1]):,}", fill="black")
    draw.text((left + 4, 4), f"loss, last {losses[-1]:.4f}", fill="black")
    write_whole(path, lambda file: picture.save(file, "png"))
