"""Whether a DiT's weights predict noise or a velocity, which neither names nor shapes tell; found out by its outputs.

A model of a velocity on straight paths (SiT, Ma et al. 2024, arXiv 2401.08740; REPA, Yu et al. 2024, arXiv 2410.06940)
is asked for times in [0, 1]. At time 0 what it predicts is the difference of the path's other end and its input, so
that, for an input of white noise that says nothing of the other end, its output is about -1 times the input. A model
of noise is asked for times from 0 to 999. At 0 there is next to no noise in its inputs: its output is about 0 times the
input, and at 999, where the input is noise, about 1 times. The factor is that of the regression of the outputs on the
inputs. A model that has not been trained yet gives 0 at both.
"""

import torch

SAMPLES, VALUES = 8, 4096  # at most so many; fewer where each has many values
VELOCITY_BELOW, ALIKE, NOISE_ABOVE = -0.25, -0.5, 0.5


@torch.no_grad()
def regression(model, time: float) -> tuple[float, float]:
    """Of a DiT's outputs on inputs of white noise, at a time, without a condition: their least-squares factor and their
    cosine to the inputs."""
    shape = (model.in_channels, *model.x_embedder.img_size)
    count = min(SAMPLES, max(1, VALUES // torch.Size(shape).numel()))
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))  # (N, C, h, w)
    out = model(x, torch.full((count,), time), model.null_condition(count))[:, : model.in_channels]
    product = float((out * x).sum())
    return product / float((x * x).sum()), product / float(x.norm() * out.norm() + 1e-20)


def predicts_velocity(model) -> bool:
    """Whether a DiT in eval mode on the CPU predicts a velocity. One that was never trained does not."""
    factor, cosine = regression(model, 0.0)
    return factor < VELOCITY_BELOW and cosine < ALIKE and regression(model, 999.0)[0] < NOISE_ABOVE
