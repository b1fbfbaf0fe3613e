"""Random numbers that belong to samples: each is a pure function of (seed, stream, sample index, draw).

There is no state to save, and no dependence on rank nor, up to the rounding of normals, on batch size and device: any
subset of samples gets the same numbers, on any process and in any order. The generator is Philox4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"), computed for a whole batch by integer tensor operations on the
device of `indices`.
"""

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """The use that numbers are drawn for: no two uses share numbers."""

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
    TRAIN_MASK = 12
    TRAIN_DROPOUT = 13
    BOUND_MASK = 14
    SAMPLE_CODE = 15
    HOLDOUT = 16
    SAMPLE_KEEP = 17


LOW = 0xFFFFFFFF


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: from four counter words and two key words to four words, each 32 bits in an int64 tensor."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the product of two 32-bit words has 64 bits, which int64 keeps, though as a signed number
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32 & LOW) ^ c1 ^ k0,
            product1 & LOW,
            (product0 >> 32 & LOW) ^ c3 ^ k1,
            product0 & LOW,
        )
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0, c1, c2, c3


def words_of_streams(
    seed: int, counts: Mapping[Stream, int], indices: torch.Tensor, draw: int | torch.Tensor = 0
) -> list[torch.Tensor]:
    """What `random_words` gives for each stream and its count. The generator's many small kernels run once for all."""
    device, blocks = indices.device, [-(-count // 4) for count in counts.values()]
    block = torch.cat([torch.arange(n, device=device) for n in blocks])
    streams = torch.cat([torch.full((n,), int(stream), device=device) for stream, n in zip(counts, blocks)])
    index = indices.unsqueeze(1)
    draws = draw.unsqueeze(1) if isinstance(draw, torch.Tensor) else torch.full_like(block, draw)
    counter = (block, draws, index & LOW, (index >> 32) * 256 + streams)
    words = philox(torch.broadcast_tensors(*counter), (seed & LOW, seed >> 32 & LOW))
    parts = torch.stack(words, dim=2).split(blocks, dim=1)  # (N, blocks, 4) each
    return [part.flatten(1)[:, :count] for part, count in zip(parts, counts.values())]


def random_words(
    seed: int, stream: Stream, indices: torch.Tensor, count: int, draw: int | torch.Tensor = 0
) -> torch.Tensor:
    """Independent 32-bit words for each sample: (N, count) int64 in [0, 2**32).

    Args:
        seed: the run's global seed, int.
        stream: a `Stream`.
        indices: (N,) int64, the samples' indices.
        draw: int or (N,) int64, which of a sample's repeated draws, such as the steps of a sampler.
    """
    return words_of_streams(seed, {stream: count}, indices, draw)[0]


def normal(
    seed: int, stream: Stream, indices: torch.Tensor, shape: Sequence[int], draw: int | torch.Tensor = 0
) -> torch.Tensor:
    """Standard normals (N, *shape), float32."""
    return as_normals(random_words(seed, stream, indices, words_for(shape), draw), shape)


def words_for(shape: Sequence[int]) -> int:
    """How many words `as_normals` takes for a sample of this shape: it takes them in pairs."""
    return -(-math.prod(shape) // 2) * 2


def as_normals(words: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Words (N, words_for(shape)) to normals (N, *shape), float32, by Box and Muller's transform in float64."""
    words = words.double()
    radius = (-2 * ((words[:, 0::2] + 1) / 2**32).log()).sqrt()
    angle = words[:, 1::2] * (2 * math.pi / 2**32)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)
    return normals[:, : math.prod(shape)].reshape(-1, *shape).float()


def seed_torch(seed: int, stream: Stream, step: int, process: int) -> None:
    """Seed torch's own generators, for a step of training in which a layer draws from them, such as nn.Dropout."""
    high, low = random_words(seed, stream, torch.tensor([step]), 2, draw=process)[0].tolist()
    torch.manual_seed(high << 31 | low >> 1)  # 63 bits


class StepNoise:
    """noise(step): the normals (N, *shape) of each of a sampler's steps, 0 to steps - 1.

    It is draw steps - step of (seed, stream, index): draw 0 is x_T, and draw 1 the last step's. For small batches the
    numbers of several steps are made at once, up to AT_ONCE of them, because the generator's many small kernels take as
    long for one step as for all.
    """

    AT_ONCE = 2**21

    def __init__(self, seed: int, stream: Stream, indices: torch.Tensor, shape: Sequence[int], steps: int):
        self.key, self.indices, self.shape, self.steps = (seed, stream), indices, shape, steps
        self.chunk = max(1, self.AT_ONCE // (len(indices) * math.prod(shape)))  # steps
        self.first, self.normals = None, None  # (chunk, N, *shape)

    def __call__(self, step: int) -> torch.Tensor:
        first = step - step % self.chunk
        if first != self.first:
            self.normals = None  # freed before the next are made
            n, last = len(self.indices), min(first + self.chunk, self.steps)
            draws = self.steps - torch.arange(first, last, device=self.indices.device)
            self.normals = normal(
                *self.key, self.indices.repeat(len(draws)), self.shape, draws.repeat_interleave(n)
            ).unflatten(0, (len(draws), n))
            self.first = first
        return self.normals[step - first]


def integers(seed: int, stream: Stream, indices: torch.Tensor, high: int) -> torch.Tensor:
    """Uniform integers in [0, high), (N,) int64."""
    return random_words(seed, stream, indices, 1).squeeze(1) * high >> 32


def uniforms(
    seed: int, stream: Stream, indices: torch.Tensor, count: int, draw: int | torch.Tensor = 0
) -> torch.Tensor:
    """Uniform numbers in [0, 1) for each sample, (N, count) float32; arguments as in `random_words`."""
    return in_unit_interval(random_words(seed, stream, indices, count, draw))


def in_unit_interval(words: torch.Tensor) -> torch.Tensor:
    """Words in [0, 2**32) to float32 in [0, 1): the largest, which would round to 1, to the largest float32 below."""
    return (words.float() / 2**32).clamp(max=1 - 2**-24)


def permutation(seed: int, stream: Stream, epoch: int, n: int) -> np.ndarray:
    """A random order of range(n), (n,) int64 NumPy, a function of (seed, stream, epoch)."""
    key = np.array([seed, (int(stream) << 48) + epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)
