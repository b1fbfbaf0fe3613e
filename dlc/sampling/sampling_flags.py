"""The flags of both sampling scripts."""

from collections.abc import Callable

from diffusion.process_table import LATENT_SAMPLERS, OBJECTIVES, PROCESSES, SAMPLER_OPTIONS
from dlc.machine.cli import SEED, ArgumentParser, add_option, number
from dlc.machine.part import add_part_flag
from dlc.machine.processes import PRECISIONS, add_speed_flags
from dlc.sampling.conditions import CONDITIONINGS
from dlc.sampling.guide import CFG_SCALE, TIME, add_guide_flags
from dlc.weights.foreign.dits import DIFFUSERS_TIMES
from dlc.weights.networks import VAE_HELP
from models import DiT_models

RESULTS = "results"  # the default of --results-dir
STEPS = number(int, 1, 1000)


def of_objectives(words: Callable) -> str:
    """Words for each sampler, words(name, spec), under the objective that it goes with."""
    rows = [PROCESSES[process] for process in OBJECTIVES.values()]
    return "; ".join(
        f"for {row.objective}, " + "; ".join(words(name, spec) for name, spec in row.samplers.items()) for row in rows
    )


def _add_weights(add: Callable, model: str) -> None:
    """The flags that name the weights and say how to read them."""
    add(
        "--model",
        choices=DiT_models,
        metavar="MODEL",
        help=f"draw from this model of DiT_models, the checkpoint's [that of --ckpt, or without it {model}]",
    )
    add(
        "--ckpt",
        help="draw from these weights, in any layout of docs/weights.md: a file, a folder or a hub id [the newest of "
        "the model's run under --results-dir; if there is none, for DiT-XL/2, the published weights]",
    )
    add("--results-dir", default=RESULTS, help="look for the run of the model here [%(default)s]")
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
        help="with others' weights, if their files do not say it: assume that they were trained on this [ddpm]",
    )


def sampling_parser(doc: str, script: str, model: str) -> ArgumentParser:
    """The flags of a sampling script, those of the conditionings that it draws for included."""
    parser = ArgumentParser(doc)
    add = parser.add_argument
    _add_weights(add, model)
    for conditioning in CONDITIONINGS.values():
        if conditioning.script == script and "add_flags" in vars(conditioning):  # one's own, not those of its base
            conditioning.add_flags(add)
    add("--sample-dir", default="samples", help="write the folder of PNGs and the .npz here [%(default)s]")
    add("--num-fid-samples", type=number(int, 1), default=50000, help="draw this many images [%(default)s]")
    add_part_flag(add, "batches of images")
    add(
        "--per-proc-batch-size",
        type=number(int, 1),
        default=32,
        help="draw at most this many images at once per process [%(default)s]",
    )
    add(
        "--sampler",
        choices=LATENT_SAMPLERS,
        help=of_objectives(lambda name, spec: f"{name}: {spec.about}") + " [the first for the checkpoint's objective]",
    )
    add(
        "--num-sampling-steps",
        type=STEPS,
        help="take this many sampling steps, up to 1000 "
        f"[{of_objectives(lambda name, spec: f'{name}: {spec.default_steps}')}]",
    )
    for name, uses in SAMPLER_OPTIONS.items():
        add_option(add, name, uses, "with --sampler {}: ")
    add(
        "--cfg-scale",
        type=number(float, 1),
        help=f"set the scale of classifier-free guidance; 1 disables it [{CFG_SCALE}, with --guide-ckpt 1]",
    )
    add("--cfg-channels", choices=["3", "all"], help="guide these latent channels [3 for DiT, all for the others]")
    add("--t-min", type=TIME, help="guide from this time on; ddpm has times 0 to 999, flow 0 to 1 [0]")
    add(
        "--t-max",
        type=TIME,
        help="guide up to this time; outside the interval the unconditional pass is not computed [the last]",
    )
    add_guide_flags(add)
    add(
        "--image-size",
        type=number(int, 1),
        help="check that the checkpoint has this image size, pixels [the checkpoint's]",
    )
    add("--vae", help=f"{VAE_HELP} [that of the checkpoint's features, or ema]")
    add(
        "--precision", choices=PRECISIONS, default="fp32", help="set the precision of the denoising steps [%(default)s]"
    )
    add(
        "--vae-precision",
        choices=PRECISIONS,
        default="fp32",
        help="set the precision of the VAE's decoder [%(default)s]",
    )
    add_speed_flags(add)
    add(
        "--cuda-graphs",
        action="store_true",
        help="record a step's kernels and launch them as one: for small models and batches on GPUs [no]",
    )
    add(
        "--progressive",
        type=number(int, 2),
        metavar="K",
        help="save a strip of K pictures that shows how sample 0 is denoised [none]",
    )
    add("--global-seed", type=SEED, default=0, help="seed the noise, the labels and the order of rows [%(default)s]")
    return parser
