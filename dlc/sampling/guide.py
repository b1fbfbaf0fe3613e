"""The weaker model of --guide-ckpt: its flags, and whether it was trained for the same samples.

A guide is an earlier or a smaller model: its errors are those of the model that it guides, and larger, so that a step
away from its prediction is a step away from these errors.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from dlc.machine.cli import number, whole_or_float
from dlc.machine.files import recorded_id
from dlc.machine.processes import start_processes
from dlc.machine.records import differences
from dlc.nets.digest import weights_sha256
from dlc.sampling.latents import Guide
from dlc.weights.hub import is_id
from dlc.weights.load import load_model, process_of, warn_of_young_ema
from dlc.weights.meta import RunMeta
from models import DiT

CFG_SCALE = 1.5  # the default of --cfg-scale
TIME = number(whole_or_float, 0)  # the argparse type of a time of the process
# keys of meta.json that two models of the same samples share
SHARED = "image_size vae_sha256 scaling_factor shift_factor latents_mean latents_std encoder_sha256".split()


def add_guide_flags(add: Callable) -> None:
    """Add --guide-ckpt and what goes with it."""
    add(
        "--guide-ckpt",
        metavar="CKPT",
        help="guide by this weaker model in the place of the null condition (autoguidance): an earlier checkpoint or a "
        "smaller model for the same latents and conditions, as --ckpt takes it [none]",
    )
    add("--guide-scale", type=number(float, 1), help="guidance scale of --guide-ckpt; 1 disables it [none]")
    add("--guide-t-min", type=TIME, help="guide by --guide-ckpt from this diffusion time on [from the first]")
    add("--guide-t-max", type=TIME, help="guide by --guide-ckpt up to this diffusion time [to the last]")


def settle_guidance(args: Namespace) -> None:
    """Give --cfg-scale its default. Raises ValueError for flags of guidance that do not go together."""
    if args.guide_ckpt and (args.cfg_scale or 1) > 1:
        raise ValueError("--guide-ckpt guides in the place of --cfg-scale: give one of them")
    if args.guide_ckpt and args.guide_scale is None:
        raise ValueError("--guide-ckpt names a model to guide by: say how strongly with --guide-scale, such as 1.5")
    for flag in ("guide_scale", "guide_t_min", "guide_t_max"):
        if getattr(args, flag) is not None and not args.guide_ckpt:
            raise ValueError(f"--{flag.replace('_', '-')} goes with --guide-ckpt, which names the model to guide by")
    low, high = args.guide_t_min, args.guide_t_max
    if low is not None and high is not None and low > high:
        raise ValueError(f"--guide-t-min {low} is above --guide-t-max {high}: --guide-scale 1 is no guidance")
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if args.guide_ckpt else CFG_SCALE


def trained_for(model: DiT, meta: RunMeta) -> dict:
    """What a guide and its model must share, by key: latents, condition, process, VAE, encoder; None: not known."""
    table = dict(model.named_parameters()).get(model.table)
    return dict(
        conditioning=model.conditioning,
        latents=[model.in_channels, *model.x_embedder.img_size],
        process=process_of(meta).config,
        **({} if table is None else model.sizes_of(tuple(table.shape))),
        **{name: getattr(meta, name) for name in SHARED},
    )


def open_guide(args: Namespace, path: Path, model: DiT, meta: RunMeta) -> tuple[Guide | None, dict | None, list[str]]:
    """The guide that the flags ask for, its object in samples.json, and notes on what could not be compared.

    Raises ValueError where it was not trained for the samples of the model, which path names.
    """
    if not args.guide_ckpt:
        return None, None, []
    named = args.guide_ckpt
    state = start_processes() if is_id(named) else None
    weak, name, known = load_model(named, args.ema, flag="--guide-ckpt", state=state)
    warn_of_young_ema(named, known)
    here, there = trained_for(model, meta), trained_for(weak, known)
    unknown = [key for key in SHARED if (here[key] is None) != (there[key] is None)]
    different = differences(there, {key: value for key, value in here.items() if key not in unknown})
    if different:
        raise ValueError(f"--guide-ckpt {named} was not trained for the samples of {path}: {different}")
    low, high = args.guide_t_min, args.guide_t_max
    recorded = dict(
        checkpoint=recorded_id(str(named)),
        model=name,
        weights_sha256=weights_sha256(weak),
        step=known.step,
        weights=known.weights,
        scale=args.guide_scale,
        t_min=low,
        t_max=high,
    )
    guide = Guide(weak, args.guide_scale, -math.inf if low is None else low, math.inf if high is None else high)
    notes = [f"the guide's {key} could not be compared with the checkpoint's" for key in unknown]
    return guide, recorded, notes
