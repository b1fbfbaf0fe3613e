"""Turn a folder of images into VAE latents and discrete latent codes on disk.

    torchrun --nnodes=1 --nproc_per_node=N extract_features_withdlc.py --model DiT-XL/2 \\
        --data-path /path/to/imagenet/train --features-path /path/to/store/features

In: DATA/{class}/*.jpg (torchvision's ImageFolder), a VAE, a SEM encoder. Out: FEATURES/, the contract of
dlc/features.py, and FEATURES/preview.png: eight crops over their VAE reconstructions. The same command run again
continues; what it writes does not depend on the number of processes.
"""
import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from dlc.latents import (IMAGENET_MEAN, IMAGENET_STD, center_crop, decode, downsampling_factor, encode, image_grid,
                         load_rgb, load_vae, to_tensor, to_uint8, vae_id)
from dlc.checkpoints import weights_sha256
from dlc.encoder import DEFAULT_BACKBONE, load_encoder
from dlc.features import FORMAT_VERSION, Features, FeatureWriter, recorded_id
from dlc.noise import Stream, integers, normal
from dlc.runtime import (SEED, ArgumentParser, agree, create_logger, default_num_workers, from_rank_0, number,
                         start_processes)
from models import DiT_models

DEFAULT_ENCODER = "pretrained/dlc_encoder.pth"


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data-path", required=True, help="folder with one folder of images a class")
    add("--features-path", "--feature-path", default="features", help="where the features go [%(default)s]")
    add("--model", default="DiTSEM-XL/2", choices=DiT_models, metavar="MODEL",
        help="the model to train on them: warns where its patch does not divide the latents [%(default)s]")
    add("--image-size", type=number(int, 1), default=256, help="height and width of the crop, pixels [%(default)s]")
    add("--vae", default="ema", help="ema, mse, a local directory or a hub id [%(default)s]")
    add("--encoder", default=DEFAULT_ENCODER, help="SEM encoder: directory or reference checkpoint; none: latents and "
                                                   "labels only [%(default)s]")
    add("--encoder-backbone", help=f"timm model of a reference checkpoint [{DEFAULT_BACKBONE}]")
    add("--L", type=number(int, 1), help="code positions of a reference checkpoint [512]")
    add("--V", type=number(int, 2, 65536), help="tokens a position of a reference checkpoint [256]")
    add("--flip", choices=["random", "none"], default="random", help="horizontal flips of the VAE's view [%(default)s]")
    add("--dtype", choices=["float16", "float32"], default="float16", help="of the stored latents [%(default)s]")
    add("--batch-size", type=number(int, 1), default=32, help="images a process encodes at once [%(default)s]")
    add("--shard-size", type=number(int, 1), default=1024, help="dataset indices a shard covers [%(default)s]")
    add("--num-workers", type=number(int, 0), default=default_num_workers(),
        help="image readers a process [%(default)s here]")
    add("--global-seed", type=SEED, default=0, help="of flips and posterior draws [%(default)s]")
    return parser, parser.parse_args()


class Views(Dataset):
    """Both views of each image: the VAE's crop, flipped where `flips` says so, and the encoder's, never flipped."""

    def __init__(self, paths, flips, image_size, code_size):
        self.paths, self.flips, self.image_size, self.code_size = paths, flips, image_size, code_size

    def crop(self, index):
        """The VAE's view (a PIL image), and the whole image."""
        image = load_rgb(self.paths[index])
        crop = center_crop(image, self.image_size)
        return ImageOps.mirror(crop) if self.flips[index] else crop, image

    def __getitem__(self, index):
        try:
            crop, image = self.crop(index)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:     # what Pillow raises
            return index, None, None, f"{type(error).__name__}: {error}"
        code_view = None
        if self.code_size:
            code_view = to_tensor(center_crop(image, self.code_size), IMAGENET_MEAN, IMAGENET_STD)
        return index, to_tensor(crop), code_view, None


def collate(items):
    """Indices, VAE views, encoder views (None without an encoder) of the readable; (index, reason) of the others."""
    good = [item for item in items if item[3] is None]
    skipped = [(item[0], item[3]) for item in items if item[3] is not None]
    if not good:
        return None, None, None, skipped
    indices, crops, code_views, _ = zip(*good)
    return (torch.tensor(indices), torch.stack(crops), torch.stack(code_views) if code_views[0] is not None else None,
            skipped)


def list_images(data_path):
    """ImageFolder's classes, paths and labels. Raises ValueError where there is nothing to extract."""
    root = Path(data_path)
    if not root.is_dir():
        raise ValueError(f"--data-path {data_path} is not a folder")
    if not any(path.is_dir() for path in root.iterdir()):
        raise ValueError(f"--data-path {data_path} has no class folders: images go into one folder a class")
    folder = ImageFolder(root, allow_empty=True)
    if not folder.samples:
        raise ValueError(f"--data-path {data_path} has class folders but no images in them")
    paths, labels = zip(*folder.samples)
    return folder.classes, list(paths), np.array(labels, dtype=np.int64)


def main():
    parser, args = parse_args()

    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors():
        classes, paths, labels = list_images(args.data_path)
        relative = [str(Path(path).relative_to(args.data_path)) for path in paths]
        factor = downsampling_factor(args.vae)
        if args.image_size % factor:
            raise ValueError(f"--image-size {args.image_size} is not a multiple of {factor}, the VAE's factor")
        if args.encoder == DEFAULT_ENCODER and not Path(args.encoder).exists():
            raise ValueError(f"no SEM encoder at {args.encoder}: put the DLC authors' teacher checkpoint there, or "
                             "name one with --encoder (--encoder none: latents and labels only)")

    # ---------------------------------------------------------------------- models and writer
    with parser.one_line_errors():
        state = start_processes()
        vae = load_vae(args.vae, state.device)
        encoder = None
        if args.encoder != "none":
            encoder = load_encoder(args.encoder, backbone=args.encoder_backbone, L=args.L, V=args.V).to(state.device)
        L, V = (encoder.L, encoder.V) if encoder else (None, None)
        settings = dict(
            format_version=FORMAT_VERSION, image_size=args.image_size, shard_size=args.shard_size,
            vae=recorded_id(vae_id(args.vae)), vae_sha256=weights_sha256(vae),
            scaling_factor=vae.config.scaling_factor, latents="sample", dtype=args.dtype,
            encoder=recorded_id(args.encoder) if encoder else None,
            encoder_sha256=weights_sha256(encoder) if encoder else None, L=L, V=V,
            flip=args.flip, seed=args.global_seed, classes=classes, images=len(paths),
            listing_sha256=hashlib.sha256("\n".join(relative).encode("utf-8", "surrogateescape")).hexdigest())
        agree("images, VAE and encoder", settings)
        writer = FeatureWriter(args.features_path, settings)
        complete = from_rank_0(writer.is_complete)
        if state.is_main_process and not complete:
            writer.start()
    logger = create_logger(state)
    patch = DiT_models[args.model].keywords["patch_size"]
    if args.image_size // factor % patch:
        logger.warning(f"warning: latents of --image-size {args.image_size} are {args.image_size // factor} wide, not "
                       f"a multiple of {args.model}'s patch {patch}: it cannot be trained on them")
    if complete:
        logger.info(f"{args.features_path} is complete; nothing to do")
        state.destroy_process_group()
        return

    # ---------------------------------------------------------------------- extraction, shard by shard
    num_shards = -(-len(paths) // args.shard_size)
    flips = (integers(args.global_seed, Stream.FLIP, torch.arange(len(paths)), 2).numpy() if args.flip == "random"
             else np.zeros(len(paths), np.int64))
    views = Views(paths, flips, args.image_size, encoder.image_size if encoder else None)
    todo = from_rank_0([shard for shard in range(num_shards) if not writer.record_path(shard).is_file()])
    logger.info(f"{len(paths):,} images in {len(classes)} classes, {num_shards} shards, {len(todo)} to do, "
                f"{state.num_processes} processes on {state.device.type}")
    batches = []                                             # a batch never crosses a shard
    for shard in todo[state.process_index::state.num_processes]:
        indices = range(shard * args.shard_size, min((shard + 1) * args.shard_size, len(paths)))
        batches += [list(indices[i:i + args.batch_size]) for i in range(0, len(indices), args.batch_size)]
    loader = DataLoader(views, batch_sampler=batches, collate_fn=collate, num_workers=args.num_workers,
                        pin_memory=state.device.type == "cuda")
    code_dtype = np.uint8 if V and V <= 256 else np.uint16
    latent_side = args.image_size // factor
    start, done = time.time(), 0
    empty = dict(features=np.zeros((0, 4, latent_side, latent_side), args.dtype), labels=labels[:0],
                 path=np.zeros(0, "U1"))
    if encoder:
        empty["sem"] = np.zeros((0, L), code_dtype)
    parts, skipped = [empty], []
    bar = tqdm(total=sum(map(len, batches)), unit="img", disable=not state.is_main_process,
               desc="extracting" if state.num_processes == 1 else f"rank 0 of {state.num_processes}")
    for batch, (indices, crops, code_views, unreadable) in zip(batches, loader):
        skipped += [[relative[index], reason] for index, reason in unreadable]
        if indices is not None:
            with torch.inference_mode():
                noise = normal(args.global_seed, Stream.POSTERIOR, indices.to(state.device),
                               (4, latent_side, latent_side))
                latents = encode(vae, crops.to(state.device, non_blocking=True), noise)      # (n, 4, S/8, S/8)
                part = dict(features=latents.cpu().numpy().astype(args.dtype))
                if encoder:
                    codes = encoder.codes(code_views.to(state.device, non_blocking=True))    # (n, L)
                    part["sem"] = codes.cpu().numpy().astype(code_dtype)
            part["labels"] = labels[indices.numpy()]
            part["path"] = np.array([relative[index] for index in indices.tolist()])
            parts.append(part)
            done += len(indices)
        shard = batch[0] // args.shard_size
        if batch[-1] + 1 == min((shard + 1) * args.shard_size, len(paths)):      # the last of its shard
            writer.write(shard, {kind: np.concatenate([part[kind] for part in parts]) for kind in empty}, skipped)
            parts, skipped = [empty], []
        bar.update(len(batch))
    bar.close()
    rate = done / (time.time() - start)

    # ---------------------------------------------------------------------- manifest and preview
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = writer.finish(num_shards)
        look = ""
        if manifest["count"]:
            preview = Path(args.features_path) / "preview.png"
            save_preview(preview, Features(args.features_path), views, relative, vae)
            look = f"; look at {preview}"
        logger.info(f"done: {manifest['count']:,} images in {num_shards} shards, {len(manifest['skipped'])} skipped "
                    f"{'(listed in manifest.json) ' if manifest['skipped'] else ''}at {args.features_path}; "
                    f"{rate:.1f} images/s a process{look}")
    state.destroy_process_group()


def save_preview(path, features, views, relative, vae, columns=8):
    """Eight crops, spread over the rows, over what the VAE makes of their stored latents."""
    rows = np.unique(np.linspace(0, features.count - 1, columns).astype(int))
    index_of = {name: index for index, name in enumerate(relative)}
    crops = [np.array(views.crop(index_of[name])[0]) for name in features.paths.gather(rows)]
    latents = torch.from_numpy(features.latents.gather(rows)).to(vae.device, torch.float32)
    with torch.inference_mode():
        decoded = to_uint8(decode(vae, latents)).cpu().numpy()
    blank = np.zeros((columns - len(rows), *decoded.shape[1:]), np.uint8)
    image_grid(np.concatenate([np.stack(crops), blank, decoded]), columns).save(path)


if __name__ == "__main__":
    main()
