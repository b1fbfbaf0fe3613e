"""The engine: latents drawn for conditions, by any sampler, with guidance in an interval of the diffusion times."""
import math
from functools import partial

import torch
from diffusers import DPMSolverMultistepScheduler

from diffusion import create_diffusion, named_betas
from dlc.noise import Stream, normal
from dlc.runtime import PRECISIONS

DEFAULT_STEPS = {"ddpm": 250, "ddim": 50, "dpmsolver++": 25}
NOISE_AT_ONCE = 2**21       # numbers, of several steps: the many small kernels that make them are launched for all


#################################################################################
#                                    Samplers                                   #
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


#################################################################################
#                                     Engine                                    #
#################################################################################


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
