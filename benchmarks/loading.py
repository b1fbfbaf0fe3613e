"""How fast batches of features load, from shards and from one file per image, warm and cold; how fast features open.

    python -m benchmarks.loading

One file per image is read as in the reference scripts: np.load of each sample, then a stack. Cold means after the
kernel was asked to drop the files' pages; `disk MB` is what was then read from the disk.
"""

import argparse
import gc
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.record import record
from dlc.data import Features, FeatureWriter, Manifest, kind_dir
from dlc.machine.cli import progress
from dlc.training.batches import TrainingBatches

IMAGENET = 1_281_167  # images in its training set
MANIFEST = Manifest(latents="sample", dtype="float16", image_size=256, images=0, L=512, V=256, classes=["a"])


def sparse_features(root, count, per_shard=1024):
    """Write features that take no room on the disk: each file is a header and a hole."""
    writer = FeatureWriter(root, MANIFEST)
    writer.start()
    shards = range(-(-count // per_shard))
    for number in shards:
        rows = min(per_shard, count - number * per_shard)
        for kind, shape, dtype in (
            ("features", (4, 32, 32), "<f2"),
            ("sem", (512,), "|u1"),
            ("labels", (), "<i8"),
            ("path", (), "<U40"),
        ):
            with open(kind_dir(root, 256, kind) / f"{number:06d}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, dict(descr=dtype, fortran_order=False, shape=(rows, *shape)))
                file.truncate(file.tell() + rows * int(np.prod(shape)) * np.dtype(dtype).itemsize)
        writer.record_path(number).write_text(json.dumps(dict(rows=rows, skipped=[])))
    writer.finish(len(shards))


def both_layouts(root, count, per_shard=1024):
    """Write the same random rows as shards in root/shards, and as one .npy each in root/files."""
    random = np.random.default_rng(0)
    writer = FeatureWriter(root / "shards", MANIFEST)
    writer.start()
    for kind in ("features", "sem"):
        kind_dir(root / "files", 256, kind).mkdir(parents=True)
    for number in progress(range(-(-count // per_shard)), desc="writing", unit="shard"):
        rows = min(per_shard, count - number * per_shard)
        arrays = dict(
            features=random.standard_normal((rows, 4, 32, 32), dtype=np.float32).astype(np.float16),
            sem=random.integers(0, 256, (rows, 512), dtype=np.uint8),
            labels=np.zeros(rows, np.int64),
            path=np.full(rows, "a/0.png"),
        )
        writer.write(number, arrays, [])
        for kind in ("features", "sem"):
            for row in range(rows):
                path = kind_dir(root / "files", 256, kind) / f"{number * per_shard + row}.npy"
                np.save(path, arrays[kind][row : row + 1])
    writer.finish(-(-count // per_shard))
    os.sync()


def one_file_an_image(root):
    """gather(rows) of that layout: latents (n, 4, 32, 32) and codes (n, 512)."""

    def gather(rows):
        return tuple(
            np.concatenate([np.load(kind_dir(root, 256, kind) / f"{row}.npy") for row in rows])
            for kind in ("features", "sem")
        )

    return gather


def shards(root):
    features = Features(root)
    return lambda rows: (features.latents.gather(rows), features.codes.gather(rows, limit=256))


def drop_pages(root):
    gc.collect()  # open maps would keep their pages
    for path in root.rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_megabytes():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"]) / 1e6


def samples_per_second(gather, batches):
    start = time.perf_counter()
    for rows in batches:
        gather(rows)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768, help="rows of the features that are timed [%(default)s]")
    parser.add_argument("--batch", type=int, default=256, help="rows per batch [%(default)s]")
    parser.add_argument("--dir", help="folder for the temporary features [the system's]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        root = Path(root)

        sparse_features(root / "small", 10_000)
        sparse_features(root / "large", IMAGENET)
        Features(root / "small").latents.gather(np.arange(args.batch))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        large = Features(root / "large")
        seconds = time.perf_counter() - start
        large.latents.gather(np.linspace(0, large.count - 1, args.batch).astype(int))
        opening = dict(
            rows=large.count,
            seconds=round(seconds, 3),
            memory_mb=round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
        )
        print("opening a set of {rows:,} rows: {seconds} s, {memory_mb} MB".format(**opening))

        both_layouts(root, args.rows)
        order = np.random.default_rng(1).permutation(args.rows)
        batches = [order[i : i + args.batch] for i in range(0, args.rows - args.batch + 1, args.batch)]
        ours, theirs = shards(root / "shards"), one_file_an_image(root / "files")
        for rows in batches[:8]:
            for one, two in zip(ours(rows), theirs(rows)):
                np.testing.assert_array_equal(one, two)
        del large, ours

        table = []
        for cache in ("warm", "cold"):
            rates = {}
            for layout, path, reader in (
                ("one file an image", root / "files", one_file_an_image),
                ("shards", root / "shards", shards),
            ):
                best, read = 0, 0
                for _ in range(3):
                    if cache == "cold":
                        gather = None
                        drop_pages(path)
                    gather = reader(path)
                    if cache == "warm":
                        samples_per_second(gather, batches)  # warms the cache
                    read_before = disk_megabytes()
                    rate = samples_per_second(gather, batches)
                    if rate > best:
                        best, read = rate, disk_megabytes() - read_before
                rates[layout] = best
                table.append(
                    {
                        "layout": layout,
                        "cache": cache,
                        "samples/s": round(best),
                        "disk MB": round(read),
                        "times one file an image": round(best / rates["one file an image"], 1),
                    }
                )
        for workers in (1, 2):
            features = Features(root / "shards")
            data = TrainingBatches(features, features.codes, features.V, seed=0, global_batch=args.batch)
            loader = iter(DataLoader(data, sampler=range(10 * len(batches)), batch_size=None, num_workers=workers))
            for _ in range(20):
                next(loader)
            start = time.perf_counter()
            for _ in range(5 * len(batches)):
                next(loader)
            rate = 5 * len(batches) * args.batch / (time.perf_counter() - start)
            table.append(
                {
                    "layout": f"shards, training's loader, {workers} worker{'s' if workers > 1 else ''}",
                    "cache": "warm",
                    "samples/s": round(rate),
                    "disk MB": 0,
                    "times one file an image": round(rate / table[0]["samples/s"], 1),
                }
            )
            del loader
        record("loading", table, opening=opening, bytes_a_sample=4 * 32 * 32 * 2 + 512)


if __name__ == "__main__":
    main()
