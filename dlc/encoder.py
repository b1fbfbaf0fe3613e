"""Image -> discrete latent code: a timm Vision Transformer with a Simplicial Embedding (SEM) head.

The class and register tokens, taken before the backbone's final norm and concatenated, go through a linear layer
without bias to L*V numbers, a LayerNorm over all of them, and a softmax over each group of V. The code is the argmax of
each group. SEM: Lavoie et al. 2022, arXiv 2204.00616; its use as an image code: Lavoie et al. 2025, arXiv 2507.12318.

    encoder = load_encoder("pretrained/dlc_encoder.pth", L=512, V=256)
    codes = encoder.codes(images)                                  # (N, 512) int64, each in 0..255

Two forms of weights are read: a directory with `config.json` and `model.safetensors`, as `save_encoder` writes it, and
the training checkpoint of the reference implementation, DINOv2 key names under `{"teacher": {"backbone.…"}}`.
"""
import json
import re
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed

from dlc.checkpoints import load_tensors, tensors_of
from dlc.disk import differences, read_json

DEFAULT_BACKBONE = "vit_large_patch14_reg4_dinov2"
# parts of a self-supervised checkpoint that serve its training, not the code
TRAINING_ONLY = ("mask_token", "norm", "head", "sem_out", "sem_cls_norm", "dino_head", "ibot_head")


class SEMEncoder(nn.Module):
    """A timm Vision Transformer and a SEM head.

    Args:
        backbone: name of any timm Vision Transformer with a class or register token.
        image_size: height and width of its input, in pixels.
        L, V: positions of the code, and tokens to choose from at each.
        temperature: of the softmax in `forward`; the code does not depend on it.
        backbone_args: further keywords of timm.create_model, such as patch_size or embed_dim.

    Raises ValueError for a backbone that timm does not have, or that has no such tokens.
    """

    def __init__(self, backbone=DEFAULT_BACKBONE, image_size=224, L=512, V=256, temperature=1.0, backbone_args=None):
        super().__init__()
        self.config = dict(backbone=backbone, image_size=image_size, L=L, V=V, temperature=temperature,
                           backbone_args=backbone_args or {})
        try:
            self.backbone = timm.create_model(backbone, pretrained=False, num_classes=0, img_size=image_size,
                                              **(backbone_args or {}))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"timm cannot build the encoder {backbone!r}: {error}") from None
        if not getattr(self.backbone, "num_prefix_tokens", 0):
            raise ValueError(f"{backbone!r} has no class or register tokens to read a code from")
        self.backbone.norm = nn.Identity()
        self.image_size, self.L, self.V, self.temperature = image_size, L, V, temperature
        self.sem_embed = nn.Linear(self.backbone.num_prefix_tokens * self.backbone.embed_dim, L * V, bias=False)
        self.sem_norm = nn.LayerNorm(L * V, eps=1e-6)

    def logits(self, images):
        """Images (N, 3, image_size, image_size), normalised with ImageNet's mean and std, to (N, L, V) float32.

        The backbone may have been cast to bfloat16 or float16; the head always is float32.
        """
        images = images.to(next(self.backbone.parameters()).dtype)
        tokens = self.backbone.forward_features(images)[:, :self.backbone.num_prefix_tokens]
        with torch.autocast(images.device.type, enabled=False):
            return self.sem_norm(self.sem_embed(tokens.flatten(1).float())).unflatten(1, (self.L, self.V))

    def forward(self, images):
        """The simplicial embedding: (N, L, V), a distribution over V at each position."""
        return torch.softmax(self.logits(images) / self.temperature, dim=2)

    def codes(self, images):
        """The discrete latent code: (N, L) int64; -1, which is no token, where the logits are not finite numbers.

        A mark in place of an error, for which a GPU would have to be waited for. The argmax would be 0.
        """
        logits = self.logits(images)
        return logits.argmax(dim=2).masked_fill(~logits.isfinite().all(dim=2), -1)


def save_encoder(encoder, directory):
    """Write config.json and model.safetensors into directory, made where missing."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(encoder.config, indent=2) + "\n")
    safetensors.torch.save_model(encoder, str(directory / "model.safetensors"))


def load_encoder(path, **given):
    """The encoder at path, in eval mode, float32, on the CPU.

    Args:
        path: a directory made by `save_encoder`, whose config says the rest, or a reference checkpoint file.
        given: backbone, L, V, which a checkpoint file does not say of itself; None is SEMEncoder's default.

    Raises ValueError where weights are missing, left over or of other shapes, no part being ever left at random, and
    where a directory's config says otherwise than what is given.
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
        try:
            encoder = SEMEncoder(**config)
        except TypeError as error:
            raise ValueError(f"{path}/config.json is not a SEM encoder's: {error}") from None
        weights = load_tensors(path / "model.safetensors")
    elif not path.is_file():
        raise ValueError(f"encoder {path} does not exist")
    else:
        weights = load_tensors(path)
        weights = tensors_of(weights.get("teacher", weights), path)
        encoder = SEMEncoder(**given)
        weights = convert_reference_weights(weights, encoder.backbone)

    wanted = encoder.state_dict()
    missing = sorted(wanted.keys() - weights.keys())
    left_over = sorted(weights.keys() - wanted.keys())
    misshapen = [f"{key} {tuple(weights[key].shape)}, wanted {tuple(wanted[key].shape)}"
                 for key in wanted.keys() & weights.keys() if weights[key].shape != wanted[key].shape]
    for what, keys in (("lacks", missing), ("has unknown", left_over), ("has other shapes:", sorted(misshapen))):
        if keys:
            raise ValueError(f"encoder {path} {what} {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''} "
                             f"(backbone {encoder.config['backbone']}, L={encoder.L}, V={encoder.V})")
    encoder.load_state_dict(weights)
    return encoder.eval()


def convert_reference_weights(teacher, backbone):
    """The tensors of a reference checkpoint's teacher, as SEMEncoder's state dict.

    DINOv2 adds a position embedding to the class token, which timm's register models fold into the token itself, and
    is built for larger images: its patch positions are resized (bicubic, antialiased) to the backbone's grid. Blocks
    saved in chunks (`blocks.2.13.…`) carry their index second.
    """
    weights = {}
    for key, value in teacher.items():
        for prefix in ("module.", "_orig_mod.", "backbone."):
            key = key.replace(prefix, "")
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        if key.split(".")[0] not in TRAINING_ONLY:
            weights[key] = value
    if "register_tokens" in weights:
        weights["reg_token"] = weights.pop("register_tokens")
    positions = weights.get("pos_embed")
    if positions is not None and backbone.no_embed_class and "cls_token" in weights:
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = resample_abs_pos_embed(positions[:, 1:], backbone.patch_embed.grid_size,
                                                      num_prefix_tokens=0)
    elif positions is not None:
        weights["pos_embed"] = resample_abs_pos_embed(positions, backbone.patch_embed.grid_size,
                                                      num_prefix_tokens=1)
    return {key if key.startswith("sem_") else f"backbone.{key}": value for key, value in weights.items()}
