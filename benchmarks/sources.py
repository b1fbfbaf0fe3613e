"""How fast images come from each source, beside the folder: bytes alone, and decoded and cropped to 256 pixels.

    python -m benchmarks.sources

Images are read in random order from the page cache. Rates are per CPU second of one process, so that other programs do
not change them; `indexing` is the time until the first image can be read. It needs the package datasets.
"""

import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np

from benchmarks.extraction import write_photographs
from benchmarks.record import flags_of, record, seconds_of
from dlc.data.images import Source, center_crop, load_rgb, open_source


def pack(root: Path) -> list[str]:
    """Write the images of root/images in every way, and return the names of the ways, the folder first."""
    for kind in ("zip", "tar"):
        shutil.make_archive(root / "images", kind, root / "images")
    paths = sorted((root / "images").rglob("*.jpg"))
    (root / "shards").mkdir()
    for number in range(4):
        with tarfile.open(root / f"shards/{number:06d}.tar", "w") as shard:
            for path in paths[number::4]:
                shard.add(path, path.relative_to(root / "images"))
    content = [dict(bytes=path.read_bytes(), path=path.name) for path in paths]
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict(dict(image=content), features).save_to_disk(root / "saved")
    return ["images", "images.zip", "images.tar", "shards", "saved"]


def bytes_alone(source: Source, index: int) -> bytes:
    file = source.open(index)
    return Path(file).read_bytes() if isinstance(file, str) else file.getvalue()


def decoded(source: Source, index: int) -> np.ndarray:
    return np.array(center_crop(load_rgb(source.open(index)), 256))


def rate(read: Callable, source: Source) -> float:
    """Images per CPU second in random order, the best of three."""

    def read_all():
        for index in np.random.default_rng(0).permutation(len(source)).tolist():
            read(source, index)

    return len(source) / min(seconds_of(read_all, time.process_time) for _ in range(3))


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--images", "read this many photographs of 500 x 375 pixels", 200)
    args, table = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as root:
        write_photographs(Path(root) / "images", args.images)
        for name in pack(Path(root)):
            start = time.process_time()
            source = open_source(Path(root) / name)
            row = {"source": name, "indexing, ms per 1,000": 1e6 * (time.process_time() - start) / args.images}
            row |= {"bytes alone/s": rate(bytes_alone, source), "images/s": rate(decoded, source)}
            table.append({**row, "times the folder": row["images/s"] / [*table, row][0]["images/s"]})
    record("sources", table)


if __name__ == "__main__":
    main()
