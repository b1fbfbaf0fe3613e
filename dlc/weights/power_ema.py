"""Power-function EMAs of a run's weights, of any length after training (Karras et al. 2024, arXiv 2312.02696).

An average of exponent gamma weights what was at time t by t^gamma: its length is the standard deviation of that profile
as a share of the training. A run tracks two, and stores them now and then (`dlc.training.power_averages`); an average
of another length is a sum of these snapshots, whose coefficients come from the profiles alone.

    python -m dlc.weights ema results --length 0.07 --out ema_0.07
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from dlc.machine.cli import number
from dlc.machine.files import folder_names, write_folder
from dlc.weights.checkpoint import write_files
from dlc.weights.foreign.safe import RECORDABLE, check_tensors, load_tensors, utf8_path
from dlc.weights.meta import newest_of_run, read_config, read_meta

LENGTH = number(float, 0.005, 0.28)  # the argparse type of a length


def exponent(length: float) -> float:
    """gamma of a length sigma_rel, whose square is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): equations 123, 126."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(step: torch.Tensor | float, time: torch.Tensor | float, gamma: float) -> torch.Tensor | float:
    """beta of an update that moves the time, in images, by `step` to `time`: (1 - step / time)^(gamma + 1), eq. 127."""
    return (1 - step / time) ** (gamma + 1)


def products(times: np.ndarray, gammas: np.ndarray, other_times: np.ndarray, other_gammas: np.ndarray) -> np.ndarray:
    """The scalar products (n, m) of the profiles of averages that end at these times: equation 151, each (n,), (m,)."""
    times, gammas = times[:, None], gammas[:, None]
    ratio = times / other_times
    power = np.where(times < other_times, ratio**other_gammas, (1 / ratio) ** gammas)
    sums = gammas + other_gammas + 1
    return (gammas + 1) * (other_gammas + 1) * power / (sums * np.maximum(times, other_times))


def coefficients(times: Sequence[float], lengths: Sequence[float], time: float, length: float) -> np.ndarray:
    """What to multiply snapshots of these times and lengths by, (n,) float64 with the sum 1, for the average at `time`
    of another length: the least squares of the profiles, algorithm 3."""
    times, gammas = np.asarray(times, np.float64), np.array([exponent(one) for one in lengths])
    wanted = np.array([time], np.float64), np.array([exponent(length)])
    solved = np.linalg.solve(products(times, gammas, times, gammas), products(times, gammas, *wanted))[:, 0]
    return solved / solved.sum()


class Snapshot(NamedTuple):
    """A stored average: its file, the images until then, its length."""

    path: Path
    images: int
    length: float


def snapshot_path(run: Path, images: int, length: float) -> Path:
    return run / "ema" / f"{images:012d}-{length:g}.safetensors"


def snapshots_of(run: Path) -> list[Snapshot]:
    """The snapshots of a run by time, oldest first."""
    pattern = r"(\d{12,18})-(0\.\d{1,9})\.safetensors"
    found = filter(None, (re.fullmatch(pattern, name, re.ASCII) for name in folder_names(run / "ema")))
    return [Snapshot(run / "ema" / one[0], int(one[1]), float(one[2])) for one in found]


def rebuild(args: argparse.Namespace) -> list[str]:
    """Write args.out, the EMA of args.length of a run, and say what it is. Raises ValueError for a user's mistake."""
    run, out = Path(args.run), Path(args.out)
    there = snapshots_of(run)
    if not there:
        raise ValueError(f"{run} has no snapshots of EMAs: name the folder of a run that has --ema-lengths")
    snapshots = [one for one in there if args.at is None or one.images <= args.at]
    if not snapshots:
        raise ValueError(f"{run} has no snapshots of EMAs until image {args.at:,}: the first is of {there[0].images:,}")
    if out.exists():
        raise ValueError(f"{out} exists: give another path")
    newest = newest_of_run(run, ["config.json", "meta.json"])
    if newest is None:
        raise ValueError(f"{run} has no checkpoint to say what its model is")
    last = snapshots[-1]
    share = coefficients([one.images for one in snapshots], [one.length for one in snapshots], last.images, args.length)
    total = {}
    for snapshot, coefficient in zip(snapshots, share):
        for name, value in check_tensors(load_tensors(snapshot.path), snapshot.path, RECORDABLE).items():
            total[name] = total.get(name, 0) + value.double() * coefficient if value.is_floating_point() else value
    with utf8_path(last.path) as (file, _), safe_open(file, framework="pt") as opened:
        step = int((opened.metadata() or {}).get("step", 0))
    weights = {name: value.float() if value.is_floating_point() else value for name, value in total.items()}
    noted = dict(read_meta(newest).noted, weights="ema", ema_length=args.length)
    meta = replace(read_meta(newest), step=step, ema_start=0.0, ema_images=last.images, noted=noted)
    write_folder(out, lambda folder: write_files(folder, read_config(newest), meta, dict(model=weights)))
    largest = np.abs(share).max()
    return [
        f"{out}: EMA of length {args.length:g} at {last.images:,} images, step {step:,}, of {len(snapshots)} "
        f"snapshots of {run} (lengths {', '.join(sorted({f'{one.length:g}' for one in snapshots}))}; the largest "
        f"coefficient is {largest:.2f})"
    ]
