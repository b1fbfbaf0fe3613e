"""What kernels and steps reach on a card: the rows of benchmarks.gpu that need no script and no diffusers.

Each function takes its own arguments and the `Bench` of benchmarks/gpu.py, and returns columns of its row. `expected`
follows from the roofline, where the card's data sheet is known. On a CPU all sizes are tiny.
"""

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import roofline, steps
from benchmarks.checks import Unavailable, difference
from benchmarks.record import DEVICE, ON_GPU, median_seconds
from benchmarks.roofline import ATTENTION, MEMORY
from dlc.machine.processes import autocast
from dlc.sampling.latents import CudaGraphs, fuse_gelu
from dlc.training.update import update_ema
from train_diffusion import draws

REPEATS = 20 if ON_GPU else 1
N = 64 if ON_GPU else 2  # latents of a pass, where a row names no other number
BACKENDS = {name: getattr(SDPBackend, name + "_ATTENTION", None) for name in ("any", "CUDNN", "FLASH", "EFFICIENT")}


def row(value: float, unit: str, expected: float | None = None, **more) -> dict:
    return {"value": value, "unit": unit, "expected": expected, **more}


def copying(bench) -> dict:
    """TB/s, read and written. Expected: 90% of the data sheet."""
    one = torch.empty(2**30 if ON_GPU else 2**20, device=DEVICE)
    two = torch.empty_like(one)
    rate = 2 * one.nbytes / median_seconds(lambda: two.copy_(one), REPEATS)
    return row(rate / 1e12, "TB/s", bench.card and 0.9 * bench.card.memory / 1e12)


def product(inputs: float, outputs: float, dtype: torch.dtype, gradient: bool, bench) -> dict:
    """TFLOP/s of a linear layer of a block, its sizes in widths, or of its weight's gradient."""
    width, tokens = bench.roofline.spec.hidden_size, N * roofline.T
    sizes = [tokens, int(inputs * width), int(outputs * width)]
    m, k, n = (sizes[1], sizes[0], sizes[2]) if gradient else sizes
    a, b = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(k, n, device=DEVICE, dtype=dtype)
    rate = 2 * m * k * n / median_seconds(lambda: a @ b, REPEATS)
    expected = bench.card and bench.card.flops * bench.card.reached * (0.5 if dtype == torch.float32 else 1) / 1e12
    return row(rate / 1e12, "TFLOP/s", expected)


def attention(backend: str, bench) -> dict:
    """TFLOP/s of attention forward and backward, of a block's heads; heads are not counted as padded."""
    heads, head = bench.roofline.spec.num_heads, bench.roofline.spec.hidden_size // bench.roofline.spec.num_heads
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    qkv = torch.randn(N, roofline.T, 3, heads, head, device=DEVICE, dtype=dtype, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = None

    def both():
        nonlocal out
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, qkv, torch.ones_like(out))

    try:
        with sdpa_kernel(BACKENDS[backend]) if BACKENDS[backend] else contextlib.nullcontext():
            seconds = median_seconds(both, REPEATS)
    except RuntimeError as error:
        raise Unavailable(f"refused: {str(error)[:90]}") from None
    flops, padded = 4 * N * heads * roofline.T**2 * head, -(-head // 32) * 32 / head
    expected = bench.card and 3.5 / 4 / padded * bench.card.flops * bench.card.reached * ATTENTION / 1e12
    return row(3.5 * flops / seconds / 1e12, "TFLOP/s", expected, said=out.grad_fn.name())


def step(work: str, way: str, precision: str, bench) -> dict:
    """Milliseconds of a row of benchmarks/steps.py, in turns with the others of that precision."""
    rows = steps.ROWS if precision == "bf16" else [(steps.TRAINING, steps.COMPILED)]
    made = partial(steps.Steps, bench.args.model, N, precision)
    table = bench.once(f"steps in {precision}", lambda: steps.measure(made(), rows, REPEATS))
    found = next(one for one in table if (one["work"], one[""]) == (work, way))
    parts = bench.roofline.training(N) if work == steps.TRAINING else bench.roofline.sampling(N // 2)
    passes = {steps.TRAINING: 1, steps.FORWARD: 1, steps.SAMPLING: 2}[work]
    expected = 1e3 * passes * sum(parts.values()) if bench.card and way == steps.COMPILED else None
    said = None if len(rows) == 1 else f"times the first: {found['times the first']}"
    return row(1e3 * found["seconds"], "ms", expected, said=said, **{"differs by": found["differs by"]})


def whole_step(checkpointing: bool, options: dict, bench) -> dict:
    """Images per second of training steps with the activation budget, and the memory that they take."""
    batch = bench.args.batch
    made = steps.Steps(bench.args.model, batch, "bf16", **options)
    made.model.train().set_grad_checkpointing(checkpointing)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    rate = batch / median_seconds(partial(made.train, steps.COMPILED), min(REPEATS, 8))
    memory = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    expected = bench.card and batch / sum(bench.roofline.training(batch).values()) * (0.75 if checkpointing else 1)
    return row(rate, "images/s", expected, **{"memory GiB": memory}, **bench.shares(3 * rate, "bf16"))


def part_of_a_step(what: str, bench) -> dict:
    """Milliseconds of AdamW, the EMA, the random numbers of 256 latents, or their codes and the table's gradient."""
    made, x = steps.Steps(bench.args.model, N, "fp32"), torch.zeros(4 * N, 4, 32, 32, device=DEVICE)
    indices, codes = torch.arange(4 * N, device=DEVICE), torch.randint(roofline.V, (4 * N, roofline.L), device=DEVICE)
    for weight in made.weights:
        weight.grad = torch.zeros_like(weight)
    average, skipped = partial(update_ema, made.averages, made.weights, 0.9999), torch.zeros((), device=DEVICE).bool()
    per_byte = bench.roofline.weights / bench.roofline.card.memory / MEMORY
    work, expected = {
        "AdamW": (made.ours.step, 28 * per_byte),
        "EMA": (average, 12 * per_byte),
        "EMA as in fp16": (partial(average, skipped), 12 * per_byte),
        "random numbers": (partial(draws, 0, indices, x, made.diffusion, 0.1), 0.6e-3),
        "code table": (
            lambda: made.model.sem_embedder(codes).sum().backward(), bench.roofline.training(4 * N)["code table"]),
    }[what]  # fmt: skip
    return row(1e3 * median_seconds(work, REPEATS), "ms", bench.card and 1e3 * expected)


def denoising(images: int, how: str, bench) -> dict:
    """Images per second of 250 guided steps of the network alone, compiled, by CUDA graphs, or with GELU's epilogue."""
    if how == "CUDA graphs" and not ON_GPU:
        raise Unavailable("CUDA graphs need a GPU")
    made, width = steps.Steps(bench.args.model, 2, "bf16"), bench.roofline.spec.hidden_size
    inputs = [torch.randn(*sizes, device=DEVICE) for sizes in ((2 * images, 4, 32, 32), (width,), (2 * images, width))]
    with torch.inference_mode(), autocast(DEVICE, "bf16"):
        wanted, denoise = made.drawing.denoise(*inputs), made.drawing.denoise
        if how == "GELU in the epilogue":
            torch._dynamo.reset()
            fuse_gelu(made.drawing)
        elif how == "CUDA graphs":
            denoise = CudaGraphs(denoise)
        differs = difference([denoise(*inputs)], [wanted])
        rate = images / median_seconds(lambda: denoise(*inputs), REPEATS) / 250
    parts = bench.roofline.sampling(images) if bench.card else {}
    if how == "GELU in the epilogue" and parts:
        parts["elementwise"] *= 13.1 / 21.1
    return row(rate, "images/s", 1 / 250 * images / sum(parts.values()) if parts else None,
               **{"differs by": differs}, **bench.shares(500 * rate, "bf16"))  # fmt: skip
