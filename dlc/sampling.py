"""The engine of both samplers: noise keyed by sample index, guidance, decoding, PNGs, and the .npz for FID.

Sample i is the same, but for rounding, whatever the number of processes and the batch size: its noise, and the code or
label it is drawn for, are functions of (global seed, i). A run that was killed draws the batches that have a missing
index, at the same places in them, so that it ends with the bytes of one that was left alone.

    python -m dlc.sampling check FILE.npz [--grid]      # what is in it, and whether anything is wrong with it
"""
import argparse
import datetime
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusion import create_diffusion, named_betas
from dlc.cli import SEED, ArgumentParser, number, progress
from dlc.checkpoints import load_weights, model_from_weights, newest_checkpoint, weights_sha256
from dlc.conditions import conditions_sha256
from dlc.disk import DirectoryLock, differences, read_json, recorded_id, remove_temporaries, write_json
from dlc.latents import decode, image_grid, in_batches, load_vae, to_uint8, vae_id, vae_label
from dlc.noise import Stream, normal
from dlc.runtime import PRECISIONS, agree, autocast, create_logger, done_by_rank_0, start_processes, versions
from dlc.sample_files import check, missing_indices, npz_rows, png_path, save_grid, save_png, write_npz
from models import DiT_models

NAMES_ONLY = ("checkpoint", "weights", "vae")      # settings that say where weights lay, not what they were
DEFAULT_STEPS = {"ddpm": 250, "ddim": 50, "dpmsolver++": 25}
NOISE_AT_ONCE = 2**21       # numbers, of several steps: the many small kernels that make them are launched for all


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


#################################################################################
#                                   Samplers                                    #
#################################################################################

class DiffusionSampler:
    """DDPM's ancestral steps or, with eta given, DDIM's, at evenly spaced times, both ends included."""

    def __init__(self, steps, eta=None, learn_sigma=True):
        self.diffusion, self.eta = create_diffusion(str(steps), learn_sigma=learn_sigma), eta
        self.times = self.diffusion.timestep_map[::-1]

    def step(self, step, x, output, noise):
        t = torch.full((len(x),), len(self.times) - 1 - step, device=x.device)
        keywords = dict(clip_denoised=False, randn_like=lambda _: noise())
        if self.eta is None:
            out = self.diffusion.p_sample(lambda *_: output, x, t, **keywords)
        else:
            out = self.diffusion.ddim_sample(lambda *_: output, x, t, eta=self.eta, **keywords)
        return out["sample"], out["pred_xstart"]


class DPMSolver:
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, arXiv 2211.01095), as diffusers has it."""
    eta = None

    def __init__(self, steps):
        if steps > 999:
            raise ValueError("--num-sampling-steps: --sampler dpmsolver++ has at most 999")
        self.scheduler = DPMSolverMultistepScheduler(trained_betas=named_betas("linear", 1000).numpy())
        self.scheduler.set_timesteps(steps)
        self.times = self.scheduler.timesteps.tolist()

    def step(self, step, x, output, noise):
        if step == 0:
            self.scheduler.set_timesteps(len(self.times))           # forgets the samples before
            self.scheduler.set_begin_index(0)
        eps = output[:, :x.shape[1]]                                # it has no use for a learned variance
        x = self.scheduler.step(eps, self.times[step], x, return_dict=False)[0]
        return x, self.scheduler.model_outputs[-1]


def create_sampler(name, steps=None, eta=None, learn_sigma=True):
    """A sampler by its name: "ddpm", "ddim" or "dpmsolver++".

    It has `times`, the model's time at each step, descending; and step(step, x, output, noise), from x at
    times[step] and the model's output there to the next x and the x_0 seen on the way; noise() gives a standard
    normal of x's shape.

    Raises ValueError for what the sampler does not have.
    """
    if eta is not None and name != "ddim":
        raise ValueError(f"--eta {eta}: --sampler {name} has none, ddim has")
    steps = steps or DEFAULT_STEPS[name]
    if name == "dpmsolver++":
        return DPMSolver(steps)
    return DiffusionSampler(steps, (eta or 0.0) if name == "ddim" else None, learn_sigma)


@torch.inference_mode()
def sample_latents(model, sampler, y, seed, indices, latent_shape, cfg_scale=1.0, t_min=0, t_max=999, channels=None,
                   denoise=None, on_step=None):
    """Draw latents (N, *latent_shape) for conditions y.

    Args:
        model: a DiT, DiTSEM or DiTCONT in eval mode.
        sampler: see create_sampler.
        y: N conditions, on the model's device.
        seed, indices: each sample's noise is a function of (seed, its index); indices is (N,) int64 on the same device.
        cfg_scale: guidance; at 1, and at times outside t_min..t_max, the null half is not computed at all.
        channels: see DiT.forward_with_cfg.
        denoise: stands for model.denoise.
        on_step: called with each step's number, the x it gives and the x_0 that the model sees.
    """
    n, steps, denoise = len(indices), len(sampler.times), denoise or model.denoise
    channels = channels or model.guided_channels or model.in_channels
    at_once, drawn = max(1, NOISE_AT_ONCE // (n * math.prod(latent_shape))), {}

    def noise(step):
        first = step - step % at_once
        if first not in drawn:
            drawn.clear()
            draws = steps - torch.arange(first, min(first + at_once, steps), device=indices.device)
            drawn[first] = normal(seed, Stream.SAMPLE_NOISE, indices.repeat(len(draws)), latent_shape,
                                  draws.repeat_interleave(n)).unflatten(0, (len(draws), n))
        return drawn[first][step - first]

    # what depends on neither x nor the other: the condition's part once for all steps, the time's once for all samples
    condition = model.condition_embedder(y)                                                 # (N, D)
    null = model.condition_embedder(model.null_condition(1).to(y.dtype)).expand(n, -1)      # (N, D)
    both = torch.cat([condition, null])                                                     # (2N, D)
    times = model.t_embedder(torch.tensor(sampler.times, device=condition.device))          # (steps, D)
    x = normal(seed, Stream.SAMPLE_NOISE, indices, latent_shape)    # the same for any number of steps
    for step, time in enumerate(sampler.times):
        if cfg_scale != 1 and t_min <= time <= t_max:
            conditional, unconditional = denoise(torch.cat([x, x]), times[step] + both).float().chunk(2)
            guided = unconditional[:, :channels] + cfg_scale * (conditional - unconditional)[:, :channels]
            output = torch.cat([guided, conditional[:, channels:]], dim=1)
        else:
            output = denoise(x, times[step] + condition).float()
        x, x_start = sampler.step(step, x, output, partial(noise, step))
        if on_step is not None:
            on_step(step, x, x_start)
    return x


class CudaGraphs:
    """A function of CUDA tensors, its kernels recorded once for each shape of the inputs and then launched as one.

    What it returns is overwritten by the next call.
    """

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, *inputs):
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.recorded:
            fixed = [value.clone() for value in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):                                  # compiles, and chooses kernels
                    self.function(*fixed)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.function(*fixed)
            self.recorded[shapes] = fixed, graph, output
        fixed, graph, output = self.recorded[shapes]
        for place, value in zip(fixed, inputs):
            place.copy_(value)
        graph.replay()
        return output


def lower_precision(model, precision):
    """Hold the weights that autocast would cast at every step in that precision: the same results, less memory."""
    for part in (model.x_embedder, model.blocks, model.final_layer):
        part.to(PRECISIONS[precision])


#################################################################################
#                                    Decoding                                   #
#################################################################################

class Decoder:
    """Latents to PNG files behind the denoising of the next batch: on GPUs in a thread and a stream of its own.

    On the CPU, where both would share the cores, only the writing is behind. Images are decoded a few at a time, so
    that memory does not grow with the batch, and one at a time on the CPU, where that is faster.

    Args:
        precision: of the VAE, "fp32", "bf16" or "fp16".
        after_first: called once, when the first batch is written.
    """

    def __init__(self, vae, folder, precision="fp32", after_first=None):
        self.vae, self.folder, self.precision = vae.to(memory_format=torch.channels_last), folder, precision
        self.on_gpu = vae.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        # a thread's own device would be the first one
        self.thread = (ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(vae.device,)) if self.on_gpu
                       else ThreadPoolExecutor(1))
        self.pool, self.pending, self.after_first = ThreadPoolExecutor(), None, after_first

    def images(self, latents, places=None):
        """Latents (N, 4, h, w) to images (N, H, W, 3) uint8 NumPy: all, or those at places, int64 on the CPU.

        Raises ValueError where one is not finite.
        """
        def network(some):
            decoded = decode(self.vae, some).float()
            if not decoded.isfinite().all():
                raise ValueError("there are samples that are not finite numbers: try --precision bf16 or fp32, and "
                                 "the same of --vae-precision")
            return to_uint8(decoded).cpu()
        with torch.inference_mode(), autocast(latents.device, self.precision):
            rows = latents if places is None else latents[places]
            return in_batches(network, rows, 16 if self.on_gpu else 1, places).numpy()

    def __call__(self, indices, latents, places=None):
        """Write latents (N, 4, h, w), all or those at places, as the PNGs of indices, soon."""
        self.wait()                                                 # at most one batch behind
        if self.on_gpu:
            ready = torch.cuda.Event()
            ready.record()
            self.pending = self.thread.submit(self._decode_and_write, indices, latents, places, ready)
        else:
            self.pending = self.thread.submit(self._write, indices, self.images(latents, places))

    def _decode_and_write(self, indices, latents, places, ready):
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            images = self.images(latents, places)
        self._write(indices, images)

    def _write(self, indices, images):
        list(self.pool.map(save_png, [png_path(self.folder, index) for index in indices], images))
        if self.after_first:
            self.after_first()
            self.after_first = None

    def wait(self):
        """Until all is written. Raises what went wrong with it."""
        if self.pending:
            self.pending.result()
            self.pending = None


def save_strip(path, pictures, sampler, draw, decoder):
    """A strip of how one sample is denoised: what the model takes for the image, from the first step to the last.

    draw(on_step) draws that sample; pictures is how many steps are shown.
    """
    shown = np.linspace(0, len(sampler.times) - 1, pictures).round().astype(int).tolist()
    seen = []
    draw(lambda step, x, x_start: seen.append(x_start) if step in shown else None)
    images = decoder.images(torch.cat(seen))
    save_png(path, image_grid(images, len(images)))


#################################################################################
#                                     Run                                       #
#################################################################################

def run(parser, args, open_conditions):
    """Draw args.num_fid_samples images into a folder of PNGs and one .npz.

    open_conditions(args, model, meta) gives the conditions: ComputedCodes or ClassLabels.
    """
    with parser.kept_on_error("what is drawn is kept", "--per-proc-batch-size", ()):
        draw_images(parser, args, open_conditions)


def draw_images(parser, args, open_conditions):
    """What `run` does, its mistakes in one line, whatever else ends it not yet."""
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
        channels = {None: model.guided_channels, "3": 3, "all": None}[args.cfg_channels] or model.in_channels
        ckpt = path.name if path.is_dir() else path.stem
        folder = Path(args.sample_dir) / (f"{name.replace('/', '-')}-{ckpt}-size-{image_size}-vae-"
                                          f"{vae_label(vae_name)}-cfg-{args.cfg_scale}-seed-{args.global_seed}")
        settings = dict(
            model=name, checkpoint=recorded_id(str(path)), weights_sha256=weights_sha256(model), step=meta.get("step"),
            weights=meta["weights"], conditions=conditions.describe(), image_size=image_size,
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
    logger.info(f"{name}, step {meta.get('step', 'unknown')}, {settings['weights']} weights of {path}; "
                f"{settings['conditions']}; {len(missing):,} of {count:,} images to draw, {args.sampler} "
                f"{len(sampler.times)} steps, cfg {args.cfg_scale}, on {state.num_processes} x {device.type}")

    # ---------------------------------------------------------------------- denoise, decode, write
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
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


def main():
    parser = ArgumentParser("Say what an .npz of samples holds and whether anything is wrong with it (exit 1).",
                            prog="python -m dlc.sampling")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("path", help="the .npz")
    parser.add_argument("--grid", action="store_true", help="write a contact sheet of its first images beside it")
    args = parser.parse_args()
    with parser.one_line_errors():
        lines, wrong = check(args.path, args.grid, progress=True)
    print("\n".join(lines + [f"wrong: {line}" for line in wrong]))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
