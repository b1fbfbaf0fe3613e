"""Speed and memory of writing and checking the .npz of 50,000 images of 256x256 pixels.

    python -m benchmarks.npz

Photograph-like PNGs, of which so few are different as --different says: the others are hard links to them, since the
disk need not hold 50,000. Memory is the peak of a process that does nothing else, PyTorch's own included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.record import record
from dlc.data.images import read_png, save_png
from dlc.sampling.pictures import check_npz, npz_rows, png_path, write_npz


def write_pngs(folder, count, different):
    """PNGs of smooth colours under a little noise. Gives their mean size in bytes."""
    random = np.random.default_rng(0)
    for index in range(count):
        if index < different:
            coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256))
            save_png(
                png_path(folder, index),
                (np.asarray(coarse) + random.normal(0, 2, (256, 256, 3))).clip(0, 255).astype(np.uint8),
            )
        else:
            os.link(png_path(folder, index % different), png_path(folder, index))
    return sum(png_path(folder, index).stat().st_size for index in range(different)) / different


def measure(work, root, args):
    """Images a second and the peak of memory, in GiB, of one part in a process of its own."""
    start = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks.npz", "--images", str(args.images), "--work", work, "--root", root],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {
        "": work,
        "images": args.images,
        "images/s": args.images / (time.perf_counter() - start),
        "memory GiB": int(said.split()[-1]) / 2**20,
    }


def peak_kilobytes():
    """This process's own peak of memory: that of getrusage begins with what the process was forked from."""
    return next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="rows of the .npz [%(default)s]")
    parser.add_argument("--different", type=int, default=500, help="different images among them [%(default)s]")
    parser.add_argument("--work", choices=["write", "check"], help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work == "write":
        write_npz(args.root / "images.npz", args.root / "images", args.images)
    elif args.work == "check":
        check_npz(args.root / "images.npz")
    if args.work:
        print(peak_kilobytes())
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        folder.mkdir()
        size = write_pngs(folder, args.images, args.different)
        rows = [measure(work, root, args) for work in ("write", "check")]
        npz = Path(root) / "images.npz"
        assert npz_rows(npz) == args.images
        with np.load(npz) as archive:
            array = archive["arr_0"]
        assert array.shape == (args.images, 256, 256, 3)
        for index in np.linspace(0, args.images - 1, 100).astype(int):
            assert (array[index] == read_png(png_path(folder, index))).all()
        record("npz", rows, png_kilobytes=size / 1e3, npz_gigabytes=npz.stat().st_size / 1e9, different=args.different)


if __name__ == "__main__":
    main()
