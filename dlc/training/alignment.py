"""Alignment of a model's hidden tokens with what an encoder sees in the clean image, which makes it learn faster.

alignment = open_alignment(args, features, depth=28)              # None without --align
alignment.begin(run, model)                                       # makes the projector, which training throws away
loss = alignment(tokens, alignment.targets(batch, step, encode))  # (N,), of tokens (N, T, D) after alignment.block

REPA: Yu et al. 2024, arXiv 2410.06940. iREPA, which keeps only the encoder's spatial structure: Singh et al. 2025,
arXiv 2512.10794. Targets are the encoder's patch tokens after its final norm, of the image flipped as the latents are:
those that extraction stored, or made as training goes.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from dlc.machine.cli import needs, number

if TYPE_CHECKING:
    from dlc.data import Features
    from dlc.nets.pixels import PixelEncoder
    from dlc.training.image_batches import Images
    from dlc.training.run import Run
    from models import DiT

PROJECTOR_WIDTH = 2048  # of REPA's two hidden layers
GAMMA = 1.0  # the share of an image's mean token that iREPA takes off its targets


def perceptron(hidden_size: int, width: int) -> nn.Module:
    """REPA's projector of tokens (N, T, hidden_size) to (N, T, width)."""
    sizes = (hidden_size, PROJECTOR_WIDTH, PROJECTOR_WIDTH, width)
    layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.SiLU())][:-1]
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Convolution(nn.Conv2d):
    """iREPA's projector of tokens (N, T, hidden_size), a square grid of them, to (N, T, width)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__(hidden_size, width, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return as_tokens(super().forward(as_grid(tokens)))


def as_grid(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (N, T, D) of a square grid to (N, D, side, side)."""
    return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))


def as_tokens(grid: torch.Tensor) -> torch.Tensor:
    return grid.flatten(2).transpose(1, 2)


def standardised(targets: torch.Tensor) -> torch.Tensor:
    """iREPA's targets (N, T, width): of each image less GAMMA times the mean over its tokens, divided by their std."""
    return (targets - GAMMA * targets.mean(dim=1, keepdim=True)) / (targets.std(dim=1, keepdim=True) + 1e-6)


def resized(targets: torch.Tensor, count: int) -> torch.Tensor:
    """Targets (N, T, width) on a square grid of `count` tokens, bilinear and antialiased; as they are where T fits."""
    if targets.shape[1] == count:
        return targets
    size = (math.isqrt(count),) * 2
    return as_tokens(F.interpolate(as_grid(targets), size=size, mode="bilinear", antialias=True))


class Kind(NamedTuple):
    """projector(hidden_size, width) builds a module; prepared(targets) is what it is compared with; weight: of the
    loss, as published."""

    projector: Callable
    prepared: Callable
    weight: float


ALIGNMENTS = {"repa": Kind(perceptron, lambda targets: targets, 0.5), "irepa": Kind(Convolution, standardised, 1.0)}


@dataclass
class Alignment:
    """What --align asks for, and the projector.

    Attributes:
        kind: a key of ALIGNMENTS.
        block: the tokens after this many blocks are aligned.
        weight: of the loss.
        until: the last step with alignment; None: all steps.
        shape: of an image's targets, (T, width).
        stored: the targets' rows, aligned with the latents; None: an encoder makes them of a batch's views.
        projector, project: the module, and what to call; from `begin` on.
    """

    kind: str
    block: int
    weight: float
    until: int | None
    shape: tuple[int, int]
    stored: object
    projector: nn.Module | None = None
    project: Callable | None = None

    @property
    def settings(self) -> dict:
        """What a checkpoint records."""
        return dict(kind=self.kind, block=self.block, weight=self.weight, until=self.until)

    def begin(self, run: "Run", model: "DiT") -> None:
        """Make the projector of a model's tokens, a part of the run, and say what is aligned."""
        (_, count, hidden_size), (patches, width) = model.pos_embed.shape, self.shape
        projector = ALIGNMENTS[self.kind].projector(hidden_size, width)
        self.projector, self.project = run.adopt_beside("projector", projector)
        here, there = (f"{math.isqrt(number)} x {math.isqrt(number)}" for number in (count, patches))
        run.logger.info(
            f"alignment: {self.kind}, weight {self.weight:g}, of {here} tokens after block {self.block} with the "
            f"encoder's {there} of {width:,} numbers{'' if here == there else f', resized to {here}'}; projector of "
            f"{sum(weight.numel() for weight in projector.parameters()) / 1e6:.1f} M parameters"
        )

    def targets(
        self, batch: Mapping[str, torch.Tensor], step: int, encode: "PixelEncoder | None" = None
    ) -> torch.Tensor | None:
        """Targets (n, T, width) of a batch, which holds them, or views to encode, as "tokens"; None after the last
        step with alignment."""
        if self.until is not None and step > self.until:
            return None
        return encode.patch_tokens(batch["tokens"]) if encode else batch["tokens"]

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss (N,): minus the mean over tokens of the cosine of what the projector makes of tokens (N, T, D), and
        targets, resized to their grid. In float32: in 16 bits the norms overflow."""
        targets = ALIGNMENTS[self.kind].prepared(resized(targets.float(), tokens.shape[1]))
        return -F.cosine_similarity(self.project(tokens).float(), targets, dim=2).mean(dim=1)


def add_alignment_flags(add: Callable) -> None:
    add(
        "--align",
        choices=ALIGNMENTS,
        help="also pull hidden tokens to the encoder's patch tokens of the image, through a projector that is thrown "
        "away; the patch tokens come from features with --store-tokens, or from --encoder with --data-path [none]",
    )
    weights = ", ".join(f"{kind.weight} of {name}" for name, kind in ALIGNMENTS.items())
    add("--align-weight", type=number(float, 0), help=f"multiply the alignment's loss by this [{weights}]")
    add("--align-block", type=number(int, 1), metavar="K", help="align the tokens after block K [8]")
    add("--align-until", type=number(int, 1), metavar="STEP", help="end the alignment after this step [never]")


def open_alignment(args: argparse.Namespace, features: "Features | Images", depth: int) -> Alignment | None:
    """What the flags ask for; None without --align. Raises ValueError for flags and features that do not go with it."""
    needs(args, "align", "align_weight", "align_block", "align_until")
    if not args.align:
        return None
    block = args.align_block or 8
    if block > depth:
        raise ValueError(f"--align-block {block}: {args.model} has {depth} blocks")
    if args.train_only:
        raise ValueError(f"--align trains the blocks, which --train-only {args.train_only} leaves as they are")
    if args.data_path:
        if features.encoder is None:
            raise ValueError("--align with --data-path needs an --encoder, whose patch tokens are the targets")
        stored, shape = None, features.encoder.patch_shape
    else:
        stored = features.arrays.get("tokens")
        if stored is None:
            raise ValueError(
                f"--align: features path {args.features_path} holds no patch tokens: extract with --store-tokens, or "
                "train on images with --data-path"
            )
        shape = stored.array(0).shape[1:]
    if math.isqrt(shape[0]) ** 2 != shape[0]:
        raise ValueError(f"--align: the encoder has {shape[0]} patch tokens, which are no square grid")
    weight = ALIGNMENTS[args.align].weight if args.align_weight is None else args.align_weight
    return Alignment(args.align, block, weight, args.align_until, shape, stored)
