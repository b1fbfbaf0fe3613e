"""How fast images come from each source, beside the folder: bytes alone, and decoded and cropped to 256 pixels.

    python -m benchmarks.sources

Images are read in random order from the page cache. Rates are per CPU second of one process, so that other programs do
not change them; `indexing` is the time until the first image can be read. Datasets need the package datasets.
"""

import argparse
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.extraction import write_photographs
from benchmarks.record import record
from dlc.data.images import Source, center_crop, open_source


def pack(root: Path) -> list[str]:
    """Write the images of root/images in every way, and return the names of the ways, the folder first."""
    for kind in ("zip", "tar"):
        shutil.make_archive(root / "images", kind, root / "images")
    (root / "shards").mkdir()
    paths = sorted((root / "images").rglob("*.jpg"))
    for number in range(4):
        with tarfile.open(root / f"shards/{number:06d}.tar", "w") as shard:
            for path in paths[number::4]:
                shard.add(path, path.relative_to(root / "images"))
    try:
        import datasets
    except ImportError:
        return ["images", "images.zip", "images.tar", "shards"]
    content = [dict(bytes=path.read_bytes(), path=path.name) for path in paths]
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict(dict(image=content), features).save_to_disk(root / "saved")
    return ["images", "images.zip", "images.tar", "shards", "saved"]


def rates(source: Source, order: list[int]) -> tuple[float, float]:
    """Images per CPU second, the best of three: their bytes alone, and decoded and cropped."""

    def content(index):
        file = source.open(index)
        return Path(file).read_bytes() if isinstance(file, str) else file.getvalue()

    found = []
    for read in (content, lambda index: np.array(center_crop(source.load(index), 256))):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            for index in order:
                read(index)
            seconds.append(time.process_time() - start)
        found.append(len(order) / min(seconds))
    return tuple(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="photographs of 500 x 375 pixels [%(default)s]")
    args, table = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        write_photographs(root / "images", args.images)
        for name in pack(root):
            start = time.process_time()
            source = open_source(root / name)
            indexing = time.process_time() - start
            order = np.random.default_rng(0).permutation(len(source)).tolist()
            bytes_alone, decoded = rates(source, order)
            first = table[0]["images/s"] if table else round(decoded, 1)
            row = {"source": name, "indexing, ms per 1,000": round(1e6 * indexing / args.images, 1)}
            row |= {"bytes alone/s": round(bytes_alone), "images/s": round(decoded, 1)}
            table.append({**row, "times the folder": round(decoded / first, 2)})
    record("sources", table)


if __name__ == "__main__":
    main()
