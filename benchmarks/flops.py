"""Floating-point operations: of a model, from its shapes, and what a device reaches."""

import time

import torch

from dlc.machine.processes import PRECISIONS


def forward_flops(model, side):
    """FLOPs of a forward pass on one latent of side x side: two for each multiply-add of each matrix product."""
    D, P = model.pos_embed.shape[2], model.patch_size
    T = (side // P) ** 2
    block = 2 * T * D * (3 * D + D + 2 * 4 * D) + 4 * T * T * D + 2 * D * 6 * D
    ends = 2 * T * D * P * P * (model.in_channels + model.out_channels) + 2 * D * 2 * D
    return len(model.blocks) * block + ends + 2 * (256 * D + D * D)


def peak_flops(precision, size):
    """FLOPs a second of a product of two size x size matrices, the best of five; TF32 as torch is set."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision]) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def synchronize():
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
