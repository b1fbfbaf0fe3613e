"""Flow matching: a straight path from data to noise, whose velocity the model learns, and samplers that go back on it.

    flow = Flow()
    losses = flow.training_losses(model, x_start, t, dict(y=y))["loss"]
    for x, x_start in EulerSampler(5, flow)(predict, x, noise):
        ...

x_t = (1 - t) x_0 + t n for noise n, so t = 0 is data and t = 1 is noise; the model learns v = dx_t/dt = n - x_0. Liu et
al. 2022, arXiv 2209.03003 (rectified flow); Lipman et al. 2022, arXiv 2210.02747. SiT (Ma et al. 2024, arXiv
2401.08740) counts time the other way: its t is our 1 - t, and its velocity our -v. With sigma = t / (1 - t) it is the
Gaussian process at another scale: x_t / (1 - t) = x_0 + sigma n.
"""
import math
from collections.abc import Callable

import numpy as np
import torch

from .likelihoods import mean_flat
from .options import Option
from .samplers import Sampler, SamplerSpec, Steps

TIME_DISTRIBUTIONS = ("uniform", "lognormal")
LAST_TIME = 0.04            # at which the SDE's noise ends: its score, which divides by t, is not used nearer to 0


class Flow:
    """Flow matching with the linear interpolant; see above. Times t (N,) are from 0 to 1.

    Args:
        time_distribution: of t in training, "uniform", or "lognormal": the sigmoid of a normal, which prefers the
            middle (Esser et al. 2024, arXiv 2403.03206, equation 19).
        time_mean, time_std: of that normal.
        time_scale: the model is told time_scale * t: 1, as in SiT and REPA, or 1000, the range of DDPM's times.
    """
    num_timesteps = last_time = 1               # the length of its time
    model_arguments = dict(learn_sigma=False)

    def __init__(self, time_distribution: str = "uniform", time_mean: float = 0.0, time_std: float = 1.0,
                 time_scale: float = 1.0):
        if time_distribution not in TIME_DISTRIBUTIONS:
            raise ValueError(f"time distribution {time_distribution}: must be one of {', '.join(TIME_DISTRIBUTIONS)}")
        if not (math.isfinite(time_mean) and 0 < time_std < math.inf and time_scale >= 1 and time_scale % 1 == 0):
            raise ValueError(f"time mean {time_mean}, std {time_std} and scale {time_scale}: the mean is finite, std "
                             "above 0, and the scale a whole number")
        if time_distribution == "uniform" and (time_mean, time_std) != (0, 1):
            raise ValueError(f"time mean {time_mean} and std {time_std} go with the time distribution lognormal")
        self.time_distribution, self.time_mean, self.time_std = time_distribution, time_mean, time_std
        self.time_scale = time_scale

    def training_times(self, u: torch.Tensor) -> torch.Tensor:
        """Times t (N,) float32 in [0, 1), of its distribution, from uniforms u (N,) float64 in [0, 1)."""
        if self.time_distribution == "lognormal":
            u = torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u))
        return u.float().clamp(max=1 - 2**-24)

    def told(self, t: torch.Tensor) -> torch.Tensor:
        """What the model is told of times t (N,)."""
        return self.time_scale * t

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t from x_0 (N, ...) at times t (N,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        t = t.view(-1, *[1] * (x_start.ndim - 1))
        return (1 - t) * x_start + t * noise

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model is to give at times t (N,), of x_start's shape."""
        return noise - x_start

    def training_losses(self, model: Callable, x_start: torch.Tensor, t: torch.Tensor,
                        model_kwargs: dict | None = None,
                        noise: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """loss (N,): the mean over a sample of (v_model - v)^2.

        Args:
            model: (x_t, told times, **model_kwargs) -> v, (N, C, ...).
            x_start: (N, C, ...) data.
            t: (N,) times.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        v = model(self.q_sample(x_start, t, noise), self.told(t), **(model_kwargs or {})).float()
        assert v.shape == x_start.shape, f"model output {tuple(v.shape)} for x {tuple(x_start.shape)}"
        return dict(loss=mean_flat((v - self.target(x_start, noise, t)) ** 2))


def score(x: torch.Tensor, t: float | torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The gradient of log p(x_t), -n / t, at x (N, ...) with velocity v and t above 0, a number or (N, 1, ...)."""
    return -(x + (1 - t) * v) / t


#################################################################################
#                                    Samplers                                   #
#################################################################################

class EulerSampler(Sampler):
    """Euler's method on dx/dt = v, at evenly spaced times from 1 to 0, which time_shift moves towards the noise.

    Like the samplers below it keeps x in float64, of which the model gets float32. Its parts are those of a sampler in
    samplers.py; v is the model's first C channels.

    Args:
        steps: how many.
        flow: the process that the model was trained on.
        time_shift: a: each time t becomes a t / (1 + (a - 1) t); 1 leaves it.
    """
    evaluations = 1         # of the model, at each time but the first

    def __init__(self, steps: int, flow: Flow, time_shift: float = 1.0):
        self.num_steps, self.told = steps, flow.told
        self.levels = self.levels_of(steps, time_shift)
        self.times = [self.levels[0], *(time for time in self.levels[1:-1] for _ in range(self.evaluations))]

    @staticmethod
    def levels_of(steps: int, time_shift: float) -> list[float]:
        """The times between which the steps go."""
        return [shifted((steps - step) / steps, time_shift) for step in range(steps + 1)]

    def __call__(self, predict: Callable, x: torch.Tensor, noise: Callable) -> Steps:
        x, channels = x.double(), x.shape[1]

        def velocity(x, *time):
            return predict(x.float(), *time)[:, :channels].double()

        for step, (t, following) in enumerate(zip(self.levels, self.levels[1:])):
            v = velocity(x, t)
            x_start, x = x - t * v, self.advance(velocity, x, v, t, following, lambda step=step: noise(step))
            yield x.float(), x_start.float()

    def advance(self, velocity: Callable, x: torch.Tensor, v: torch.Tensor, t: float, following: float,
                noise: Callable) -> torch.Tensor:
        """x at the time `following` from x with v = velocity(x, t); noise() is a standard normal."""
        return x + (following - t) * v


class HeunFlowSampler(EulerSampler):
    """Heun's method of second order: two evaluations per step but in the last, which is Euler's."""
    evaluations = 2

    def advance(self, velocity: Callable, x: torch.Tensor, v: torch.Tensor, t: float, following: float,
                noise: Callable) -> torch.Tensor:
        """See `EulerSampler`. Whether a step is guided is decided by its first time, for both its evaluations."""
        euler = x + (following - t) * v
        return x + (following - t) * (v + velocity(euler, following, t)) / 2 if following else euler


class SDESampler(EulerSampler):
    """Euler and Maruyama's method on dx = [v - (w/2) score] dt + sqrt(w) dW with w = 2t (SiT, section 3.2).

    At evenly spaced times from 1 to LAST_TIME; the last step, from there to 0, adds no noise.
    """

    @staticmethod
    def levels_of(steps: int, time_shift: float) -> list[float]:
        """See `EulerSampler`. The shift leaves LAST_TIME where it is."""
        even = np.linspace(1, shifted(LAST_TIME, 1 / time_shift), steps)
        return [*shifted(even, time_shift).tolist(), 0.0]

    def advance(self, velocity: Callable, x: torch.Tensor, v: torch.Tensor, t: float, following: float,
                noise: Callable) -> torch.Tensor:
        """See `EulerSampler`."""
        x = x + (following - t) * (v - t * score(x, t, v))
        return x + math.sqrt(2 * t * (t - following)) * noise() if following else x


def shifted(t: float | np.ndarray, shift: float) -> float | np.ndarray:
    """Times that are moved towards 1, for a shift above 1, or towards 0; 1 / shift moves them back."""
    return shift * t / (1 + (shift - 1) * t)


#################################################################################
#                       What the table of processes says of it                  #
#################################################################################

SHIFT = dict(fewest_steps=1, options=dict(time_shift=Option(
    "move the times to a t / (1 + (a - 1) t) with this a, towards the noise, as large latents need",
    low=0.01, high=100)))
FLOW_SAMPLERS = {
    "euler": SamplerSpec("Euler's method", EulerSampler, 25, **SHIFT, scheduler=lambda process: (
        "scheduler_flow", "FlowScheduler", dict(num_train_timesteps=int(process.time_scale)))),
    "heun": SamplerSpec("Heun's second-order method, two evaluations per step", HeunFlowSampler, 25, **SHIFT),
    "sde": SamplerSpec("Euler and Maruyama's method on the SDE, which adds noise", SDESampler, 250, **SHIFT),
}
FLOW_OPTIONS = dict(
    time_distribution=Option("draw times from this; lognormal: the sigmoid of a normal, which prefers the middle",
                             choices=TIME_DISTRIBUTIONS, training_only=True),
    time_mean=Option("set the mean of that normal", low=-10, high=10, training_only=True),
    time_std=Option("set the standard deviation of that normal", low=0.01, high=10, training_only=True),
    time_scale=Option("give the model this times t: 1, as SiT and REPA do, or 1000, DDPM's range", low=1, high=1000),
)
