"""Image -> discrete latent code: a timm Vision Transformer with a Simplicial Embedding (SEM) head.

The class and register tokens, taken before the backbone's final norm and concatenated, go through a linear layer
without bias to L*V numbers, a LayerNorm over all of them, and a softmax over each group of V. The code is the argmax of
each group. SEM: Lavoie et al. 2022, arXiv 2204.00616; as an image code: Lavoie et al. 2025, arXiv 2507.12318.

    encoder = load_encoder("pretrained/dlc_encoder.pth", L=512, V=256)
    codes = encoder.codes(images)                                  # (N, 512) int64, each in 0..255

Two formats of weights are read: a directory of `config.json` and `model.safetensors`, as `save_encoder` writes it, and
the training checkpoint of the reference implementation, which has DINOv2's names under `{"teacher": {"backbone.…"}}`.
"""

import json
import math
import re
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn

from dlc.checkpoints.tensor_files import check_tensors, differences_from, load_tensors, shown
from dlc.cli import number, one_line
from dlc.disk import SWITCH, TEXT, check_values, differences, or_null, read_json, real_number, whole_number
from dlc.images import IMAGENET_MEAN, IMAGENET_STD, normalize

DEFAULT_ENCODER = "pretrained/dlc_encoder.pth"
DEFAULT_BACKBONE = "vit_large_patch14_reg4_dinov2"
# parts of a self-supervised checkpoint that only its losses need
TRAINING_ONLY = ("mask_token", "norm", "head", "sem_out", "sem_cls_norm", "dino_head", "ibot_head")
# The keys that a configuration may have, with their bounds. None of them makes timm open a file, ask a hub or import.
BACKBONE_ARGS = dict(
    patch_size=whole_number(1, 256),
    embed_dim=whole_number(1, 16384),
    depth=whole_number(1, 256),
    num_heads=whole_number(1, 1024),
    mlp_ratio=real_number(0.01, 64),
    reg_tokens=whole_number(0, 1024),
    class_token=SWITCH,
    no_embed_class=SWITCH,
    pre_norm=SWITCH,
    qkv_bias=SWITCH,
    qk_norm=SWITCH,
    init_values=or_null(real_number(0, 100)),
)
CONFIG = dict(
    backbone=TEXT,
    image_size=whole_number(1, 4096),
    L=whole_number(1, 65536),
    V=whole_number(2, 65536),
    temperature=real_number(1e-6),
    backbone_args=or_null(((lambda value: isinstance(value, dict)), "an object")),
)


class SEMEncoder(nn.Module):
    """A timm Vision Transformer and a SEM head.

    Args:
        backbone: name of any timm Vision Transformer with a class or register token; never a file or a hub's id.
        image_size: height and width of the input, in pixels.
        L, V: number of positions of the code, and number of tokens to choose from at each.
        temperature: temperature of the softmax in `forward`; the code does not depend on it.
        backbone_args: arguments that replace the backbone's own, such as patch_size or embed_dim; see BACKBONE_ARGS.

    Raises ValueError for arguments out of bounds, and for a backbone that timm does not have or that has no class or
    register token.
    """

    def __init__(self, backbone=DEFAULT_BACKBONE, image_size=224, L=512, V=256, temperature=1.0, backbone_args=None):
        super().__init__()
        self.config = dict(
            backbone=backbone,
            image_size=image_size,
            L=L,
            V=V,
            temperature=temperature,
            backbone_args=backbone_args or {},
        )
        check_config("encoder", self.config)
        import timm  # imported here: slower to import than torch

        try:
            self.backbone = timm.create_model(
                backbone, pretrained=False, num_classes=0, img_size=image_size, **self.config["backbone_args"]
            )
        except Exception as error:  # timm's models raise many types
            raise ValueError(
                f"timm cannot build the encoder {backbone!r} from its config: {one_line(error, 100)}"
            ) from None
        if not getattr(self.backbone, "num_prefix_tokens", 0):
            raise ValueError(f"{backbone!r} has no class or register tokens to read a code from")
        self.backbone.norm = nn.Identity()
        self.image_size, self.L, self.V, self.temperature = image_size, L, V, temperature
        self.sem_embed = nn.Linear(self.backbone.num_prefix_tokens * self.backbone.embed_dim, L * V, bias=False)
        self.sem_norm = nn.LayerNorm(L * V, eps=1e-6)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, image_size, image_size), normalised with ImageNet's mean and std, to (N, L, V) float32.

        The backbone may have been cast to bfloat16 or float16; the head is always float32.
        """
        tokens = self._tokens(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.sem_norm(self.sem_embed(tokens)).unflatten(1, (self.L, self.V))

    def _tokens(self, images):
        images = images.to(next(self.backbone.parameters()).dtype)
        return self.backbone.forward_features(images)[:, : self.backbone.num_prefix_tokens].flatten(1).float()

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (N, image_size, image_size, 3) uint8 to logits (N, L, V) float32; see `tokens` for the codes."""
        return self.logits(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))

    def prefix_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels as in `encode_pixels` to the class and register tokens that the head reads, (N, tokens * width)."""
        return self._tokens(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The simplicial embedding: (N, L, V), a distribution over V tokens at each position."""
        return torch.softmax(self.logits(images) / self.temperature, dim=2)

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """Images, as `logits` takes them, to discrete latent codes; see `tokens`."""
        return tokens(self.logits(images))


def tokens(logits: torch.Tensor) -> torch.Tensor:
    """Logits (N, L, V) to the discrete latent code (N, L) int64; -1, which is no token, where logits are not finite.

    This is a mark rather than an error, for which the CPU would have to wait for the GPU. The argmax of NaNs is 0.
    """
    return logits.argmax(dim=2).masked_fill(~logits.isfinite().all(dim=2), -1)


def check_config(path, config):
    """Raise ValueError, naming path and key, for a configuration with unknown keys or with values out of bounds."""
    backbone, more = config.get("backbone", DEFAULT_BACKBONE), config.get("backbone_args") or {}
    check_values(path, config, CONFIG)  # first, since what follows relies on the types
    for where, values, kinds in ((path, config, CONFIG), (f"{path}, backbone_args", more, BACKBONE_ARGS)):
        unknown = sorted(values.keys() - kinds.keys())
        if unknown:
            raise ValueError(f"{where}: a SEM encoder has no key {shown(unknown[0])}, only {', '.join(kinds)}")
    check_values(f"{path}, backbone_args", more, BACKBONE_ARGS)
    import timm

    if not re.fullmatch(r"\w+(\.\w+)?", backbone) or not timm.is_model(backbone):
        raise ValueError(f"{path}: timm cannot build the encoder {shown(repr(backbone))}: it has no such model")


def save_encoder(encoder, directory):
    """Write config.json and model.safetensors into a directory, which is created if it does not exist."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(encoder.config, indent=2) + "\n")
    safetensors.torch.save_model(encoder, str(directory / "model.safetensors"))


def load_encoder(path, **given):
    """The encoder at path, in eval mode, float32, on the CPU.

    Args:
        path: a directory made by `save_encoder`, whose config has all arguments, or a reference checkpoint file.
        given: backbone, L and V, which a checkpoint file does not record; None stands for SEMEncoder's default.

    Raises ValueError if weights are missing, left over or of other shapes, so that no weight stays random, and if a
    directory's config contradicts what is given.
    """
    path = Path(path)
    given = {key: value for key, value in given.items() if value is not None}
    if path.is_dir():
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise ValueError(f"encoder {path} has no {' and no '.join(missing)}")
        config = read_json(path / "config.json")
        different = differences(config, given)
        if different:
            raise ValueError(f"encoder {path}: {different}; leave out the flag")
        check_config(path / "config.json", config)
        weights = check_tensors(load_tensors(path / "model.safetensors"), path / "model.safetensors")
    elif not path.is_file():
        raise ValueError(f"encoder {path} does not exist")
    else:
        config, teacher = given, load_tensors(path)
        teacher = teacher.get("teacher", teacher)
        if isinstance(teacher, dict):
            teacher = {key: value for key, value in teacher.items() if not serves_training_only(key)}
        names = set(map(reference_name, check_tensors(teacher, path)))
        if not any(name.startswith("sem_") for name in names) or "reg_token" in names:
            what = "has timm's tensor names" if "reg_token" in names else "has no SEM head (sem_embed, sem_norm)"
            raise ValueError(
                f"encoder {path} {what}: wanted a reference checkpoint of a SEM encoder, with DINOv2's "
                "names, or a directory of config.json and model.safetensors"
            )
    with torch.device("meta"):  # no memory is allocated before the shapes agree
        outline = SEMEncoder(**config)
    if not path.is_dir():
        weights = convert_reference_weights(teacher, outline.backbone)
    different = differences_from(outline.state_dict(), weights)
    if different:
        raise ValueError(
            f"encoder {path} {different} (backbone {outline.config['backbone']}, L={outline.L}, V={outline.V})"
        )
    encoder = SEMEncoder(**config)
    encoder.load_state_dict(weights)
    return encoder.eval()


def reference_name(key):
    """A tensor's name in a reference checkpoint, without the prefixes of DDP, torch.compile and chunks of blocks.

    Blocks that were saved in chunks (`blocks.2.13.…`) have their index in second place.
    """
    for prefix in ("module.", "_orig_mod.", "backbone."):
        key = str(key).replace(prefix, "")
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)


def serves_training_only(key):
    return reference_name(key).split(".")[0] in TRAINING_ONLY


def convert_reference_weights(teacher, backbone):
    """The tensors of a reference checkpoint's teacher, as SEMEncoder's state dict.

    DINOv2 adds a position embedding to the class token; timm's register models have it folded into the token. DINOv2 is
    also built for larger images, so the positions of its patches are resized (bicubic, antialiased) to the backbone's
    grid. Positions of another shape than DINOv2's, (1, 1 + n * n, D), are left as they are.
    """
    from timm.layers import resample_abs_pos_embed

    weights = {reference_name(key): value for key, value in teacher.items() if not serves_training_only(key)}
    if "register_tokens" in weights:
        weights["reg_token"] = weights.pop("register_tokens")
    positions, token = weights.get("pos_embed"), weights.get("cls_token")
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if (
        grid
        and positions is not None
        and positions.ndim == 3
        and len(positions) == 1
        and positions.numel()
        and (positions.shape[1] > 1 and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1)
    ):
        folded = getattr(backbone, "no_embed_class", False) and token is not None
        if folded and token.shape == positions[:, :1].shape:
            weights["cls_token"] = token + positions[:, :1]
        weights["pos_embed"] = resample_abs_pos_embed(
            positions[:, 1:] if folded else positions, grid, num_prefix_tokens=0 if folded else 1
        )
    return {key if key.startswith("sem_") else f"backbone.{key}": value for key, value in weights.items()}


#################################################################################
#                                     Flags                                     #
#################################################################################


def add_encoder_flags(add, default=DEFAULT_ENCODER, more=""):
    """Add the flags that name a SEM encoder. more: words to add to the help of --encoder."""
    add("--encoder", default=default, help=f"SEM encoder: directory or reference checkpoint{more} [%(default)s]")
    add("--encoder-backbone", help=f"timm model that a reference checkpoint is of [{DEFAULT_BACKBONE}]")
    add("--L", type=number(int, 1), help="code positions, if --encoder is a reference checkpoint [512]")
    add(
        "--V",
        type=number(int, 2, 65536),
        help="tokens per code position, if --encoder is a reference checkpoint [256] or the features have no manifest",
    )


def open_encoder(args):
    """The encoder that those flags name. Raises ValueError as `load_encoder` does."""
    if args.encoder == DEFAULT_ENCODER and not Path(args.encoder).exists():
        raise ValueError(
            f"no SEM encoder at {args.encoder}: put the DLC authors' teacher checkpoint there, or name "
            "one with --encoder"
        )
    return load_encoder(args.encoder, backbone=args.encoder_backbone, L=args.L, V=args.V)
