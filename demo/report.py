"""Draw the pictures of demo.sh, and print how long its stages took. demo.table makes the table of numbers.

    python -m demo.report demo_output --sources DIGIT.png DIGIT.png

demo.png shows held-out images, their VAE reconstructions, and samples: sample i was drawn from the code of held-out row
i. composed.png shows samples from composed codes between the two images they are composed of. The emoji's prior.png
shows samples for a prior's codes; demo.prior draws the digits'.
"""

import argparse
from pathlib import Path

import numpy as np

from demo.table import Demo, read_samples
from dlc.data.images import image_grid, read_png, save_png

COLUMNS = 10  # of every picture
DRAWN_ROWS = 4  # of prior.png


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print the demo's times and draw its pictures.")
    parser.add_argument("folder", type=Path, help="read what demo.sh made, and write its pictures here")
    parser.add_argument(
        "--sources",
        type=Path,
        nargs="+",
        required=True,
        help="the two images that all codes were composed of, or those of each file of composed codes in turn",
    )
    return parser.parse_args()


def draw_heldout(demo: Demo, path: Path) -> None:
    """Held-out images, spread over the classes, above their reconstructions and samples."""
    kinds = {
        "held out": demo.images,
        "by the VAE": demo.reconstructions(),
        "from its code": read_samples(demo.seeds("samples")[0]),
    }
    shown = np.linspace(0, len(demo.images) - 1, 2 * COLUMNS).astype(int)
    images = np.concatenate([images[some] for some in (shown[::2], shown[1::2]) for images in kinds.values()])
    save_png(path, image_grid(images, COLUMNS, [*kinds] * 2))


def name_of(path: Path) -> str:
    """What a picture shows, by its path: emoji have a name after their number, digits are in a folder of their own."""
    return path.stem.partition("-")[2] or path.parent.name


def draw_composed(samples: np.ndarray, pairs: list[list[Path]], path: Path) -> None:
    """A row for each file of composed codes, between the two images that its codes are composed of."""
    images, captions = [], []
    for (first, last), row in zip(pairs, np.split(samples, len(pairs))):
        images += [read_png(first), *row[: COLUMNS - 2], read_png(last)]
        captions += [name_of(first), *[""] * (COLUMNS - 2), name_of(last)]
    save_png(path, image_grid(images, COLUMNS, captions=captions))


def main() -> None:
    args = parse_args()
    demo = Demo(args.folder)

    print("\nstage                          seconds in this run")
    times = [line.split(maxsplit=1) for line in (args.folder / "times.txt").read_text().splitlines()]
    for seconds, stage in times + [(sum(int(seconds) for seconds, _ in times), "all")]:
        print(f"{stage:30} {seconds:>7}")

    draw_heldout(demo, args.folder / "demo.png")
    files = len(list((args.folder / "composed_codes").glob("*.npy")))
    pairs = [args.sources[i : i + 2] for i in range(0, len(args.sources), 2)]
    pairs = pairs if len(pairs) == files else pairs * files
    draw_composed(demo.samples("composed"), pairs, args.folder / "composed.png")
    if demo.what == "emoji":
        drawn = demo.samples("samples_prior")[: DRAWN_ROWS * COLUMNS]
        save_png(args.folder / "prior.png", image_grid(drawn, COLUMNS))
    print(f"\nlook at {', '.join(map(str, sorted(args.folder.glob('*.png'))))}")


if __name__ == "__main__":
    main()
