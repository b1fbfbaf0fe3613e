"""Image -> discrete latent code: a timm Vision Transformer with a Simplicial Embedding (SEM) head.

The class and register tokens, taken before the backbone's final norm and concatenated, go through a linear layer
without bias to L*V numbers, a LayerNorm over all of them, and a softmax over each group of V. The code is the argmax of
each group. SEM: Lavoie et al. 2022, arXiv 2204.00616; as an image code: Lavoie et al. 2025, arXiv 2507.12318.

    encoder = dlc.weights.networks.load_encoder("lavoies/SEM_dinov2_L512")
    codes = encoder.codes(images)                                  # (N, 512) int64, each in 0..255
"""

import json
import re
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from dlc.machine.cli import one_line
from dlc.machine.records import OBJECT, SWITCH, TEXT, check_values, or_null, real_number, whole_number

DEFAULT_BACKBONE = "vit_large_patch14_reg4_dinov2"
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
    backbone_args=or_null(OBJECT),
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

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        image_size: int = 224,
        L: int = 512,
        V: int = 256,
        temperature: float = 1.0,
        backbone_args: dict | None = None,
    ):
        super().__init__()
        self.config = dict(backbone=backbone, image_size=image_size, L=L, V=V, temperature=temperature)
        self.config["backbone_args"] = backbone_args or {}
        check_config("encoder", self.config)
        import timm  # imported here: slower to import than torch

        try:
            self.backbone = timm.create_model(
                backbone, pretrained=False, num_classes=0, img_size=image_size, **self.config["backbone_args"]
            )
        except Exception as error:  # timm's models raise many types
            why = one_line(error, 100)
            raise ValueError(f"timm cannot build the encoder {backbone!r} from its config: {why}") from None
        if not getattr(self.backbone, "num_prefix_tokens", 0):
            raise ValueError(f"{backbone!r} has no class or register tokens to read a code from")
        patch = getattr(getattr(self.backbone, "patch_embed", None), "patch_size", None) or (1, 1)
        if image_size % patch[0] or image_size % patch[1]:
            raise ValueError(
                f"{backbone!r} cannot read images of {image_size} pixels: not a multiple of its patch, {patch[0]}"
            )
        self.backbone.norm = nn.Identity()
        self.image_size, self.L, self.V, self.temperature = image_size, L, V, temperature
        self.patch_shape = (image_size // patch[0]) * (image_size // patch[1]), self.backbone.embed_dim
        self.said = ""  # by what is loaded into it
        # of the backbone's final norm, where its weights have it. The code does not depend on it, so these are no part
        # of the state dict, by whose digest encoders are told apart
        for name in ("norm_scale", "norm_shift"):
            self.register_buffer(name, None, persistent=False)  # (width,)
        self.sem_embed = nn.Linear(self.backbone.num_prefix_tokens * self.backbone.embed_dim, L * V, bias=False)
        self.sem_norm = nn.LayerNorm(L * V, eps=1e-6)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, image_size, image_size), normalised with ImageNet's mean and std, to (N, L, V) float32.

        The backbone may have been cast to bfloat16 or float16; the head is always float32.
        """
        return self.head(self._tokens(images))

    def head(self, tokens: torch.Tensor) -> torch.Tensor:
        """The class and register tokens, as `prefix_tokens` gives them, to logits (N, L, V) float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.sem_norm(self.sem_embed(tokens)).unflatten(1, (self.L, self.V))

    def _tokens(self, images):
        return self._all_tokens(images)[:, : self.backbone.num_prefix_tokens].flatten(1).float()

    def _all_tokens(self, images):
        return self.backbone.forward_features(images.to(next(self.backbone.parameters()).dtype))

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (N, image_size, image_size, 3) uint8 to logits (N, L, V) float32; see `tokens` for the codes."""
        return self.logits(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))

    def prefix_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels as in `encode_pixels` to the class and register tokens that the head reads, (N, tokens * width)."""
        return self._tokens(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))

    def patch_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels as in `encode_pixels` to the patch tokens after the backbone's final norm, (N, *patch_shape) float32.

        That norm is without scale and shift where the weights have none (norm_scale, norm_shift).
        """
        images = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
        tokens = self._all_tokens(images)[:, self.backbone.num_prefix_tokens :].float()
        return F.layer_norm(tokens, tokens.shape[2:], self.norm_scale, self.norm_shift, eps=1e-6)

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


def check_config(path: str | Path, config: dict) -> None:
    """Raise ValueError, naming path and key, for a configuration with unknown keys or values out of bounds."""
    backbone, more = config.get("backbone", DEFAULT_BACKBONE), config.get("backbone_args") or {}
    # in this order: the second relies on what the first one checks
    for where, values, kinds in ((path, config, CONFIG), (f"{path}, backbone_args", more, BACKBONE_ARGS)):
        check_values(where, values, kinds)
        if unknown := sorted(values.keys() - kinds.keys()):
            raise ValueError(f"{where}: a SEM encoder has no key {one_line(unknown[0], 80)}, only {', '.join(kinds)}")
    import timm

    if not re.fullmatch(r"\w+(\.\w+)?", backbone) or not timm.is_model(backbone):
        raise ValueError(f"{path}: timm cannot build the encoder {one_line(repr(backbone)[:1000], 80)}: no such model")


def save_encoder(encoder: SEMEncoder, directory: str | Path) -> None:
    """Write config.json and model.safetensors into a directory, which is created if it does not exist."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(encoder.config, indent=2) + "\n")
    safetensors.torch.save_model(encoder, str(directory / "model.safetensors"))
