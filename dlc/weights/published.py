"""DiT's published weights, fetched from their public address: whole or not at all, continued where they were cut off.

    path = published_weights("DiT-XL-2-256x256.pt")                # pretrained_models/DiT-XL-2-256x256.pt

The address publishes no digest, so a file counts as whole if it has all names and shapes of its model and only finite
values. DIT_WEIGHTS_URL names a mirror.
"""

import os
from functools import partial
from pathlib import Path

import torch

from dlc.weights.download import OutOfReach, fetch, is_offline
from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors
from models import DiT_models

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
ADDRESS_VARIABLE = "DIT_WEIGHTS_URL"
FOLDER = Path("pretrained_models")
PUBLISHED = {"DiT-XL-2-256x256.pt": ("DiT-XL/2", 256), "DiT-XL-2-512x512.pt": ("DiT-XL/2", 512)}


def published_name(model: str, image_size: int) -> str | None:
    """The file of a model's published weights, or None if there are none."""
    return next((name for name, which in PUBLISHED.items() if which == (model, image_size)), None)


def published_weights(name: str, folder: Path = FOLDER) -> Path:
    """The local file of published weights, fetched if it is not there yet: by the first process that gets to it.

    Raises ValueError, saying where to put the file, if its address is out of reach or does not send these weights.
    """
    path, mirror = folder / name, os.environ.get(ADDRESS_VARIABLE)
    url = f"{(mirror or ADDRESS).rstrip('/')}/{name}"
    try:
        if is_offline() and not mirror and not path.is_file():
            raise OutOfReach(f"{url} is out of reach (HF_HUB_OFFLINE is set)")
        return fetch(url, path, partial(check, url, name))
    except OutOfReach as error:
        raise ValueError(
            f"{path} is not there, and {error}: put the file at {path}, or name weights with --ckpt"
        ) from None


def check(url: str, name: str, part: Path) -> None:
    """Raise ValueError if a file does not hold its model's weights: names, shapes, finiteness."""
    model, image_size = PUBLISHED[name]
    try:
        with torch.device("meta"):
            wanted = DiT_models[model](input_size=image_size // 8).state_dict()
        different = differences_from(wanted, check_tensors(load_tensors(part), part))
    except ValueError as error:
        different = str(error).replace(str(part), "it")
    if different:
        raise ValueError(f"{url} did not send the weights of {model} ({different}): nothing is kept of it")
