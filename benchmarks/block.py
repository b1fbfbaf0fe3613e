"""Where a transformer block's time goes on one CPU thread, and what of it could be saved at most.

    python -m benchmarks.block
    python -m benchmarks.block --precision bf16         # on CPUs that have products of 16 bits

Times are of the thread's own CPU time, the best of several rounds in which all parts take turns: on a machine shared
with other work they vary by a few percent, where times of the clock vary by a factor. `of the peak` is relative to a
product of two 2048 x 2048 matrices. The row `products at the peak` is what would be left if attention's and the linear
layers' products ran at that rate and all else took no time: no way of computing the block is faster in that precision.
Training's rows are a block's forward and backward pass, three times the products, and AdamW and EMA of its weights.
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F

from benchmarks.record import record
from dlc.machine.processes import PRECISIONS, autocast, compile_options
from dlc.training.update import update_ema
from models import DiT_models

BLOCK, HALVES, BOUND = "block", "block, two batches of N", "products at the peak"
COMPILED, OURS = "block, compiled by torch's defaults", "block, compiled as in sampling"
TRAINING, TRAINING_COMPILED = "forward and backward", "forward and backward, compiled as in training"
UPDATE = "AdamW and EMA"
PEAK_SIZE = 2048


def training_parts(block, compiled, x, c):
    """The rows of a training step: name to function."""
    inputs = [value.clone().requires_grad_() for value in (x, c)]
    weights = [weight.detach().clone().requires_grad_() for weight in block.parameters()]
    averages, optimizer = [weight.detach().clone() for weight in weights], torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)

    def passes(module):
        with torch.inference_mode(False), torch.enable_grad():
            out = module(*inputs)
            return torch.autograd.grad(out, [*inputs, *module.parameters()], torch.ones_like(out))

    def update():
        with torch.inference_mode(False):
            optimizer.step()
            update_ema(averages, weights, 0.999)

    return {TRAINING: lambda: passes(block), TRAINING_COMPILED: lambda: passes(compiled), UPDATE: update}


def parts_of(block, x, c, precision):
    """What to time: name to function and FLOPs of its products."""
    (n, tokens, width), heads = x.shape, block.attn.num_heads
    hidden, rows = block.mlp.fc1.out_features, n * tokens
    flat, mlp = x.flatten(0, 1), torch.randn(n, tokens, hidden)
    q = torch.randn(n, heads, tokens, width // heads)
    square = torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=PRECISIONS[precision])
    weight, bias = block.mlp.fc1.weight.detach(), block.mlp.fc1.bias.detach()
    mlp, q = mlp.to(square.dtype), q.to(square.dtype)  # as they are under autocast
    transposed, compiled, ours = weight.t().contiguous(), copy.deepcopy(block), copy.deepcopy(block)
    compiled.compile(dynamic=False)
    ours.compile(dynamic=False, **compile_options(x.device))
    attention = 4 * n * tokens * tokens * width
    linear = {name: 2 * rows * size for name, size in (
        ("qkv", 3 * width * width), ("proj", width * width), ("fc1", width * hidden), ("fc2", width * hidden)
    )}  # fmt: skip
    whole = sum(linear.values()) + attention
    parts = {
        BLOCK: (lambda: block(x, c), whole),
        COMPILED: (lambda: compiled(x, c), whole),
        OURS: (lambda: ours(x, c), whole),
        HALVES: (lambda: [block(*half) for half in zip(x.chunk(2), c.chunk(2))], whole),
        "qkv": (lambda: block.attn.qkv(x), linear["qkv"]),
        "attention": (lambda: F.scaled_dot_product_attention(q, q, q), attention),
        "proj": (lambda: block.attn.proj(x), linear["proj"]),
        "fc1": (lambda: block.mlp.fc1(x), linear["fc1"]),
        "fc1, weight transposed before": (lambda: torch.addmm(bias, flat, transposed), linear["fc1"]),
        "GELU": (lambda: block.mlp.act(mlp), None),
        "fc2": (lambda: block.mlp.fc2(mlp), linear["fc2"]),
        "adaLN": (lambda: block.adaLN_modulation(c), None),
        "norms, shifts, scales and gates": (
            lambda: [x + c.unsqueeze(1) * (block.norm1(x) * (1 + c.unsqueeze(1)) + c.unsqueeze(1)) for _ in range(2)],
            None,
        ),
        "large product": (lambda: square @ square, 2 * PEAK_SIZE**3),
    }
    for name, function in training_parts(block, ours, x, c).items():
        parts[name] = function, None if name == UPDATE else 3 * whole
    if precision == "fp32" and torch.backends.mkldnn.is_available():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        parts["fc1, weight packed by oneDNN"] = (
            lambda: torch.ops.mkldnn._linear_pointwise(flat, reordered, bias, "none", [], ""),
            linear["fc1"],
        )
    return parts


@torch.inference_mode()
def best_times(parts, rounds, precision):
    """Seconds of this thread by name."""
    best = {}
    for _ in range(rounds + 1):  # the first compiles
        for name, (function, _) in parts.items():
            start = time.thread_time()
            with autocast(torch.device("cpu"), precision):
                function()
            seconds = time.thread_time() - start
            best[name] = min(best.get(name, seconds), seconds)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiTSEM-S/2", help="name in DiT_models [%(default)s]")
    parser.add_argument("--batch", type=int, default=8, help="samples, null halves included [%(default)s]")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="precision of the products [%(default)s]"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds [%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DiT_models[args.model]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(args.batch, *model.pos_embed.shape[1:])
    parts = parts_of(model.blocks[0], x, torch.randn(args.batch, x.shape[2]), args.precision)
    best = best_times(parts, args.rounds, args.precision)
    peak, whole = parts["large product"][1] / best["large product"], best[BLOCK]
    rows = [(name, seconds, parts[name][1]) for name, seconds in best.items() if name != "large product"]
    rows.append((BOUND, parts[BLOCK][1] / peak, parts[BLOCK][1]))
    record(
        "block" if args.precision == "fp32" else f"block-{args.precision}",
        [
            {
                "": name,
                "ms": 1000 * seconds,
                "of the block": seconds / whole,
                "of the peak": flops / seconds / peak if flops else None,
            }
            for name, seconds, flops in rows
        ],
        model=args.model,
        batch=args.batch,
        peak_gflops=peak / 1e9,
    )


if __name__ == "__main__":
    main()
