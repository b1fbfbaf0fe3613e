"""The table that a demo ends with: how good are the samples, and do they follow their codes?

    python -m demo.table demo_output
    python -m demo.table demo_output_emoji

writes table.txt and table.json there. A row is a set of images, or several sets that differ in their seed: then it has
the means over the sets and their standard errors. To add a row, list it in ROWS. Rows whose files are missing are
skipped.

Frechet distance: to the training images, in features that did not make the codes, because samples for the codes would
have an advantage there (demo.judges). The digits: in the 20 directions in which the train digits vary most as 8x8
scans. The emoji: in the last hidden layer of a small classifier of their groups, and in the 20 directions in which the
training pictures vary most at 16x16 pixels. The row of real held-out images is the floor for so few images. Code
agreement: the share of tokens that encoding an image gives back of the code that it was drawn for, beside the share if
images and codes were paired at random. Its ceiling is the row of reconstructions. Read as asked: the share that a
classifier of real images reads as the class asked for. Sharpness: the mean difference of horizontal neighbours, in grey
levels.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from demo.judges import Judge
from dlc.data import Features
from dlc.data.images import read_png, to_uint8
from dlc.machine.files import read_json, write_bytes
from dlc.nets.vae import decode
from dlc.sampling.code_folder import open_codes
from dlc.weights.networks import load_vae


def read_codes(source: str | Path) -> np.ndarray:
    """All codes of a source as --dlc-dir takes it, (n, L) int64."""
    rows = open_codes(source).rows
    return rows.gather(np.arange(len(rows))).astype(np.int64)


def read_samples(path: Path) -> np.ndarray:
    """The images (n, S, S, 3) uint8 of an .npz."""
    with np.load(path) as archive:
        return archive["arr_0"]


class Demo:
    """The output folder of demo.sh, and its held-out images: pixels, labels and codes, row by row."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.what = "emoji" if (self.folder / "emoji").is_dir() else "digits"
        self.features = Features(self.folder / "features_heldout")
        self.images, self.codes, self.labels = self.real("heldout")

    def real(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The images (n, 64, 64, 3) uint8 of "train" or "heldout", their codes (n, L) int64, and their labels (n,)."""
        features = Features(self.folder / f"features_{split}")
        rows = np.arange(features.count)
        paths = [self.folder / self.what / split / path for path in features.paths.gather(rows)]
        codes = features.codes.gather(rows).astype(np.int64)
        return np.stack([read_png(path) for path in paths]), codes, features.labels.gather(rows)

    def sets(self, name: str, pattern: str = "*.npz") -> list[Path]:
        """What matches in a --sample-dir, by seed. Raises FileNotFoundError where nothing does."""
        found = sorted((self.folder / name).glob(pattern))
        if not found:
            raise FileNotFoundError(self.folder / name)
        return found

    def only(self, name: str, pattern: str = "*.npz") -> Path:
        """As `sets`, of one set. Raises ValueError where several match."""
        found = self.sets(name, pattern)
        if len(found) > 1:
            several = f"{self.folder / name} has {len(found)} sets of samples"
            raise ValueError(f"{several}: keep one of {', '.join(map(str, found))}")
        return found[0]

    def samples(self, name: str) -> np.ndarray:
        """The samples (n, 64, 64, 3) uint8 in a --sample-dir of one set."""
        return read_samples(self.only(name))

    def prior_codes(self, name: str) -> np.ndarray:
        """The codes (n, L) that a prior drew for such samples."""
        return read_codes(self.only(name, "*.codes"))

    def reconstructions(self) -> np.ndarray:
        """What the VAE makes of the images, (n, 64, 64, 3) uint8."""
        latents = torch.from_numpy(self.features.latents.gather(np.arange(self.features.count))).float()
        vae = load_vae(self.features.manifest.vae)
        with torch.inference_mode():
            return torch.cat([to_uint8(decode(vae, part)) for part in latents.split(64)]).numpy()


def samples_by_class(demo: Demo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of a DiT that is told the digit, of the size of the DiTSEM and as many steps, at half the batch, which
    saves a minute. Sample i of `--label-sampling equal` is of digit i % 10, and is compared with a real code of it.
    """
    images = demo.samples("samples_class")
    labels = np.arange(len(images)) % 10
    own = [np.flatnonzero(demo.labels == digit) for digit in range(10)]
    return images, demo.codes[[own[label][i // 10 % len(own[label])] for i, label in enumerate(labels)]], labels


def simple_samples(demo: Demo, name: str, part: int) -> tuple[np.ndarray, np.ndarray, None]:
    """Samples for codes of a simpler model than a prior (demo.codes), which are this part of samples_simple."""
    return np.split(demo.samples("samples_simple"), 2)[part], read_codes(demo.folder / f"simple_codes/{name}.npy"), None


def samples_of_training_codes(demo: Demo) -> list[tuple]:
    """Samples for the codes of training images, which samples.json names."""
    _, codes, labels = demo.real("train")
    rows = [(path, np.array(read_json(path.with_suffix(".json"))["code_rows"])) for path in demo.sets("samples_train")]
    return [(read_samples(path), codes[some], labels[some]) for path, some in rows]


def samples_of_heldout_codes(demo: Demo, name: str) -> list[tuple]:
    """Samples for the held-out codes in their order, of each seed."""
    return [(read_samples(path), demo.codes, demo.labels) for path in demo.sets(name)]


REAL = {
    "real held-out images": lambda demo: (demo.images, demo.codes, demo.labels),
    "their VAE reconstructions": lambda demo: (demo.reconstructions(), demo.codes, demo.labels),
}
# name: (images (n, 64, 64, 3) uint8, codes (n, L) or None, labels (n,) or None), or a list of such, one for each seed,
# by a function of the Demo
ROWS = dict(
    digits=REAL | {
        "samples from their codes": lambda demo: (demo.samples("samples"), demo.codes, demo.labels),
        "flow, 5 calls": lambda demo: (demo.samples("samples_flow"), demo.codes, demo.labels),
        "DiT on classes, half batch": samples_by_class,
        "samples from a prior's codes": lambda demo: (
            demo.samples("samples_prior"), demo.prior_codes("samples_prior"), None),
        "the same, by class": lambda demo: (  # sample i of --prior-class all is of digit i % 10
            demo.samples("samples_prior_class"), demo.prior_codes("samples_prior_class"), np.arange(360) % 10),
        "from a mixture's codes": lambda demo: simple_samples(demo, "mixture", 0),
        "from independent positions": lambda demo: simple_samples(demo, "independent", 1),
        "samples from shuffled codes": lambda demo: (
            demo.samples("samples_shuffled"), np.load(demo.folder / "shuffled_codes.npy"), None),
    },
    emoji=REAL | {
        "samples from their codes": lambda demo: samples_of_heldout_codes(demo, "samples"),
        "from training images' codes": samples_of_training_codes,
        "from a prior's codes": lambda demo: (
            demo.samples("samples_prior"), demo.prior_codes("samples_prior"), None),
        "from shuffled codes": lambda demo: (
            demo.samples("samples_shuffled"), np.load(demo.folder / "shuffled_codes.npy"), None),
    },
)  # fmt: skip


def rows_of(demo: Demo) -> dict:
    """ROWS of a demo, and one for each folder compare_NAME, of samples for the held-out codes in their order."""
    more = sorted(path.name for path in demo.folder.glob("compare_*"))
    return ROWS[demo.what] | {
        name.removeprefix("compare_"): (lambda demo, name=name: samples_of_heldout_codes(demo, name)) for name in more
    }


def mean_of(sets: list[dict]) -> dict:
    """The numbers of a row from those of its sets: means over the sets and, of several sets, their standard errors."""
    row = dict(sets[0], sets=len(sets))
    for key in [key for key in COLUMNS if key in sets[0] and key != "images"]:
        values = np.array([one[key] for one in sets])
        row[key] = round(float(values.mean()), 4)
        if len(sets) > 1:
            row[f"{key}_error"] = round(float(values.std(ddof=1) / len(sets) ** 0.5), 4)
    return row


COLUMNS = dict(
    images=("images", "{:d}"),
    frechet_distance=("Frechet distance", "{:.3f}"),
    pca_distance=("in directions", "{:.3f}"),
    code_agreement=("code agreement", "{:.3f}"),
    chance=("by chance", "{:.3f}"),
    read_as_asked=("read as asked", "{:.3f}"),
    sharpness=("sharpness", "{:.2f}"),
)


def table_of(rows: list[dict]) -> str:
    """The numbers of the rows as lines of aligned columns; those that no row has are left out."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    lines = [" " * 28 + "".join(f"{title:>18}" for title, _ in columns.values())]
    for row in rows:
        cells = []
        for key, (_, form) in columns.items():
            error = f" ± {form.format(row[f'{key}_error'])}" if f"{key}_error" in row else ""
            cells.append(form.format(row[key]) + error if key in row else "-")
        lines.append(f"{row['name']:28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines) + "\n"


def measure(folder: Path) -> list[dict]:
    """The numbers of each row whose files are there."""
    demo = Demo(folder)
    judge, rows = Judge(demo), []
    for name, row_of in rows_of(demo).items():
        try:
            sets = row_of(demo)
        except FileNotFoundError as error:
            print(f"skipped: {name}: {error} is missing")
            continue
        rows.append(mean_of([judge(name, *one) for one in (sets if isinstance(sets, list) else [sets])]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the demo's table, and write it as text and JSON.")
    parser.add_argument("folder", help="read what demo.sh made, and write table.txt and table.json here")
    folder = Path(parser.parse_args().folder)
    rows = measure(folder)
    table = table_of(rows)
    write_bytes(folder / "table.txt", table.encode())
    write_bytes(folder / "table.json", (json.dumps(rows, indent=1) + "\n").encode())
    print(f"\n{table}\nFrechet distance: lower is closer to the training images.")
    print(f"Written to {folder / 'table.txt'} and table.json")


if __name__ == "__main__":
    main()
