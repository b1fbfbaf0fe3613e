"""The table that demo.sh ends with: how good are the samples, and do they follow their codes?

    python -m demo.table demo_output

writes demo_output/table.txt and demo_output/table.json. A row is a set of 360 images: to add one, list it in ROWS. Rows
whose files are missing are skipped.

Frechet distance: to the 1,437 train digits, in the 20 directions in which those vary most as 8x8 scans. Not in the
features of the digits encoder: it makes the codes, so samples for its codes would have an advantage there, and 480
numbers are too many for 360 images. The row of real held-out digits is the floor that so few images leave.
Code agreement: the share of tokens that encoding an image gives back of the code that it was drawn for, beside the
share if images and codes were paired at random. Read as asked: by a classifier of real digits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from demo.digits import DigitReader, MainDirections, load_split
from dlc.data import Features
from dlc.data.images import to_uint8
from dlc.machine.files import write_bytes
from dlc.nets.vae import decode
from dlc.sampling.code_folder import open_codes
from dlc.weights.networks import load_encoder, load_vae
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.tokens import CodeReader, token_agreement

CPU = torch.device("cpu")


def read_codes(source: str | Path) -> np.ndarray:
    """All codes of a source as --dlc-dir takes it, (n, L) int64."""
    rows = open_codes(source).rows
    return rows.gather(np.arange(len(rows))).astype(np.int64)


class Demo:
    """The output folder of demo.sh, and the held-out digits: real images, labels and codes, row by row."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.features = Features(self.folder / "features_heldout")
        rows = np.arange(self.features.count)
        self.codes = self.features.codes.gather(rows).astype(np.int64)
        self.labels = self.features.labels.gather(rows)  # folders 0 to 9, so the class index is the digit
        images, labels = load_split("heldout")
        order = np.argsort(labels, kind="stable")  # the listing goes class by class
        self.images = images[order]
        assert (labels[order] == self.labels).all()

    def samples(self, name: str) -> np.ndarray:
        """The samples in a --sample-dir of the demo. Raises FileNotFoundError where there are none."""
        with np.load(self.only(name, "*.npz")) as archive:
            return archive["arr_0"]

    def prior_codes(self, name: str) -> np.ndarray:
        """The codes (n, L) that a prior drew for such samples. Raises FileNotFoundError where there are none."""
        return read_codes(self.only(name, "*.codes"))

    def only(self, name: str, pattern: str) -> Path:
        """What matches in a --sample-dir. Raises FileNotFoundError where nothing does, ValueError where several do."""
        found = sorted((self.folder / name).glob(pattern))
        if not found:
            raise FileNotFoundError(self.folder / name)
        if len(found) > 1:
            raise ValueError(
                f"{self.folder / name} has {len(found)} sets of samples: keep one of {', '.join(map(str, found))}"
            )
        return found[0]

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
    """Samples for codes of a simpler model than a prior (demo.prior), which are this part of samples_simple."""
    return np.split(demo.samples("samples_simple"), 2)[part], read_codes(demo.folder / f"simple_codes/{name}.npy"), None


# name: (images (n, 64, 64, 3) uint8, codes (n, L) or None, the digit on each (n,) or None), by a function of the Demo
ROWS = {
    "real held-out digits": lambda demo: (demo.images, demo.codes, demo.labels),
    "their VAE reconstructions": lambda demo: (demo.reconstructions(), demo.codes, demo.labels),
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
}  # fmt: skip


class Judge:
    """Gives the numbers of a set of images."""

    def __init__(self, demo: Demo):
        self.read_digit, self.V = DigitReader(), demo.features.V
        self.read_code = CodeReader(load_encoder(demo.features.manifest.encoder), CPU)
        scans = DigitReader.scans(load_split("train")[0])  # (1437, 64)
        self.main_directions = MainDirections(scans)
        self.train = self.statistics(scans)

    def statistics(self, scans: np.ndarray) -> FeatureStatistics:
        return FeatureStatistics.of(self.main_directions(scans))

    def __call__(self, name: str, images: np.ndarray, codes: np.ndarray | None, labels: np.ndarray | None) -> dict:
        distance = frechet_distance(self.train, self.statistics(DigitReader.scans(images)))
        numbers = dict(name=name, images=len(images), frechet_distance=round(distance, 4))
        if codes is not None:
            found = self.read_code(torch.from_numpy(images))["codes"].numpy()
            agreement = token_agreement(codes.astype(np.int64), found, self.V)
            numbers.update(code_agreement=round(agreement["share"], 4), chance=round(agreement["chance"], 4))
        if labels is not None:
            numbers["read_as_asked"] = round(float((self.read_digit(images) == labels).mean()), 4)
        return numbers


COLUMNS = dict(
    images=("images", "{:d}"),
    frechet_distance=("Frechet distance", "{:.3f}"),
    code_agreement=("code agreement", "{:.3f}"),
    chance=("by chance", "{:.3f}"),
    read_as_asked=("read as asked", "{:.3f}"),
)


def table_of(rows: list[dict]) -> str:
    """The numbers of the rows as lines of aligned columns."""
    lines = [" " * 28 + "".join(f"{title:>18}" for title, _ in COLUMNS.values())]
    for row in rows:
        cells = [form.format(row[key]) if key in row else "-" for key, (_, form) in COLUMNS.items()]
        lines.append(f"{row['name']:28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines) + "\n"


def measure(folder: Path) -> list[dict]:
    """The numbers of each row whose files are there."""
    demo = Demo(folder)
    judge, rows = Judge(demo), []
    for name, row_of in ROWS.items():
        try:
            rows.append(judge(name, *row_of(demo)))
        except FileNotFoundError as error:
            print(f"skipped: {name}: {error} is missing")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the demo's table, and write it as text and JSON.")
    parser.add_argument("folder", help="read what demo.sh made, and write table.txt and table.json here")
    folder = Path(parser.parse_args().folder)
    rows = measure(folder)
    table = table_of(rows)
    write_bytes(folder / "table.txt", table.encode())
    write_bytes(folder / "table.json", (json.dumps(rows, indent=1) + "\n").encode())
    print(
        f"\n{table}\nFrechet distance: lower is closer to the train digits. Written to {folder / 'table.txt'} and .json"
    )


if __name__ == "__main__":
    main()
