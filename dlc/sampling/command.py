"""The command that both sampling scripts are: flags, checks, drawing, and the .npz for FID.

Sample i is the same, but for rounding, whatever the number of processes and the batch size: its noise, and the code,
label or vector it is drawn for, are functions of (global seed, i). A run that was killed draws the batches that have a
missing index, with every sample at the same position in its batch, and so ends with the bytes of an uninterrupted run.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map

from diffusion.samplers import SAMPLERS
from dlc.machine.cli import ArgumentParser, progress
from dlc.machine.files import recorded_id
from dlc.machine.processes import (
    agree,
    autocast,
    compile_options,
    create_logger,
    done_by_rank_0,
    set_numerics,
    start_processes,
)
from dlc.nets.digest import weights_sha256
from dlc.nets.vae import pixels_per_cell, same_vae
from dlc.sampling.conditions import CONDITIONINGS
from dlc.sampling.decoder import Decoder, save_strip
from dlc.sampling.latents import CudaGraphs, create_sampler, lower_precision, sample_latents
from dlc.sampling.pictures import npz_rows, save_grid, write_npz
from dlc.sampling.sample_folder import SampleFolder
from dlc.sampling.samples_record import SamplesRecord, this_launch
from dlc.sampling.sampling_flags import RESULTS, sampling_parser
from dlc.weights.checkpoint import NoCheckpoint, newest_checkpoint
from dlc.weights.foreign.dits import PUBLISHED, published_dit
from dlc.weights.foreign.layouts import locate
from dlc.weights.hub import fetched_by_node, is_id
from dlc.weights.load import describe, load_model
from dlc.weights.networks import downsampling_factor, fetch_vae, load_vae, vae_id, vae_label
from models import DiT_models

#################################################################################
#                                    Checks                                     #
#################################################################################


@dataclass
class Job:
    """What the checks found out, and drawing needs."""

    state: object  # accelerate's PartialState
    checkpoint: Path
    model: torch.nn.Module
    sampler: object
    conditions: object  # see CONDITIONINGS
    vae: torch.nn.Module
    record: SamplesRecord
    folder: SampleFolder
    launch: dict  # see `this_launch`
    missing: np.ndarray  # indices of the images to draw, ascending
    notes: list[str]  # what could not be compared
    layout: str  # what the checkpoint was recognised as, in words

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.model.in_channels, *self.model.x_embedder.img_size


def refuse_model(args, script: str, wanted: str) -> None:
    """Raise ValueError where the script does not draw for a model's conditioning, or a flag is another's."""
    if CONDITIONINGS[wanted].script != script:
        here = " or ".join(name for name, one in CONDITIONINGS.items() if one.script == script)
        raise ValueError(
            f"--model {args.model} is not conditioned on {here}: draw from it with {CONDITIONINGS[wanted].script}"
        )
    for name, one in CONDITIONINGS.items():
        for flag in one.flags:
            if name != wanted and getattr(args, flag.strip("-").replace("-", "_"), None) is not None:
                raise ValueError(f"{flag} is for models conditioned on {name}: {args.model} is conditioned on {wanted}")


def open_model(args, script: str, default: str):
    """The checkpoint's path, its model in eval mode, and its RunMeta; args.model becomes the model's name.

    Raises ValueError where the checkpoint is not of --model, or the script does not draw from it.
    """
    if args.ckpt and args.results_dir != RESULTS:
        raise ValueError("--results-dir is where a checkpoint is looked for, --ckpt names one: give one of them")
    args.model = args.model or (None if args.ckpt else default)
    if args.model:
        refuse_model(args, script, DiT_models[args.model].conditioning)
    if is_id(args.ckpt or "."):  # fetched by one process of each node, before the others read it
        fetched_by_node(start_processes(), lambda ask: locate(args.ckpt, "--ckpt", ask))
    path = args.ckpt or find_checkpoint(args)
    model, name, meta = load_model(
        path,
        args.ema,
        diffusers_time=args.diffusers_time,
        input_size=args.image_size and args.image_size // downsampling_factor(args.vae or "ema"),
    )
    if args.model not in (None, name):
        raise ValueError(f"checkpoint {path} is of model {name}, not {args.model}")
    args.model = name
    refuse_model(args, script, model.conditioning)
    return Path(path), model, meta


def find_checkpoint(args) -> Path | str:
    """The newest checkpoint of --model under --results-dir; where there is none, its published weights."""
    try:
        return newest_checkpoint(args.results_dir, args.model, args.ema)
    except NoCheckpoint as error:
        which = args.model, args.image_size or 256
        if which not in PUBLISHED or args.results_dir != RESULTS or not args.ema:  # which are EMA weights
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{error}; without that, the published weights are used", flush=True)
        return published_dit(*which, lambda name: locate(name, "--ckpt"))


def open_vae(args, meta, channels, state):
    """The VAE to decode with, its name, its digest, and notes on what the checkpoint does not say of it.

    Raises ValueError where it is not the VAE that made the checkpoint's latents. A --vae of the user's may have other
    weights, such as a decoder that was tuned further; channels, scale and shift have to be those of the latents.
    """
    name = args.vae or meta.vae or "ema"
    fetched_by_node(state, lambda ask: fetch_vae(name, ask))
    vae = load_vae(name, state.device)
    digest, notes = same_vae(vae, name, args.vae is not None, channels, vars(meta), "the checkpoint's latents")
    return vae, name, digest, [f"VAE {name}: {vae.said}", *notes]


def guided_channels(flag: str | None, model) -> int:
    """How many latent channels --cfg-channels asks to guide."""
    if flag is None:
        return model.guided_channels or model.in_channels
    return 3 if flag == "3" else model.in_channels


def prepare(args, script: str, default: str) -> Job:
    """Check everything that can be wrong, and take the folder. Raises ValueError or OSError for a user's mistake."""
    if args.t_min > args.t_max:
        raise ValueError(f"--t-min {args.t_min} is above --t-max {args.t_max}: --cfg-scale 1 is no guidance")
    path, model, meta = open_model(args, script, default)
    sampler = create_sampler(
        args.sampler, args.num_sampling_steps, args.eta, learn_sigma=model.out_channels > model.in_channels
    )
    if (args.progressive or 0) > sampler.num_steps:
        raise ValueError(f"--progressive {args.progressive}: there are {sampler.num_steps} steps to show")
    conditions = CONDITIONINGS[model.conditioning].open(args, model, meta)
    state = start_processes()
    if args.cuda_graphs and state.device.type != "cuda":
        raise ValueError("--cuda-graphs needs a GPU")
    vae, vae_name, vae_digest, notes = open_vae(args, meta, model.in_channels, state)
    image_size = model.x_embedder.img_size[0] * pixels_per_cell(vae.config)
    if args.image_size not in (None, image_size):
        raise ValueError(f"--image-size {args.image_size}: checkpoint {path} is of {image_size}-pixel images")
    record = SamplesRecord(
        model=args.model,
        checkpoint=recorded_id(str(path)),
        weights_sha256=weights_sha256(model),
        step=meta.step,
        weights=meta.weights,
        conditions={**conditions.recorded, "sha256": conditions.digest(args.num_fid_samples)},
        image_size=image_size,
        vae=recorded_id(vae_id(vae_name)),
        vae_sha256=vae_digest,
        vae_precision=args.vae_precision,
        sampler=args.sampler,
        num_sampling_steps=sampler.num_steps,
        eta=(args.eta or 0.0) if SAMPLERS[args.sampler].has_eta else None,
        cfg_scale=args.cfg_scale,
        cfg_channels=guided_channels(args.cfg_channels, model),
        t_min=args.t_min,
        t_max=args.t_max,
        precision=args.precision,
        tf32=args.tf32,
        global_seed=args.global_seed,
        num_fid_samples=args.num_fid_samples,
        runs=[],
    )
    agree("checkpoint, codes and VAE", record)
    ckpt = path.stem if path.is_file() else path.name
    folder = SampleFolder(
        Path(args.sample_dir)
        / (
            f"{args.model.replace('/', '-')}-{ckpt}-size-{image_size}-vae-{vae_label(vae_name)}-cfg-{args.cfg_scale}"
            f"-seed-{args.global_seed}"
        ),
        conditions,
    )
    launch = this_launch(state, args.per_proc_batch_size)
    missing = done_by_rank_0(state, lambda: folder.open(record, launch))
    return Job(
        state,
        path,
        model,
        sampler,
        conditions,
        vae,
        record,
        folder,
        launch,
        np.array(missing, dtype=np.int64),
        [*conditions.notes, *notes],
        describe(meta),
    )


#################################################################################
#                                    Drawing                                    #
#################################################################################


def draw_batch(job: Job, indices: np.ndarray, denoise, on_step) -> torch.Tensor:
    """The latents (N, C, h, w) of these samples."""
    device, record = job.state.device, job.record
    with autocast(device, record.precision):
        return sample_latents(
            job.model,
            job.sampler,
            y=tree_map(lambda value: value.to(device), job.conditions(indices)),
            seed=record.global_seed,
            indices=torch.from_numpy(indices).to(device),
            latent_shape=job.latent_shape,
            cfg_scale=record.cfg_scale,
            t_min=record.t_min,
            t_max=record.t_max,
            channels=record.cfg_channels,
            denoise=denoise,
            on_step=on_step,
        )


def draw_missing(job: Job, args) -> None:
    """Denoise, decode and write this process's share of the missing images."""
    state, folder, missing, count = job.state, job.folder, job.missing, job.record.num_fid_samples
    # All batches have one size and are cut by index, and those with a missing sample are drawn whole: the rounding of a
    # sample then does not depend on which others are missing, now or in a resumed run, and nothing is compiled twice.
    rounds = -(-count // (args.per_proc_batch_size * state.num_processes))
    size = -(-count // (rounds * state.num_processes))
    batches, firsts = np.unique(missing // size, return_index=True)
    parts = np.split(missing, firsts[1:])  # the indices to draw, by batch

    set_numerics(args.tf32)
    lower_precision(job.model, args.precision)
    job.model.to(state.device)
    if args.compile if args.compile is not None else state.device.type == "cuda":
        for block in job.model.blocks:
            block.compile(dynamic=False, **compile_options(state.device))
    denoise = CudaGraphs(job.model.denoise) if args.cuda_graphs else job.model.denoise
    decoder = Decoder(
        job.vae,
        folder.path,
        args.vae_precision,
        partial(save_grid, folder.grid, folder.path, count) if state.is_main_process else None,
    )
    if args.progressive and state.is_main_process:
        with torch.compiler.set_stance("force_eager"):  # one image: not worth compiling for
            save_strip(
                folder.strip,
                args.progressive,
                job.sampler.num_steps,
                partial(draw_batch, job, np.arange(1), job.model.denoise),
                decoder,
            )
    with progress(
        total=count,
        initial=count - len(missing),
        unit="img",
        desc="sampling",
        disable=not state.is_main_process,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:
        for first in range(state.process_index, len(batches), state.num_processes):
            start = batches[first] * size
            images = sum(map(len, parts[first : first + state.num_processes]))  # the other ranks keep pace
            latents = draw_batch(
                job,
                np.arange(start, start + size).clip(max=count - 1),
                denoise,
                lambda *_, share=images / job.sampler.num_steps: bar.update(share),
            )
            decoder(parts[first].tolist(), latents, (parts[first] - start).tolist())
        decoder.wait()
        bar.update(count - bar.n)  # what adding fractions left


def finish(job: Job) -> None:
    """Write the .npz and the contact sheet of all images; for rank 0, once all processes are done."""
    folder, count = job.folder, job.record.num_fid_samples
    if npz_rows(folder.npz) != count:
        write_npz(folder.npz, folder.path, count, progress=True)
    save_grid(folder.grid, folder.path, count)
    folder.lock.release()


def sample(doc: str, script: str, model: str) -> None:
    """The whole of a sampling script.

    Args:
        doc: the script's docstring.
        script: its file name, by which CONDITIONINGS says what it draws for.
        model: the model to draw from where neither --model nor --ckpt is given.
    """
    parser = sampling_parser(doc, script, model)
    args = parser.parse_args()
    with parser.kept_on_error("what is drawn is kept", "--per-proc-batch-size", ()):
        run(parser, args, script, model)


def run(parser: ArgumentParser, args, script: str, default: str) -> None:
    """Check, draw and finish."""
    with parser.one_line_errors():
        job = prepare(args, script, default)
    state, record, folder = job.state, job.record, job.folder
    logger = create_logger(state)
    logger.info(
        f"{record.model} of {job.checkpoint} ({job.layout}); {job.conditions.describe()}; "
        f"{len(job.missing):,} of {record.num_fid_samples:,} images to draw, {record.sampler} "
        f"{record.num_sampling_steps} steps, cfg {record.cfg_scale}, on {state.num_processes} x {state.device.type}"
    )
    for note in job.notes:
        logger.info(f"note: {note}")
    if len(job.missing) or args.progressive:
        lower = "--batch-size of sample_prior.py, whose codes --dlc-dir takes in the place of --prior"
        with parser.kept_on_error("what is drawn is kept", lower):
            job.conditions.prepare(folder.codes, state, job.launch)
    with parser.kept_on_error("what is drawn is kept", "--per-proc-batch-size"):
        draw_missing(job, args)
    try:
        state.wait_for_everyone()
    except RuntimeError:
        parser.error("another process failed, see its message; what is drawn is kept: run the same command again")
    if state.is_main_process:
        with parser.kept_on_error("what is drawn is kept", "--num-fid-samples"):
            finish(job)
        logger.info(f"done: {record.num_fid_samples:,} images in {folder.path} and {folder.npz}; look at {folder.grid}")
    state.destroy_process_group()
