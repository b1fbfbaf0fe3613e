"""Memory of training by batch size, with and without activation checkpointing, without a GPU to measure it on.

    python -m benchmarks.memory --model DiTSEM-XL/2

Weights, gradients, AdamW's two moments and EMA take 20 bytes per parameter. The memory of activations is measured: the
bytes that autograd saves in the forward pass, counted once for each storage, under bf16 autocast on the CPU, at two
batch sizes. Temporary buffers of a step and the allocator's fragments are left out.
"""

import argparse

import torch

from benchmarks.record import record
from models import DiT, DiT_models


def saved_bytes(module: torch.nn.Module, *inputs) -> int:
    """Bytes that module(*inputs) saves for its backward pass, beside its own parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = module(*inputs)
    del out
    return sum(saved.values())


def batch_bytes(model: DiT, batch: int, checkpointing: bool) -> int:
    """Bytes that the backward pass needs of a batch."""
    codes = torch.zeros(batch, model.sem_embedder.L, dtype=torch.long)
    model.train().set_grad_checkpointing(checkpointing)
    total = saved_bytes(model, torch.randn(batch, 4, 32, 32), torch.zeros(batch), codes)
    if checkpointing:  # which hides its blocks from the hooks: each block's input, and one block at a time
        tokens, width = model.pos_embed.shape[1:]
        x, c = torch.randn(batch, tokens, width, requires_grad=True), torch.randn(batch, width, requires_grad=True)
        total += len(model.blocks) * x.numel() * 4 + saved_bytes(model.blocks[0], x, c)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiTSEM-XL/2", help="a DiTSEM [%(default)s]")
    parser.add_argument("--L", type=int, default=512, help="code positions [%(default)s]")
    parser.add_argument("--V", type=int, default=256, help="tokens per position [%(default)s]")
    args = parser.parse_args()
    model = DiT_models[args.model](L=args.L, V=args.V)
    states = 20 * sum(parameter.numel() for parameter in model.parameters())
    per_image, fixed = {}, {}
    for checkpointing in (False, True):
        one, two = (batch_bytes(model, batch, checkpointing) for batch in (1, 2))
        per_image[checkpointing], fixed[checkpointing] = two - one, 2 * one - two  # fixed: the weights in bf16
    names = {key: f"GiB, {'with' if key else 'without'} activation checkpointing" for key in (False, True)}
    rows = []
    for batch in (8, 16, 32, 64, 128, 256):
        memory = {name: (states + fixed[key] + batch * per_image[key]) / 2**30 for key, name in names.items()}
        rows.append({"batch on a GPU": batch, **memory})
    record("memory", rows, **vars(args), states_gib=states / 2**30)


if __name__ == "__main__":
    main()
