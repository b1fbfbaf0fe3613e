"""Compose new discrete latent codes from those of two or more images, to draw samples that combine them.

    python compose_dlc.py dog.jpg fern.jpg --num 16 --out composed.npy
    python compose_dlc.py --features-path features --rows 3 17 --num 16 --out composed.npy
    torchrun --nnodes=1 --nproc_per_node=1 sample_ddp_computed_dlc.py --dlc-dir composed.npy --num-fid-samples 16

In: images and a SEM encoder, or rows of a features directory. Out: codes (num, L) for --dlc-dir; standard output says
how many tokens come from each source. At each position a source is drawn by --weights, and a token is taken from it:
with --mode tokens, the source's own token at that position (Lavoie et al. 2025, arXiv 2507.12318); with --mode sem, a
draw from the source's SEM distribution there, so that the token is a draw from the weighted mean of the distributions.
For example, with a dog, a fern and --weights 3 1, three in four tokens are the dog's. Code i is a
function of (seed, i).
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlc.data import Features, code_dtype, read_manifest
from dlc.data.codes import CodeSet, CodeSpec, compare
from dlc.data.images import SOURCES, WHITE, add_background_flag, center_crop, is_transparent, load_image
from dlc.machine.cli import SEED, ArgumentParser, excludes, number
from dlc.machine.exact import in_batches
from dlc.machine.files import check_output, reading_whole, write_new
from dlc.machine.noise import Stream, random_words
from dlc.nets.encoder import SEMEncoder
from dlc.weights.networks import DEFAULT_ENCODER, add_encoder_flags, open_encoder
from evaluation.tokens import codes_of


def choose(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Weighted choices by uniform numbers in [0, 1): weights (..., K) and uniform (...) to indices (...) int64."""
    bounds = weights.double().cumsum(dim=-1)
    places = torch.searchsorted(bounds, (uniform * bounds[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    return places.clamp(max=weights.shape[-1] - 1)


def compose(sources: torch.Tensor, weights: torch.Tensor, num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw composed codes.

    Args:
        sources: codes (K, L) to take tokens from, or distributions (K, L, V) to draw tokens from.
        weights: (K,), how often each source is chosen; they need not sum to 1.
        num: codes to draw.
        seed: the numbers for code i are a function of (seed, i).

    Returns codes (num, L) int64, and the source of each token, (num, L) int64.
    """
    K, L = sources.shape[:2]
    positions, parts = torch.arange(L), []
    for indices in torch.arange(num).split(256):  # all of (num, L, V) at once could fill the memory
        words = random_words(seed, Stream.COMPOSE, indices, 2 * L).double() / 2**32
        source = choose(weights.expand(len(indices), L, K), words[:, :L])  # (n, L)
        taken = sources[source, positions]  # (n, L) or (n, L, V)
        parts.append((taken if sources.ndim == 2 else choose(taken, words[:, L:]), source))
    return tuple(map(torch.cat, zip(*parts)))


def parse_args() -> tuple[ArgumentParser, argparse.Namespace]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("images", nargs="*", help="compose codes of these images, two or more, also inside archives: images.zip/0.png")
    add("--features-path", "--feature-path", help="read --rows or the encoder's name from these features [features]")
    add("--rows", type=number(int, 0), nargs="+", help="take these rows of the features, from 0, instead of images")
    add_background_flag(add, None)
    add_encoder_flags(add, None, f" [that of the features, or {DEFAULT_ENCODER}]")
    add(
        "--mode",
        choices=["tokens", "sem"],
        default="tokens",
        help="take the sources' tokens, or, for images, draw from their SEM distributions",
    )
    add("--weights", type=number(float, 0), nargs="+", help="choose sources with these relative frequencies [equal]")
    add("--temp", type=number(float, 1e-6), help="with --mode sem: set the distributions' temperature [the encoder's]")
    add("--num", type=number(int, 1), default=16, help="compose this many codes")
    add("--global-seed", type=SEED, default=0, help="seed all draws")
    add("--out", default="composed.npy", help="write the codes (num, L) to this .npy")
    return parser, parser.parse_args()


def check_sources(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, and for an --out that cannot be written."""
    names = args.rows or args.images
    if bool(args.images) == bool(args.rows) or args.rows and not args.features_path:
        raise ValueError("name the sources as image files, or by --features-path with --rows")
    if len(names) < 2:
        raise ValueError("composing takes two or more sources")
    if args.weights and (len(args.weights) != len(names) or not sum(args.weights)):
        raise ValueError(f"--weights: give one for each of the {len(names)} sources, not all 0")
    if args.mode == "sem" and args.rows:
        raise ValueError("--mode sem needs images: features hold codes, not SEM distributions")
    excludes(args, "rows", "encoder", "encoder_backbone", "L", "background")
    if args.temp and args.mode != "sem":
        raise ValueError("--temp applies to --mode sem only")
    for name in args.images:
        if Path(name).exists() and any(kind.takes(name) for kind in SOURCES):
            raise ValueError(f"{name} holds images: name them one by one, such as {name.rstrip('/')}/cat/0.png")
    if Path(args.out).suffix != ".npy":
        raise ValueError(f"--out {args.out}: wanted a .npy")
    check_output(args.out, "--out", args.images)


def view_of(path: str, size: int, background: tuple[int, int, int]) -> Image.Image:
    """What the encoder sees of an image, size pixels squared. Raises ValueError, naming it, if it cannot be read."""
    with reading_whole(path, "cannot be read as an image"):
        image = load_image(path, background)
    if is_transparent(image):
        print(f"{path} is transparent: it is blended on --background")
    return center_crop(image, size)


@torch.inference_mode()
def read_logits(encoder: SEMEncoder, paths: Sequence[str], background: tuple[int, int, int]) -> torch.Tensor:
    """The encoder's logits (K, L, V) of images. Raises ValueError for one that cannot be read, or has none."""
    views = [np.array(view_of(path, encoder.image_size, background)) for path in paths]
    pixels = torch.from_numpy(np.stack(views)).to(next(encoder.parameters()).device)
    # in batches of 1, so that an image's code does not depend on the other sources
    logits = in_batches(encoder.encode_pixels, pixels, 1).cpu()
    for path, one in zip(paths, logits):
        if not one.isfinite().all():
            raise ValueError(f"the encoder's logits of {path} are not finite numbers: try another --encoder")
    return logits


def read_images(args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    """The images' codes (K, L) or, with --mode sem, distributions (K, L, V); and V.

    The encoder and the background are those of the features, where flags do not say them.
    """
    features = args.features_path or ("features" if Path("features/manifest.json").is_file() else None)
    made = read_manifest(features) if features else None
    is_theirs = bool(made and made.encoder and args.encoder is None)
    args.encoder = made.encoder if is_theirs else args.encoder or DEFAULT_ENCODER
    encoder = open_encoder(args)
    print(f"encoder {args.encoder}{f', of {features}' if is_theirs else ''}: {encoder.said}")
    if is_theirs or args.features_path:
        theirs = CodeSpec(owner=f"features {features}", L=made.L, V=made.V, encoder_sha256=made.encoder_sha256)
        compare(theirs, codes_of(encoder, f"the encoder {args.encoder}"))
    logits = read_logits(encoder, args.images, args.background or (made and made.background) or WHITE)
    if args.mode == "tokens":
        return logits.argmax(dim=2), encoder.V
    return torch.softmax(logits / (args.temp or encoder.temperature), dim=2), encoder.V


def read_rows(args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    """The rows' codes (K, L), and V."""
    codes = CodeSet.of_features(Features(args.features_path, V=args.V))
    if codes.V is None:
        raise ValueError(f"features {codes.owner} do not say V, the tokens per position: give --V")
    if max(args.rows) >= len(codes):
        raise ValueError(f"--rows {max(args.rows)}: features {codes.owner} have rows 0 to {len(codes) - 1}")
    return torch.from_numpy(codes.gather(args.rows)), codes.V


def main() -> None:
    parser, args = parse_args()
    with parser.one_line_errors():
        check_sources(args)
        sources, V = read_rows(args) if args.rows else read_images(args)
        weights = torch.tensor(args.weights or [1.0] * len(sources))
        codes, source = compose(sources, weights, args.num, args.global_seed)
        buffer = io.BytesIO()
        np.save(buffer, codes.numpy().astype(code_dtype(V)))
        write_new(Path(args.out), buffer.getvalue(), "--out")
    shares = torch.bincount(source.flatten(), minlength=len(sources))
    for name, count in zip(args.images or [f"row {row}" for row in args.rows], shares.tolist()):
        print(f"{count:8,} of {source.numel():,} tokens ({count / source.numel():.1%}) from {name}")
    print(
        f"{args.num} codes of {codes.shape[1]} tokens in {args.out}: draw from them with sample_ddp_computed_dlc.py "
        f"--dlc-dir {args.out} --num-fid-samples {args.num}"
    )


if __name__ == "__main__":
    main()
