"""Squared distances between two sets of features, in tiles, in float32 or as ADM's evaluator rounds them."""

from collections.abc import Iterator

import torch

TILE = 2000  # rows and columns of distances in memory at once
ADM_BLOCK = 10_000  # rows and columns of distances that ADM computes in one precision


def half_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Squared distances (n, m) of rows, every step rounded to float16 as in ADM: float32 holding half's values.

    The product is float32's, rounded once, as TensorFlow's half product is. On a CPU that is 3 times as fast as torch's
    half product; on a GPU torch's may sum in float16.
    """
    u, v = u.half(), v.half()
    norm_u, norm_v = (one.square().float().sum(dim=1).half() for one in (u, v))
    product = (u.float() @ v.float().T).half()
    return ((norm_u[:, None] - 2 * product) + norm_v).clamp(min=0).float()


def exact_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Squared distances (n, m) of rows in float32."""
    u, v = u.float(), v.float()
    norm_u, norm_v = (one.square().sum(dim=1) for one in (u, v))
    return torch.addmm(norm_u[:, None] + norm_v, u, v.T, alpha=-2).clamp(min=0)


def tiles(count: int, size: int, start: int = 0) -> list[slice]:
    """Slices of at most `size` that cover start..count."""
    return [slice(low, min(low + size, count)) for low in range(start, count, size)]


def distance_tiles(u: torch.Tensor, v: torch.Tensor, half: bool) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, squared distances) over all pairs of rows of u (N, D) and v (M, D), TILE x TILE at once.

    half: distances in float16 where a block of ADM_BLOCK x ADM_BLOCK is finite, in float32 where it is not.
    """
    for rows in tiles(len(u), ADM_BLOCK):
        for columns in tiles(len(v), ADM_BLOCK):
            inner = [
                (r, c) for r in tiles(rows.stop, TILE, rows.start) for c in tiles(columns.stop, TILE, columns.start)
            ]
            in_half = half and half_is_finite(u[rows], v[columns])
            distances = half_distances if in_half else exact_distances
            for r, c in inner:
                yield r, c, distances(u[r], v[c])


def half_is_finite(u: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether all squared distances of two blocks of rows are finite in float16."""
    norms = [one.half().square().float().sum(dim=1).half().float() for one in (u, v)]
    if not all(norm.isfinite().all() for norm in norms):
        return False
    if 2 * sum(norm.max() for norm in norms) < torch.finfo(torch.float16).max:
        return True  # |u - v|^2 <= 2 |u|^2 + 2 |v|^2, and 2 |u v| is no larger
    return all(half_distances(u[r], v[c]).isfinite().all() for r in tiles(len(u), TILE) for c in tiles(len(v), TILE))
