"""The flags of both sampling scripts."""

from diffusion.process_table import PROCESSES
from diffusion.samplers import SAMPLERS
from dlc.machine.cli import SEED, ArgumentParser, number
from dlc.machine.processes import PRECISIONS, add_speed_flags
from dlc.sampling.conditions import CONDITIONINGS
from dlc.sampling.guide import CFG_SCALE, add_guide_flags
from dlc.weights.foreign.dits import DIFFUSERS_TIMES
from dlc.weights.networks import VAE_HELP
from models import DiT_models

RESULTS = "results"  # the default of --results-dir


def sampling_parser(doc: str, script: str, model: str) -> ArgumentParser:
    """The flags of a sampling script, those of the conditionings that it draws for included."""
    parser = ArgumentParser(doc)
    add = parser.add_argument
    add(
        "--model",
        choices=DiT_models,
        metavar="MODEL",
        help=f"name in DiT_models; must be the checkpoint's [that of --ckpt, or without it {model}]",
    )
    add(
        "--ckpt",
        help="weights to draw from, in any layout of docs/weights.md: a file, a folder or a hub id [the newest of the "
        "model's run under --results-dir; if there is none, for DiT-XL/2, the published weights]",
    )
    add("--results-dir", default=RESULTS, help="look for the run of the model here [%(default)s]")
    add("--no-ema", dest="ema", action="store_false", help="use the raw weights instead of the EMA weights")
    add(
        "--diffusers-time",
        choices=DIFFUSERS_TIMES,
        help="with weights in diffusers' layout: compute DiT's function, which those converted from DiT have, or "
        "diffusers', which those trained there have [what the folder says, else dit]",
    )
    add(
        "--process",
        choices=[name for name in PROCESSES if name != "masked"],  # which is that of priors
        help="with weights of others, whose files do not say it: what they were trained on [gaussian]",
    )
    for conditioning in CONDITIONINGS.values():
        if conditioning.script == script and "add_flags" in vars(conditioning):  # one's own, not those of its base
            conditioning.add_flags(add)
    add("--sample-dir", default="samples", help="write the folder of PNGs and the .npz here [%(default)s]")
    add("--num-fid-samples", type=number(int, 1), default=50000, help="number of images to draw [%(default)s]")
    add(
        "--per-proc-batch-size", type=number(int, 1), default=32, help="largest batch per process, images [%(default)s]"
    )
    add(
        "--sampler",
        choices=SAMPLERS,
        default="ddpm",
        help="; ".join(f"{name}: {spec.about}" for name, spec in SAMPLERS.items()) + " [%(default)s]",
    )
    add(
        "--num-sampling-steps",
        type=number(int, 2, 1000),
        help="sampling steps, 2 to 1000 "
        f"[{', '.join(f'{name}: {spec.default_steps}' for name, spec in SAMPLERS.items())}]",
    )
    add("--eta", type=number(float, 0, 1), help="noise of --sampler ddim: 0 adds none, 1 as much as DDPM [0]")
    add(
        "--cfg-scale",
        type=number(float, 1),
        help=f"classifier-free guidance scale; 1 disables guidance [{CFG_SCALE}, with --guide-ckpt 1]",
    )
    add("--cfg-channels", choices=["3", "all"], help="guide these latent channels [3 for DiT, all for the others]")
    add("--t-min", type=number(int, 0, 999), default=0, help="guide from this diffusion time on [%(default)s]")
    add(
        "--t-max",
        type=number(int, 0, 999),
        default=999,
        help="guide up to this diffusion time; outside the interval the null half is not computed [%(default)s]",
    )
    add_guide_flags(add)
    add("--image-size", type=number(int, 1), help="image size, pixels; must be the checkpoint's [the checkpoint's]")
    add("--vae", help=f"{VAE_HELP} [that of the checkpoint's features, or ema]")
    add("--precision", choices=PRECISIONS, default="fp32", help="precision of the denoising steps [%(default)s]")
    add("--vae-precision", choices=PRECISIONS, default="fp32", help="precision of the VAE's decoder [%(default)s]")
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
        help="save a strip of K pictures of how sample 0 is denoised [none]",
    )
    add("--global-seed", type=SEED, default=0, help="seed of the noise, the labels and the order of rows [%(default)s]")
    return parser
