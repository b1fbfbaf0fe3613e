"""The images that features were extracted from, and what the features' VAE makes of them."""

from pathlib import Path

import numpy as np
import torch

from dlc.data import Features
from dlc.data.images import Views, collate, flips_of
from dlc.nets.pixels import PixelEncoder
from dlc.nets.vae import same_vae
from dlc.sampling.decoder import Decoder
from dlc.weights.networks import load_vae


class FeatureImages:
    """The image files that features were extracted from: the crops, never flipped, and the row of each.

    Args:
        features: with a manifest and paths.
        data_path: the folder that the paths are relative to.
        count: how many images, evenly spread over the rows; None: all.

    Raises ValueError where the features do not say which images, or where the first of them is not in the folder.
    """

    def __init__(self, features: Features, data_path: str, count: int | None = None):
        if features.manifest is None or features.paths is None:
            raise ValueError(f"features {features.root} have no manifest.json to say which images they were made of")
        copies = 2 if features.manifest.flip == "both" else 1  # rows of one image follow each other
        self.rows = np.arange(0, features.count, copies)
        if count is not None:
            if count > len(self.rows):
                raise ValueError(f"--num-images {count}: features {features.root} are of {len(self.rows):,} images")
            self.rows = self.rows[np.linspace(0, len(self.rows) - 1, count).round().astype(int)]
        names = features.paths.gather(self.rows).tolist()
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"features {features.root} name an image outside of any folder: {name!r}")
        if not Path(data_path).is_dir():
            raise ValueError(f"--data-path {data_path} is not a folder")
        if not (Path(data_path) / names[0]).is_file():
            raise ValueError(f"--data-path {data_path} has no {names[0]}, which features {features.root} are of")
        flips = flips_of("none", len(names), 0)
        self.views = Views(data_path, names, flips, features.image_size, None)

    def __len__(self):
        return len(self.rows)

    def crops(self, indices: np.ndarray) -> torch.Tensor:
        """The crops (n, S, S, 3) uint8 of images. Raises OSError, naming the file, for one that cannot be read."""
        crops, _, unreadable = collate([self.views[index] for index in indices.tolist()])
        for index, error, _ in unreadable:
            raise OSError(f"cannot read {self.views.path(index)!r} ({error}), which the features were made of")
        return crops.squeeze(1)


def open_vae(name: str | None, features: Features, device):
    """The VAE that a flag names, or the features' own; its name, its digest, and notes.

    Raises ValueError where the features' own cannot be had, or where one does not fit the features' latents.
    """
    manifest = features.manifest
    if name is None and manifest.vae is None:
        raise ValueError(f"features {features.root} do not say which VAE made them: name one with --vae")
    vae = load_vae(name or manifest.vae, device)
    whose, channels = "the features' latents", manifest.latent_channels
    return vae, *same_vae(vae, name or manifest.vae, name is not None, channels, vars(manifest), whose)


class Reconstructor:
    """Crops (n, S, S, 3) uint8 to what the VAE makes of them, decoded from the mean of the posterior as samples are."""

    AT_ONCE = 8  # images encoded at once; fixed, because rounding depends on it

    def __init__(self, vae, device: torch.device, precision: str = "fp32"):
        self.device, self.encoder = device, PixelEncoder(vae, None, device, precision)
        self.decoder = Decoder(vae, None, precision)

    def __call__(self, crops: torch.Tensor) -> np.ndarray:
        moments = self.encoder.moments(crops, self.AT_ONCE)  # (n, 2C, S/f, S/f)
        return self.decoder.images(moments.chunk(2, dim=1)[0])
