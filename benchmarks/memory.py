"""Memory of training by card: how many images a GPU holds at once, and the flags to type. Needs no GPU.

    python -m benchmarks.memory

A weight takes 16 bytes with AdamW's two moments and the EMA, and 4 more for its gradient where micro-batches accumulate
it. What a block keeps for its backward pass is what torch's partitioner chooses under bf16 autocast.
"""

from dataclasses import replace

import torch
import torch._functorch.config as partitioner
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from benchmarks.record import flags_of, record
from benchmarks.roofline import L, V
from dlc.machine.processes import ACTIVATION_BUDGET
from models import DiT_models, ModelSpec

CARDS, RESERVE = (24, 48, 80), 3  # GiB; the reserve is for CUDA, kernels' buffers and the allocator's fragments
GIB = 2**30


def compiled_bytes(block: torch.nn.Module, *inputs) -> int:
    """Bytes that a compiled block keeps for its backward pass of a batch: inputs (n, ...). It is not run."""
    kept = {}

    def forward(graph, _):
        of_batch = set()  # the rest are weights, or copies of them
        for node in graph.graph.nodes:
            given = node.op == "placeholder" and node.meta["val"].shape in [one.shape for one in inputs]
            if given or of_batch.intersection(node.all_input_nodes):
                of_batch.add(node)
        outputs = graph.graph.find_nodes(op="output")[0].args[0]
        values = [node.meta["val"] for node in outputs]
        for node, value in list(zip(outputs, values))[1:]:
            if node in of_batch:
                kept[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()

        def run(_):
            return [torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) for value in values]

        run._boxed_call = True
        return run

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=forward,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(block, dynamic=False, backend=backend)(*inputs)
    return sum(kept.values())


def eager_bytes(model: torch.nn.Module, n: int) -> int:
    """Bytes that autograd saves of a batch of n latents."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    latents, codes = torch.randn(n, 4, 32, 32), torch.zeros(n, model.sem_embedder.L, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = model(latents, torch.zeros(n), codes)
    del out
    return sum(saved.values())


class Memory:
    """Of training a DiTSEM. Called with a number of images, it gives the bytes that their activations take."""

    def __init__(self, spec: ModelSpec, **sizes):
        with torch.device("meta"):
            self.weights = sum(weight.numel() for weight in spec(**sizes).parameters())
        one, self.depth = replace(spec, depth=1)(**sizes), spec.depth
        self.block, (_, self.tokens, self.width) = one.blocks[0], one.pos_embed.shape
        one.blocks = torch.nn.ModuleList()
        self.outside = eager_bytes(one, 2) - eager_bytes(one, 1)  # per image

    def __call__(self, n: int) -> int:
        x, c = torch.empty(n, self.tokens, self.width), torch.empty(n, self.width)
        return n * self.outside + self.depth * compiled_bytes(self.block, x.requires_grad_(), c.requires_grad_())

    def fits(self, card: int, batch: int) -> dict:
        """The largest part of a batch that a card of so many GiB holds, halving it, with the flags for it."""
        parts = 1
        while True:
            needed = self.weights * (16 if parts == 1 else 20) + self(batch // parts)
            if needed / GIB <= card - RESERVE or parts == batch:
                break
            parts *= 2
        return {"images at once": batch // parts, "GiB": needed / GIB + RESERVE, "flags": f"--grad-accum {parts}"}


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--models", "compute these models", [f"DiTSEM-{size}/2" for size in "S B L XL".split()])
    add("--batch", "hold this many images per GPU and step, a power of 2", 256)
    args = parser.parse_args()
    partitioner.activation_memory_budget, rows = ACTIVATION_BUDGET, []
    for model in args.models:
        memory = Memory(DiT_models[model], L=L, V=V)
        rows += [{"model": model, "card, GiB": card, **memory.fits(card, args.batch)} for card in CARDS]
    record("memory", rows, batch=args.batch)


if __name__ == "__main__":
    main()
