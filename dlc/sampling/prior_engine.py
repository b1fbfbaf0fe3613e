"""The engine of priors: draw codes with any sampler of diffusion/masked_samplers.py, guided by class, or infilled."""

from collections.abc import Callable
from functools import partial

import torch

from diffusion.masked import MaskedDiffusion
from dlc.machine.noise import Stream, uniforms
from dlc.machine.processes import autocast
from dlc.sampling.latents import check_conditions
from prior import DLCPrior


@torch.inference_mode()
def sample_codes(
    model: DLCPrior,
    diffusion: MaskedDiffusion,
    sampler: Callable,
    *,
    seed: int,
    indices: torch.Tensor,
    y: torch.Tensor | None = None,
    cfg_scale: float = 1.0,
    guide: tuple[DLCPrior, MaskedDiffusion, float] | None = None,
    codes: torch.Tensor | None = None,
    precision: str = "fp32",
    on_call: Callable | None = None,
) -> torch.Tensor:
    """Draw codes, (N, L) int64 in 0..V-1.

    Args:
        model, diffusion: in eval mode, and the process that it was trained on, which says what it is told of the time.
        sampler: see `create_sampler` in diffusion/masked_samplers.py.
        seed, indices: a code's random numbers are functions of (seed, its index); (N,) int64 on the model's device.
        y: (N,) classes, if the prior has classes [none].
        cfg_scale: guidance by class (Ho & Salimans 2022) in log probabilities; at 1 the null half is not computed.
        guide: a weaker prior, its process, and a scale W: log p_weak + W (log p - log p_weak), both for the same y, in
            the place of guidance by class.
        codes: (N, L) tokens to keep, and V where tokens are to be drawn [V everywhere].
        precision: of the blocks, "fp32", "bf16" or "fp16"; scores are always float32, and draws float64.
        on_call: called after each call of the model with the codes so far, where V is left to draw.
    """
    if y is not None:
        check_conditions(y, model.null_condition(1))
    if codes is None:
        codes = torch.full((len(indices), model.L), model.V, device=indices.device)

    def logits(codes, sigma, y, places, model=model):
        with autocast(codes.device, precision):
            return model(codes, sigma, y, places=places)[..., : model.V]  # (M, V), or (N, L, V)

    def predict(codes, t, places):
        sigma = diffusion.told(t)
        if guide is not None and guide[2] != 1:
            weak, process, scale = guide
            weaker = logits(codes, process.told(t), y, places, weak)
            return weaker + scale * (logits(codes, sigma, y, places) - weaker)
        if y is None or cfg_scale == 1:
            return logits(codes, sigma, y, places)
        both = torch.cat([y, model.null_condition(len(y)).to(y)])
        places = None if places is None else places.repeat(2, 1)
        conditional, null = logits(codes.repeat(2, 1), sigma.repeat(2), both, places).chunk(2)
        return null + cfg_scale * (conditional - null)

    drawn = codes
    for drawn in sampler(predict, codes, partial(uniforms, seed, Stream.SAMPLE_CODE, indices, model.L)):
        if on_call is not None:
            on_call(drawn)
    return drawn
