"""What a sampling script opens and checks before the work: the checkpoint, the sampler, the VAE, and what guides beside
the null condition: the weaker model of --guide-ckpt, or the model's own intermediate head (--internal-scale).

A guide is an earlier or a smaller model: it makes the errors of the model that it guides, but larger ones, so that a
step away from its prediction is a step away from these errors.
"""

import math
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffusion.process_table import OBJECTIVES, SAMPLER_OPTIONS, predicted_by
from diffusion.samplers import Sampler
from dlc.machine.files import recorded_id
from dlc.machine.records import differences
from dlc.nets.vae import pixels_per_cell, same_vae
from dlc.sampling.conditions import CONDITIONINGS, Conditions
from dlc.sampling.latents import Guide, create_sampler
from dlc.sampling.samples_record import SamplesRecord, short_digest, weights_of
from dlc.sampling.sampling_flags import RESULTS
from dlc.weights.hub import PUBLISHED, published_dit
from dlc.weights.load import load_model, newest_in, process_of, warn_of_young_ema
from dlc.weights.meta import SAME_LATENTS, NoCheckpoint, RunMeta, newest_checkpoint
from dlc.weights.networks import load_vae, vae_id, vae_label
from models import DiT, DiT_models

if TYPE_CHECKING:
    from accelerate import PartialState


def refuse_model(args: Namespace, script: str, wanted: str) -> None:
    """Raise ValueError where the script does not draw for a model's conditioning, or a flag is another's."""
    if CONDITIONINGS[wanted].script != script:
        here = " or ".join(name for name, one in CONDITIONINGS.items() if one.script == script)
        raise ValueError(
            f"--model {args.model} is not conditioned on {here}: draw from it with {CONDITIONINGS[wanted].script}"
        )
    for name, one in CONDITIONINGS.items():
        for flags, argument in one.flags.items():
            flag, *_ = flags.split()
            given = getattr(args, argument.get("dest", flag.strip("-").replace("-", "_")), None)
            if given is not None and flags not in CONDITIONINGS[wanted].flags:
                raise ValueError(f"{flag} is for models conditioned on {name}: {args.model} is conditioned on {wanted}")


def open_model(args: Namespace, script: str, default: str) -> tuple[Path, DiT, RunMeta]:
    """The checkpoint's path, its model in eval mode, and what is known of it; args.model becomes the model's name.

    script, default: as `sample` takes them. Raises ValueError if the checkpoint is not of --model, or of no model that
    the script draws from.
    """
    if args.ckpt and args.results_dir != RESULTS:
        raise ValueError("--results-dir is where a checkpoint is looked for, --ckpt names one: give one of them")
    args.model = args.model or (None if args.ckpt else default)
    if args.model:
        refuse_model(args, script, DiT_models[args.model].conditioning)
    path = find_checkpoint(args) if args.ckpt is None else newest_in(args.ckpt, ("config.json",))
    model, name, meta = load_model(
        path,
        args.ema,
        flag="--ckpt",
        diffusers_time=args.diffusers_time,
        process=OBJECTIVES.get(args.objective),
        input_size=args.image_size and args.image_size // 8,  # pixels per cell of DiT's VAEs
    )
    if args.model not in (None, name):
        raise ValueError(f"checkpoint {path} holds a {name}, not a {args.model}")
    args.model = name
    refuse_model(args, script, model.conditioning)
    warn_of_young_ema(path, meta)
    return Path(path), model, meta


def find_checkpoint(args: Namespace) -> Path | str:
    """The newest checkpoint of the run of --model under --results-dir; where there is none, its published weights."""
    try:
        return newest_checkpoint(args.results_dir, args.model, args.ema)
    except NoCheckpoint as error:
        which = args.model, args.image_size or 256
        if which not in PUBLISHED or args.results_dir != RESULTS or not args.ema:  # which are EMA weights
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{error}; without that, the published weights are used", flush=True)
        return published_dit(*which)


def open_sampler(args: Namespace, model: DiT, meta: RunMeta) -> Sampler:
    """The sampler that the flags ask for. Raises ValueError as `create_sampler` does, and for times of guidance that
    are not the process's; args.t_min, args.t_max and args.cfg_channels get numbers where no flag says them."""
    process, options = process_of(meta), {name: getattr(args, name) for name in SAMPLER_OPTIONS}
    sampler = create_sampler(args.sampler, args.num_sampling_steps, process, **options)
    args.t_min = 0 if args.t_min is None else args.t_min
    args.t_max = process.last_time if args.t_max is None else args.t_max
    own = model.guided_channels or model.in_channels
    args.cfg_channels = {None: own, "3": 3, "all": model.in_channels}[args.cfg_channels]
    for name in ("t_min", "t_max", "guide_t_min", "guide_t_max"):
        if (getattr(args, name) or 0) > process.last_time:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: {args.model} was trained on the process "
                f"{process.config['process']}, whose times are 0 to {process.last_time}"
            )
    if (args.progressive or 0) > sampler.num_steps:
        raise ValueError(f"--progressive {args.progressive}: there are {sampler.num_steps} steps to show")
    return sampler


def open_vae(
    args: Namespace, meta: RunMeta, model: DiT, state: "PartialState"
) -> tuple[torch.nn.Module, dict, list[str]]:
    """The VAE to decode with, its keys of samples.json, and notes on what could not be compared with the checkpoint;
    args.image_size becomes that of its images.

    Raises ValueError where it is not the VAE that made the checkpoint's latents. A --vae of the user's may have other
    weights, such as a decoder that was tuned further; channels, scale and shift have to be those of the latents.
    """
    name = args.vae or meta.vae or "ema"
    vae = load_vae(name, state.device)
    digest, notes = same_vae(vae, name, args.vae is not None, model.in_channels, vars(meta), "the checkpoint's latents")
    image_size = model.x_embedder.img_size[0] * pixels_per_cell(vae.config)
    if args.image_size not in (None, image_size):
        raise ValueError(f"--image-size {args.image_size}: the checkpoint was trained on {image_size}-pixel images")
    args.image_size = image_size
    return vae, dict(vae=recorded_id(vae_id(name)), vae_sha256=digest), [f"VAE {name}: {vae.said}", *notes]


def trained_for(model: DiT, meta: RunMeta) -> dict:
    """What a guide and its model must share, by key: latents, condition, process, VAE, encoder; None: not known."""
    table = dict(model.named_parameters()).get(model.table)
    return dict(
        conditioning=model.conditioning,
        latents=[model.in_channels, *model.x_embedder.img_size],
        process=predicted_by(process_of(meta).config),
        **({} if table is None else model.sizes_of(tuple(table.shape))),
        **{name: getattr(meta, name) for name in SAME_LATENTS},
    )


def open_guide(args: Namespace, path: Path, model: DiT, meta: RunMeta) -> tuple[Guide | None, dict | None, list[str]]:
    """The guide that the flags ask for, its object in samples.json, and notes on what could not be compared.

    Raises ValueError where it was not trained for the samples of the model, which path names.
    """
    low, high, scale = args.guide_t_min, args.guide_t_max, args.internal_scale or args.guide_scale
    if scale is None:
        return None, None, []
    guide = Guide(None, scale, -math.inf if low is None else low, math.inf if high is None else high)
    recorded, named = dict(scale=scale, t_min=low, t_max=high), args.guide_ckpt
    if not named:
        if model.intermediate_head is None:
            raise ValueError(
                f"--internal-scale {scale}: {path} has no intermediate head: train one with --intermediate-head K "
                "--train-only head"
            )
        return guide, dict(recorded, intermediate_head=model.intermediate_head), []
    weak, name, known = load_model(named, args.ema, flag="--guide-ckpt")
    warn_of_young_ema(named, known)
    here, there = trained_for(model, meta), trained_for(weak, known)
    unknown = [key for key in SAME_LATENTS if (here[key] is None) != (there[key] is None)]
    different = differences(there, {key: value for key, value in here.items() if key not in unknown})
    if different:
        raise ValueError(f"--guide-ckpt {named} was not trained for the samples of {path}: {different}")
    notes = [f"the guide's {key} could not be compared with the checkpoint's" for key in unknown]
    return replace(guide, model=weak), dict(recorded, model=name, **weights_of(named, weak, known)), notes


def folder_name(record: SamplesRecord, conditions: Conditions) -> str:
    """The name of the folder for a set of samples: what people look for, and a digest of everything that decides it."""
    checkpoint, guide = Path(record.checkpoint), f"-guide-{record.guide['scale']}" if record.guide else ""
    named = checkpoint.stem if checkpoint.is_file() else checkpoint.name
    if record.step is not None and named != f"{record.step:07d}":
        named += f"-{record.step:07d}"
    return (
        f"{record.model.replace('/', '-')}-{named}-size-{record.image_size}-vae-{vae_label(record.vae)}"
        f"-cfg-{record.cfg_scale}{guide}-seed-{record.global_seed}-{short_digest(record, conditions)}"
    )
