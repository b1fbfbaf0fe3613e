"""1,558 emoji of 64x64 pixels on white, Noto Emoji's pictures, as an image folder.

    python -m demo.emoji EMOJI

writes EMOJI/train/{group}/{index:04d}-{name}.png (1,363 images) and EMOJI/heldout/{group}/{index:04d}-{name}.png (195),
from assets/emoji: one sheet of pictures, and a table of their names and groups, row by row. Every eighth picture is
held out; running it again writes the same pictures. Where they come from: assets/emoji/README.md.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from dlc.data.images import save_png
from dlc.machine.cli import ArgumentParser

SHEET = Path(__file__).resolve().parent.parent / "assets/emoji"
IMAGE_SIZE, COLUMNS = 64, 40  # pixels; of the sheet
HELDOUT_EVERY = 8


def load_emoji() -> tuple[np.ndarray, list[str], list[str]]:
    """All emoji: images (n, 64, 64, 3) uint8, their names, and the names of their groups."""
    with open(SHEET / "names.csv", newline="", encoding="utf-8") as file:
        names, groups = zip(*((row["name"], row["group"]) for row in csv.DictReader(file)))
    sheet = np.array(Image.open(SHEET / "sheet.jpg").convert("RGB"))
    cells = sheet.reshape(-1, IMAGE_SIZE, COLUMNS, IMAGE_SIZE, 3).swapaxes(1, 2)
    return cells.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)[: len(names)], list(names), list(groups)


def is_heldout(index: int) -> bool:
    return index % HELDOUT_EVERY == HELDOUT_EVERY // 2


def write_image_folder(root: Path) -> int:
    """Write both splits under root as PNG files, one folder per group. Returns the number of images."""
    images, names, groups = load_emoji()
    for index, (image, name, group) in enumerate(zip(images, names, groups)):
        folder = root / ("heldout" if is_heldout(index) else "train") / group
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"{index:04d}-{name}.png", image)
    return len(images)


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m demo.emoji")
    parser.add_argument("out", type=Path, help="write the images into this folder, which is created if missing")
    args = parser.parse_args()
    with parser.one_line_errors():
        print(f"{write_image_folder(args.out)} images under {args.out}")


if __name__ == "__main__":
    main()
