"""Memory of training by batch size, with and without activation checkpointing, without a GPU to measure it on.

    python -m benchmarks.memory --model DiTSEM-XL/2

Weights, gradients, AdamW's two moments and EMA are 20 bytes a parameter. What the backward pass needs of an image is
measured: the bytes that autograd saves in the forward pass, counted once for each storage, under bf16 autocast on the
CPU, at two batch sizes. Left out are what a step takes for the time being, and the allocator's fragments.
"""

import argparse

import torch

from benchmarks.record import record
from models import DiT_models


def saved_bytes(module, *inputs):
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


def of_a_batch(model, batch, checkpointing):
    """Bytes that the backward pass needs of a batch."""
    codes = torch.zeros(batch, model.sem_embedder.L, dtype=torch.long)
    model.train().set_grad_checkpointing(checkpointing)
    total = saved_bytes(model, torch.randn(batch, 4, 32, 32), torch.zeros(batch), codes)
    if checkpointing:  # which hides its blocks from the hooks: each block's input, and one block at a time
        tokens, width = model.pos_embed.shape[1:]
        x, c = torch.randn(batch, tokens, width, requires_grad=True), torch.randn(batch, width, requires_grad=True)
        total += len(model.blocks) * x.numel() * 4 + saved_bytes(model.blocks[0], x, c)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiTSEM-XL/2", help="a DiTSEM [%(default)s]")
    parser.add_argument("--L", type=int, default=512, help="code positions [%(default)s]")
    parser.add_argument("--V", type=int, default=256, help="tokens a position [%(default)s]")
    args = parser.parse_args()
    model = DiT_models[args.model](L=args.L, V=args.V)
    states = 20 * sum(parameter.numel() for parameter in model.parameters())
    per_image, fixed = {}, {}
    for checkpointing in (False, True):
        one, two = (of_a_batch(model, batch, checkpointing) for batch in (1, 2))
        per_image[checkpointing], fixed[checkpointing] = two - one, 2 * one - two  # fixed: the weights in bf16
    record(
        "memory",
        [
            {
                "batch on a GPU": batch,
                **{
                    f"GiB, {'with' if checkpointing else 'without'} activation checkpointing": (
                        states + fixed[checkpointing] + batch * per_image[checkpointing]
                    )
                    / 2**30
                    for checkpointing in (False, True)
                },
            }
            for batch in (8, 16, 32, 64, 128, 256)
        ],
        model=args.model,
        L=args.L,
        V=args.V,
        states_gib=states / 2**30,
        mib_an_image={("with" if key else "without"): value / 2**20 for key, value in per_image.items()},
    )


if __name__ == "__main__":
    main()
