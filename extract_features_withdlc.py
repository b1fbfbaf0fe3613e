"""Turn images into VAE latents and discrete latent codes on disk.

    torchrun --nnodes=1 --nproc_per_node=N extract_features_withdlc.py --model DiT-XL/2 \\
        --data-path /path/to/imagenet/train --features-path /path/to/store/features

In: images (DATA/{class}/*.jpg, an archive or a dataset), a VAE, a SEM encoder. Out: FEATURES/, the contract of
dlc/data/, and FEATURES/preview.png: eight crops over their VAE reconstructions. The same command run again
continues. The stored bytes depend neither on the number of processes and workers nor on a row's neighbours.
"""

import argparse
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlc.data import Features, FeatureWriter, Manifest, NotFinite
from dlc.data.extraction import BatchEncoder, batches_of, extract
from dlc.data.images import add_background_flag, add_source_flags, image_grid, open_source, save_sheet, to_uint8
from dlc.data.inspection import without
from dlc.data.manifest import DTYPES, LATENTS, read_manifest
from dlc.data.views import Views, collate, flips_of
from dlc.machine.cli import SEED, ArgumentParser, NotHere, number, progress
from dlc.machine.exact import set_exact_numerics
from dlc.machine.files import SHEET, check_output, check_outside
from dlc.machine.part import add_part_flag, asked_part
from dlc.machine.processes import (
    PRECISIONS,
    agree,
    create_logger,
    default_num_workers,
    done_by_rank_0,
    from_rank_0,
    on_gpus,
    start_processes,
    wait_for_all,
)
from dlc.machine.readers import read_ahead
from dlc.nets.pixels import PixelEncoder
from dlc.nets.vae import decode, latent_shape
from dlc.weights.networks import VAE_HELP, add_encoder_flags, data_settings, open_networks
from evaluation.similarity import psnr
from models import DiT_models

if TYPE_CHECKING:
    from accelerate import PartialState

ON_GPU = on_gpus()
LOWEST_PSNR = 20  # dB; docs/extraction.md says why


def parse_args() -> tuple[ArgumentParser, argparse.Namespace]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add_source_flags(add, required=True)
    add(
        "--features-path",
        "--feature-path",
        default="features",
        help="write the features into this directory [%(default)s]",
    )
    add(
        "--model",
        default="DiTSEM-XL/2",
        choices=DiT_models,
        metavar="MODEL",
        help="warn if this model's patch size does not divide the latents [%(default)s]",
    )
    add(
        "--image-size",
        type=number(int, 1),
        default=256,
        help="crop images to this height and width, pixels [%(default)s]",
    )
    add("--vae", default="ema", help=f"{VAE_HELP} [%(default)s]")
    add_encoder_flags(add, more="; none: store latents and labels only")
    add(
        "--store-tokens",
        action="store_true",
        help="also store the encoder's patch tokens of each row, in 16 bits, for train_diffusion.py --align; the log "
        "first says how much disk they take",
    )
    add("--dino-cfg", action=NotHere, help="leave it out: L and V come from --encoder, or from --L and --V")
    add(
        "--flip",
        choices=["random", "none", "both"],
        default="random",
        help="flip the VAE's view horizontally; both: two rows per image, unflipped, then flipped [%(default)s]",
    )
    add(
        "--posterior",
        choices=LATENTS,
        default="sample",
        help="store this of the VAE's posterior; moments: mean and std, from which training draws a fresh sample in "
        "each epoch [%(default)s]",
    )
    add("--dtype", choices=DTYPES, default="float16", help="store latents in this type [%(default)s]")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="set the precision of both networks' weights and activations; TF32 is never used [%(default)s]",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=ON_GPU,
        help="torch.compile both networks [only on GPUs]",
    )
    add(
        "--batch-size",
        type=number(int, 1),
        default=32 if ON_GPU else 4,
        help="encode this many images per batch; on a CPU each core encodes a batch [32 on GPUs, 4 on CPUs]",
    )
    add_part_flag(add, "shards")
    add("--shard-size", type=number(int, 1), default=1024, help="store this many images per shard [%(default)s]")
    add(
        "--num-workers",
        type=number(int, 0),
        default=default_num_workers(),
        help="use this many data readers per process [%(default)s here]",
    )
    add("--strict", action="store_true", help="stop at the first broken image instead of skipping it")
    add_background_flag(add)
    add("--global-seed", type=SEED, default=0, help="seed flips and posterior draws [%(default)s]")
    return parser, parser.parse_args()


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other."""
    check_outside(args.features_path, "--features-path", args.data_path)
    if args.store_tokens and args.encoder == "none":
        raise ValueError("--store-tokens stores what an --encoder makes of the images, and there is none")


def main() -> None:
    parser, args = parse_args()
    with parser.one_line_errors("what is done is kept", "--batch-size", (OSError,)):
        run(parser, args)


def open_inputs(args: argparse.Namespace, state: "PartialState", logger: logging.Logger) -> tuple:
    """The VAE, the encoder or None, the images, and the manifest of what is to be written.

    Raises ValueError or OSError, naming the flag or file, for what cannot be opened or does not go together.
    """
    vae, encoder = open_networks(
        args.image_size,
        args.vae,
        None if args.encoder == "none" else args.encoder,
        backbone=args.encoder_backbone,
        L=args.L,
        V=args.V,
    )
    logger.info(f"VAE {args.vae}: {vae.said}")
    if encoder:
        logger.info(f"encoder {args.encoder}: {encoder.said}")
    logger.info(f"listing {args.data_path}")
    source = done_by_rank_0(state, lambda: open_source(args.data_path, args.labels))
    for remark in source.remarks:
        logger.warning(f"warning: {remark}")
    manifest = Manifest(
        image_size=args.image_size,
        shard_size=args.shard_size,
        latents=args.posterior,
        dtype=args.dtype,
        precision=args.precision,
        flip=args.flip,
        background=list(args.background),
        seed=args.global_seed,
        classes=source.classes,
        tokens=list(encoder.patch_shape) if args.store_tokens else None,
        tokens_norm=("plain" if encoder.norm_scale is None else "learned") if args.store_tokens else None,
        **data_settings(args.vae, vae, args.encoder, encoder, source),
    )
    agree("VAE and encoder", manifest.to_json())
    return vae, encoder, source, manifest


def size_of_tokens(manifest: Manifest, images: int, copies: int) -> str:
    """What --store-tokens takes, in words, for so many images of so many rows each."""
    patches, width = manifest.tokens
    size, shard = 2 * copies * patches * width, min(images, manifest.shard_size)
    return (
        f"patch tokens: {patches} of {width:,} numbers in float16 per row, {images * size / 1e9:.3g} GB for "
        f"{images * copies:,} rows; each process holds shards of {shard * size / 1e9:.3g} GB in memory (--shard-size)"
    )


def mended_by(views: Views, strict: bool) -> Callable[[str], bool]:
    """Whether an image that was skipped can be read now, as a function of its path, for `FeatureWriter.start`.

    With strict it raises ValueError for one that cannot.
    """

    @functools.cache
    def mended(path):
        *_, fault = views[views.source.indices[path]]
        if fault and strict:
            path = views.source.path(fault[0])
            raise ValueError(f"cannot read {path!r} ({fault[1]}): fix the file, or leave out --strict")
        return fault is None

    return mended


def begin(writer: FeatureWriter, preview: Path, mended: Callable[[str], bool]) -> bool:
    """See `FeatureWriter.start`. Raises ValueError where somebody else's picture lies in the preview's place, too."""
    if not writer.record_path.is_file() and preview.parent.is_dir():
        check_output(preview, "the picture", own=[SHEET])
    return writer.start(mended)


def run(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Extract the features that args ask for."""
    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors():
        check_flags(args)
        part = asked_part(args.part)
        state = start_processes(precisions=[args.precision])
        logger = create_logger(state)
        vae, encoder, source, manifest = open_inputs(args, state, logger)
        flips = flips_of(args.flip, len(source), args.global_seed)  # (images, k)
        code_size = encoder.image_size if encoder else None
        views = Views(source, flips, args.image_size, code_size, args.background)
        writer = FeatureWriter(args.features_path, manifest, part)
        preview = Path(args.features_path) / "preview.png"
        incomplete = done_by_rank_0(state, lambda: begin(writer, preview, mended_by(views, args.strict)))
    patch, side = DiT_models[args.model].patch_size, latent_shape(vae, args.image_size)[1]
    if side % patch:
        logger.warning(
            f"warning: latents of --image-size {args.image_size} are {side} wide, not a multiple of "
            f"{args.model}'s patch {patch}: it cannot be trained on them"
        )
    if not incomplete:
        logger.info(f"{args.features_path} is complete; nothing to do{without(read_manifest(args.features_path))}")
        if state.is_main_process and not preview.exists():
            with parser.one_line_errors("the features are complete"):
                save_reconstructions(preview, args.features_path, views, vae, logger)
        state.destroy_process_group()
        return

    # ---------------------------------------------------------------------- extraction, shard by shard
    num_shards = manifest.num_shards
    todo = from_rank_0([shard for shard in part.share(range(num_shards)) if not writer.is_done(shard)])
    for line in part.said("shards"):
        logger.info(line)
    logger.info(
        f"{len(source):,} images in {len(manifest.classes)} classes, {num_shards} shards, {len(todo)} to do, "
        f"{state.num_processes} processes on {state.device.type}, {args.precision}"
    )
    if manifest.tokens:
        logger.info(size_of_tokens(manifest, *flips.shape))
    own = todo[state.process_index :: state.num_processes]
    batches = batches_of(own, len(source), args.shard_size, args.batch_size)
    load, on_gpu = lambda batch: collate([views[index] for index in batch]), state.device.type == "cuda"
    loaded = read_ahead(load, batches, args.num_workers, pin=on_gpu)
    set_exact_numerics()
    encoder = PixelEncoder(vae, encoder, state.device, args.precision, args.compile)
    encode = BatchEncoder(encoder, views, source.labels, manifest, args.batch_size, args.strict)
    if args.compile and batches:
        encode.warm_up()
    images, start = sum(map(len, batches)), time.time()
    bar = progress(
        total=images,
        unit="img",
        disable=not state.is_main_process,
        desc="extracting" if state.num_processes == 1 else f"rank 0 of {state.num_processes}",
    )
    try:
        with bar:
            extract(encode, zip(batches, loaded), writer, len(source), bar.update)
    except NotFinite as error:
        parser.error(f"{error}; what is done is kept, and other settings need another --features-path")
    rate = images / (time.time() - start)
    wait_for_all()
    manifest = writer.finish(num_shards) if state.is_main_process else None
    if state.is_main_process and not manifest:
        logger.info(part.said_left(writer.left_over, "shards"))
        return state.destroy_process_group()
    if manifest and not manifest.count:
        path, reason = manifest.skipped[0]
        parser.error(f"none of the {len(source):,} images of {args.data_path} can be read, as {path!r}: {reason}")

    # ---------------------------------------------------------------------- preview
    if state.is_main_process:
        with parser.one_line_errors("the features are complete"):
            save_reconstructions(preview, args.features_path, views, vae, logger)
        skipped = len(manifest.skipped)
        logger.info(
            f"done: {manifest.count:,} rows of {len(source):,} images in {num_shards} shards, {skipped} skipped "
            f"{'(listed in manifest.json) ' if skipped else ''}at {args.features_path}; "
            f"{rate:.2f} images/s per process; look at {preview}"
        )
        if manifest.transparent:
            logger.warning(
                f"warning: {manifest.transparent:,} images are transparent: they were blended on --background "
                f"rgb{args.background}"
            )
        if skipped > 0.01 * len(source):
            logger.warning(f"warning: {skipped / len(source):.0%} of the images are missing{without(manifest)}")
    state.destroy_process_group()


def save_reconstructions(
    path: Path, features_path: str, views: Views, vae: torch.nn.Module, logger: logging.Logger, columns: int = 8
) -> None:
    """Draw crops of some images, spread over the rows, above the VAE's reconstructions from the stored latents.

    Their PSNR is logged, with a warning if it is below LOWEST_PSNR.
    """
    features, source = Features(features_path), views.source
    rows = np.unique(np.linspace(0, features.count - 1, columns).astype(int))
    copies = rows % views.flips.shape[1]
    indices = [source.indices[name] for name in features.paths.gather(rows)]
    crops = [views.crops(views.load(index), index)[copy] for index, copy in zip(indices, copies)]
    stored = features.latents.gather(rows)[:, : features.latent_shape[0]]  # of moments: the mean
    with torch.inference_mode():
        decoded = to_uint8(decode(vae, torch.from_numpy(stored).to(vae.device, torch.float32))).cpu().numpy()
    decibels = psnr(torch.from_numpy(np.stack(crops)), torch.from_numpy(decoded))
    captions = [*(Path(path).stem for path in features.paths.gather(rows)), *(f"{one:.1f} dB" for one in decibels)]
    save_sheet(path, image_grid([*crops, *decoded], len(rows), ("images", "from latents"), captions))
    value = float(decibels.mean())
    logger.info(f"reconstructions in {path}: PSNR {value:.1f} dB")
    if value < LOWEST_PSNR:
        logger.warning(
            f"warning: the VAE does not keep these images (PSNR below {LOWEST_PSNR} dB), and samples cannot be better "
            "than its reconstructions: try another --vae (docs/extraction.md)"
        )


if __name__ == "__main__":
    main()
