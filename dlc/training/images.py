"""Training on images themselves: a folder of them in the place of features, latents and codes made as they are needed.

Images are decoded by the data loader's readers; the VAE and, for codes, the SEM encoder run on the training's device,
without gradients. Both compute in float32 whatever the training's precision is, so that it changes neither the latents
nor, by an argmax that falls otherwise, the codes: they are those of extraction but for rounding (on GPUs to what TF32
is worth, unless --no-tf32).
"""
import torch

from dlc.cli import warn_once
from dlc.encoder import load_encoder
from dlc.extraction import data_settings
from dlc.features import Manifest
from dlc.images import Views, collate, flips_of
from dlc.listing import list_images
from dlc.noise import Stream, integers
from dlc.runtime import done_by_rank_0
from dlc.training.batches import TrainingBatches
from dlc.vae import downsampling_factor, latent_shape, load_vae

FLIPS = ("random", "none")


class Column:
    """Values in memory, one a row, gathered as those of `NpyRows` are; they are in range by their making."""

    def __init__(self, values):
        self.values = values

    def gather(self, rows, limit=None):
        return self.values[rows]


class Images:
    """What training asks of `Features`, of a folder with one folder of images a class.

    Row i is image i of `list_images`, which the first process reads for all. latent_kind is "images": batches are of
    crops, and `PixelEncoder` makes the moments of them.

    Args:
        image_size: height and width of the crop, pixels.
        vae: what --vae takes.
        state: of the processes, one of which lists the images for all.
        encoder: a directory or a reference checkpoint, the latter with L, V and backbone where they are not the
            defaults; None where no codes are wanted.
        flip: one of FLIPS; random: drawn anew at each place in the row of epochs.

    Raises ValueError where there are no images, or networks cannot be had or do not fit the image size.
    """
    latent_kind = "images"

    def __init__(self, state, data_path, image_size, vae, encoder=None, L=None, V=None, backbone=None, flip="random"):
        self.image_size, self.flip = image_size, flip
        factor = downsampling_factor(vae)
        if image_size % factor:
            raise ValueError(f"--image-size {image_size} is not a multiple of {factor}, the VAE's factor")
        classes, paths, labels, remarks = done_by_rank_0(state, lambda: list_images(data_path))
        for remark in remarks:
            warn_once(remark, remark)
        self.count, self.num_classes, self.labels, self.codes = len(paths), len(classes), Column(labels), None
        self.vae, self.encoder = load_vae(vae), None
        if encoder:
            self.encoder = load_encoder(encoder, L=L, V=V, backbone=backbone)
        self.L, self.V = (self.encoder.L, self.encoder.V) if encoder else (None, None)
        self.latent_shape = latent_shape(self.vae, image_size)
        self.views = Views(data_path, paths, flips_of("none", len(paths), 0), image_size,
                           self.encoder.image_size if encoder else None)
        self.manifest = Manifest(image_size=image_size, latents="moments", dtype="float32", flip=flip, classes=classes,
                                 **data_settings(vae, self.vae, encoder, self.encoder, paths))

    def __getstate__(self):
        return {**self.__dict__, "vae": None, "encoder": None}      # a reader that is started afresh needs no networks

    def source(self):
        return self.manifest.source()

    def validate(self):
        """Nothing: to look at every image takes as long as an epoch, so each is looked at in the first."""


class ImageBatches(TrainingBatches):
    """`TrainingBatches` of Images: crops in place of latents and, where the condition is None, the encoder's views.

    An item is one line of text, in place of tensors, where an image cannot be read.
    """

    def __getitem__(self, step):
        """Places (n,), crops (n, S, S, 3) uint8, conditions (n, ...) or views (n, s, s, 3) uint8."""
        try:
            places, crops, condition = super().__getitem__(step)
        except OSError as error:                # as data: raised, it would come with its traceback as its text
            return str(error)
        if self.features.flip == "random":
            flipped = integers(self.seed, Stream.TRAIN_FLIP, places, 2).bool()
            crops = torch.where(flipped.view(-1, 1, 1, 1), crops.flip(2), crops)
        return places, crops, condition

    def gather(self, rows):
        """Crops and conditions or views of images, none flipped. Raises OSError, naming it, for one out of reach."""
        views = self.features.views
        _, crops, code_views, unreadable = collate([views[row] for row in rows.tolist()])
        if unreadable:
            what = "; ".join(f"{views.path(index)!r} ({error})" for index, error, _ in unreadable)
            raise OSError(f"cannot read {what}: mend what is broken, or take it away (a run that has checkpoints then "
                          "continues with --allow-change); features are extracted without such images")
        condition = code_views if self.condition is None else torch.from_numpy(self.condition.gather(rows, self.limit))
        return crops.squeeze(1), condition
