"""The images that features were extracted from, and what the features' VAE makes of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from dlc.data import Features
from dlc.data.images import WHITE, Folder, open_source
from dlc.nets.pixels import PixelEncoder
from dlc.nets.vae import same_vae
from dlc.sampling.pictures import Decoder
from dlc.weights.networks import load_vae
from evaluation.sets import FileImages
from evaluation.similarity import psnr, ssim
from evaluation.tokens import EncoderNetwork

if TYPE_CHECKING:
    from accelerate import PartialState


class FeatureImages(FileImages):
    """The images that features were extracted from: the crops, never flipped, and `rows`, the row of each.

    Args:
        features: with a manifest and paths.
        data_path: as `open_source` takes it; the paths are relative to it.
        count: how many images, evenly spread over the rows; None: all.

    Raises ValueError where the features do not say which images, or where they are not there (in a folder: where the
    first one is not).
    """

    def __init__(self, features: Features, data_path: str | Path, count: int | None = None):
        if features.manifest is None or features.paths is None:
            raise ValueError(f"features {features.root} have no manifest.json to say which images they were made of")
        copies = 2 if features.manifest.flip == "both" else 1  # rows of one image follow each other
        self.rows = np.arange(0, features.count, copies)
        if count is not None:
            if count > len(self.rows):
                raise ValueError(
                    f"--num-images {count}: features {features.root} were made of {len(self.rows):,} images"
                )
            self.rows = self.rows[np.linspace(0, len(self.rows) - 1, count).round().astype(int)]
        names = features.paths.gather(self.rows).tolist()
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"features {features.root} name an image outside of any folder: {name!r}")
        try:
            source = open_source(data_path, names=names)
            if isinstance(source, Folder) and not Path(source.path(0)).is_file():
                raise ValueError(f"--data-path {data_path} has no {names[0]}")
        except ValueError as error:
            raise ValueError(f"{error}: features {features.root} were made of it") from None
        super().__init__(source, crop=features.image_size, background=features.manifest.background or WHITE)


def vae_of(name: str | None, features: Features, state: "PartialState") -> tuple[nn.Module, str, list[str]]:
    """The VAE that a flag names, or the features' own, on the device; its digest; and notes.

    Raises ValueError where the features' own cannot be had, or where one does not fit the features' latents.
    """
    manifest = features.manifest
    if name is None and manifest.vae is None:
        raise ValueError(f"features {features.root} do not say which VAE made them: name one with --vae")
    named = name or manifest.vae
    vae, whose = load_vae(named, state.device), "the features' latents"
    return vae, *same_vae(vae, named, name is not None, manifest.latent_channels, vars(manifest), whose)


class Reconstruction:
    """What a VAE makes of images, decoded from the mean of the posterior as samples are: a network of `measure`.

    Its outputs are `psnr` and `ssim` of each image and its reconstruction, `codes` of the reconstruction, and, of each
    network's features, NAME.originals and NAME.reconstructions.

    Args:
        precision: of the VAE.
        networks: whose features are wanted of both.
        read: the `EncoderNetwork` that reads the codes; None: no codes.
    """

    name, notes = "reconstruction", ()
    AT_ONCE = 8  # images encoded at once; fixed, because rounding depends on it

    def __init__(
        self,
        vae: nn.Module,
        device: torch.device,
        precision: str = "fp32",
        networks: Iterable = (),
        read: EncoderNetwork | None = None,
    ):
        self.device, self.networks, self.read = device, networks, read
        self.encoder, self.decoder = PixelEncoder(vae, None, device, precision), Decoder(vae, precision=precision)
        self.outputs = dict(psnr=1, ssim=1, **(dict(codes=read.outputs["codes"]) if read else {}))
        for one in networks:
            width = one.outputs["pool"]
            self.outputs |= {f"{one.name}.originals": width, f"{one.name}.reconstructions": width}

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, S, S, 3) uint8 to their reconstructions, the same shape and type, on the CPU."""
        moments = self.encoder.moments(images, self.AT_ONCE)  # (n, 2C, S/f, S/f)
        return torch.from_numpy(self.decoder.images(moments.chunk(2, dim=1)[0]))

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.reconstruct(images)
        originals, reconstructions = images.to(self.device), found.to(self.device)
        outputs = dict(psnr=psnr(originals, reconstructions)[:, None], ssim=ssim(originals, reconstructions)[:, None])
        of = {one: one(reconstructions) for one in {*self.networks, *([self.read] if self.read else [])}}
        if self.read:
            outputs["codes"] = of[self.read]["codes"]
        for one in self.networks:
            outputs[f"{one.name}.originals"] = one(originals)["pool"]
            outputs[f"{one.name}.reconstructions"] = of[one]["pool"]
        return outputs
