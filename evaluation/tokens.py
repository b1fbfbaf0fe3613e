"""How many tokens of two sets of codes agree, and the SEM encoder as a network of `measure`, which reads codes."""

import contextlib
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlc.data.codes import CodeSet, CodeSpec, compare, token_counts
from dlc.data.images import center_crop
from dlc.machine.exact import in_batches
from dlc.nets.digest import weights_sha256
from dlc.nets.encoder import SEMEncoder, tokens
from dlc.weights.hub import is_id
from dlc.weights.meta import read_meta
from dlc.weights.networks import DEFAULT_ENCODER, open_encoder

BATCH = 32  # images at once; fixed, because a pixel or a token near a tie may depend on it


def token_agreement(wanted: np.ndarray, found: np.ndarray, V: int) -> dict:
    """How many tokens of pairs of codes agree, in all and at each position, as .metrics.json holds it.

    Chance is sum_v p_v q_v, where p and q are how often token v is wanted and found at a position: the share that would
    agree if wanted and found codes were paired at random.

    Args:
        wanted, found: codes (n, L), integers in 0..V-1.
    """
    count, L = wanted.shape
    equal = wanted == found  # (n, L)
    shares, by_position = equal.mean(axis=1), equal.mean(axis=0)
    p, q = (token_counts(codes, V) / count for codes in (wanted, found))  # (L, V)
    chance = (p * q).sum(axis=1)
    return dict(
        share=float(equal.mean()),
        standard_error=float(shares.std(ddof=1) / count**0.5) if count > 1 else None,  # over images
        chance=float(chance.mean()),
        whole_codes=float(equal.all(axis=1).mean()),
        images=count,
        L=L,
        V=V,
        share_by_position=by_position.round(6).tolist(),
        chance_by_position=chance.round(6).tolist(),
    )


#################################################################################
#                                  The encoder                                  #
#################################################################################


class EncoderNetwork:
    """A SEM encoder as a network: `pool` are its class and register tokens, `codes` (n, L) the code of each image."""

    name, notes = "encoder", ()

    def __init__(self, encoder: SEMEncoder, device: torch.device):
        self.encoder, self.device = encoder.to(device).requires_grad_(False), device
        self.outputs = dict(pool=encoder.backbone.num_prefix_tokens * encoder.backbone.embed_dim, codes=encoder.L)

    @cached_property
    def digest(self) -> str:
        return weights_sha256(self.encoder)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (n, H, W, 3) uint8 to dict(pool=(n, D) float32, codes=(n, L) int64 on the CPU).

        Raises ValueError where the encoder's logits are not finite.
        """
        side = self.encoder.image_size
        views = [np.array(center_crop(Image.fromarray(image), side)) for image in images.cpu().numpy()]  # as extraction
        pool = in_batches(self.encoder.prefix_tokens, torch.from_numpy(np.stack(views)).to(self.device), BATCH)
        codes = in_batches(lambda some: tokens(self.encoder.head(some)), pool, BATCH).cpu()
        if (codes < 0).any():
            raise ValueError("the encoder's logits of an image are not finite numbers: try another --encoder")
        return dict(pool=pool, codes=codes)


def encoder_of(args: Namespace, codes: CodeSet | None, checkpoint: str = "") -> tuple[SEMEncoder, list[str]]:
    """The encoder that the flags name, or else the one that made the codes, if it is still there; and notes.

    Args:
        args: flags of `add_encoder_flags`.
        codes: None if they are not here.
        checkpoint: of the model that the samples are of, which names the encoder of codes that lie alone.

    Raises ValueError where it is not the one that made the codes, or makes codes of another L or V.
    """
    if args.encoder is None:
        named = codes.features.source()["encoder"] if codes and codes.features is not None else None
        with contextlib.suppress(ValueError, OSError):  # gone, or of others
            folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
            named = named or read_meta(folder).noted.get("encoder")
        args.encoder = named if named and (Path(named).exists() or is_id(named)) else DEFAULT_ENCODER
    encoder = open_encoder(args)
    try:
        return encoder, compare(codes, codes_of(encoder, f"the encoder {args.encoder}")) if codes else []
    except ValueError as error:
        raise ValueError(f"{error}: name the one that made them with --encoder") from None


def codes_of(encoder: SEMEncoder, owner: str) -> CodeSpec:
    """What the codes of an encoder are. owner: the encoder, in words."""
    return CodeSpec(owner=owner, L=encoder.L, V=encoder.V, encoder_sha256=weights_sha256(encoder))
