"""How time and memory of the stages grow with their work: 1, 10 and 100 times as many rows, images, tokens, steps.

    python -m benchmarks.growth

Each measurement runs the project's own functions in a process of its own, which first does the same work at a tiny
size. Seconds are CPU seconds of all threads, less affected by other work, the best of up to five; on a GPU they are
seconds. `MiB` is the rise of the process's peak memory, inputs included. An exponent is the slope of log time between
the last two sizes: 1 where twice the work takes twice as long. Networks are tiny: read exponents, not times. Most files
are links to a few.
"""

import argparse
import gc
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.record import record, run_script, seconds_of
from diffusion import create_diffusion
from diffusion.process_table import create_process
from dlc.data import Features, FeatureWriter, Manifest
from dlc.data.images import open_source, save_png
from dlc.data.inspection import problems
from dlc.sampling.latents import create_sampler, sample_latents
from dlc.sampling.pictures import write_npz
from dlc.sampling.prior_draw import sample_codes
from evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall
from models import DiT_models
from prior import DLCPrior_models

IMAGENET = 1_281_167  # images of its training set
IMAGE_ROWS = (12_800, 128_000, IMAGENET)
L, V = 16, 256


class Row(NamedTuple):
    """prepare(folder, size) writes the files that work(folder, size) reads, which returns the function to time."""

    name: str
    grows: str
    sizes: tuple[int, ...]
    tiny: int
    prepare: Callable | None
    work: Callable
    why: str = "not known"  # an exponent is above 1.15


def linked(folder: Path, names: Iterable[str], write: Callable[[Path], object]) -> None:
    """Files of these names, up to 30,000 links each to one that write(path) makes: disks allow 65,000."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        if number % 30_000 == 0:
            first = folder / name
            write(first)
        else:
            os.link(first, folder / name)


def class_folders(folder: Path, size: int) -> None:
    for number in range(classes := min(1000, size // 10)):
        names = (f"{index}.JPEG" for index in range(number, size, classes))
        linked(folder / f"n{number:08d}", names, Path.touch)


def features(folder: Path, size: int) -> None:
    manifest = Manifest(latents="sample", dtype="float16", image_size=32, images=0, classes=["a"], L=L, V=V)
    writer, random = FeatureWriter(folder, manifest), np.random.default_rng(0)
    writer.start()
    for shard, start in enumerate(range(0, size, 1024)):
        rows = min(1024, size - start)
        latents = random.standard_normal((rows, 4, 4, 4), dtype=np.float32).astype(np.float16)
        codes = random.integers(0, V, (rows, L), dtype=np.uint8)
        arrays = dict(features=latents, sem=codes, labels=np.zeros(rows, np.int64), path=np.full(rows, "a/0.png"))
        writer.write(shard, arrays, [])
    writer.finish(shard + 1)


def samples(folder: Path, size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    linked(folder / "images", (f"{index:06d}.png" for index in range(size)), lambda path: save_png(path, image))


def diffusion_step(batch: int, side: int) -> Callable:
    """A forward and backward pass and AdamW's step."""
    x, t, y = torch.randn(batch, 4, side, side), torch.zeros(batch, dtype=torch.long), torch.randint(V, (batch, L))
    model, diffusion = DiT_models["DiTSEM-Ti/2"](input_size=side, L=L, V=V).train(), create_diffusion("")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def work():
        diffusion.training_losses(model, x, t, dict(y=y))["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def sampling(count: int, steps: int) -> Callable:
    model, indices = DiT_models["DiTSEM-Ti/4"](input_size=16, L=L, V=V).eval(), torch.arange(count)
    options = dict(y=torch.zeros(count, L, dtype=torch.long), seed=0, cfg_scale=1.5)
    return lambda: sample_latents(model, create_sampler("ddpm", steps), indices=indices, **options)


def drawing_codes(folder: Path, size: int) -> Callable:
    model, process = DLCPrior_models["DLCPrior-Ti"](L=size, V=V).eval(), create_process("masked", V=V)
    sampler = create_sampler("first-hitting", process=process)
    return lambda: sample_codes(model, process, sampler, seed=0, indices=torch.arange(4))


# fmt: off
ROWS = [
    Row("listing a folder of images", "files", (10_000, 100_000, IMAGENET), 100, class_folders,
        lambda folder, _: partial(open_source, folder)),
    Row("opening features", "rows", IMAGE_ROWS, 100, features, lambda folder, _: partial(Features, folder)),
    Row("checking features before training", "rows", IMAGE_ROWS, 100, features,
        lambda folder, _: Features(folder).validate),
    Row("python -m dlc.features check", "rows", IMAGE_ROWS, 100, features,
        lambda folder, _: lambda: list(problems(folder))),
    Row("writing the .npz", "images of 32 x 32", (500, 5_000, 50_000), 100, samples,
        lambda folder, size: partial(write_npz, folder / "images.npz", folder / "images", size)),
    Row("training step", "images per batch", (1, 10, 100), 1, None, lambda _, size: diffusion_step(size, 16)),
    Row("training step", "tokens of the image, 64 x 64 to 640 x 640", (16, 144, 1_600), 16, None,
        lambda _, size: diffusion_step(4, 2 * round(size**0.5)),
        "attention compares all pairs of tokens: between 1 and 2"),
    Row("sampling, 10 steps", "images at once", (2, 20, 200), 1, None, lambda _, size: sampling(size, 10)),
    Row("sampling, DDPM", "steps", (10, 100, 1_000), 2, None, lambda _, size: sampling(4, size)),
    Row("drawing codes, first hitting", "L, tokens per code and calls of the network", (16, 64, 256), 4, None,
        drawing_codes, "L calls of a network over L tokens: L^2, and more by attention"),
    Row("Frechet distance", "features", (64, 256, 1_024), 16, None,
        lambda _, D: partial(frechet_distance, *map(FeatureStatistics.of, torch.randn(2, 2 * D, D))),
        "roots of D x D matrices take D^3, and memory D^2"),
    Row("precision and recall", "images in each set", (200, 2_000, 20_000), 100, None,
        lambda _, size: partial(precision_recall, *torch.randn(2, size, 64)),
        "each image is compared with every one: N^2; the tiles of distances have one size"),
]
# fmt: on


def peak_kilobytes() -> int:
    """This process's own peak of memory: that of getrusage includes the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if "VmHWM" in line))


def measure(row: Row, root: Path, size: int) -> tuple[float, float]:
    """Seconds of a row's work, and the MiB by which memory rises."""
    for count in (row.tiny, size):
        folder = root / f"{row.prepare.__name__ if row.prepare else 'none'}-{count}"
        if row.prepare and not folder.exists():
            row.prepare(folder, count)
        if count == row.tiny:
            row.work(folder, count)()  # loads libraries, starts threads
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds, work = peak_kilobytes(), [], row.work(folder, size)
    while len(seconds) < 5 and sum(seconds) < 2:
        seconds.append(seconds_of(work))
    return min(seconds), (peak_kilobytes() - before) / 1024


def table_row(row: Row, measured: list[tuple[float, float]]) -> dict:
    """A row of the table, from (seconds, MiB) at each size."""
    seconds, memory = zip(*measured)
    exponent = math.log(seconds[-1] / seconds[-2], row.sizes[-1] / row.sizes[-2])
    return {
        **{"": row.name, "grows": row.grows},
        "from … to": " / ".join(f"{size:,}" for size in row.sizes),
        "seconds": " / ".join(f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in seconds),
        "exponent": exponent,
        "MiB": " / ".join(f"{value:,.0f}" for value in memory),
        "why": row.why if exponent > 1.15 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a row, a size and a folder, in its own process
    args, rows = parser.parse_args(), []
    if args.one:
        number, size, root = args.one
        return print(*measure(ROWS[int(number)], Path(root), int(size)))
    with tempfile.TemporaryDirectory() as root:
        for number, row in enumerate(ROWS):
            said = [run_script("-m", "benchmarks.growth", "--one", number, size, root) for size in row.sizes]
            rows.append(table_row(row, [tuple(map(float, words.split())) for words in said]))
            print(rows[-1], flush=True)
    record("growth", rows)


if __name__ == "__main__":
    main()
