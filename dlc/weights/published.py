"""DiT's published weights: a local file, the hub's repository of them, or the file at their public address.

The address publishes no digest, so its file counts as whole if it has all names and shapes of its model and only finite
values. DIT_WEIGHTS_URL names a mirror, which is then asked in place of the hub.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors
from dlc.weights.hub import fetch_file, is_offline
from models import DiT_models

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
ADDRESS_VARIABLE = "DIT_WEIGHTS_URL"
FOLDER = Path("pretrained_models")
PUBLISHED = {  # by model and image size: the repository on the hub, and the file at the address
    ("DiT-XL/2", 256): ("facebook/DiT-XL-2-256", "DiT-XL-2-256x256.pt"),
    ("DiT-XL/2", 512): ("facebook/DiT-XL-2-512", "DiT-XL-2-512x512.pt"),
}


def published_dit(model: str, image_size: int, locate: Callable[[str], object]) -> str | Path:
    """The hub id or the local file of a model's published weights; either is fetched if it is not there yet.

    Args:
        model, image_size: a key of PUBLISHED.
        locate: fetches the weights that a hub id names, and raises ValueError if it cannot.

    Raises ValueError, saying where to put the file, if neither the hub nor the address gives it.
    """
    repository, name = PUBLISHED[model, image_size]
    path, mirror = FOLDER / name, os.environ.get(ADDRESS_VARIABLE)
    if path.is_file():
        return path
    if not mirror:
        try:
            locate(repository)
            return repository
        except ValueError as error:
            if is_offline():
                raise ValueError(f"{error}; or put DiT's {name} at {path}") from None
    url = f"{(mirror or ADDRESS).rstrip('/')}/{name}"
    try:
        return fetch_file(url, path, partial(check, url, model, image_size))
    except ValueError as error:
        raise ValueError(f"{error}: put the file at {path}, or name weights with --ckpt") from None


def check(url: str, model: str, image_size: int, part: Path) -> None:
    """Raise ValueError if a file does not hold its model's weights: names, shapes, finiteness."""
    try:
        with torch.device("meta"):
            wanted = DiT_models[model](input_size=image_size // 8).state_dict()
        different = differences_from(wanted, check_tensors(load_tensors(part), part))
    except ValueError as error:
        different = str(error).replace(str(part), "it")
    if different:
        raise ValueError(f"{url} did not send the weights of {model} ({different}), and nothing is kept of it")
