"""Milliseconds of embedding a batch of codes, forward and backward: rows gathered, as here, or one-hot times table."""

import time

import torch
import torch.nn.functional as F

from benchmarks.flops import synchronize
from models import SEMEmbedder

GATHERED, ONE_HOT = "rows gathered and averaged", "one-hot times table"


def one_hot_product(embedder, codes):
    """The codes' embedding as the references compute it, (N, D)."""
    one_hot = F.one_hot(codes.long(), embedder.V + 1).float()  # (N, L, V+1)
    return torch.einsum("nlv,lvd->nd", one_hot, embedder.embedding_table) / embedder.L


WAYS = {GATHERED: lambda embedder, codes: embedder(codes), ONE_HOT: one_hot_product}


def milliseconds(way, device, batch, L, V, width, repeats=10):
    """The median of the repeats, after two more to warm up."""
    embedder = SEMEmbedder(L, V, width).to(device)
    torch.nn.init.normal_(embedder.embedding_table)
    codes, taken = torch.randint(V, (batch, L), dtype=torch.uint8, device=device), []
    weights = torch.randn(batch, width, device=device)
    for _ in range(repeats + 2):
        embedder.zero_grad()
        synchronize()
        start = time.perf_counter()
        (WAYS[way](embedder, codes) * weights).sum().backward()
        synchronize()
        taken.append(time.perf_counter() - start)
    return 1000 * sorted(taken[2:])[repeats // 2]
