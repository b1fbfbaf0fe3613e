"""The networks that turn images into features: Inception (FID, sFID, Inception Score) and DINOv2 (FD-DINOv2).

    network = open_networks(args, ["inception"], state)["inception"]
    features = network(images)                    # (N, H, W, 3) uint8: {"pool": (N, 2048), "spatial": (N, 2023)}

A network has a `name`, `outputs` (the width of each), and a `digest` of its weights. `pool` is the output that every
network has; `probabilities` is None where it has no classes. To add one, write such a class, and give it a row in
NETWORKS.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from dlc.machine.cli import number
from dlc.machine.processes import done_by_rank_0
from dlc.nets.digest import weights_sha256
from dlc.weights.hub import fetch_file, is_offline, sha256_of
from evaluation.dinov2 import load_dinov2, preprocess
from evaluation.inception import SIDE, InceptionV3
from evaluation.inception_weights import GRAPH, NAMES, SHA256_PREFIX, URL, digest_fault, load_inception

DINOV2_NAME = "dinov2_vitl14_pretrain.pth"
DINOV2_URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{DINOV2_NAME}"


class InceptionNetwork:
    """FID's Inception, on a device, float32."""

    name, distance, flag = "inception", "FID", "--inception"
    files, url, sha256_prefix = (*NAMES, GRAPH), URL, SHA256_PREFIX
    outputs = dict(pool=2048, spatial=2023)

    def __init__(self, path, device):
        self.path = Path(path)
        fault = digest_fault(path)
        self.notes = [fault] if fault else []
        self.module: InceptionV3 = load_inception(path)
        self.digest = weights_sha256(self.module)
        self.module.to(device)
        self.device = device

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return dict(zip(self.outputs, self.module(images)))

    def probabilities(self, pool: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, 1008) of features `pool`, on the CPU."""
        return self.module.probabilities(pool).cpu()


class DINOv2Network:
    """The class token of a DINOv2 ViT-L/14 without registers, on a device, float32."""

    name, distance, flag = "dinov2", "FD-DINOv2", "--dinov2"
    files, url, sha256_prefix = (DINOV2_NAME,), DINOV2_URL, ""
    probabilities = None

    def __init__(self, path, device):
        self.path = Path(path)
        self.module = load_dinov2(path)
        self.digest = weights_sha256(self.module)
        self.outputs = dict(pool=self.module.embed_dim)
        self.module.to(device)
        self.device = device
        large = (self.module.embed_dim, len(self.module.blocks)) == (1024, 24)
        self.notes = [] if large else [f"{path} is no ViT-L/14, by which FD-DINOv2 is defined"]

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        views = preprocess(images).to(self.device, self.module.pos_embed.dtype, non_blocking=True)
        return dict(pool=self.module.forward_features(views)[:, 0].float())


NETWORKS = {network.name: network for network in (InceptionNetwork, DINOv2Network)}


def find_weights(kind, given=None) -> Path:
    """The file of a network's weights: the given one, one in torch's hub cache or here, or one fetched to the cache.

    Raises ValueError in one line that says where to put it, if it is nowhere and cannot be fetched.
    """
    if given:
        if not Path(given).is_file():
            raise ValueError(f"{kind.flag} {given} {'is no file' if Path(given).exists() else 'does not exist'}")
        return Path(given)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for path in (folder / name for folder in (cache, Path(".")) for name in kind.files):
        if path.is_file():
            return path
    try:
        if is_offline():
            raise ValueError("HF_HUB_OFFLINE is set")
        return fetch_file(kind.url, cache / kind.files[0], partial(check_digest, kind))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"no weights of {kind.name} ({error}): fetch {kind.url} elsewhere and put it into {cache}, or name a file "
            f"of them with {kind.flag}"
        ) from None


def check_digest(kind, part: Path) -> None:
    """Raise ValueError if a fetched file's SHA-256 has other first digits than those of a network's published file."""
    found = sha256_of(part)
    if not found.startswith(kind.sha256_prefix):
        raise ValueError(
            f"what {kind.url} sent has the SHA-256 {found[:8]}…, wanted {kind.sha256_prefix}…: it is not the "
            "published file, and was removed"
        )


def probe_image(side: int = SIDE) -> np.ndarray:
    """A fixed image (1, side, side, 3) uint8 with edges, gradients and texture, by which networks are compared."""
    y, x = np.mgrid[:side, :side].astype(np.int64)
    red = (x * 255) // (side - 1)
    green = ((x * x + 3 * y * y + 7 * x * y) // 97) % 256
    blue = 255 * ((x // 16 + y // 16) % 2)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)[None]


def add_network_flags(add, more=""):
    """Add the flags that choose networks and their weights. more: words to add to the help of --features."""
    add("--features", default="inception", help=f"compare features of {' or '.join(NETWORKS)}{more} [%(default)s]")
    add(
        "--inception",
        help="read Inception's weights from this .pth, .safetensors or .pb [torch's hub cache, or fetched]",
    )
    add("--dinov2", help="read DINOv2's weights from this .pth or .safetensors [torch's hub cache, or fetched]")
    add(
        "--batch-size",
        type=number(int, 1),
        help="images per batch, on a CPU per core; another size changes the last digits [64 on GPUs, 8 on CPUs]",
    )


def given_weights(args) -> dict[str, str | None]:
    """The path that the flag of each network names."""
    return dict(inception=args.inception, dinov2=args.dinov2)


def check_weights_flags(args, names) -> None:
    """Raise ValueError where weights are named of a network that is none of the wanted ones."""
    for kind in NETWORKS.values():
        if given_weights(args)[kind.name] and kind.name not in names:
            raise ValueError(f"{kind.flag}: no features of {kind.name} are wanted: leave it out, or ask for some")


def find_networks(args, names) -> dict[str, Path]:
    """The file of the weights of each of these networks; see `find_weights`."""
    return {name: find_weights(NETWORKS[name], given_weights(args)[name]) for name in names}


def open_networks(args, names, state):
    """{name: network} of these names, on this process's device. Rank 0 fetches weights that are nowhere."""
    paths = done_by_rank_0(state, lambda: find_networks(args, names))
    return {name: NETWORKS[name](path, state.device) for name, path in paths.items()}
