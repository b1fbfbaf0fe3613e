"""What guides beside the null condition: the weaker model of --guide-ckpt, whose training is compared with that of the
model, or the model's own intermediate head (--internal-scale).

A guide is an earlier or a smaller model: it makes the errors of the model that it guides, but larger ones, so that a
step away from its prediction is a step away from these errors.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from diffusion.process_table import predicted_by
from dlc.machine.cli import number, whole_or_float
from dlc.machine.files import recorded_id
from dlc.machine.records import differences
from dlc.nets.digest import weights_sha256
from dlc.sampling.latents import Guide
from dlc.weights.load import load_model, process_of, warn_of_young_ema
from dlc.weights.meta import SAME_LATENTS, RunMeta
from models import DiT

CFG_SCALE = 1.5  # the default of --cfg-scale
TIME = number(whole_or_float, 0)  # the argparse type of a time of the process


def add_guide_flags(add: Callable) -> None:
    """Add --guide-ckpt and what goes with it."""
    add(
        "--guide-ckpt",
        metavar="CKPT",
        help="guide by this weaker model instead of the null condition (autoguidance): an earlier checkpoint or a "
        "smaller model for the same latents and conditions, as --ckpt takes it [none]",
    )
    add("--guide-scale", type=number(float, 1), help="set the guidance scale of --guide-ckpt; 1 disables it [none]")
    add(
        "--internal-scale",
        type=number(float, 1),
        help="guide by the model's own intermediate head (--intermediate-head in training) with this scale, in one "
        "pass; 1 disables it; --cfg-scale acts after it [none]",
    )
    add(
        "--guide-t-min",
        type=TIME,
        help="guide by --guide-ckpt or --internal-scale from this diffusion time on [the first]",
    )
    add(
        "--guide-t-max",
        type=TIME,
        help="guide by --guide-ckpt or --internal-scale up to this diffusion time [the last]",
    )


def settle_guidance(args: Namespace) -> None:
    """Give --cfg-scale its default. Raises ValueError for flags of guidance that do not go together."""
    if args.guide_ckpt and (args.cfg_scale or 1) > 1:
        raise ValueError("--guide-ckpt guides in the place of --cfg-scale: give one of them")
    for flag in ("t_min", "t_max", "cfg_channels"):
        if args.guide_ckpt and getattr(args, flag) is not None:
            other = "it guides all channels" if flag == "cfg_channels" else f"give --guide-{flag.replace('_', '-')}"
            raise ValueError(f"--{flag.replace('_', '-')} belongs to --cfg-scale, not to --guide-ckpt: {other}")
    if args.guide_ckpt and args.guide_scale is None:
        raise ValueError("--guide-ckpt names a model to guide by: say how strongly with --guide-scale, such as 1.5")
    if args.guide_scale is not None and not args.guide_ckpt:
        raise ValueError("--guide-scale goes with --guide-ckpt, which names the model to guide by")
    if args.internal_scale is not None and args.guide_ckpt:
        raise ValueError("--guide-ckpt guides in the place of --internal-scale: give one of them")
    for flag in ("guide_t_min", "guide_t_max"):
        if getattr(args, flag) is not None and not args.guide_ckpt and args.internal_scale is None:
            raise ValueError(f"--{flag.replace('_', '-')} goes with --guide-ckpt or --internal-scale")
    low, high = args.guide_t_min, args.guide_t_max
    if low is not None and high is not None and low > high:
        raise ValueError(f"--guide-t-min {low} is above --guide-t-max {high}: scale 1 turns guidance off")
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if args.guide_ckpt else CFG_SCALE


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
    if args.internal_scale is not None and model.intermediate_head is None:
        raise ValueError(
            f"--internal-scale {args.internal_scale}: {path} has no intermediate head: train one with "
            "--intermediate-head K --train-only head"
        )
    low, high, scale = args.guide_t_min, args.guide_t_max, args.internal_scale or args.guide_scale
    acts = scale, -math.inf if low is None else low, math.inf if high is None else high
    recorded = dict(scale=scale, t_min=low, t_max=high)
    if not args.guide_ckpt:
        head = dict(recorded, intermediate_head=model.intermediate_head)
        return (None, None, []) if scale is None else (Guide(None, *acts), head, [])
    named = args.guide_ckpt
    weak, name, known = load_model(named, args.ema, flag="--guide-ckpt")
    warn_of_young_ema(named, known)
    here, there = trained_for(model, meta), trained_for(weak, known)
    unknown = [key for key in SAME_LATENTS if (here[key] is None) != (there[key] is None)]
    different = differences(there, {key: value for key, value in here.items() if key not in unknown})
    if different:
        raise ValueError(f"--guide-ckpt {named} was not trained for the samples of {path}: {different}")
    recorded = dict(
        checkpoint=recorded_id(str(named)),
        model=name,
        weights_sha256=weights_sha256(weak),
        step=known.step,
        weights=known.weights,
        **recorded,
    )
    notes = [f"the guide's {key} could not be compared with the checkpoint's" for key in unknown]
    return Guide(weak, *acts), recorded, notes
