"""Features that somebody else computed: `--features PATH.npz`.

| array | content |
|---|---|
| `samples` | features of the samples (N, D), floats |
| `reference` | features of the reference (M, D); or --reference names an .npz with `mu`, `sigma` |
| `samples_spatial`, `reference_spatial` | for sFID, if wanted |
| `probs` | class probabilities of the samples (N, classes), for the Inception Score, if wanted |
"""

from pathlib import Path

import torch

from dlc.data.npz import array_names, read_array
from dlc.machine.cli import one_line
from evaluation.measuring import Measured
from evaluation.metrics import FeatureStatistics, checked

NAME = "file"  # of the network, which is not known


class FileNetwork:
    """Stands for that network.

    Args:
        path: of the file.
        measured: what the file holds of the samples.
        probs: their class probabilities, or None.
    """

    name, digest, notes = NAME, None, ()

    def __init__(self, path, measured: Measured, probs: torch.Tensor | None):
        self.path, self.measured = Path(path), measured
        self.outputs = {output: one.dim for (_, output), one in measured.statistics.items()}
        self.probabilities = None if probs is None else lambda _: probs


def read_features(path) -> tuple[Measured, Measured | None, torch.Tensor | None]:
    """What was measured of samples and of the reference (or None), and the samples' probabilities (or None).

    Raises ValueError, naming file and array.
    """
    path, names = Path(path), array_names(path)
    if "samples" not in names:
        keys = one_line(", ".join(names), 100) or "none"
        raise ValueError(f"--features {path} has no array samples (N, D): its keys are {keys}")

    def read(name):
        try:
            features = checked(torch.from_numpy(read_array(path, name)), name)
            rows = features.split(4096)
            if name == "probs" and any((part.double().sum(dim=1) - 1).abs().max() > 1e-3 for part in rows):
                raise ValueError("probs have rows that do not sum to 1")
            return features.float()
        except (ValueError, TypeError) as error:
            raise ValueError(f"--features {path}: {one_line(error, 200).removeprefix(f'{path}: ')}") from None

    def measured(name):
        features = read(name)
        found = Measured(len(features), features={NAME: features})
        for output, key in (("pool", name), ("spatial", f"{name}_spatial")):
            if key in names:
                rows = features if key == name else read(key)
                if len(rows) != found.count:
                    raise ValueError(f"--features {path}: {key} has {len(rows):,} rows, {name} {found.count:,}")
                found.statistics[NAME, output] = FeatureStatistics.of(rows)
        return found

    samples, reference = measured("samples"), measured("reference") if "reference" in names else None
    probs = read("probs") if "probs" in names else None
    if probs is not None and len(probs) != samples.count:
        raise ValueError(f"--features {path}: probs has {len(probs):,} rows, samples {samples.count:,}")
    return samples, reference, probs
