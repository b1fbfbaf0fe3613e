"""Codes of images in evaluation: how many tokens of two sets of codes agree, and the encoder that reads them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlc.checkpoints.weights import weights_sha256
from dlc.encoder import DEFAULT_ENCODER, open_encoder, tokens
from dlc.images import center_crop
from dlc.runtime import in_batches

BATCH = 32  # images encoded at once; fixed, because a code near a tie may depend on it


class TokenAgreement:
    """Counts, over pairs of codes, of where the tokens wanted and found agree: for L positions of V tokens each."""

    def __init__(self, L: int, V: int):
        self.L, self.V, self.shares = L, V, []
        self.equal = np.zeros(L, np.int64)
        self.wanted, self.found = np.zeros((2, L, V), np.int64)  # how often each token is

    def update(self, wanted: np.ndarray, found: np.ndarray) -> None:
        """Add pairs of codes (n, L) of integers in 0..V-1."""
        equal = wanted == found
        self.equal += equal.sum(axis=0)
        self.shares.append(equal.mean(axis=1))
        for counts, codes in ((self.wanted, wanted), (self.found, found)):
            places = codes.astype(np.int64) + np.arange(self.L) * self.V
            counts += np.bincount(places.ravel(), minlength=counts.size).reshape(counts.shape)

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays, for `restore`."""
        shares = np.concatenate([np.zeros(0), *self.shares])
        return dict(equal=self.equal, wanted=self.wanted, found=self.found, shares=shares)

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from arrays of `state`. Raises ValueError where they are of other codes."""
        mine = self.state()
        for name, array in state.items():
            if array.dtype != mine[name].dtype or name != "shares" and array.shape != mine[name].shape:
                raise ValueError(f"{name} is of other codes")
        self.equal, self.wanted, self.found = (state[name].copy() for name in ("equal", "wanted", "found"))
        self.shares = [state["shares"].copy()]

    def summary(self) -> dict:
        """The numbers, as .metrics.json holds them.

        Chance is sum_v p_v q_v, where p and q are how often token v is wanted and found at a position: the share that
        would agree if samples and codes were paired at random.
        """
        shares = np.concatenate(self.shares)
        count, by_position = len(shares), self.equal / len(shares)
        chance = (self.wanted / count * (self.found / count)).sum(axis=1)  # (L,)
        return dict(
            share=float(by_position.mean()),
            standard_error=float(shares.std(ddof=1) / count**0.5) if count > 1 else None,
            chance=float(chance.mean()),
            whole_codes=float((shares == 1).mean()),
            images=count,
            L=self.L,
            V=self.V,
            share_by_position=by_position.round(6).tolist(),
            chance_by_position=chance.round(6).tolist(),
        )


class CodeReader:
    """Images to their codes, by a SEM encoder on a device."""

    def __init__(self, encoder, device: torch.device):
        self.encoder, self.device = encoder.to(device).requires_grad_(False), device

    def view(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, 3) uint8 as the encoder sees it (s, s, 3)."""
        return np.array(center_crop(Image.fromarray(image), self.encoder.image_size))

    @torch.inference_mode()
    def codes(self, views: np.ndarray) -> np.ndarray:
        """Views (n, s, s, 3) uint8 to codes (n, L). Raises ValueError where the encoder's logits are not finite."""
        pixels = torch.from_numpy(views).to(self.device)
        codes = in_batches(lambda some: tokens(self.encoder.encode_pixels(some)), pixels, BATCH).cpu().numpy()
        if (codes < 0).any():
            raise ValueError("the encoder's logits of an image are not finite numbers: try another --encoder")
        return codes


def batches_of_rows(count: int) -> list[np.ndarray]:
    """0 to count - 1, BATCH at once."""
    return np.split(np.arange(count), range(BATCH, count, BATCH))


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
