"""The command behind both sampling scripts: flags, checks, drawing, and the .npz for FID.

Sample i's noise, and the code, label or vector it is drawn for, are functions of (global seed, i). A run that was
killed draws the batches that have a missing index, with every sample at the same position in its batch, and so ends
with the bytes of an uninterrupted run.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._pytree import tree_map

from diffusion.process_table import SAMPLER_OPTIONS
from diffusion.samplers import Sampler
from dlc.machine.cli import BAR, progress
from dlc.machine.files import check_apart
from dlc.machine.part import asked_part
from dlc.machine.processes import (
    agree,
    compile_blocks,
    create_logger,
    done_by_rank_0,
    same_kernels,
    set_numerics,
    start_processes,
    wait_for_all,
)
from dlc.sampling.conditions import Conditions, open_conditions
from dlc.sampling.latents import (
    CudaGraphs,
    Guide,
    check_conditions,
    fuse_gelu,
    guidance,
    lower_precision,
    sampling_steps,
)
from dlc.sampling.opening import folder_name, open_guide, open_model, open_sampler, open_vae
from dlc.sampling.pictures import GRID_PAIRS, Decoder, png_path, save_grid, save_strip
from dlc.sampling.samples_record import SampleFolder, SamplesRecord, guidance_of, this_launch, weights_of
from dlc.sampling.sampling_flags import sampling_parser, settle_guidance
from dlc.weights.load import describe
from models import DiT

if TYPE_CHECKING:
    from accelerate import PartialState

KEPT = "what is drawn is kept"


@dataclass
class Job:
    """A set of samples to draw: what the checks opened, and found out."""

    state: "PartialState"
    model: DiT
    sampler: Sampler
    guide: Guide | None
    conditions: Conditions
    vae: torch.nn.Module
    record: SamplesRecord
    folder: SampleFolder
    missing: np.ndarray  # indices of the images to draw, ascending
    said: list[str]  # lines for the log: what is drawn, and what could not be compared


def prepare(args: Namespace, script: str, default: str) -> Job:
    """Check everything that can be wrong, and take the folder. Raises ValueError or OSError for a user's mistake."""
    settle_guidance(args)
    part = asked_part(args.part)
    check_apart(args.sample_dir, "--sample-dir", [vars(args).get(name) for name in ("dlc_dir", "condition_path")])
    path, model, meta = open_model(args, script, default)
    sampler = open_sampler(args, model, meta)
    guide, known_of_guide, said_of_guide = open_guide(args, path, model, meta)
    conditions = open_conditions(args, model, meta)
    digest = conditions.digest(args.num_fid_samples)
    state = start_processes(precisions=[args.precision, args.vae_precision])
    if args.cuda_graphs and state.device.type != "cuda":
        raise ValueError("--cuda-graphs needs a GPU")
    vae, known_of_vae, notes = open_vae(args, meta, model, state)
    keys, options = SamplesRecord.keys(), dict.fromkeys(SAMPLER_OPTIONS) | sampler.options
    known = {name: value for name, value in vars(args).items() if name in keys}  # flags, of which some were settled
    known |= {option: value for option, value in options.items() if option in keys}
    known |= dict(
        weights_of(path, model, meta),
        **known_of_vae,
        conditions={**conditions.recorded, "sha256": digest},
        sampler=sampler.name,
        num_sampling_steps=sampler.num_steps,
        sampler_options={option: value for option, value in sampler.options.items() if option not in keys},
        guide=known_of_guide,
    )
    record = SamplesRecord(**known, runs=[])
    agree("checkpoint, codes and VAE", record)
    # All batches have one size, which parts do not change, and are cut by index.
    rounds = -(-args.num_fid_samples // (args.per_proc_batch_size * state.num_processes))
    batch = -(-args.num_fid_samples // (rounds * state.num_processes))
    folder = SampleFolder(Path(args.sample_dir) / folder_name(record, conditions), conditions, part, batch)
    missing = done_by_rank_0(state, lambda: folder.open(record, this_launch(state, args.per_proc_batch_size, part)))
    line = (
        f"{record.model} of {path} ({describe(meta)}); {conditions.said}; "
        f"{len(missing):,} of {record.num_fid_samples:,} images to draw, {record.sampler} "
        f"{record.num_sampling_steps} steps, {guidance_of(record.to_json())}, "
        f"on {state.num_processes} x {state.device.type}"
    )
    said = [line, *part.said("images"), *(f"note: {note}" for note in (*conditions.notes, *notes, *said_of_guide))]
    missing = np.array(missing, dtype=np.int64)
    return Job(state, model, sampler, guide, conditions, vae, record, folder, missing, said)


def draw_missing(job: Job, args: Namespace) -> Callable | None:
    """Denoise, decode and write this process's share of the missing images. Returns what draws their contact sheet."""
    state, folder, missing, count = job.state, job.folder, job.missing, job.record.num_fid_samples
    # Batches with a missing sample are drawn whole: the rounding of a sample then does not depend on which others are
    # missing, now or in a resumed run, and nothing is compiled twice.
    size, share = folder.batch, len(folder.part.share(range(count), folder.block))
    batches, firsts = np.unique(missing // size, return_index=True)
    parts = np.split(missing, firsts[1:])  # the indices to draw, by batch

    set_numerics(args.tf32)
    null = job.model.null_condition(1)
    models = [one for one in (job.model, job.guide and job.guide.model) if one is not None]
    for model in models:
        lower_precision(model, args.precision)
        model.to(state.device)
        if state.device.type == "cuda" and args.precision != "fp32":
            fuse_gelu(model)
        if args.compile if args.compile is not None else state.device.type == "cuda":
            compile_blocks(model, state.device, dynamic=False, options=same_kernels())
    decoder, sheet = Decoder(job.vae, folder.path, args.vae_precision), None
    if state.is_main_process and (len(missing) or not folder.is_finished(count) or not folder.grid.exists()):
        latents = job.conditions.latents(np.arange(min(GRID_PAIRS, count)), job.record.vae_sha256)
        asked = {} if latents is None else dict(enumerate(decoder.images(latents.to(state.device))))
        sheet = decoder.after_first = partial(save_grid, folder.grid, folder.path, count, job.conditions.words, asked)

    def draw(indices):
        y = job.conditions(indices)
        check_conditions(y, null)  # before they are on a GPU
        return sampling_steps(
            job.model,
            job.sampler,
            y=tree_map(lambda value: value.to(state.device), y),
            seed=job.record.global_seed,
            indices=torch.from_numpy(indices).to(state.device),
            guide=job.guide,
            **guidance(job.record),
        )

    if args.progressive and state.is_main_process and folder.part.index == 0:
        with torch.compiler.set_stance("force_eager"):  # one image: not worth compiling for
            seen = [x_start for _, x_start in draw(np.arange(1))]
            save_strip(folder.strip, args.progressive, seen, decoder)
    if args.cuda_graphs:
        for model in models:
            model.denoise = CudaGraphs(model.denoise)
    bar = progress(total=share, initial=share - len(missing), unit="img", desc="sampling", bar_format=BAR)
    with bar:
        for first in range(state.process_index, len(batches), state.num_processes):
            start = batches[first] * size
            images = sum(map(len, parts[first : first + state.num_processes]))  # the other ranks keep pace
            for latents, _ in draw(np.arange(start, start + size).clip(max=count - 1)):  # noqa: B007
                bar.update(images / job.sampler.num_steps)
            decoder(parts[first].tolist(), latents, (parts[first] - start).tolist())
        decoder.wait()
        bar.update(share - bar.n)  # what adding fractions left
    wait_for_all()
    return sheet


def sample(doc: str, script: str, model: str) -> None:
    """The whole of a sampling script.

    Args:
        doc: the script's docstring.
        script: its file name, by which CONDITIONINGS says what it draws for.
        model: the model to draw from where neither --model nor --ckpt is given.
    """
    parser = sampling_parser(doc, script, model)
    args = parser.parse_args()
    with parser.one_line_errors(KEPT, "--per-proc-batch-size"):
        with parser.one_line_errors("nothing was drawn; what was there is kept"):
            job = prepare(args, script, model)
        state, record, folder = job.state, job.record, job.folder
        logger = create_logger(state)
        for line in job.said:
            logger.info(line)
        if len(job.missing) or args.progressive:
            lower = "--batch-size of sample_prior.py, whose codes --dlc-dir takes in the place of --prior"
            with parser.one_line_errors(KEPT, lower):
                job.conditions.prepare(folder, state, this_launch(state, args.per_proc_batch_size, folder.part))
        sheet = draw_missing(job, args)
        if state.is_main_process:
            folder.finish(record.num_fid_samples, sheet)
        if folder.left_over:
            return logger.info(folder.part.said_left(folder.left_over, "images"))
        there = png_path(folder.path, 0).exists()
        where = f"{folder.path} and {folder.npz}" if there else f"{folder.npz}, whose PNGs were removed"
        step = "" if record.step is None else f", step {record.step:,}"
        drawn_for = f", for codes of {record.conditions['source']}," if "prior" in record.conditions else ""
        images = f"{record.num_fid_samples:,} images of {record.checkpoint}{step}{drawn_for}"
        logger.info(f"done: {images} in {where}; look at {folder.grid}")
        state.destroy_process_group()
