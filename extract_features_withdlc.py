"""Turn a folder of images into VAE latents and discrete latent codes on disk.

    torchrun --nnodes=1 --nproc_per_node=N extract_features_withdlc.py --model DiT-XL/2 \\
        --data-path /path/to/imagenet/train --features-path /path/to/store/features

In: DATA/{class}/*.jpg (torchvision's ImageFolder), a VAE, a SEM encoder. Out: FEATURES/, the contract of
dlc/features/, and FEATURES/preview.png: eight crops over their VAE reconstructions. The same command run again
continues; what it writes does not depend on the number of processes and workers, nor a row on its neighbours.
"""
import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dlc.checkpoints.weights import weights_sha256
from dlc.cli import SEED, ArgumentParser, number, progress
from dlc.disk import recorded_id, write_whole
from dlc.encoder import add_encoder_flags, open_encoder
from dlc.extraction import Networks, in_order
from dlc.features import FORMAT_VERSION, Features, FeatureWriter, NotFinite, as_stored, code_dtype
from dlc.features.manifest import DTYPES, LATENTS
from dlc.images import Views, collate, flips_of, image_grid, load_rgb, to_uint8
from dlc.listing import list_images, listing_sha256
from dlc.noise import Stream, normal
from dlc.runtime import (
    PRECISIONS,
    agree,
    create_logger,
    default_num_workers,
    done_by_rank_0,
    from_rank_0,
    start_processes,
)
from dlc.signals import ignore_signals
from dlc.vae import decode, downsampling_factor, load_vae, vae_id
from models import DiT_models

NOT_FINITE = "try --precision bf16 or fp32"         # what to do about latents or logits that are not numbers
COMPARED_BATCHES = 8        # in which a lower precision's tokens are compared with fp32's
ON_GPU = torch.cuda.is_available()


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data-path", required=True, help="folder with one folder of images a class")
    add("--features-path", "--feature-path", default="features", help="where the features go [%(default)s]")
    add("--model", default="DiTSEM-XL/2", choices=DiT_models, metavar="MODEL",
        help="the model to train on them: warns where its patch does not divide the latents [%(default)s]")
    add("--image-size", type=number(int, 1), default=256, help="height and width of the crop, pixels [%(default)s]")
    add("--vae", default="ema", help="ema, mse, a local directory or a hub id [%(default)s]")
    add_encoder_flags(add, more="; none: latents and labels only")
    add("--flip", choices=["random", "none", "both"], default="random",
        help="horizontal flips of the VAE's view; both: two rows per image, as it is, then flipped [%(default)s]")
    add("--posterior", choices=LATENTS, default="sample",
        help="what is stored of the VAE's posterior; moments: its mean and std, from which training draws a fresh "
             "sample each epoch [%(default)s]")
    add("--dtype", choices=DTYPES, default="float16", help="of the stored latents [%(default)s]")
    add("--precision", choices=PRECISIONS, default="fp32",
        help="of both networks, weights and activations (fp32: TF32 off) [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, default=ON_GPU,
        help="torch.compile both networks [on GPUs]")
    add("--batch-size", type=number(int, 1), default=32 if ON_GPU else 4,
        help="images encoded at once, on a CPU by each core [32 on GPUs, 4 on CPUs]")
    add("--shard-size", type=number(int, 1), default=1024, help="images a shard covers [%(default)s]")
    add("--num-workers", type=number(int, 0), default=default_num_workers(),
        help="image readers a process [%(default)s here]")
    add("--strict", action="store_true", help="stop at the first image that cannot be read, rather than skip it")
    add("--global-seed", type=SEED, default=0, help="of flips and posterior draws [%(default)s]")
    return parser, parser.parse_args()


def main():
    parser, args = parse_args()

    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors():
        data_path, features_path = Path(args.data_path).resolve(), Path(args.features_path).resolve()
        if features_path == data_path or data_path in features_path.parents:
            raise ValueError(f"--features-path {args.features_path} lies in --data-path {args.data_path}, whose "
                             "folders are the classes: give another")
        factor = downsampling_factor(args.vae)
        if args.image_size % factor:
            raise ValueError(f"--image-size {args.image_size} is not a multiple of {factor}, the VAE's factor")
        encoder = None if args.encoder == "none" else open_encoder(args)
        state = start_processes()
        logger = create_logger(state)
        logger.info(f"listing {args.data_path}")
        classes, paths, labels, remarks = done_by_rank_0(state, lambda: list_images(args.data_path))
        for remark in remarks:
            logger.warning(f"warning: {remark}")

    # ---------------------------------------------------------------------- models and writer
    with parser.one_line_errors():
        vae = load_vae(args.vae)
        L, V = (encoder.L, encoder.V) if encoder else (None, None)
        settings = dict(
            format_version=FORMAT_VERSION, image_size=args.image_size, shard_size=args.shard_size,
            vae=recorded_id(vae_id(args.vae)), vae_sha256=weights_sha256(vae),
            scaling_factor=vae.config.scaling_factor, latents=args.posterior, dtype=args.dtype,
            encoder=recorded_id(args.encoder) if encoder else None,
            encoder_sha256=weights_sha256(encoder) if encoder else None, L=L, V=V, precision=args.precision,
            flip=args.flip, seed=args.global_seed, classes=classes, images=len(paths),
            listing_sha256=listing_sha256(paths))
        agree("VAE and encoder", settings)
        writer = FeatureWriter(args.features_path, settings)
        incomplete = done_by_rank_0(state, writer.start)
    patch = DiT_models[args.model].patch_size
    if args.image_size // factor % patch:
        logger.warning(f"warning: latents of --image-size {args.image_size} are {args.image_size // factor} wide, not "
                       f"a multiple of {args.model}'s patch {patch}: it cannot be trained on them")
    num_shards = -(-len(paths) // args.shard_size)
    flips = flips_of(args.flip, len(paths), args.global_seed)                                # (images, k)
    views = Views(args.data_path, paths, flips, args.image_size, encoder.image_size if encoder else None)
    preview = Path(args.features_path) / "preview.png"
    if not incomplete:
        logger.info(f"{args.features_path} is complete; nothing to do")
        if state.is_main_process and not preview.exists():
            with parser.one_line_errors():
                save_preview(preview, args.features_path, views, paths, vae)
        state.destroy_process_group()
        return

    # ---------------------------------------------------------------------- what there is to do
    todo = from_rank_0([shard for shard in range(num_shards) if not writer.is_done(shard)])
    logger.info(f"{len(paths):,} images in {len(classes)} classes, {num_shards} shards, {len(todo)} to do, "
                f"{state.num_processes} processes on {state.device.type}, {args.precision}")
    batches = []                                             # a batch never crosses a shard
    for shard in todo[state.process_index::state.num_processes]:
        indices = range(shard * args.shard_size, min((shard + 1) * args.shard_size, len(paths)))
        batches += [list(indices[i:i + args.batch_size]) for i in range(0, len(indices), args.batch_size)]
    loader = DataLoader(views, batch_sampler=batches, collate_fn=collate, num_workers=args.num_workers, worker_init_fn=ignore_signals,
                        pin_memory=state.device.type == "cuda")
    to_compare = []                                          # code views, to say what a lower precision changes
    if encoder and args.precision != "fp32" and state.is_main_process:
        for batch in batches[:COMPARED_BATCHES]:
            indices, _, code_views, _ = collate([views[index] for index in batch])
            if indices is not None:
                to_compare.append((code_views, indices - batch[0]))
    if to_compare:                                           # in fp32 first: the networks are then cast in place
        full = Networks(vae, encoder, state.device, args.batch_size)
        exact = torch.cat([full.codes(*compared) for compared in to_compare])
    networks = Networks(vae, encoder, state.device, args.batch_size, args.precision, args.compile)
    if to_compare:
        changed = int((torch.cat([networks.codes(*compared) for compared in to_compare]) != exact).sum())
        logger.info(f"{args.precision} changes {changed:,} of {exact.numel():,} tokens ({changed / exact.numel():.2%}) "
                    f"of the first {len(exact)} images against fp32")

    # ---------------------------------------------------------------------- extraction, shard by shard
    latent_shape = (4, args.image_size // factor, args.image_size // factor)
    stored_shape = (8, *latent_shape[1:]) if args.posterior == "moments" else latent_shape
    empty = dict(features=np.zeros((0, *stored_shape), args.dtype), labels=labels[:0], path=np.zeros(0, "U1"))
    if encoder:
        empty["sem"] = np.zeros((0, L), code_dtype(V))

    def encode_batch(item):
        """A loaded batch as arrays, one a kind, of k rows per image; and the [path, error] of what is skipped."""
        batch, (indices, crops, code_views, unreadable) = item
        for index, error, broken in unreadable:
            if args.strict or not broken:
                raise OSError(f"cannot read {views.path(index)!r} ({error}): mend it"
                              f"{', or leave out --strict' if broken else ''}")
        skipped = [[paths[index], error] for index, error, _ in unreadable]
        if indices is None:
            return batch, empty, skipped
        copies, places = crops.shape[1], indices - batch[0]     # of an image that cannot be read, the place stays
        moments = networks.moments(crops, places)                                 # (n, k, 2, 4, S/8, S/8)
        mean, std = moments.unbind(2)
        latents = moments.flatten(2, 3) if args.posterior == "moments" else mean
        if args.posterior == "sample":
            there = torch.arange(batch[0], batch[-1] + 1, device=state.device)
            noise = torch.stack([normal(args.global_seed, Stream.POSTERIOR, there, latent_shape, copy)
                                 for copy in range(copies)], dim=1)
            latents = mean + std * torch.stack([noise[place] for place in places])
        names = np.array([paths[index] for index in indices.tolist()])
        rows = dict(features=as_stored(latents.flatten(0, 1).cpu().numpy(), args.dtype,
                                       lambda row: repr(str(names[row // copies])), NOT_FINITE),
                    labels=labels[indices.numpy()].repeat(copies), path=names.repeat(copies))
        if encoder:
            codes = networks.codes(code_views, places).cpu().numpy()
            if (codes < 0).any():
                name = str(names[(codes < 0).any(axis=1).argmax()])
                raise NotFinite(f"the encoder's logits of {name!r} are not finite numbers: {NOT_FINITE}")
            rows["sem"] = codes.astype(code_dtype(V)).repeat(copies, axis=0)
        return batch, rows, skipped

    def whole_shards(encoded):
        parts, skipped = [empty], []
        for batch, rows, unreadable in encoded:
            parts.append(rows)
            skipped += unreadable
            bar.update(len(batch))
            shard = batch[0] // args.shard_size
            if batch[-1] + 1 == min((shard + 1) * args.shard_size, len(paths)):      # the last of its shard
                yield shard, {kind: np.concatenate([part[kind] for part in parts]) for kind in empty}, skipped
                parts, skipped = [empty], []

    if args.compile and batches:        # before there are threads, of which only one may compile
        networks.moments(torch.zeros(1, flips.shape[1], args.image_size, args.image_size, 3, dtype=torch.uint8))
        if encoder:
            networks.codes(torch.zeros(1, encoder.image_size, encoder.image_size, 3, dtype=torch.uint8))
    start = time.time()
    bar = progress(total=sum(map(len, batches)), unit="img", disable=not state.is_main_process,
               desc="extracting" if state.num_processes == 1 else f"rank 0 of {state.num_processes}")
    with parser.kept_on_error("what is done is kept", "--batch-size", (OSError,)):
        try:
            with bar, networks.pool() as encoding, ThreadPoolExecutor(1) as writing:
                encoded = in_order(encoding, encode_batch, zip(batches, loader), networks.threads)
                for _ in in_order(writing, lambda shard: writer.write(*shard), whole_shards(encoded), 1):
                    pass
        except NotFinite as error:
            parser.error(f"{error}; what is done is kept, and other settings need another --features-path")
        rate = sum(map(len, batches)) / (time.time() - start)
        state.wait_for_everyone()
        manifest = writer.finish(num_shards) if state.is_main_process else None

    # ---------------------------------------------------------------------- preview
    if state.is_main_process:
        with parser.one_line_errors():                          # none of the images may have been read
            save_preview(preview, args.features_path, views, paths, vae)
        logger.info(f"done: {manifest['count']:,} rows of {len(paths):,} images in {num_shards} shards, "
                    f"{len(manifest['skipped'])} skipped "
                    f"{'(listed in manifest.json) ' if manifest['skipped'] else ''}at {args.features_path}; "
                    f"{rate:.2f} images/s a process; look at {preview}")
        if len(manifest["skipped"]) > 0.01 * len(paths):
            logger.warning(f"warning: {len(manifest['skipped']) / len(paths):.0%} of the images were skipped")
    state.destroy_process_group()


def save_preview(path, features_path, views, paths, vae, columns=8):
    """Eight crops, spread over the rows, over what the VAE makes of their stored latents."""
    features = Features(features_path)
    rows = np.unique(np.linspace(0, features.count - 1, columns).astype(int))
    index_of = {name: index for index, name in enumerate(paths)}
    copy = rows % views.flips.shape[1]
    crops = [views.crops(load_rgb(views.path(index_of[name])), index_of[name])[copy[i]]
             for i, name in enumerate(features.paths.gather(rows))]
    stored = features.latents.gather(rows)[:, :features.latent_shape[0]]                     # of moments, the mean
    with torch.inference_mode():
        decoded = to_uint8(decode(vae, torch.from_numpy(stored).to(vae.device, torch.float32))).cpu().numpy()
    blank = np.zeros((columns - len(rows), *decoded.shape[1:]), np.uint8)
    grid = image_grid(np.concatenate([np.stack(crops), blank, decoded]), columns)
    write_whole(path, lambda file: grid.save(file, "png"))


if __name__ == "__main__":
    main()
