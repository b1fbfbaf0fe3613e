"""The encoder and the VAE that flags name, loaded strictly: from our folders, or by `dlc.weights.foreign`.

encoder = load_encoder("lavoies/SEM_dinov2_L512")
vae = load_vae("ema", device)
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from dlc.data.images import Source
from dlc.machine.cli import number
from dlc.machine.files import read_json, recorded_id
from dlc.machine.records import differences
from dlc.nets.digest import weights_sha256
from dlc.nets.encoder import SEMEncoder, check_config
from dlc.nets.vae import latent_settings, pixels_per_cell
from dlc.weights.foreign import encoders, vaes
from dlc.weights.foreign.names import read_foreign
from dlc.weights.foreign.safe import check_tensors, fill, load_tensors
from dlc.weights.hub import is_id, locate, parts_of

DEFAULT_ENCODER = "lavoies/SEM_dinov2_L512"
VAE_HELP = "VAE: ema, mse, a folder, a file, or hub id[@revision][:file]"
VAE_ALIASES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def add_encoder_flags(add: Callable, default: str | None = DEFAULT_ENCODER, more: str = "") -> None:
    """Add the flags that name a SEM encoder. more: words to add to the help of --encoder."""
    stated = "" if more.endswith("]") else f" [{default or 'none'}]"
    add("--encoder", default=default, help=f"SEM encoder: folder, file, or hub id[@revision][:file]{more}{stated}")
    add("--encoder-backbone", help="build the backbone of an --encoder file as this timm model [read off its shapes]")
    add("--L", type=number(int, 1), help="number of code positions, if the --encoder does not give it [512]")
    add(
        "--V",
        type=number(int, 2, 65536),
        help="tokens per code position, if the --encoder does not give them [256] or the features have no manifest",
    )


def open_encoder(args: argparse.Namespace) -> SEMEncoder:
    """The encoder that those flags name. Raises ValueError as `load_encoder` does."""
    return load_encoder(args.encoder, backbone=args.encoder_backbone, L=args.L, V=args.V)


def load_encoder(name: str | Path, flag: str = "--encoder", **given) -> SEMEncoder:
    """The encoder that a name stands for, in eval mode, float32, on the CPU. Its `said` is what was recognised.

    Args:
        name: a folder that `save_encoder` wrote, or a folder, file or hub id in a layout of docs/weights.md.
        flag: that the name was given to, for errors.
        given: backbone, L and V, for weights that do not say them [None: what is read off them].

    Raises ValueError if weights are missing, left over or of other shapes, and if a config contradicts what is given.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if "backbone" in given:
        check_config(f"{flag}-backbone", dict(backbone=given["backbone"]))
    path, file, said = locate(name, "encoder", flag), None, "a folder of this program"
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "backbone" not in config or {"model_type", "architectures"} & config.keys():
        tensors, config, file = read_foreign(name, path, "encoder", given=given)
        path, said = file.path, file.said
    different = differences(config, given)
    if different:
        raise ValueError(f"encoder {name}: {different}; leave out the flag")
    check_config(path, config)
    try:
        with torch.device("meta"):  # compare shapes first; the loaded tensors are then used as they are
            encoder = SEMEncoder(**config)
    except ValueError as error:
        raise ValueError(f"encoder {name}: {error}") from None
    if file:
        weights = encoders.state_dict_of(tensors, encoder.backbone)
    else:
        tensors = weights = check_tensors(load_tensors(path / "model.safetensors"), path / "model.safetensors")
    fill(encoder, weights, f"encoder {name}", f" (backbone {encoder.config['backbone']}, L={encoder.L}, V={encoder.V})")
    if {"norm.weight", "norm.bias"} <= tensors.keys():
        encoder.norm_scale = tensors["norm.weight"].to(torch.float32, copy=True)
        encoder.norm_shift = tensors["norm.bias"].to(torch.float32, copy=True)
    encoder.said = said
    return encoder


def vae_id(name: str) -> str:
    """The directory or hub id that a value of --vae stands for."""
    return VAE_ALIASES.get(name, name)


def vae_label(name: str) -> str:
    """The short form of --vae for the name of a folder: its alias, or the last part of its path, or of its id."""
    aliases = {full: alias for alias, full in VAE_ALIASES.items()}
    return aliases.get(vae_id(name)) or Path(parts_of(name)[0] if is_id(name) else name).name


def load_vae(name: str, device: torch.device | str = "cpu") -> torch.nn.Module:
    """The VAE that --vae names, in eval mode, float32. Its `said` is what was recognised.

    name: "ema", "mse", or a path or hub id in a layout of docs/weights.md. Raises ValueError if it cannot be loaded.
    """
    tensors, config, file = read_foreign(vae_id(name), locate(vae_id(name), "vae", "--vae"), "vae")
    vae = vaes.build(config, tensors, f"--vae {name}: {file.path.name}")
    vae.said = file.said
    return vae.to(device).requires_grad_(False)


def data_settings(
    vae_name: str, vae: torch.nn.Module, encoder_name: str, encoder: SEMEncoder | None, source: Source
) -> dict:
    """The keys of a `Manifest` that say of which images, and with which networks, latents and codes are made.

    The names are the values of --vae and --encoder; without an encoder, encoder is None.
    """
    return dict(
        vae=recorded_id(vae_id(vae_name)),
        vae_sha256=weights_sha256(vae),
        **latent_settings(vae),
        encoder=recorded_id(encoder_name) if encoder else None,
        encoder_sha256=weights_sha256(encoder) if encoder else None,
        L=encoder.L if encoder else None,
        V=encoder.V if encoder else None,
        images=len(source),
        listing_sha256=source.sha256(),
    )


def open_networks(image_size: int, vae: str, encoder: str | None, **given) -> tuple[torch.nn.Module, SEMEncoder | None]:
    """The VAE and the encoder, or None for no encoder, on the CPU, by the values of --vae and --encoder.

    given: as of `load_encoder`. Raises ValueError as that does, for what is given of no encoder, and for an image size
    that is no multiple of the VAE's factor.
    """
    if not encoder and any(given.values()):
        raise ValueError("--L, --V and --encoder-backbone describe an --encoder, and there is none")

    def check(factor):
        if image_size % factor:
            raise ValueError(f"--image-size {image_size} is not a multiple of {factor}, the VAE's factor")

    if vae_id(vae) in VAE_ALIASES.values():
        check(8)  # known without asking the hub
    loaded = load_vae(vae)
    check(pixels_per_cell(loaded.config))
    return loaded, load_encoder(encoder, **given) if encoder else None
