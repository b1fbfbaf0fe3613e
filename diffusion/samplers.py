"""Samplers: from a standard normal x_T to a sample x_0, through a model that is asked at each step.

    for x, x_start in sampler(predict, x, noise):       # one item per step; the last x is the sample
        ...

predict(x, time) is the model's output (N, C or 2C, ...) for x (N, C, ...) at a time of the full process, a whole or
fractional number from 0 to 999. It owns guidance, embeddings and precision, and may be called any number of times per
step; predict(x, time, since) is guided as at the time `since`. noise(step) is a standard normal of x's shape. x_start
is the x_0 that the model saw in the step.

To add one, write its class here and give it a row in SAMPLERS: the scripts' flags, their help and the tests follow the
table. Those of another process are in its own file (see process_table.py).
"""
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from .gaussian import GaussianDiffusion
from .options import Option
from .schedules import named_betas, spaced_timesteps

FULL_STEPS = 1000           # of the process that the models are trained on, whose schedule is the linear one

Steps = Iterator[tuple[torch.Tensor, torch.Tensor]]     # x and x_start of each


def noise_levels() -> np.ndarray:
    """sigma(t) = sqrt((1 - alphas_cumprod) / alphas_cumprod) of the full process, ascending (1000,) float64 NumPy.

    It is the noise of x_t / sqrt(alphas_cumprod_t) = x_0 + sigma(t) eps.
    """
    alphas_cumprod = torch.cumprod(1 - named_betas("linear", FULL_STEPS), 0).numpy()
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def signal_scale(sigma: float) -> float:
    """sqrt(alphas_cumprod) at a noise level: what x_0 is multiplied by in x_t."""
    return 1 / math.sqrt(1 + sigma**2)


class Sampler:
    """The base of all samplers, which are called as above.

    Attributes: num_steps, the number of items that it yields; times, those for which it asks predict, in that order.
    """
    num_steps: int
    times: list[float]

    def told(self, times: torch.Tensor) -> torch.Tensor:
        """What the model is told of its times."""
        return times


class AncestralSampler(Sampler):
    """DDPM's ancestral steps (Ho et al. 2020), at evenly spaced times; of variance beta, if the model predicts none."""

    def __init__(self, steps: int, process: GaussianDiffusion | None = None):
        self.diffusion = GaussianDiffusion(named_betas("linear", FULL_STEPS), spaced_timesteps(FULL_STEPS, [steps]))
        self.loop = self.diffusion.p_sample_loop_progressive
        self.num_steps, self.times = steps, self.diffusion.timestep_map[::-1]

    def __call__(self, predict: Callable, x: torch.Tensor, noise: Callable) -> Steps:
        times, draws = iter(self.times), itertools.count()

        def model(x, _):
            output = predict(x, next(times))
            return output if output.shape[1] > x.shape[1] else torch.cat([output, torch.ones_like(output)], dim=1)

        for out in self.loop(model, x.shape, x, clip_denoised=False, randn_like=lambda _: noise(next(draws))):
            yield out["sample"], out["pred_xstart"]


class DDIMSampler(AncestralSampler):
    """DDIM's steps (Song et al. 2020) with DDPM's noise times eta, at the same times."""

    def __init__(self, steps: int, process: GaussianDiffusion | None = None, eta: float = 0.0):
        super().__init__(steps)
        self.loop = functools.partial(self.diffusion.ddim_sample_loop_progressive, eta=eta)


class DPMSolver(Sampler):
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2), at evenly spaced times.

    The first step, which has no step before it, and the last, to sigma = 0, are of first order.
    """

    def __init__(self, steps: int, process: GaussianDiffusion | None = None):
        self.num_steps = steps
        self.times = np.linspace(0, FULL_STEPS - 1, steps + 1).round()[:0:-1].astype(int).tolist()
        self.sigmas = [*noise_levels()[self.times].tolist(), 0.0]

    def __call__(self, predict: Callable, x: torch.Tensor, noise: Callable) -> Steps:
        before = step_before = None
        for time, sigma, following in zip(self.times, self.sigmas, self.sigmas[1:]):
            scale, following_scale = signal_scale(sigma), signal_scale(following)
            x_start = x / scale - sigma * predict(x, time)[:, :x.shape[1]]
            if following == 0:
                x = x_start
            else:
                step = math.log(sigma / following)              # the step in lambda = -log(sigma)
                slope = 0 if before is None else (x_start - before) * (step / step_before / 2)
                x = (following * following_scale / (sigma * scale) * x
                     - following_scale * math.expm1(-step) * (x_start + slope))
                before, step_before = x_start, step
            yield x, x_start


class HeunSampler(Sampler):
    """Heun's method of second order on the probability flow (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    For y = x_t / sqrt(alphas_cumprod_t) that is dy/dsigma = eps. The noise levels are those of their equation 5 between
    the schedule's largest and smallest, so that times are fractional: two evaluations per step but in the last, to 0.
    """
    rho = 7

    def __init__(self, steps: int, process: GaussianDiffusion | None = None):
        levels = noise_levels()
        sigmas = np.linspace(levels[-1] ** (1 / self.rho), levels[0] ** (1 / self.rho), steps) ** self.rho
        sigmas[[0, -1]] = levels[[-1, 0]]                       # the power's rounding would make 999 a little less
        self.num_steps, self.sigmas = steps, [*sigmas.tolist(), 0.0]
        self.step_times = np.interp(np.log(sigmas), np.log(levels), np.arange(FULL_STEPS)).tolist()
        self.times = [self.step_times[0], *(time for time in self.step_times[1:] for _ in range(2))]

    def __call__(self, predict: Callable, x: torch.Tensor, noise: Callable) -> Steps:
        def slope(y, step):
            return predict(y * signal_scale(self.sigmas[step]), self.step_times[step])[:, :y.shape[1]]

        y = x / signal_scale(self.sigmas[0])
        for step, (sigma, following) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            eps = slope(y, step)
            x_start, euler = y - sigma * eps, y + (following - sigma) * eps
            y = y + (following - sigma) * (eps + slope(euler, step + 1)) / 2 if following else euler
            yield y * signal_scale(following), x_start


@dataclass(frozen=True)
class SamplerSpec:
    """What a sampler's name stands for."""
    about: str                      # completes "--sampler NAME: …" in the scripts' help
    build: Callable                 # (steps, process, **options) -> sampler
    default_steps: int | None       # None: as many as there are tokens
    fewest_steps: int = 2
    most_steps: int = FULL_STEPS
    options: dict[str, Option] = field(default_factory=dict)
    assumed: dict = field(default_factory=dict)     # arguments that the process must have been created with
    scheduler: Callable | None = None   # (process) -> module, class and arguments of diffusers' that takes its steps


LINEAR = dict(noise_schedule="linear", predict_xstart=False, diffusion_steps=FULL_STEPS)
DIFFUSERS = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2)
SAMPLERS = {
    "ddpm": SamplerSpec(
        "DDPM's ancestral steps", AncestralSampler, 250, assumed=LINEAR),
    "ddim": SamplerSpec(
        "DDIM", DDIMSampler, 50, assumed=LINEAR,
        options=dict(eta=Option("add DDPM's noise times this; 0 adds none", low=0, high=1))),
    "dpmsolver++": SamplerSpec(
        "DPM-Solver++ of second order", DPMSolver, 25, most_steps=FULL_STEPS - 1, assumed=LINEAR,
        scheduler=lambda process: ("diffusers", "DPMSolverMultistepScheduler", DIFFUSERS)),
    "heun": SamplerSpec(
        "Heun's second-order method of EDM, two evaluations per step", HeunSampler, 25, assumed=LINEAR),
}
