"""The pictures of demo.sh, and how long its stages took. The table of numbers is demo.table's.

    python -m demo.report demo_output --sources DIGIT.png DIGIT.png

demo.png shows held-out digits, their VAE reconstructions, and samples: sample i was drawn from the code of held-out row
i. composed.png shows samples from composed codes, 12 per row, between the two digits they are composed of.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from demo.table import Demo
from dlc.data.images import image_grid

COLUMNS = 20  # of the picture: two per digit
COMPOSED = 12  # codes per pair of weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print the demo's times and draw its pictures.")
    parser.add_argument("folder", type=Path, help="read what demo.sh made, and write demo.png and composed.png here")
    parser.add_argument("--sources", nargs=2, required=True, help="the two digits that codes were composed of")
    return parser.parse_args()


def draw_composed(samples: Path, sources: list[Path], path: Path) -> None:
    """Draw COMPOSED samples per row, between the two images they are composed of."""
    rows = samples.reshape(-1, COMPOSED, *samples.shape[1:])
    first, last = (
        np.broadcast_to(np.array(Image.open(source)), (len(rows), 1, *samples.shape[1:])) for source in sources
    )
    image_grid(np.concatenate([first, rows, last], axis=1).reshape(-1, *samples.shape[1:]), COMPOSED + 2).save(path)


def main() -> None:
    args = parse_args()
    demo, picture, composed = Demo(args.folder), args.folder / "demo.png", args.folder / "composed.png"

    print("\nstage                          seconds in this run")
    times = [line.split(maxsplit=1) for line in (args.folder / "times.txt").read_text().splitlines()]
    for seconds, stage in times + [(sum(int(seconds) for seconds, _ in times), "all")]:
        print(f"{stage:30} {seconds:>7}")

    shown = np.concatenate([np.flatnonzero(demo.labels == digit)[: COLUMNS // 10] for digit in range(10)])
    rows = [images[shown] for images in (demo.images, demo.reconstructions(), demo.samples("samples"))]
    image_grid(np.concatenate(rows), COLUMNS).save(picture)
    draw_composed(demo.samples("composed"), args.sources, composed)
    print(f"\nlook at {picture}: held-out digits, reconstructions, samples from their codes")
    print(f"and at {composed}: samples from codes composed of the two digits beside them")


if __name__ == "__main__":
    main()
