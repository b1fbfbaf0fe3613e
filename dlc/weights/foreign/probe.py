"""Whether a DiT's weights predict noise or a velocity, which neither names nor shapes tell; found out by its outputs.

A model of a velocity on straight paths is asked for times in [0, 1], and predicts the difference of the path's ends. At
time 0 its input is one of them, and says next to nothing of the other: the output is about -1 times the input, for
white noise where the path begins with noise (SiT, Ma et al. 2024, arXiv 2401.08740), for smooth latents where it begins
with data (REPA, Yu et al. 2024, arXiv 2410.06940). A model of noise is asked for times from 0 to 999. At 0 there is
next to no noise in its inputs, and at 999 nothing else: the output is about 0 and 1 times the input.

The factor is that of the least-squares regression of the outputs on the inputs. Measured on small models, trained for
60 to 800 steps: velocity -0.66 to -0.83 at 0 and -0.30 to -0.85 at 999, a time that such models never met; noise 0.02
to 0.95 at 0 and 0.28 to 0.99 at 999. A model that was never trained gives 0 or a number near it.
"""

import math

import torch
import torch.nn.functional as F

SAMPLES, VALUES = 8, 4096  # at most so many; fewer where each has many values
VELOCITY_BELOW, ALIKE, NOISE_ABOVE = -0.25, -0.5, 0.25


def inputs(model, smooth: bool) -> torch.Tensor:
    """Latents (N, C, h, w) of unit variance: white noise, or noise of a quarter of the resolution, enlarged."""
    shape = (model.in_channels, *model.x_embedder.img_size)
    count, generator = min(SAMPLES, max(1, VALUES // math.prod(shape))), torch.Generator().manual_seed(0)
    if not smooth:
        return torch.randn(count, *shape, generator=generator)
    coarse = torch.randn(count, shape[0], *(max(2, side // 4) for side in shape[1:]), generator=generator)
    x = F.interpolate(coarse, size=shape[1:], mode="bilinear")
    return x / x.std()


@torch.no_grad()
def regression(model, x: torch.Tensor, time: float) -> tuple[float, float]:
    """Of a DiT's outputs for x at a time, without a condition: least-squares factor, and cosine to the inputs."""
    count = len(x)
    out = model(x, torch.full((count,), time), model.null_condition(count))[:, : model.in_channels]
    product = float((out * x).sum())
    return product / float((x * x).sum()), product / float(x.norm() * out.norm() + 1e-20)


def predicts_velocity(model) -> bool:
    """Whether a DiT in eval mode on the CPU predicts a velocity. One that was never trained does not."""
    for smooth in (False, True):
        x = inputs(model, smooth)
        factor, cosine = regression(model, x, 0.0)
        if factor < VELOCITY_BELOW and cosine < ALIKE and regression(model, x, 999.0)[0] < NOISE_ABOVE:
            return True
    return False
