"""Pixel space <-> latent space: crops, views, the VAE, and back to 8-bit images."""
import contextlib
import re
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dlc.cli import one_line
from dlc.disk import SWITCH, check_values, list_of, one_of, or_null, read_json, real_number, whole_number
from dlc.tensor_files import check_tensors, differences_from, load_tensors

VAE_ALIASES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
VAE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What a VAE's config.json may hold, and within which bounds: the arguments of diffusers' AutoencoderKL.
CHANNELS, NUMBER = whole_number(1, 8192), real_number(-1e30, 1e30)
VAE_CONFIG = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, latent_channels=CHANNELS, block_out_channels=list_of(CHANNELS, 1, 6),
    down_block_types=list_of(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 1, 6),
    up_block_types=list_of(one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), 1, 6),
    layers_per_block=whole_number(1, 16), norm_num_groups=whole_number(1, 1024),
    act_fn=one_of("silu", "swish", "mish", "gelu", "relu"), sample_size=whole_number(1, 65536),
    scaling_factor=real_number(1e-30, 1e30), shift_factor=or_null(NUMBER),
    latents_mean=or_null(list_of(NUMBER)), latents_std=or_null(list_of(NUMBER)), force_upcast=SWITCH,
    use_quant_conv=SWITCH, use_post_quant_conv=SWITCH, mid_block_add_attention=SWITCH)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def center_crop(image, size):
    """The crop of ADM (Dhariwal & Nichol 2021): shorter side to `size`, then the central square.

    Halved with a box filter while still at least twice the size, then resized bicubically. An image over 64 times as
    long as wide is first cut to its middle: resized whole, a line of 1 x 50,000 pixels would fill the memory.
    """
    longest = 64 * min(image.size)
    if max(image.size) > longest:
        left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
        image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_rgb(path):
    """The image at path, RGB, as torchvision's loader gives it: transparency is dropped, not blended.

    Grey of 16 bits, which Pillow would cut off at 255, is brought to 8 by its high byte, as Pillow brings colour.

    Raises ValueError for an image past Pillow's limit of pixels and for grey without a known range. What Pillow raises
    for a broken file, and the system for one out of reach, comes through.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)      # at twice the limit, it is an error anyway
        try:
            image = Image.open(path)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS:,}") from None
    with image:
        if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"{image.format} of mode {image.mode}: what is white in it is not known")
        # Pillow warns where a palette's transparency is dropped in one step
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def normalize(pixels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """Pixels (N, H, W, 3) uint8 to (N, 3, H, W) float32 on their device: scaled to [0, 1], less mean, over std."""
    # filled in place: copied there from the CPU, they would make the CPU wait for the GPU
    mean, std = (torch.stack([torch.full((1, 1), one, device=pixels.device) for one in value]) for value in (mean, std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def vae_id(name):
    """The directory or hub id that --vae names."""
    return VAE_ALIASES.get(name, name)


def vae_label(name):
    """The short form of --vae in a folder's name: its alias, or the last part of its path or id."""
    aliases = {full: alias for alias, full in VAE_ALIASES.items()}
    return aliases.get(vae_id(name)) or Path(name).name


def vae_config(name):
    """The VAE's configuration, checked, without its weights: a dict of AutoencoderKL's arguments.

    Raises ValueError, naming file and key, for one that this program would compute something else with.
    """
    path = vae_file(name, ("config.json",))
    config = read_json(path)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
        raise ValueError(f"--vae {name}: its config.json is not an AutoencoderKL's")
    # keys with a leading underscore say where it came from; one that is null says nothing
    config = {key: value for key, value in config.items() if not key.startswith("_") and (
        key in VAE_CONFIG or value is not None)}
    unknown = sorted(config.keys() - VAE_CONFIG.keys())
    if unknown:
        raise ValueError(f"--vae {name}: its config.json has the key {one_line(unknown[0][:1000], 80)}, which an "
                         "AutoencoderKL does not have")
    check_values(path, config, VAE_CONFIG)
    for key in ("down_block_types", "up_block_types"):
        if len(config.get(key, [None])) != len(config["block_out_channels"]):
            raise ValueError(f"{path}: {key} has not as many entries as block_out_channels")
    for key, wanted in (("latent_channels", 4), ("in_channels", 3), ("out_channels", 3)):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"--vae {name} has {config[key]} {key.replace('_', ' ')}, wanted {wanted}")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key):
            raise ValueError(f"--vae {name} shifts its latents ({key} in config.json), which nothing here does: wanted "
                             "one with a scaling factor alone")
    return config


def downsampling_factor(name):
    """Pixels a latent cell, along each axis."""
    if vae_id(name) in VAE_ALIASES.values():
        return 8                                    # known without asking the hub
    return 2 ** (len(vae_config(name)["block_out_channels"]) - 1)


def load_vae(name, device="cpu"):
    """The AutoencoderKL that --vae names, in eval mode, float32.

    It is built here rather than by diffusers' own loader, which opens what else a config or an index names.

    Args:
        name: "ema" or "mse" (Stability AI's fine-tuned decoders), a hub id, or a local directory.

    Raises ValueError, naming what is missing or wrong, where it cannot be had.
    """
    config = vae_config(name)
    path = vae_file(name, VAE_WEIGHTS)
    weights = {current_vae_name(key): value for key, value in check_tensors(load_tensors(path), path).items()}
    try:
        with torch.device("meta"):                  # no memory is taken before the shapes agree
            vae = AutoencoderKL(**config)
    except Exception as error:                      # such as of channels that the groups do not divide
        raise ValueError(f"--vae {name}: diffusers cannot build an AutoencoderKL from its config.json "
                         f"({one_line(error, 100)})") from None
    different = differences_from(vae.state_dict(), weights)
    if different:
        raise ValueError(f"--vae {name}: {path} {different}")
    vae.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return vae.to(device).eval().requires_grad_(False)


def current_vae_name(key):
    """The name of a VAE's tensor as diffusers has it since 0.17; Stability AI's files are older."""
    old = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    new = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    return f"{old[1]}.{new[old[2]]}.{old[3]}" if old else key


def vae_file(name, files):
    """The path of the first of `files` that --vae's directory, the hub's local cache, or else the hub has.

    Raises ValueError where none has any.
    """
    folder = Path(vae_id(name))
    if folder.exists():
        for file in files:
            if (folder / file).is_file():
                return folder / file
        raise ValueError(f"--vae {name} is not a directory of a diffusers AutoencoderKL: it has no "
                         f"{' or '.join(files)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            with contextlib.suppress(Exception):    # not there, or no name that a hub could have
                return Path(huggingface_hub.hf_hub_download(vae_id(name), file, local_files_only=True))
        try:
            there = {one.rfilename for one in huggingface_hub.model_info(vae_id(name), timeout=10).siblings}
            for file in files:
                if file in there:
                    return Path(huggingface_hub.hf_hub_download(vae_id(name), file))
            error = f"has no {' or '.join(files)}"
        except Exception as raised:                 # whatever the hub's client or its transport raises
            error = f"is out of reach or does not have it ({type(raised).__name__})"
    raise ValueError(f"cannot load the VAE {one_line(repr(vae_id(name)), 100)}: {files[0]} is not in the local cache, "
                     f"and the hub {error}; --vae takes a local directory too")


def in_batches(network, rows, size, places=None):
    """network(rows), of each row (n, ...), computed in batches of one size and each row at its own place in its batch.

    How a network rounds a row depends on the batch's size and, on some machines, on the row's place. So that it depends
    on nothing else, the places that no row has are filled with copies of another.

    Args:
        places: (n,) int64 on the CPU, ascending, out of an endless row of places that batches are cut from; None: from
            0 on, without a gap.
    """
    batches, outputs = {}, []
    for row, place in enumerate(range(len(rows)) if places is None else places.tolist()):
        batches.setdefault(place // size, {})[place % size] = row
    for own in batches.values():                        # place in the batch -> row
        first = next(iter(own.values()))
        # stacked, not indexed by a tensor: copied to the GPU, it would make the CPU wait
        output = network(torch.stack([rows[own.get(place, first)] for place in range(size)]))
        outputs += [output[place] for place in own]
    return torch.stack(outputs)


def posterior(vae, images):
    """Images (N, 3, S, S) in [-1, 1] to the mean and standard deviation of their scaled latents.

    Each (N, 4, S/8, S/8) float32, whatever the precision of the VAE's weights.
    """
    there = vae.encode(images.to(vae.encoder.conv_in.weight.dtype)).latent_dist
    return there.mean.float() * vae.config.scaling_factor, there.std.float() * vae.config.scaling_factor


def encode(vae, images):
    """Images (N, 3, S, S) in [-1, 1] to latents (N, 4, S/8, S/8), the posterior's mean, of about unit variance."""
    return posterior(vae, images)[0]


def decode(vae, latents):
    """Scaled latents (N, 4, h, w) to images (N, 3, S, S), about in [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample


def to_uint8(images):
    """Images (N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8, rounded as DiT's sampler does (127.5 x + 128, cut off)."""
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def image_grid(images, columns):
    """Images (n, H, W, 3) uint8 NumPy in rows of so many columns, a PIL image; missing places stay black."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, height, width, 3), np.uint8)
    grid[:n] = images
    grid = grid.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(grid.reshape(rows * height, columns * width, 3))
