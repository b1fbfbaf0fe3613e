"""The engine of both samplers: noise keyed by sample index, guidance, decoding, PNGs, and the .npz for FID.

Sample i is the same whatever the number of processes and the batch size: its noise, and the code or label it is drawn
for, are functions of (global seed, i). A run that was killed draws the missing indices only.
"""
import argparse
import hashlib
import os
import platform
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffusion import create_diffusion
from dlc.checkpoints import load_weights, model_from_weights, newest_checkpoint, weights_sha256
from dlc.features import (Features, Stack, differences, file_order, load_array, read_json, recorded_id, write_json,
                          write_whole)
from dlc.latents import decode, image_grid, load_vae, to_uint8, vae_id, vae_label
from dlc.noise import Stream, integers, normal, permutation
from dlc.runtime import (PRECISIONS, SEED, ArgumentParser, agree, autocast, create_logger, from_rank_0, number,
                         start_processes, versions)
from models import DiT_models

GRID_IMAGES, GRID_COLUMNS = 64, 8


def argument_parser(doc, model):
    """The flags that both samplers have."""
    parser = ArgumentParser(doc)
    add = parser.add_argument
    add("--model", default=model, choices=DiT_models, metavar="MODEL",
        help="name in DiT_models; must be the checkpoint's [%(default)s]")
    add("--ckpt", help="checkpoint directory, .pt or .safetensors [the model's newest under --results-dir]")
    add("--results-dir", default="results", help="where to look for it [%(default)s]")
    add("--no-ema", dest="ema", action="store_false", help="the raw weights in place of the EMA weights")
    add("--sample-dir", default="samples", help="where the folder of PNGs and the .npz go [%(default)s]")
    add("--num-fid-samples", type=number(int, 1), default=50000, help="images to draw [%(default)s]")
    add("--per-proc-batch-size", type=number(int, 1), default=32, help="images a process draws at once [%(default)s]")
    add("--num-sampling-steps", type=number(int, 1, 1000), default=250, help="DDPM steps of the 1000 [%(default)s]")
    add("--cfg-scale", type=number(float, 1), default=1.5, help="classifier-free guidance, 1: none [%(default)s]")
    add("--cfg-channels", choices=["3", "all"], help="latent channels it covers [3 for DiT, all for the others]")
    add("--t-max", type=number(int, 0, 999), default=999,
        help="guide only at diffusion times up to this, 0 to 999 [%(default)s]")
    add("--image-size", type=number(int, 1), help="pixels; must be the checkpoint's [the checkpoint's]")
    add("--vae", help="ema, mse, a local directory or a hub id [that of the checkpoint's features, or ema]")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the denoising steps [%(default)s]")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 products on GPUs [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks [on GPUs]")
    add("--global-seed", type=SEED, default=0, help="of noise, labels and the order of codes [%(default)s]")
    return parser


@torch.inference_mode()
def sample_latents(model, diffusion, y, seed, indices, latent_shape, cfg_scale=1.0, t_max=999, channels=None):
    """Draw latents (N, *latent_shape) for conditions y by ancestral sampling.

    Args:
        model: a DiT, DiTSEM or DiTCONT in eval mode.
        y: N conditions, on the model's device.
        seed, indices: each sample's noise is a function of (seed, its index); indices is (N,) int64 on the same device.
        cfg_scale: guidance; at 1 and beyond t_max the null half is not computed at all.
        channels: see DiT.forward_with_cfg.
    """
    n = len(indices)
    guided_y = torch.cat([y, model.null_condition(n).to(y.dtype)])

    def guided(x, t):
        return model.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), guided_y, cfg_scale, channels=channels)[:n]

    def conditional(x, t):
        return model(x, t, y)

    x = normal(seed, Stream.SAMPLE_NOISE, indices, latent_shape, draw=0)        # the same for any number of steps
    for step in reversed(range(diffusion.num_timesteps)):
        predict = guided if cfg_scale != 1 and diffusion.timestep_map[step] <= t_max else conditional
        x = diffusion.p_sample(
            predict, x, torch.full((n,), step, device=x.device), clip_denoised=False,
            randn_like=lambda _: normal(seed, Stream.SAMPLE_NOISE, indices, latent_shape, draw=step + 1))["sample"]
    return x


#################################################################################
#                           What each sample is drawn for                       #
#################################################################################

class ComputedCodes:
    """Codes out of a file or folder: sample i gets row order(i), cycling where there are more samples than rows.

    Args:
        source: a features directory, a folder of `.npy` files (n, L), or one such file.
        order: "random", a permutation of all rows keyed by the seed, or "sequential".

    Raises ValueError where the source has no codes, or not such as the model was trained on.
    """
    name = "code_rows"

    def __init__(self, source, model, meta, order, seed):
        path = Path(source)
        self.source, self.order_name = recorded_id(str(source)), order
        self.V = model.sem_embedder.V
        if path.is_file():
            self.codes = Stack([path], sample_ndim=1)
        elif not path.is_dir():
            raise ValueError(f"code source {source} does not exist")
        elif any(path.glob("*.npy")):
            files = sorted(path.glob("*.npy"), key=file_order)
            lone = load_array(files[0]).shape[:-1] in ((), (1,))
            self.codes = Stack(files, sample_ndim=1, lone=lone)
        else:
            features = Features(path)
            self.codes = features.codes
            if self.codes is None:
                raise ValueError(f"features {source} hold no codes")
            if features.manifest is not None and features.V != self.V:
                raise ValueError(f"codes of {source} have V={features.V}, the checkpoint's model V={self.V}")
            encoders = [one.get("encoder_sha256") for one in (features.manifest or {}, meta)]
            if None not in encoders and len(set(encoders)) > 1:
                raise ValueError(f"codes of {source} come from another encoder than those the model was trained on")
        if not len(self.codes):
            raise ValueError(f"code source {source} has no rows")
        L = self.codes.array(0).shape[1]
        if L != model.sem_embedder.L:
            raise ValueError(f"codes of {source} have L={L}, the checkpoint's model L={model.sem_embedder.L}")
        self.order = (permutation(seed, Stream.SAMPLE_ORDER, 0, len(self.codes)) if order == "random"
                      else np.arange(len(self.codes)))

    def describe(self):
        """The source, and a digest of its first codes that tells whether it is still what it was."""
        digest = hashlib.sha256(self(np.arange(64)).numpy()).hexdigest()[:16]
        return f"codes of {self.source} in {self.order_name} order, the first 64 of sha256 {digest}"

    def values(self, indices):
        """The row of each sample."""
        return self.order[indices % len(self.order)]

    def __call__(self, indices):
        """Codes (N, L) of the samples. Raises ValueError, naming file and row, for a value outside 0..V-1."""
        return torch.from_numpy(self.codes.gather(self.values(indices), limit=self.V).astype(np.int64))


class RandomLabels:
    """A uniformly random class for each sample."""
    name = "labels"

    def __init__(self, model, seed):
        self.num_classes, self.seed = model.y_embedder.num_classes, seed

    def describe(self):
        return f"random labels of {self.num_classes} classes"

    def values(self, indices):
        return self(indices).numpy()

    def __call__(self, indices):
        return integers(self.seed, Stream.SAMPLE_LABEL, torch.from_numpy(indices), self.num_classes)


#################################################################################
#                                     Files                                     #
#################################################################################

def png_path(folder, index):
    return folder / f"{index:06d}.png"


def save_png(path, image):
    write_whole(path, lambda file: Image.fromarray(image).save(file, format="png"))


def read_png(path):
    return np.array(Image.open(path))


def missing_indices(folder, count):
    there = {entry.name for entry in os.scandir(folder) if entry.stat().st_size}
    return [index for index in range(count) if png_path(folder, index).name not in there]


def write_npz(path, folder, count, progress=False):
    """Stream PNGs 0..count-1 into path as arr_0 (count, S, S, 3) uint8, a few images in memory at a time."""
    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, \
                archive.open("arr_0.npy", "w", force_zip64=True) as array, ThreadPoolExecutor() as pool:
            shape = (count, *read_png(png_path(folder, 0)).shape)
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint8))
            np.lib.format.write_array_header_1_0(array, {**header, "shape": shape})
            for start in tqdm(range(0, count, 256), desc="writing .npz", unit="x256", disable=not progress):
                paths = [png_path(folder, index) for index in range(start, min(start + 256, count))]
                for name, image in zip(paths, pool.map(read_png, paths)):
                    if image.shape != shape[1:] or image.dtype != np.uint8:
                        raise ValueError(f"{name} has shape {image.shape}, wanted {shape[1:]}")
                    array.write(image.tobytes())
    write_whole(path, write)


def npz_rows(path):
    """How many images path holds, read off its header alone; 0 where it is missing or broken."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            return np.lib.format.read_array_header_1_0(array)[0][0]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return 0


class Decoder:
    """Latents to PNG files, behind the denoising of the next batch: copies and PNG work run in other threads."""

    def __init__(self, vae, folder):
        self.vae, self.folder = vae, folder
        self.pool = ThreadPoolExecutor()
        self.pending = []

    def __call__(self, indices, latents):
        with torch.inference_mode():
            images = to_uint8(decode(self.vae, latents)).to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if latents.is_cuda else None
        if copied:
            copied.record()
        self.wait()                                     # at most one batch behind
        self.pending = [self.pool.submit(self._save, index, image, copied) for index, image in zip(indices, images)]

    def _save(self, index, image, copied):
        if copied:
            copied.synchronize()
        save_png(png_path(self.folder, index), image.numpy())

    def wait(self):
        for future in self.pending:
            future.result()
        self.pending = []


#################################################################################
#                                     Run                                       #
#################################################################################

def run(parser, args, open_conditions):
    """Draw args.num_fid_samples images into a folder of PNGs and one .npz.

    open_conditions(args, model, meta) gives the conditions: ComputedCodes or RandomLabels.
    """
    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors():
        path = Path(args.ckpt) if args.ckpt else newest_checkpoint(args.results_dir, args.model)
        weights, meta = load_weights(path, args.ema)
        model, name = model_from_weights(weights, path)
        del weights                                     # as large as the model
        if name != args.model:
            raise ValueError(f"checkpoint {path} is of model {name}, not {args.model}")
        conditions = open_conditions(args, model, meta)
        for start in range(0, args.num_fid_samples, 4096):      # every code is read and checked before work starts
            conditions(np.arange(start, min(start + 4096, args.num_fid_samples)))
        state = start_processes()
        device = state.device
        vae_name = args.vae or meta.get("vae") or "ema"
        vae = load_vae(vae_name, device)
        vae_sha256 = weights_sha256(vae)
        if args.vae is None and meta.get("vae_sha256") not in (None, vae_sha256):
            raise ValueError(f"the VAE at {vae_name} is not the one that the checkpoint's features were made with; "
                             "name one with --vae")
        if (meta.get("scaling_factor") or vae.config.scaling_factor) != vae.config.scaling_factor:
            raise ValueError(f"--vae {vae_name} has scaling factor {vae.config.scaling_factor}, the checkpoint's "
                             f"latents {meta['scaling_factor']}")
        latent_size = model.x_embedder.img_size[0]
        image_size = latent_size * 2 ** (len(vae.config.block_out_channels) - 1)
        if args.image_size not in (None, image_size):
            raise ValueError(f"--image-size {args.image_size}: checkpoint {path} is of {image_size}-pixel images")
        ckpt = path.name if path.is_dir() else path.stem
        folder = Path(args.sample_dir) / (f"{name.replace('/', '-')}-{ckpt}-size-{image_size}-vae-"
                                          f"{vae_label(vae_name)}-cfg-{args.cfg_scale}-seed-{args.global_seed}")
        settings = dict(
            model=name, checkpoint=recorded_id(str(path)), weights_sha256=weights_sha256(model), step=meta.get("step"),
            weights="ema" if args.ema else "raw", conditions=conditions.describe(), image_size=image_size,
            vae=recorded_id(vae_id(vae_name)), vae_sha256=vae_sha256, sampler="ddpm",
            num_sampling_steps=args.num_sampling_steps, cfg_scale=args.cfg_scale, cfg_channels=args.cfg_channels,
            t_max=args.t_max, precision=args.precision, tf32=args.tf32, global_seed=args.global_seed)
        agree("checkpoint, codes and VAE", settings)
        record = folder / "samples.json"
        if record.is_file():
            different = differences(read_json(record), settings)
            if different:
                raise ValueError(f"{folder} holds samples made with other settings: {different}; give another "
                                 "--sample-dir")
            drawn = read_json(record)["num_fid_samples"]
            if drawn > args.num_fid_samples:
                raise ValueError(f"{folder} is a set of {drawn:,} samples, and its .npz would shrink to "
                                 f"--num-fid-samples {args.num_fid_samples}: give another --sample-dir")
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------------- what is missing
    logger = create_logger(state)
    npz = folder.with_name(folder.name + ".npz")
    if state.is_main_process:
        everyone = np.arange(args.num_fid_samples)
        write_json(record, dict(
            settings, num_fid_samples=args.num_fid_samples, command=sys.argv, processes=state.num_processes,
            device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            versions=versions(), **{conditions.name: conditions.values(everyone).tolist()}))
    missing = from_rank_0(missing_indices(folder, args.num_fid_samples) if state.is_main_process else None)
    logger.info(f"{name}, step {meta.get('step', 'unknown')}, {settings['weights']} weights of {path}; "
                f"{settings['conditions']}; {len(missing):,} of {args.num_fid_samples:,} images to draw, "
                f"{args.num_sampling_steps} steps, cfg {args.cfg_scale}, on {state.num_processes} x {device.type}")

    # ---------------------------------------------------------------------- denoise, decode, write
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    model.to(device)
    if args.compile if args.compile is not None else device.type == "cuda":
        for block in model.blocks:
            block.compile()
    diffusion = create_diffusion(str(args.num_sampling_steps))
    channels = {None: None, "3": 3, "all": model.in_channels}[args.cfg_channels]
    latent_shape = (model.in_channels, latent_size, latent_size)
    decoder = Decoder(vae, folder)
    size = args.per_proc_batch_size
    batches = [missing[i:i + size] for i in range(0, len(missing), size)]
    with tqdm(total=len(missing), unit="img", desc="sampling", disable=not state.is_main_process) as bar:
        for first in range(state.process_index, len(batches), state.num_processes):
            indices = np.array(batches[first])
            with autocast(device, args.precision):
                latents = sample_latents(
                    model, diffusion, conditions(indices).to(device), args.global_seed,
                    torch.from_numpy(indices).to(device), latent_shape, args.cfg_scale, args.t_max, channels)
            decoder(indices.tolist(), latents)
            bar.update(sum(map(len, batches[first:first + state.num_processes])))     # the other ranks keep pace
        decoder.wait()
    state.wait_for_everyone()

    # ---------------------------------------------------------------------- .npz and contact sheet
    if state.is_main_process:
        if missing or npz_rows(npz) != args.num_fid_samples:
            write_npz(npz, folder, args.num_fid_samples, progress=True)
        first = [read_png(png_path(folder, index)) for index in range(min(GRID_IMAGES, args.num_fid_samples))]
        image_grid(np.stack(first), GRID_COLUMNS).save(folder.with_name(folder.name + ".grid.png"))
        logger.info(f"done: {args.num_fid_samples:,} images in {folder} and {npz}; look at {folder}.grid.png")
    state.destroy_process_group()
