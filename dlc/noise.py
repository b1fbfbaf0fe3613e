"""Random numbers that belong to samples: each is a pure function of (seed, stream, sample index, draw).

No state, so nothing to save, and no dependence on rank nor, up to the rounding of normals, on batch size and device: any
subset of samples, drawn anywhere in any order, gets the same numbers. The generator is Philox4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), computed for a whole batch with integer tensor operations on whatever
device `indices` is on.
"""
import math
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """One for each use, so that no two uses ever share numbers."""
    FLIP = 0
    POSTERIOR = 1
    TRAIN_TIMESTEP = 2
    TRAIN_NOISE = 3
    TRAIN_DROP = 4
    SAMPLE_NOISE = 5
    SAMPLE_LABEL = 6
    TRAIN_ORDER = 7
    SAMPLE_ORDER = 8
    TRAIN_POSTERIOR = 9
    COMPOSE = 10
    TRAIN_FLIP = 11


LOW = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10: four counter words and two key words, int64 tensors holding 32 bits each, to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the product of two 32-bit words fills 64 bits; int64 keeps all of them, if as a signed number
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((product1 >> 32 & LOW) ^ c1 ^ k0, product1 & LOW,
                          (product0 >> 32 & LOW) ^ c3 ^ k1, product0 & LOW)
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0, c1, c2, c3


def random_words(seed, stream, indices, count, draw=0):
    """Independent 32-bit words for each sample: (N, count) int64 in [0, 2**32).

    Args:
        seed: the run's global seed, int.
        stream: a `Stream`.
        indices: (N,) int64, the samples' own numbers.
        draw: int or (N,) int64, numbers the repeated draws of one sample, such as the steps of a sampler.
    """
    block = torch.arange(-(-count // 4), device=indices.device)
    index = indices.unsqueeze(1)
    draws = draw.unsqueeze(1) if isinstance(draw, torch.Tensor) else torch.full_like(block, draw)
    counter = (block, draws, index & LOW, (index >> 32) * 256 + int(stream))
    words = philox(torch.broadcast_tensors(*counter), (seed & LOW, seed >> 32 & LOW))
    return torch.stack(words, dim=2).flatten(1)[:, :count]


def normal(seed, stream, indices, shape, draw=0):
    """Standard normals (N, *shape), float32, by Box and Muller's transform in float64."""
    count = math.prod(shape)
    words = random_words(seed, stream, indices, count + count % 2, draw).double()
    radius = (-2 * ((words[:, 0::2] + 1) / 2**32).log()).sqrt()
    angle = words[:, 1::2] * (2 * math.pi / 2**32)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)
    return normals[:, :count].reshape(-1, *shape).float()


def integers(seed, stream, indices, high):
    """Uniform integers in [0, high), (N,) int64."""
    return random_words(seed, stream, indices, 1).squeeze(1) * high >> 32


def uniform(seed, stream, indices):
    """Uniform numbers in [0, 1), (N,) float64."""
    return random_words(seed, stream, indices, 1).squeeze(1) / 2**32


def permutation(seed, stream, epoch, n):
    """A random order of range(n), int64 NumPy, a function of (seed, stream, epoch)."""
    key = np.array([seed, (int(stream) << 48) + epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)
