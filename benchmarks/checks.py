"""What must be equal before a rate means anything: small checks on the device, which `benchmarks.gpu` runs first.

Each function of CHECKS takes the device and returns (difference, largest allowed difference), then what made the CPU
wait for the GPU if anything did. It raises `Unavailable` if the device cannot do it.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
import torch.distributed as dist

from diffusion import create_diffusion
from dlc.machine.processes import autocast
from dlc.sampling.latents import create_sampler, lower_precision, sample_latents
from dlc.training.sharding import fully_shard_blocks
from dlc.training.update import SkippedSteps, update_ema
from models import DiTSEM
from train_diffusion import losses_of

N, L, V = 8, 16, 32
OVERFLOWING, SKIPPED = (1, 4, 5), ((3, 0, 2), 2.0**7)  # the scale is halved three times


class Unavailable(Exception):
    """The device cannot do it."""


def small_model(device: torch.device) -> DiTSEM:
    """A DiTSEM whose output is not 0, as an untrained one's is."""
    torch.manual_seed(0)
    model = DiTSEM(input_size=16, patch_size=2, hidden_size=128, depth=2, num_heads=2, L=L, V=V)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return model.to(device).train()


def loss_of(model: DiTSEM, device: torch.device, precision: str, number: int = 0) -> torch.Tensor:
    """The mean loss of a training step of train_diffusion.py."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(N, 4, 16, 16, generator=generator).to(device, non_blocking=True)
    y = torch.randint(V, (N, L), generator=generator).to(device, non_blocking=True)
    indices = torch.arange(N * number, N * number + N, device=device)
    with autocast(device, precision):
        terms, _ = losses_of(model, create_diffusion(""), indices, x, y, seed=0, dropout=0.1, draw_latents=False)
    return terms["loss"].mean()


def difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    """The mean difference of two lists of tensors, relative to the mean absolute value of the second."""
    return sum((a - b).abs().sum().item() for a, b in zip(one, two)) / sum(b.abs().sum().item() for b in two)


@contextlib.contextmanager
def waits_noted(device: torch.device, notes: list[str]) -> Iterator[None]:
    """Add to notes what makes the CPU wait for the GPU in this block, torch's own kernels included."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    notes += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


def fp16_steps(device: torch.device, steps: Sequence[int], notes: list[str]) -> tuple[list[torch.Tensor], tuple]:
    """How weights and EMA change in these steps, some of which overflow; skipped steps, and the scale."""
    model, scaler = small_model(device), torch.amp.GradScaler(device.type, init_scale=2.0**10)
    ema, optimizer = deepcopy(model), torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    averages, weights = list(ema.parameters()), list(model.parameters())
    begun = [weight.detach().clone() for weight in (*weights, *averages)]
    skips = SkippedSteps([optimizer], scaler, device)
    for step in steps:
        loss = loss_of(model, device, "fp16" if device.type == "cuda" else "fp32", step)
        with waits_noted(device, notes) if step != steps[0] else contextlib.nullcontext():
            scaler.scale(loss * (math.inf if step in OVERFLOWING else 1)).backward()
            skips.step()
            optimizer.zero_grad()
            update_ema(averages, weights, 0.9, skips.last)
    changed = [(now - then).detach() for now, then in zip([*weights, *averages], begun)]
    return changed, (skips.read(), scaler.get_scale())


def fp16_skips(device: torch.device) -> tuple:
    """fp16: steps that overflow are counted on the device, and leave weights and EMA as if they had not been."""
    notes, steps = [], range(1, 9)
    ours, counted = fp16_steps(device, steps, notes)
    wanted, _ = fp16_steps(device, [step for step in steps if step not in OVERFLOWING], [])
    if counted != SKIPPED:
        raise AssertionError(f"(skipped, in a row, longest), scale: {counted}, not {SKIPPED}")
    return difference(ours, wanted), 1e-2, *notes[:1]


def drawn(model: DiTSEM, device: torch.device, precision: str) -> torch.Tensor:
    """Latents of a few guided steps."""
    with autocast(device, precision):
        return sample_latents(
            model, create_sampler("ddim", 10), y=torch.arange(N * L, device=device).view(N, L) % V, seed=0,
            indices=torch.arange(N, device=device), cfg_scale=1.5, t_max=500,
        )  # fmt: skip


def sampling_in_bf16(device: torch.device) -> tuple:
    """Sampling in bf16: the latents of float32, up to 16-bit rounding."""
    exact = drawn(small_model(device).eval(), device, "fp32")
    model = small_model(device).eval()
    lower_precision(model, "bf16")
    return difference([drawn(model, device, "bf16")], [exact]), 0.1


def sharded(device: torch.device) -> tuple:
    """FSDP with one process: a step in bf16 gives the weights of one without it."""
    weights = []
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for shard in (False, True):
            model = small_model(device)
            if shard:
                fully_shard_blocks(model, device, "bf16")
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
            loss_of(model, device, "bf16").backward()
            optimizer.step()
            weights.append([(weight.full_tensor() if shard else weight).detach() for weight in model.parameters()])
    finally:
        dist.destroy_process_group()
    return difference(weights[1], weights[0]), 0.1


CHECKS = {"fp16, skipped steps": fp16_skips, "FSDP, one process": sharded, "sampling in bf16": sampling_in_bf16}
