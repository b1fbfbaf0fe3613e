"""What the VAE keeps of images: reconstructions of the images that features were extracted from, against the images.

    python evaluate.py reconstruction features --data-path /path/to/imagenet/val

In: FEATURES/, which say which images, crop and VAE, and the images. Out: a table and FEATURES/reconstruction.json: PSNR,
SSIM, the Frechet distance of reconstructions to the same crops (rFID, where the features are Inception's), and, where
the features hold codes, the share of tokens that reconstructions keep. It bounds what samples of a model of these
latents can reach. The same command run again continues, and repeats nothing that is done.
"""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import safetensors.torch
import torch

from dlc.checkpoints.tensor_files import load_tensors
from dlc.checkpoints.weights import weights_sha256
from dlc.cli import progress
from dlc.disk import write_bytes
from dlc.evaluation.agreement import CodeReader, TokenAgreement, batches_of_rows
from dlc.evaluation.metrics import FeatureStatistics, frechet_distance
from dlc.evaluation.similarity import psnr, ssim
from dlc.extraction import PixelEncoder, in_order
from dlc.features import Features
from dlc.images import Views, collate, flips_of
from dlc.runtime import cores_per_process
from dlc.sampling.decoder import Decoder
from dlc.vae import check_decodes, load_vae

SAVE_SECONDS = 60  # between two writes of what is done so far

#################################################################################
#                           The images and the networks                         #
#################################################################################


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
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
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
        _, crops, _, unreadable = collate([self.views[index] for index in indices.tolist()])
        for index, error, _ in unreadable:
            raise OSError(f"cannot read {self.views.path(index)!r} ({error}), which the features were made of")
        return crops.squeeze(1)


def open_vae(name: str | None, features: Features, device):
    """The VAE that a flag names, or the features' own; its name, its digest, and notes.

    Raises ValueError where the features' own cannot be had, or where one does not fit the features' latents.
    """
    manifest, notes = features.manifest, []
    if name is None and manifest.vae is None:
        raise ValueError(f"features {features.root} do not say which VAE made them: name one with --vae")
    vae = load_vae(name or manifest.vae, device)
    digest = weights_sha256(vae)
    if digest != manifest.vae_sha256:
        if name is None:
            raise ValueError(f"the VAE at {manifest.vae} is not the one that the features were made with: name one with --vae")
        notes.append(f"--vae {name} is not the VAE that the features were made with")
    check_decodes(vae, name or manifest.vae, manifest.latent_channels, vars(manifest), "the features' latents")
    return vae, digest, notes


class Reconstructor:
    """Crops (n, S, S, 3) uint8 to what the VAE makes of them, decoded from the mean of the posterior as samples are."""

    BATCH = 8  # images encoded at once; fixed, because rounding depends on it

    def __init__(self, vae, device: torch.device, precision: str = "fp32"):
        self.encoder = PixelEncoder(vae, None, device, precision)
        self.decoder = Decoder(vae, None, precision)

    def __call__(self, crops: torch.Tensor) -> np.ndarray:
        moments = self.encoder.moments(crops, self.BATCH)  # (n, 2C, S/f, S/f)
        return self.decoder.images(moments.chunk(2, dim=1)[0])


#################################################################################
#                                   Measuring                                   #
#################################################################################


class Measured:
    """What is known of the first `done` images: sums and statistics, which can be written and read back.

    Args:
        dim: of the features of the Frechet distance; None: there are none.
        L, V: of the codes; None: there are none.
        settings: what decides the numbers; those of others are not continued.
    """

    def __init__(self, dim: int | None, L: int | None, V: int | None, settings: dict):
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        self.psnr, self.ssim = [], []  # (n,) each
        self.originals, self.reconstructions = (FeatureStatistics(dim) if dim else None for _ in range(2))
        self.agreement = TokenAgreement(L, V) if L else None

    @property
    def done(self) -> int:
        return sum(map(len, self.psnr))

    def save(self, path: Path) -> None:
        tensors = dict(
            settings=torch.frombuffer(bytearray(self.settings), dtype=torch.uint8),
            psnr=torch.cat(self.psnr),
            ssim=torch.cat(self.ssim),
        )
        for name in ("originals", "reconstructions"):
            statistics = getattr(self, name)
            if statistics is not None:
                tensors[f"{name}.mean"], tensors[f"{name}.scatter"] = statistics.mean, statistics.scatter
        if self.agreement is not None:
            for name, value in self.agreement.state().items():
                tensors[f"agreement.{name}"] = torch.from_numpy(value)
        content = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
        write_bytes(path, content)

    def load(self, path: Path) -> bool:
        """Continue from a file of `save`. Returns False, and changes nothing, where there is none of these settings."""
        try:
            tensors = load_tensors(path) if path.is_file() else {}
            if bytes(tensors["settings"].tolist()) != self.settings:
                return False
            count, parts = len(tensors["psnr"]), {}
            for name in ("originals", "reconstructions"):
                if getattr(self, name) is not None:
                    mean, scatter = tensors[f"{name}.mean"], tensors[f"{name}.scatter"]
                    parts[name] = FeatureStatistics(len(mean))
                    parts[name].merge(FeatureStatistics.from_moments(mean, scatter / (count - 1), count))
            if self.agreement is not None:
                state = {name: tensors[f"agreement.{name}"].numpy() for name in self.agreement.state()}
                self.agreement.restore(state)
        except (ValueError, KeyError, RuntimeError, TypeError):
            return False  # damaged: measured anew
        vars(self).update(parts, psnr=[tensors["psnr"].clone()], ssim=[tensors["ssim"].clone()])
        return True

    def summary(self) -> dict:
        """The numbers, as reconstruction.json holds them."""
        peak, similarity = torch.cat(self.psnr).double(), torch.cat(self.ssim).double()
        result = dict(images=self.done, psnr=float(peak.mean()), ssim=float(similarity.mean()))
        if self.originals is not None:
            result["frechet_distance"] = frechet_distance(self.originals, self.reconstructions)
        if self.agreement is not None:
            result["code_agreement"] = self.agreement.summary()
        return result


def measure(measured: Measured, images: FeatureImages, reconstruct, extract=None, read=None, codes=None, save_to=None):
    """Add to `measured` the images that are not in it yet.

    Args:
        reconstruct: a Reconstructor.
        extract: images (n, S, S, 3) uint8 NumPy to features (n, D), a tensor; None: no Frechet distance.
        read, codes: a CodeReader, and codes(rows), (n, L), the features' codes; None: no code agreement.
        save_to: file to write what is done to, every SAVE_SECONDS.

    Files are read by threads while the networks work on earlier ones.
    """
    threads, saved = cores_per_process(), time.monotonic()
    batches = [batch for batch in batches_of_rows(len(images)) if batch[0] >= measured.done]
    with (
        ThreadPoolExecutor(threads) as pool,
        progress(total=len(images), initial=measured.done, desc="reconstructing", unit="img", delay=2) as bar,
    ):
        for indices, crops in zip(batches, in_order(pool, images.crops, batches, threads)):
            reconstructions = reconstruct(crops)  # (n, S, S, 3)
            if extract is not None:
                measured.originals.update(extract(crops.numpy()))
                measured.reconstructions.update(extract(reconstructions))
            if read is not None:
                views = np.stack([read.view(image) for image in reconstructions])
                measured.agreement.update(codes(images.rows[indices]), read.codes(views))
            pair = crops.to(reconstruct.encoder.device), torch.from_numpy(reconstructions).to(reconstruct.encoder.device)
            measured.psnr.append(psnr(*pair).cpu())
            measured.ssim.append(ssim(*pair).cpu())
            bar.update(len(indices))
            if save_to is not None and time.monotonic() > saved + SAVE_SECONDS:
                measured.save(save_to)
                saved = time.monotonic()
