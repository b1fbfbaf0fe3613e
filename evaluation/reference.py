"""References: the stored statistics of an .npz, its images, or the images of a folder, archive or dataset.

| array of an ADM reference | content |
|---|---|
| `arr_0` | images uint8 (N, H, W, 3), for precision and recall; ADM's have 10,000 of them |
| `mu`, `sigma` | mean (2048,) and covariance (2048, 2048) of Inception's pool_3 over the whole data set |
| `mu_s`, `sigma_s` | the same of the 2023 spatial features, for sFID |

`make-reference` adds `network`, `network_sha256`, `count` (images behind the statistics) and `sha256` (of their
pixels). ADM's evaluator ignores these.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlc.data.npz import array_names, read_array
from dlc.machine.cli import one_line
from evaluation.metrics import FeatureStatistics
from evaluation.sets import ImageSet, is_npz, open_images

STORED = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
DEFAULT_NETWORK = "inception"  # of ADM's files, which do not say


@dataclass
class Reference:
    """What the samples are compared with; path is None where nothing is.

    statistics: {output: stored FeatureStatistics} of the network called `network`. images: None where there are
    statistics alone. count, sha256: of the images behind the statistics, if known.
    """

    path: Path | None
    images: ImageSet | None = None
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    network: str = DEFAULT_NETWORK
    network_sha256: str | None = None
    count: int | None = None
    sha256: str | None = None

    def stored(self, network: str, output: str = "pool") -> FeatureStatistics | None:
        """The stored statistics of a network's output, if there are any."""
        return self.statistics.get(output) if network == self.network else None

    def statistics_sha256(self) -> str | None:
        """A digest of the stored statistics, None where there are none."""
        digest = hashlib.sha256()
        for one in self.statistics.values():
            digest.update(one.mean.numpy().tobytes() + one.covariance.numpy().tobytes())
        return digest.hexdigest() if self.statistics else None


def open_reference(path: str | Path, crop: int | None = None, resize: int | None = None) -> Reference:
    """The reference at path: an .npz with statistics, images or both, or what `open_images` takes.

    Raises ValueError in one line, naming path and array, where it is none of these.
    """
    path = Path(path)
    if not is_npz(path):
        return Reference(path, open_images(path, "--reference", crop, resize))
    names = array_names(path)
    reference = Reference(path)
    for name, kinds in dict(network="U", network_sha256="U", sha256="U", count="iu").items():
        if name in names:
            setattr(reference, name, array(path, name, kinds, ()).item())
    for output, (mean, covariance) in STORED.items():
        if (mean in names) != (covariance in names):
            there, lacking = (mean, covariance) if mean in names else (covariance, mean)
            raise ValueError(f"--reference {path} has {there} but no {lacking}")
        if mean in names:
            try:
                moments = array(path, mean), array(path, covariance)
                reference.statistics[output] = FeatureStatistics.from_moments(*moments)
            except ValueError as error:
                raise ValueError(f"--reference {path}: {mean}, {covariance}: {error}") from None
    if "arr_0" in names:
        reference.images = open_images(path, "--reference")
        reference.images.notes = []  # of what else it holds
    if not reference.images and not reference.statistics:
        keys = one_line(", ".join(names), 100) or "none"
        raise ValueError(f"--reference {path} has neither arr_0 nor mu and sigma: its keys are {keys}")
    return reference


def array(path: Path, name: str, kinds: str = "fiu", shape: tuple[int, ...] | None = None) -> np.ndarray:
    """An array in an .npz. Raises ValueError for other kinds of types, as NumPy calls them, or another given shape."""
    found = read_array(path, name)
    if found.dtype.kind not in kinds:
        wanted = {"U": "text", "iu": "an integer"}.get(kinds, "real numbers")
        raise ValueError(f"{path}: {name} has type {found.dtype}, wanted {wanted}")
    if shape is not None and found.shape != shape:
        raise ValueError(f"{path}: {name} has shape {found.shape}, wanted {shape}")
    return found.copy()  # torch warns of arrays that cannot be written
