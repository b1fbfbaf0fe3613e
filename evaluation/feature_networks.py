"""The networks that turn images into features: Inception (FID, sFID, Inception Score) and DINOv2 (FD-DINOv2).

    network = feature_networks(args, ["inception"], state)["inception"]
    features = network(images)                    # (N, H, W, 3) uint8: {"pool": (N, 2048), "spatial": (N, 2023)}

A network has a `name`, `outputs` (the width of each), a `digest` of its weights and `notes` on them. `pool` is the
output that every network has. To add one, write such a class, and give it a row in NETWORKS: --NAME then names its
weights, and --features NAME computes each metric that is tied to no network. Its Frechet distance is a row of METRICS.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dlc.machine.cli import number, one_line, path_or_name
from dlc.machine.files import sha256_of
from dlc.machine.processes import done_by_rank_0
from dlc.nets.digest import weights_sha256
from dlc.weights.hub import fetch_file, is_offline
from evaluation.dinov2 import load_dinov2, preprocess

if TYPE_CHECKING:
    from accelerate import PartialState


class InceptionNetwork:
    """FID's Inception, on a device, float32."""

    name, outputs = "inception", dict(pool=2048, spatial=2023)
    # of torch-fidelity and of pytorch-fid; the digits are the first of the SHA-256, by torch.hub's convention
    files = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
    url, sha256_prefix = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{files[0]}", "6726825d"

    def __init__(self, path: Path, device: torch.device):
        from evaluation.inception import load_inception  # --help does not need torchvision

        self.path, self.device, self.notes = Path(path), device, []
        found = sha256_of(path)
        if not found.startswith(self.sha256_prefix):
            if self.path.stem.endswith(f"-{self.sha256_prefix}"):
                raise ValueError(
                    f"{path} has the SHA-256 {found[:8]}…, wanted {self.sha256_prefix}…, as its name says: it is "
                    "damaged or another file; fetch it again"
                )
            self.notes.append(
                f"the Inception weights in {path} are not the published file (SHA-256 {found[:8]}…, not "
                f"{self.sha256_prefix}…)"
            )
        self.module = load_inception(path)
        self.digest = weights_sha256(self.module)
        self.module.to(device)

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return dict(zip(self.outputs, self.module(images)))

    def probabilities(self, pool: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, 1008) of features `pool`, on the CPU."""
        return self.module.probabilities(pool).cpu()


class DINOv2Network:
    """The class token of a DINOv2 ViT-L/14 without registers, on a device, float32."""

    name, files = "dinov2", ("dinov2_vitl14_pretrain.pth",)
    url, sha256_prefix = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{files[0]}", ""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = Path(path), device
        self.module = load_dinov2(path)
        self.digest = weights_sha256(self.module)
        self.outputs = dict(pool=self.module.embed_dim)
        self.module.to(device)
        large = (self.module.embed_dim, len(self.module.blocks)) == (1024, 24)
        self.notes = [] if large else [f"{path} is no ViT-L/14, by which FD-DINOv2 is defined"]

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        views = preprocess(images).to(self.device, self.module.pos_embed.dtype, non_blocking=True)
        tokens = self.module.forward_features(views)
        return dict(pool=tokens[:, 0].float().clone())  # a view would keep all tokens in memory


NETWORKS = {network.name: network for network in (InceptionNetwork, DINOv2Network)}


#################################################################################
#                                    Weights                                    #
#################################################################################


def add_weights_flags(add: Callable) -> None:
    """Add a flag per network that names the file of its weights."""
    for name in NETWORKS:
        add(
            f"--{name}",
            metavar="FILE",
            dest="weights",  # a list of (name of a network, file)
            action="append",
            default=[],
            type=lambda text, name=name: (name, path_or_name(text)),
            help=f"read the weights of {name} from this file [torch's hub cache, or fetched]",
        )


def add_network_flags(add: Callable) -> None:
    """Add the flags that choose the network and its weights."""
    add("--features", choices=NETWORKS, default="inception", help="compare the features of this network")
    add_weights_flags(add)
    add(
        "--batch-size",
        type=number(int, 1),
        help="run this many images at once, on a CPU per core; another size changes the last digits [64 on GPUs, 8 on "
        "CPUs]",
    )


def check_weights_flags(args: Namespace, names: Iterable[str]) -> None:
    """Raise ValueError where weights are named of a network that is none of the wanted ones."""
    for name, _ in args.weights:
        if name not in names:
            raise ValueError(f"--{name}: no features of {name} are wanted: leave it out, or ask for some")


def weights_here(name: str) -> Path | None:
    """The file of a network's weights in torch's hub cache or here; None where there is none."""
    folders = Path(torch.hub.get_dir()) / "checkpoints", Path(".")
    paths = [folder / file for folder in folders for file in NETWORKS[name].files]
    return next((path for path in paths if path.is_file()), None)


def find_weights(name: str, given: str | None = None) -> Path:
    """The file of a network's weights: the given one, one in torch's hub cache or here, or one fetched to the cache.

    Raises ValueError in one line that says where to put it, if it is nowhere and cannot be fetched.
    """
    if given:
        if not Path(given).is_file():
            raise ValueError(f"--{name} {given} {'is no file' if Path(given).exists() else 'does not exist'}")
        return Path(given)
    kind, cache = NETWORKS[name], Path(torch.hub.get_dir()) / "checkpoints"
    here = weights_here(name)
    if here is not None:
        return here

    def check(part):
        found = sha256_of(part)
        if not found.startswith(kind.sha256_prefix):
            raise ValueError(
                f"what came has the SHA-256 {found[:8]}…, wanted {kind.sha256_prefix}…: it is not the published file, "
                "and was removed"
            )

    try:
        if is_offline():
            raise ValueError("HF_HUB_OFFLINE is set")
        return fetch_file(kind.url, cache / kind.files[0], check)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"no weights of {name} ({one_line(error, 120)}): fetch {kind.url} elsewhere and put it into {cache}, or "
            f"name a file of them with --{name}; agreement and reconstruction --features none need none"
        ) from None


def feature_networks(args: Namespace, names: Iterable[str], state: "PartialState") -> dict:
    """{name: network} of these names, on this process's device. Rank 0 fetches weights that are nowhere."""
    given = dict(args.weights)
    paths = done_by_rank_0(state, lambda: {name: find_weights(name, given.get(name)) for name in names})
    return {name: NETWORKS[name](path, state.device) for name, path in paths.items()}
