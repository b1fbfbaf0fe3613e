"""Training on images: a source of them takes the place of features, and latents and codes are made as training goes.

Data readers decode the images. The VAE and, for codes, the SEM encoder run on the training device, without
gradients and in float32: the training precision must change neither the latents nor an argmax, and so a code. Latents
and codes equal those of extraction but for rounding (on GPUs that of TF32, which --no-tf32 turns off).
"""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlc.data import Manifest
from dlc.data.images import WHITE, open_source
from dlc.data.views import Views, collate, flips_of
from dlc.machine.cli import warn_once
from dlc.machine.noise import Stream, integers
from dlc.machine.processes import done_by_rank_0
from dlc.nets.vae import latent_shape
from dlc.training.batches import Batch, TrainingBatches
from dlc.weights.networks import data_settings, open_networks

if TYPE_CHECKING:
    from accelerate import PartialState

LOOKED_AT = 32  # images that are opened before the work
FLIPS = ("random", "none")


class Images:
    """Images with the interface of `Features` that training uses.

    Row i is image i of `open_source`. latent_kind is "images": batches hold crops, which `PixelEncoder` turns into
    moments.

    Args:
        state: from `start_processes`; rank 0 lists the images for all.
        data_path, labels: as `open_source` takes them.
        vae: as --vae takes it.
        image_size: height and width of the crop, pixels.
        encoder: as --encoder takes it, with L, V and backbone where it does not say them; None for neither codes nor
            patch tokens.
        flip: one of FLIPS; random: drawn anew at each sample index.
        background: what transparent images are blended on.

    Raises ValueError if there are no images, or if a network cannot be loaded or does not fit the image size.
    """

    latent_kind = "images"

    def __init__(
        self,
        state: "PartialState",
        data_path: str | Path,
        *,
        vae: str,
        image_size: int = 256,
        encoder: str | None = None,
        L: int | None = None,
        V: int | None = None,
        backbone: str | None = None,
        flip: str = "random",
        background: tuple[int, int, int] = WHITE,
        labels: str | None = None,
    ):
        self.image_size, self.flip = image_size, flip
        self.vae, self.encoder = open_networks(image_size, vae, encoder, L=L, V=V, backbone=backbone)
        source = done_by_rank_0(state, lambda: open_source(data_path, labels))
        for remark in source.remarks:
            warn_once(remark, remark)
        self.count, self.num_classes = len(source), len(source.classes)
        self.labels, self.codes = SimpleNamespace(gather=source.labels.__getitem__), None  # as an `NpyRows`
        self.L, self.V = (self.encoder.L, self.encoder.V) if encoder else (None, None)
        self.latent_shape = latent_shape(self.vae, image_size)
        flips, code_size = flips_of("none", self.count, 0), self.encoder.image_size if encoder else None
        self.views = Views(source, flips, image_size, code_size, background)
        if state.is_main_process:
            looked = np.unique(np.linspace(0, self.count - 1, LOOKED_AT).astype(int)).tolist()
            blended = sum(self.views[index][2] for index in looked)
            if blended:
                what = f"{blended} of {len(looked)} images that were looked at are transparent"
                warn_once("transparency", f"--data-path {data_path}: {what}: they are blended on --background")
        self.manifest = Manifest(
            image_size=image_size,
            latents="moments",
            dtype="float32",
            flip=flip,
            background=list(background),
            classes=source.classes,
            **data_settings(vae, self.vae, encoder, self.encoder, source),
        )

    def source(self) -> dict:
        return self.manifest.source()

    def validate(self) -> None:
        """Nothing: checking every image takes as long as an epoch, so each is checked when its turn comes."""


class ImageBatches(TrainingBatches):
    """`TrainingBatches` of Images: also crops, and in the place of an array None the encoder's views.

    Views for patch tokens are flipped as the crops are, those for codes never.
    """

    def __getitem__(self, step: int) -> Batch | OSError:
        """indices (n,), images (n, S, S, 3) uint8, and arrays (n, ...) or the encoder's views (n, s, s, 3) uint8."""
        batch = super().__getitem__(step)
        if isinstance(batch, dict) and self.data.flip == "random":
            flipped = integers(self.seed, Stream.TRAIN_FLIP, batch["indices"], 2).bool().view(-1, 1, 1, 1)
            for name in {"images", "tokens"} & batch.keys():
                batch[name] = torch.where(flipped, batch[name].flip(2), batch[name])
        return batch

    def gather(self, rows: np.ndarray) -> Batch:
        """Crops, and arrays or views, of images, none flipped. Raises OSError, naming those that cannot be read."""
        views = self.data.views
        crops, code_views, _, unreadable = collate([views[row] for row in rows.tolist()])
        if unreadable:
            what = "; ".join(f"{views.source.path(index)!r} ({error})" for index, error, _ in unreadable)
            raise OSError(
                f"cannot read {what}: fix it, or remove it (a run that has checkpoints then needs --allow-change; "
                "extraction leaves such images out by itself)"
            )
        views_of = {name: code_views for name, array in self.arrays.items() if array is None}
        return dict(images=crops.squeeze(1), **views_of, **super().gather(rows))
