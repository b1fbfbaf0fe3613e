"""scikit-learn's handwritten digits as 64x64 RGB images: 1,797 real scans of 8x8 pixels, enlarged, white on black.

    python -m demo.digits DIGITS

writes DIGITS/train/{digit}/{index:04d}.png (1,437 images) and DIGITS/heldout/{digit}/{index:04d}.png (360), where index
is the position in `sklearn.datasets.load_digits`. The split is fixed and stratified by digit; running it again writes
the same bytes. Nothing is downloaded: the scans come with scikit-learn (Alpaydin & Kaynak 1998, "Optical
Recognition of Handwritten Digits", UCI).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

IMAGE_SIZE = 64  # pixels
SCAN_SIZE = 8  # pixels
INK = 16  # highest grey level of the scans, 0..16
HELDOUT = 360  # images, about a fifth
SPLIT_SEED = 0
DIRECTIONS = 20  # they hold 89% of the variance of the train scans


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """All digits in scikit-learn's order: images (1797, 64, 64, 3) uint8 and labels (1797,) int64."""
    scans, labels = load_digits(return_X_y=True)
    grey = np.rint(scans.reshape(-1, SCAN_SIZE, SCAN_SIZE) * (255 / INK)).astype(np.uint8)
    images = np.stack(
        [Image.fromarray(scan).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for scan in grey]
    )  # (n, 64, 64)
    return np.repeat(images[..., None], 3, axis=3), labels.astype(np.int64)


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the train and held-out images, (1437,) and (360,), each ascending."""
    train, heldout = train_test_split(
        np.arange(len(labels)), test_size=HELDOUT, random_state=SPLIT_SEED, stratify=labels
    )
    return np.sort(train), np.sort(heldout)


def load_split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 64, 64, 3) uint8 and labels (n,) int64 of "train" or "heldout"."""
    images, labels = load_images()
    indices = dict(zip(("train", "heldout"), split_indices(labels)))[name]
    return images[indices], labels[indices]


class DigitReader:
    """Classifies the digit on an image: a support vector machine on 8x8 pixels, fitted to the train scans."""

    def __init__(self):
        images, labels = load_split("train")
        self.svc = SVC(C=10, gamma="scale").fit(self.scans(images), labels)

    @staticmethod
    def scans(images: np.ndarray) -> np.ndarray:
        """Images (n, 64, 64, 3) uint8 back to scans (n, 64) in 0..1: averages over 8x8 pixels."""
        cell = IMAGE_SIZE // SCAN_SIZE
        cells = images.reshape(-1, SCAN_SIZE, cell, SCAN_SIZE, cell, 3)
        return cells.mean(axis=(2, 4, 5)).reshape(-1, SCAN_SIZE**2) / 255

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The digits on images (n, 64, 64, 3) uint8: (n,) int64."""
        return self.svc.predict(self.scans(images))


class MainDirections:
    """The DIRECTIONS directions in which scans (n, 64), those of the train digits, vary most.

    Called with scans (m, 64), gives their coordinates (m, DIRECTIONS).
    """

    def __init__(self, scans: np.ndarray):
        self.mean = scans.mean(axis=0)
        self.axes = np.linalg.svd(scans - self.mean, full_matrices=False)[2][:DIRECTIONS].T  # (64, 20)

    def __call__(self, scans: np.ndarray) -> np.ndarray:
        return (scans - self.mean) @ self.axes


def write_image_folder(root: Path) -> int:
    """Write both splits under root as PNG files, one folder per digit. Returns the number of images."""
    images, labels = load_images()
    for name, indices in zip(("train", "heldout"), split_indices(labels)):
        for index in indices:
            path = Path(root) / name / str(labels[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
    return len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as an image folder.")
    parser.add_argument("out_dir", help="write the images into this folder, which is created if missing")
    args = parser.parse_args()
    print(f"{write_image_folder(args.out_dir)} images under {args.out_dir}")


if __name__ == "__main__":
    main()
