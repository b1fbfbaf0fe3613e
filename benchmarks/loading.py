"""How fast batches of features load, from shards and from one file per image, warm and cold.

    python -m benchmarks.loading

One file per image is read as in the reference scripts: np.load of each sample, then a stack. Cold means after the
kernel was asked to drop the files' pages; `disk MB` is what was then read from the disk.
"""

import gc
import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.record import flags_of, record, seconds_of
from dlc.data import Features, FeatureWriter, Manifest, kind_dir
from dlc.machine.readers import read_ahead
from dlc.training.batches import TrainingBatches

FILES, SHARDS, TIMES = "one file per image", "shards", "times one file per image"
MANIFEST = Manifest(latents="sample", dtype="float16", image_size=256, images=0, L=512, V=256, classes=["a"])


def both_layouts(root: Path, count: int, per_shard: int = 1024) -> None:
    """Write the same random rows as shards in root/shards, and as one .npy each in root/files."""
    random = np.random.default_rng(0)
    writer = FeatureWriter(root / "shards", MANIFEST)
    writer.start()
    folders = {kind: kind_dir(root / "files", 256, kind) for kind in ("features", "sem")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for number, start in enumerate(range(0, count, per_shard)):
        rows = min(per_shard, count - start)
        arrays = dict(
            features=random.standard_normal((rows, 4, 32, 32), dtype=np.float32).astype(np.float16),
            sem=random.integers(0, 256, (rows, 512), dtype=np.uint8),
            labels=np.zeros(rows, np.int64),
            path=np.full(rows, "a/0.png"),
        )
        writer.write(number, arrays, [])
        for kind, folder in folders.items():
            for row in range(rows):
                np.save(folder / f"{start + row}.npy", arrays[kind][row : row + 1])
    writer.finish(number + 1)
    os.sync()


def reader(layout: str, root: Path) -> Callable:
    """gather(rows) of a layout: latents (n, 4, 32, 32) and codes (n, 512)."""
    if layout == SHARDS:
        features = Features(root / "shards")
        return lambda rows: (features.latents.gather(rows), features.codes.gather(rows))
    folders = [kind_dir(root / "files", 256, kind) for kind in ("features", "sem")]
    return lambda rows: tuple(np.concatenate([np.load(folder / f"{row}.npy") for row in rows]) for folder in folders)


def best_rate(layout: str, cache: str, root: Path, batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """The best of three: samples per second, and the MB read from the disk."""

    def read():
        gather = reader(layout, root)
        for rows in batches:
            gather(rows)

    def disk_bytes():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    found = []
    for _ in range(3):
        gc.collect()  # open maps would keep their pages
        for path in root.rglob("*.npy") if cache == "cold" else ():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cache == "warm":
            read()
        before = disk_bytes()
        rate = sum(map(len, batches)) / seconds_of(read, time.perf_counter)
        found.append((rate, (disk_bytes() - before) / 1e6))
    return max(found)


def loader_rate(root: Path, batch: int, count: int, workers: int) -> float:
    """Samples per second out of training's loader."""
    features = Features(root / "shards")
    data = TrainingBatches(features, dict(latents=features.latents, codes=features.codes), seed=0, global_batch=batch)
    loader = read_ahead(data.__getitem__, range(10 * count), workers)
    deque(itertools.islice(loader, 20), 0)
    some = partial(deque, itertools.islice(loader, 5 * count), 0)
    return 5 * count * batch / seconds_of(some, time.perf_counter)


def main() -> None:
    parser, add_flag = flags_of(__doc__)
    add_flag("--rows", "time this many rows of features", 32_768)
    add_flag("--batch", "read this many rows per batch", 256)
    parser.add_argument("--dir", help="write the temporary features here [the system's]")
    args, table, rates = parser.parse_args(), [], {}

    def add(layout, cache, rate, read):
        rates.setdefault(cache, rate)  # the first row of a cache is of one file per image
        times = round(rate / rates[cache], 1)
        row = {"layout": layout, "cache": cache, "samples/s": round(rate), "disk MB": round(read), TIMES: times}
        table.append(row)

    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        root = Path(root)
        both_layouts(root, args.rows)
        order = np.random.default_rng(1).permutation(args.rows)
        batches = [order[i : i + args.batch] for i in range(0, args.rows - args.batch + 1, args.batch)]
        for cache in ("warm", "cold"):
            for layout in (FILES, SHARDS):
                add(layout, cache, *best_rate(layout, cache, root, batches))
        for workers in (1, 2):
            name = f"shards, training's loader, {workers} worker{'s' if workers > 1 else ''}"
            add(name, "warm", loader_rate(root, args.batch, len(batches), workers), 0)
    record("loading", table, bytes_per_sample=4 * 32 * 32 * 2 + 512)


if __name__ == "__main__":
    main()
