"""The engine of both samplers: noise keyed by sample index, guidance, decoding, PNGs, and the .npz for FID.

Sample i is the same, but for rounding, whatever the number of processes and the batch size: its noise, and the code or
label it is drawn for, are functions of (global seed, i). A run that was killed draws the batches that have a missing
index, at the same places in them, so that it ends with the bytes of one that was left alone.

    python -m dlc.sampling check FILE.npz [--grid]      # what is in it, and whether anything is wrong with it
"""
import argparse
import datetime
import platform
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dlc.checkpoints.run import newest_checkpoint
from dlc.checkpoints.weights import load_weights, model_from_weights, weights_sha256
from dlc.cli import SEED, ArgumentParser, number, progress
from dlc.disk import DirectoryLock, differences, read_json, recorded_id, remove_temporaries, write_json
from dlc.runtime import (
    PRECISIONS,
    agree,
    autocast,
    create_logger,
    done_by_rank_0,
    set_numerics,
    start_processes,
    versions,
)
from dlc.sampling.conditions import conditions_sha256
from dlc.sampling.decoder import Decoder, save_strip
from dlc.sampling.files import missing_indices, npz_rows, save_grid, write_npz
from dlc.sampling.latents import DEFAULT_STEPS, CudaGraphs, create_sampler, lower_precision, sample_latents
from dlc.vae import check_decodes, load_vae, pixels_per_cell, vae_id, vae_label
from models import DiT_models

NAMES_ONLY = ("checkpoint", "weights", "vae")      # settings that say where weights lay, not what they were


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
    add("--per-proc-batch-size", type=number(int, 1), default=32,
        help="images a process draws at once, at most [%(default)s]")
    add("--sampler", choices=DEFAULT_STEPS, default="ddpm",
        help="DDPM's ancestral steps, DDIM, or DPM-Solver++ of second order [%(default)s]")
    add("--num-sampling-steps", type=number(int, 2, 1000),
        help=f"steps of the 1000 [{', '.join(f'{name}: {steps}' for name, steps in DEFAULT_STEPS.items())}]")
    add("--eta", type=number(float, 0, 1), help="noise of --sampler ddim, 0: none, 1: as DDPM's [0]")
    add("--cfg-scale", type=number(float, 1), default=1.5, help="classifier-free guidance, 1: none [%(default)s]")
    add("--cfg-channels", choices=["3", "all"], help="latent channels it covers [3 for DiT, all for the others]")
    add("--t-min", type=number(int, 0, 999), default=0, help="guide from this diffusion time, 0 to 999 [%(default)s]")
    add("--t-max", type=number(int, 0, 999), default=999, help="to this; outside, the null half is not computed "
                                                               "[%(default)s]")
    add("--image-size", type=number(int, 1), help="pixels; must be the checkpoint's [the checkpoint's]")
    add("--vae", help="ema, mse, a local directory or a hub id [that of the checkpoint's features, or ema]")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the denoising steps [%(default)s]")
    add("--vae-precision", choices=PRECISIONS, default="fp32", help="of the VAE's decoder [%(default)s]")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 products on GPUs [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks [on GPUs]")
    add("--cuda-graphs", action="store_true",
        help="record a step's kernels and launch them as one: for small models and batches on GPUs [no]")
    add("--progressive", type=number(int, 2), metavar="K",
        help="save a strip of K pictures of how sample 0 is denoised [none]")
    add("--global-seed", type=SEED, default=0, help="of noise, labels and the order of codes [%(default)s]")
    return parser


def run(parser, args, open_conditions):
    """Draw args.num_fid_samples images into a folder of PNGs and one .npz.

    open_conditions(args, model, meta) gives the conditions: ComputedCodes or ClassLabels.
    """
    # ---------------------------------------------------------------------- checks
    count = args.num_fid_samples
    with parser.one_line_errors():
        if args.t_min > args.t_max:
            raise ValueError(f"--t-min {args.t_min} is above --t-max {args.t_max}: --cfg-scale 1 is no guidance")
        path = Path(args.ckpt) if args.ckpt else newest_checkpoint(args.results_dir, args.model, args.ema)
        weights, meta = load_weights(path, args.ema)
        model, name = model_from_weights(weights, path)
        del weights                                     # as large as the model
        if name != args.model:
            raise ValueError(f"checkpoint {path} is of model {name}, not {args.model}")
        sampler = create_sampler(args.sampler, args.num_sampling_steps, args.eta,
                                 learn_sigma=model.out_channels > model.in_channels)
        if (args.progressive or 0) > len(sampler.times):
            raise ValueError(f"--progressive {args.progressive}: there are {len(sampler.times)} steps to show")
        conditions = open_conditions(args, model, meta)
        digest = conditions_sha256(conditions, count)
        state = start_processes()
        device = state.device
        if args.cuda_graphs and device.type != "cuda":
            raise ValueError("--cuda-graphs needs a GPU")
        vae_name = args.vae or meta.vae or "ema"
        vae = load_vae(vae_name, device)
        vae_sha256 = weights_sha256(vae)
        if args.vae is None and meta.vae_sha256 not in (None, vae_sha256):
            raise ValueError(f"the VAE at {vae_name} is not the one that the checkpoint's features were made with; "
                             "name one with --vae")
        check_decodes(vae, vae_name, model.in_channels, vars(meta), "the checkpoint's latents")
        latent_size = model.x_embedder.img_size[0]
        image_size = latent_size * pixels_per_cell(vae)
        if args.image_size not in (None, image_size):
            raise ValueError(f"--image-size {args.image_size}: checkpoint {path} is of {image_size}-pixel images")
        channels = {None: model.guided_channels, "3": 3, "all": None}[args.cfg_channels] or model.in_channels
        ckpt = path.name if path.is_dir() else path.stem
        folder = Path(args.sample_dir) / (f"{name.replace('/', '-')}-{ckpt}-size-{image_size}-vae-"
                                          f"{vae_label(vae_name)}-cfg-{args.cfg_scale}-seed-{args.global_seed}")
        settings = dict(
            model=name, checkpoint=recorded_id(str(path)), weights_sha256=weights_sha256(model), step=meta.step,
            weights=meta.weights, conditions=conditions.describe(), image_size=image_size,
            vae=recorded_id(vae_id(vae_name)), vae_sha256=vae_sha256, vae_precision=args.vae_precision,
            sampler=args.sampler, num_sampling_steps=len(sampler.times), eta=sampler.eta, cfg_scale=args.cfg_scale,
            cfg_channels=channels, t_min=args.t_min, t_max=args.t_max, precision=args.precision, tf32=args.tf32,
            global_seed=args.global_seed)
        agree("checkpoint, codes and VAE", (settings, digest))
        npz, grid, strip = (folder.with_name(folder.name + end) for end in (".npz", ".grid.png", ".progressive.png"))
        lock = DirectoryLock(folder)
        this_run = dict(
            command=sys.argv, date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            processes=state.num_processes, per_proc_batch_size=args.per_proc_batch_size,
            device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            versions=versions())
        missing = done_by_rank_0(
            state, lambda: open_folder(folder, lock, npz, settings, conditions, count, digest, this_run))
    logger = create_logger(state)
    logger.info(f"{name}, step {'unknown' if meta.step is None else meta.step}, {settings['weights']} weights of {path}; "
                f"{settings['conditions']}; {len(missing):,} of {count:,} images to draw, {args.sampler} "
                f"{len(sampler.times)} steps, cfg {args.cfg_scale}, on {state.num_processes} x {device.type}")

    # ---------------------------------------------------------------------- denoise, decode, write
    set_numerics(args.tf32)
    # Batches of one size, cut by index, of which those with a missing sample are drawn, whole: a sample's rounding does
    # not depend on which others are missing, now or in a run that goes on, and nothing is compiled twice.
    rounds = -(-count // (args.per_proc_batch_size * state.num_processes))
    size = -(-count // (rounds * state.num_processes))
    missing = np.array(missing, dtype=np.int64)
    batches = np.unique(missing // size)

    def draw(indices, denoise, on_step):
        with autocast(device, args.precision):
            return sample_latents(
                model, sampler, conditions(indices).to(device), args.global_seed, torch.from_numpy(indices).to(device),
                (model.in_channels, latent_size, latent_size), args.cfg_scale, args.t_min, args.t_max, channels,
                denoise, on_step)

    with parser.kept_on_error("what is drawn is kept", "--per-proc-batch-size"):
        lower_precision(model, args.precision)
        model.to(device)
        if args.compile if args.compile is not None else device.type == "cuda":
            for block in model.blocks:
                block.compile(dynamic=False)
        denoise = CudaGraphs(model.denoise) if args.cuda_graphs else model.denoise
        decoder = Decoder(vae, folder, args.vae_precision,
                          partial(save_grid, grid, folder, count) if state.is_main_process else None)
        if args.progressive and state.is_main_process:
            with torch.compiler.set_stance("force_eager"):          # one image: not worth compiling for
                save_strip(strip, args.progressive, sampler, partial(draw, np.arange(1), model.denoise), decoder)
        with progress(total=count, initial=count - len(missing), unit="img", desc="sampling",
                  disable=not state.is_main_process, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} "
                  "[{elapsed}<{remaining}, {rate_fmt}]") as bar:
            for first in range(state.process_index, len(batches), state.num_processes):
                start = batches[first] * size
                indices = missing[missing // size == batches[first]]
                # the other ranks keep pace
                images = np.isin(missing // size, batches[first:first + state.num_processes]).sum()
                latents = draw(np.arange(start, start + size).clip(max=count - 1), denoise,
                               lambda *_: bar.update(images / len(sampler.times)))
                decoder(indices.tolist(), latents, torch.from_numpy(indices - start))
            decoder.wait()
            bar.update(count - bar.n)                               # what adding fractions left
    try:
        state.wait_for_everyone()
    except RuntimeError:
        parser.error("another process ended early, and said why; what is drawn is kept: run the same command again")

    # ---------------------------------------------------------------------- .npz and contact sheet
    if state.is_main_process:
        with parser.kept_on_error("what is drawn is kept", "--num-fid-samples"):
            if npz_rows(npz) != count:
                write_npz(npz, folder, count, progress=True)
            save_grid(grid, folder, count)
        lock.release()
        logger.info(f"done: {count:,} images in {folder} and {npz}; look at {grid}")
    state.destroy_process_group()


def open_folder(folder, lock, npz, settings, conditions, count, digest, this_run):
    """Take a folder for samples 0..count-1, and note in its samples.json what is about to draw the missing ones.

    Returns the missing indices. Raises ValueError where another launch has the folder, and where what lies there is of
    other settings or conditions (digest: their conditions_sha256), or more than count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    try:
        earlier = compare_with_earlier(folder, settings, conditions, count, digest)
    except ValueError:
        lock.release()
        raise
    remove_temporaries(folder)
    remove_temporaries(folder.parent, folder.name + ".")
    missing = missing_indices(folder, count)
    if missing or not earlier:
        npz.unlink(missing_ok=True)                     # of fewer images, or of some that are no more
        write_json(folder / "samples.json", dict(
            settings, num_fid_samples=count, conditions_sha256=digest,
            runs=[*earlier.get("runs", []), dict(this_run, images=len(missing))],
            **{conditions.name: conditions.values(np.arange(count)).tolist()}))
    return missing


def compare_with_earlier(folder, settings, conditions, count, digest):
    """What samples.json says of the images that lie in folder already, {} where there are none.

    Raises ValueError where they are not of these settings and conditions, or are more than count.
    """
    if not (folder / "samples.json").is_file():
        if any(folder.glob("*.png")):
            raise ValueError(f"{folder} holds images but no samples.json to say what they are; give another "
                             "--sample-dir")
        return {}
    earlier = read_json(folder / "samples.json")
    drawn = earlier.get("num_fid_samples", 0)
    different = differences(earlier, {key: value for key, value in settings.items() if key not in NAMES_ONLY})
    if not different and drawn <= count:
        there = digest if drawn == count else conditions_sha256(conditions, drawn)
        different = differences(earlier, dict(conditions_sha256=there))
    if different:
        raise ValueError(f"{folder} holds samples made with other settings: {different}; give another --sample-dir")
    if drawn > count:
        raise ValueError(f"{folder} is a set of {drawn:,} samples, and its .npz would shrink to --num-fid-samples "
                         f"{count}: give another --sample-dir")
    return earlier
