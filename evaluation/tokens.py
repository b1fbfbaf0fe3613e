"""Codes of images in evaluation: how many tokens of two sets of codes agree, and the encoder that reads codes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlc.data.codes import token_counts
from dlc.data.images import center_crop
from dlc.machine.cli import progress
from dlc.machine.exact import in_batches, side_by_side
from dlc.machine.processes import cores_per_process
from dlc.nets.digest import weights_sha256
from dlc.nets.encoder import tokens
from dlc.weights.networks import DEFAULT_ENCODER, open_encoder
from evaluation.measuring import counts_of, exact_numerics, gather, share

BATCH = 32  # images at once; fixed, because a pixel or a token near a tie may depend on it

#################################################################################
#                                  Arithmetic                                   #
#################################################################################


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
#                                    Encoding                                   #
#################################################################################


class CodeReader:
    """Images to their codes, by a SEM encoder on a device."""

    def __init__(self, encoder, device: torch.device):
        self.encoder, self.device = encoder.to(device).requires_grad_(False), device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """Images (n, H, W, 3) uint8 to codes (n, L) int64 on the CPU.

        Raises ValueError where the encoder's logits are not finite.
        """
        pixels = pixels_for(self.encoder, images, self.device)
        codes = in_batches(lambda some: tokens(self.encoder.encode_pixels(some)), pixels, BATCH).cpu()
        if (codes < 0).any():
            raise ValueError("the encoder's logits of an image are not finite numbers: try another --encoder")
        return codes


class EncoderNetwork:
    """The SEM encoder's class and register tokens, from which it reads codes, as a network of features."""

    name, distance, notes = "encoder", "FD-encoder", ()

    def __init__(self, encoder, device: torch.device):
        self.encoder, self.device = encoder.to(device).requires_grad_(False), device
        self.outputs = dict(pool=encoder.backbone.num_prefix_tokens * encoder.backbone.embed_dim)
        self.digest = weights_sha256(encoder)

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (n, H, W, 3) uint8 to dict(pool=(n, D)) float32."""
        return dict(pool=self.encoder.prefix_tokens(pixels_for(self.encoder, images.cpu().numpy(), self.device)))


def pixels_for(encoder, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Images (n, H, W, 3) uint8 as extraction shows them to an encoder: (n, s, s, 3) uint8 on the device."""
    views = [np.array(center_crop(Image.fromarray(image), encoder.image_size)) for image in images]
    return torch.from_numpy(np.stack(views)).to(device)


def open_encoder_of(args, manifest, L: int, whose: str):
    """The encoder that the flags name, or the features' own, to compare codes of L positions with; and notes.

    Args:
        manifest: of the features that the codes belong to, or None.
        whose: words for the codes.

    Raises ValueError where it is not the one that made the codes, or makes codes of another L.
    """
    if args.encoder is None:
        named = manifest.encoder if manifest is not None else None
        args.encoder = named if named and Path(named).exists() else DEFAULT_ENCODER
    encoder = open_encoder(args)
    if encoder.L != L:
        raise ValueError(f"encoder {args.encoder} makes codes of L={encoder.L}, {whose} have L={L}")
    made_by = manifest.encoder_sha256 if manifest is not None else None
    if made_by is None:
        return encoder, [f"{whose} do not say which encoder made them: {args.encoder} was not compared"]
    if made_by != weights_sha256(encoder):
        raise ValueError(f"encoder {args.encoder} is not the one that made {whose}: name it with --encoder")
    return encoder, []


#################################################################################
#                             Batches, side by side                             #
#################################################################################


def batches_of(start: int, stop: int) -> list[np.ndarray]:
    """The numbers start to stop - 1, BATCH at once."""
    return [np.arange(place, min(place + BATCH, stop)) for place in range(start, stop, BATCH)]


def in_batches_of_images(read, work, start: int, stop: int, state, desc: str):
    """work(indices, read(indices)) for images start to stop - 1, a batch at a time and in order.

    read runs in threads of its own, ahead of work, of which several batches run side by side.
    """
    batches = batches_of(start, stop)
    with (
        exact_numerics(),
        progress(total=stop - start, desc=desc, unit="img", delay=2, disable=not state.is_main_process) as bar,
    ):
        loaded = zip(batches, side_by_side(read, batches, state.device, cores_per_process()))
        done = side_by_side(lambda item: work(*item), loaded, state.device)
        for indices, result in zip(batches, done):
            yield result
            bar.update(len(indices))


def agreement_of_images(load, wanted: np.ndarray, read: CodeReader, state, desc: str, change=None) -> dict | None:
    """`token_agreement` of wanted codes (n, L) with those of n images, read by all processes; None but on rank 0.

    Args:
        load: of indices (k,), their images (k, H, W, 3) uint8.
        change: makes other images of those, on the device, which are then read; None: they are read as they are.
    """
    count, L = wanted.shape
    start, stop = share(count, BATCH, state.process_index, state.num_processes)
    parts = in_batches_of_images(
        load, lambda _, images: read(change(images) if change else images), start, stop, state, desc
    )
    codes = gathered([torch.zeros(0, L, dtype=torch.int64), *parts], count, state)
    return None if codes is None else token_agreement(wanted, codes.numpy(), read.encoder.V)


def gathered(parts: list[torch.Tensor], count: int, state) -> torch.Tensor | None:
    """The rows (count, ...) of the shares of all processes, each given in parts, on rank 0; None elsewhere."""
    return gather(torch.cat(parts), counts_of(count, BATCH, state), state)
