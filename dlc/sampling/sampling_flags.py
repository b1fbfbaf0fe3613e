"""The flags of both sampling scripts."""

from argparse import Namespace
from collections.abc import Callable

from diffusion.process_table import LATENT_SAMPLERS, OBJECTIVES, PROCESSES, SAMPLER_OPTIONS
from dlc.machine.cli import SEED, ArgumentParser, add_option, excludes, needs, number, whole_or_float
from dlc.machine.part import add_part_flag
from dlc.machine.processes import PRECISIONS, add_speed_flags
from dlc.sampling.conditions import CONDITIONINGS
from dlc.weights.foreign.dits import DIFFUSERS_TIMES
from dlc.weights.networks import VAE_HELP
from models import DiT_models

RESULTS, CFG_SCALE = "results", 1.5  # the defaults of --results-dir and --cfg-scale
TIME = number(whole_or_float, 0)  # the argparse type of a time of the process
STEPS = number(int, 1, 1000)


def of_objectives(words: Callable) -> str:
    """Words for each sampler, words(name, spec), under the objective that it goes with."""
    rows = [PROCESSES[process] for process in OBJECTIVES.values()]
    return "; ".join(
        f"for {row.objective}, " + "; ".join(words(name, spec) for name, spec in row.samplers.items()) for row in rows
    )


def _add_guidance(add: Callable) -> None:
    scale, text = number(float, 1), "guide by --guide-ckpt or --internal-scale"
    add("--cfg-scale", type=scale, help=f"set the scale of guidance; 1 disables it [{CFG_SCALE}, with --guide-ckpt 1]")
    add("--cfg-channels", choices=["3", "all"], help="guide these latent channels [3 for DiT, all for the others]")
    add("--t-min", type=TIME, help="guide from this time on; ddpm has times 0 to 999, flow 0 to 1 [0]")
    add("--t-max", type=TIME, help="guide up to this time; no unconditional pass is computed beyond it [the last]")
    add(
        "--guide-ckpt",
        metavar="CKPT",
        help="guide by this weaker model instead of the null condition (autoguidance): an earlier checkpoint or a "
        "smaller model for the same latents and conditions, as --ckpt takes it [none]",
    )
    add("--guide-scale", type=scale, help="set the guidance scale of --guide-ckpt; 1 disables it [none]")
    add(
        "--internal-scale",
        type=scale,
        help="guide by the model's own intermediate head (--intermediate-head in training) with this scale, in one "
        "pass; 1 disables it; --cfg-scale acts after it [none]",
    )
    add("--guide-t-min", type=TIME, help=f"{text} from this diffusion time on [the first]")
    add("--guide-t-max", type=TIME, help=f"{text} up to this diffusion time [the last]")


def sampling_parser(doc: str, script: str, model: str) -> ArgumentParser:
    """The flags of a sampling script, those of the conditionings that it draws for included."""
    parser = ArgumentParser(doc)
    add, count = parser.add_argument, number(int, 1)
    add("--model", choices=DiT_models, metavar="MODEL", help=f"draw from this model [that of --ckpt, else {model}]")
    add(
        "--ckpt",
        help="draw from these weights, in any layout of docs/weights.md: a file, a folder or a hub id [the newest of "
        "the model's run under --results-dir; if there is none, for DiT-XL/2, the published weights]",
    )
    add("--results-dir", default=RESULTS, help="look for the run of the model here")
    add("--no-ema", dest="ema", action="store_false", help="use the raw weights instead of the EMA weights")
    add(
        "--diffusers-time",
        choices=DIFFUSERS_TIMES,
        help="with weights in diffusers' layout: compute DiT's function, for weights converted from DiT, or "
        "diffusers', for weights trained in diffusers [what the folder says, else dit]",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        help="if others' weights do not say it: assume they were trained on this [ddpm]",
    )
    kinds = [kind.flags for kind in CONDITIONINGS.values() if kind.script == script]
    for flag, argument in {flag: one for flags in kinds for flag, one in flags.items()}.items():
        add(*flag.split(), **argument)
    add("--sample-dir", default="samples", help="write the folder of PNGs and the .npz here")
    add("--num-fid-samples", type=count, default=50000, help="draw this many images")
    add_part_flag(add, "batches of images")
    add("--per-proc-batch-size", type=count, default=32, help="draw at most this many images at once per process")
    about = of_objectives(lambda name, spec: f"{name}: {spec.about}")
    add("--sampler", choices=LATENT_SAMPLERS, help=f"{about} [the first for the checkpoint's objective]")
    steps = of_objectives(lambda name, spec: f"{name}: {spec.default_steps}")
    add("--num-sampling-steps", type=STEPS, help=f"take this many sampling steps, up to 1000 [{steps}]")
    for name, uses in SAMPLER_OPTIONS.items():
        add_option(add, name, uses, "with --sampler {}: ")
    _add_guidance(add)
    add("--image-size", type=count, help="check that the images have this size, pixels [the checkpoint's]")
    add("--vae", help=f"{VAE_HELP} [that of the checkpoint's features, or ema]")
    add("--precision", choices=PRECISIONS, default="fp32", help="set the precision of the denoising steps")
    add("--vae-precision", choices=PRECISIONS, default="fp32", help="set the precision of the VAE's decoder")
    add_speed_flags(add)
    add(
        "--cuda-graphs",
        action="store_true",
        help="launch a step's kernels as one: for small models and batches on GPUs",
    )
    add(
        "--progressive",
        type=number(int, 2),
        metavar="K",
        help="save a strip of K pictures of sample 0 on its way [none]",
    )
    add("--global-seed", type=SEED, default=0, help="seed the noise, the labels and the order of rows")
    return parser


def settle_guidance(args: Namespace) -> None:
    """Give --cfg-scale its default. Raises ValueError for flags of guidance that do not go together."""
    needs(args, "guide_scale", "guide_ckpt")
    needs(args, "guide_ckpt", "guide_scale", *([] if args.internal_scale else ["guide_t_min", "guide_t_max"]))
    excludes(args, "guide_ckpt", "internal_scale", "t_min", "t_max", "cfg_channels")
    if args.guide_ckpt and (args.cfg_scale or 1) > 1:
        raise ValueError("--guide-ckpt guides in the place of --cfg-scale: give one of them")
    for kind, low, high in (("t", args.t_min, args.t_max), ("guide-t", args.guide_t_min, args.guide_t_max)):
        if None not in (low, high) and low > high:
            raise ValueError(f"--{kind}-min {low} is above --{kind}-max {high}: scale 1 turns guidance off")
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if args.guide_ckpt else CFG_SCALE
