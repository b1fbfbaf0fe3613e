"""The demos' pictures, 64x64 RGB, as image folders; nothing is downloaded, and running it again writes the same.

    python -m demo.pictures digits FOLDER       # train/ and heldout/{digit}/{index:04d}.png: 1,437 and 360 images
    python -m demo.pictures emoji FOLDER        # train/ and heldout/{group}/{index:04d}-{name}.png: 1,363 and 195

Digits: scikit-learn's 1,797 real scans of 8x8 pixels, enlarged, white on black (Alpaydin & Kaynak 1998, "Optical
Recognition of Handwritten Digits", UCI); index is the position in `sklearn.datasets.load_digits`, and the split is
stratified by digit. Emoji: Noto Emoji's pictures on white, from assets/emoji (see its README.md): one sheet of
pictures, and a table of their names and groups, row by row; every eighth one is held out.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn import datasets
from sklearn.model_selection import train_test_split

from dlc.data.images import save_png
from dlc.machine.cli import ArgumentParser

SIZE = 64  # pixels
INK = 16  # highest grey level of the scans, 0..16
EMOJI, COLUMNS = Path(__file__).resolve().parent.parent / "assets/emoji", 40  # of the sheet

Pictures = tuple[np.ndarray, list[str], list[str], np.ndarray]


def load_digits() -> Pictures:
    """All digits: images (n, 64, 64, 3) uint8, their names, their groups, and which of them are held out, (n,) bool."""
    scans, labels = datasets.load_digits(return_X_y=True)
    grey = np.rint(scans.reshape(-1, 8, 8) * (255 / INK)).astype(np.uint8)
    images = np.stack([Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for scan in grey])
    order = np.arange(len(labels))
    _, heldout = train_test_split(order, test_size=360, random_state=0, stratify=labels)
    return images[..., None].repeat(3, axis=3), [""] * len(labels), labels.astype(str).tolist(), np.isin(order, heldout)


def load_emoji() -> Pictures:
    """All emoji, as `load_digits` gives the digits."""
    with open(EMOJI / "names.csv", newline="", encoding="utf-8") as file:
        names, groups = zip(*((f"-{row['name']}", row["group"]) for row in csv.DictReader(file)))
    sheet = np.array(Image.open(EMOJI / "sheet.jpg").convert("RGB"))
    cells = sheet.reshape(-1, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    return cells[: len(names)], list(names), list(groups), np.arange(len(names)) % 8 == 4


def write_image_folder(root: Path, what: str) -> int:
    """Write "digits" or "emoji" under root as PNG files. Returns the number of images."""
    images, names, groups, heldout = dict(digits=load_digits, emoji=load_emoji)[what]()
    for index, image in enumerate(images):
        folder = root / ("heldout" if heldout[index] else "train") / groups[index]
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"{index:04d}{names[index]}.png", image)
    return len(images)


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m demo.pictures")
    parser.add_argument("what", choices=["digits", "emoji"], help="write these pictures")
    parser.add_argument("out", type=Path, help="write them into this folder, which is created if missing")
    args = parser.parse_args()
    with parser.one_line_errors():
        print(f"{write_image_folder(args.out, args.what)} images under {args.out}")


if __name__ == "__main__":
    main()
