"""Noise schedules, and which of their steps a sampler keeps."""
import math
from collections.abc import Sequence

import torch


def named_betas(name: str, steps: int) -> torch.Tensor:
    """The variances beta_1..beta_steps of a named schedule, (steps,) float64.

    "linear": Ho et al. 2020, section 4, 1e-4 to 0.02 at 1000 steps, scaled to keep the end point at other lengths.
    "squaredcos_cap_v2": Nichol & Dhariwal 2021, equation 17, with beta at most 0.999.
    """
    if name == "linear":
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(f"noise schedule {name!r} does not exist: linear, squaredcos_cap_v2")


def spaced_timesteps(steps: int, respacing: str | Sequence[int]) -> list[int]:
    """The kept times out of range(steps), ascending list of int.

    Args:
        respacing: "ddimN": N times at a fixed stride from 0 (Song et al. 2020, DDIM). "a,b,c" or [a, b, c]: the range
            is cut into that many equal sections, and each gives so many evenly spaced times, both ends included.

    Raises ValueError where the range does not hold them.
    """
    if isinstance(respacing, str):
        try:
            if respacing.startswith("ddim"):
                return fixed_stride_timesteps(steps, int(respacing[len("ddim"):]))
            respacing = [int(count) for count in respacing.split(",")]
        except ValueError as error:
            raise ValueError(f"respacing {respacing!r} of {steps} steps: {error}; "
                             'wanted "250", "ddim50" or "10,15,20"') from None
    kept, start = [], 0
    for section, count in enumerate(respacing):
        size = steps // len(respacing) + (section < steps % len(respacing))
        if not 1 <= count <= size:
            raise ValueError(f"respacing {respacing}: cannot take {count} times out of a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        kept += [start + round(i * stride) for i in range(count)]
        start += size
    return kept


def fixed_stride_timesteps(steps: int, count: int) -> list[int]:
    for stride in range(1, steps + 1):
        times = range(0, steps, stride)
        if len(times) == count:
            return list(times)
    raise ValueError(f"no whole stride gives exactly {count} times")
