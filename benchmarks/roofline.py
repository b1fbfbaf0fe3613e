"""How fast a card can train and sample a DiTSEM, computed from what a step must do. Needs no GPU, and measures nothing.

    python -m benchmarks.roofline

benchmarks/README.md explains each part. The rates are assumed: others measured on an H100 that products of these sizes
reach 65% of its data sheet, attention 47% of that, and kernels that read and write memory 78%.
"""

from dataclasses import dataclass

import torch

from benchmarks.record import flags_of, forward_flops, record
from models import DiT_models

T, L, V = 256, 512, 256  # tokens of 256 x 256 pixels by patches of 2, code positions, tokens per position
ATTENTION, MEMORY = 0.47, 0.78
LAUNCHES = {"train": 0.28e-3, "sample": 0.03e-3}  # seconds per block of what the rows above leave out, assumed


@dataclass(frozen=True)
class Card:
    """Of the data sheet, per second: dense 16-bit FLOPs, bytes of memory, bytes to the node's other GPUs, one way.
    reached: the share of these FLOPs that products of a block reach."""

    flops: float
    memory: float
    links: float
    reached: float = 0.65


CARDS = {  # by a part of the name: of SXM cards, but for those that are named before
    "H100 PCIe": Card(756.5e12, 2.0e12, 64e9),
    "H100 NVL": Card(835.5e12, 3.9e12, 300e9),
    "H100": Card(989.4e12, 3.35e12, 450e9),
    "H200": Card(989.4e12, 4.8e12, 450e9),
    "A100": Card(312e12, 2.04e12, 300e9, 0.7),
    "RTX 4090": Card(165.2e12, 1.01e12, 32e9, 0.85),
}


def card_of(name: str) -> Card | None:
    """The card of a device's name; None if its data sheet is not here."""
    return next((card for part, card in CARDS.items() if part in name), None)


class Roofline:
    """Seconds of the parts of a step of one of several GPUs of a node."""

    def __init__(self, model: str, card: Card, gpus: int = 1, sharded: bool = False):
        with torch.device("meta"):
            built = DiT_models[model](L=L, V=V)
        self.spec, self.card, self.gpus, self.sharded = DiT_models[model], card, gpus, sharded
        self.weights = sum(weight.numel() for weight in built.parameters())
        self.table, self.flops = built.sem_embedder.embedding_table.numel(), forward_flops(built, 32)
        self.linear = 12 * self.spec.hidden_size**2 * self.spec.depth

    def passes(self, n: int, linear: float, attention: float, elementwise: float) -> dict[str, float]:
        """The parts that grow with n latents, given in forward passes, and in passes over the tokens of a block."""
        width, depth, head = self.spec.hidden_size, self.spec.depth, self.spec.hidden_size // self.spec.num_heads
        products = self.card.flops * self.card.reached
        padded = -(-head // 32) * 32 / head
        return {
            "linear layers": linear * 2 * T * self.linear * n / products,
            "attention": attention * 4 * T * T * width * depth * n * padded / (products * ATTENTION),
            "elementwise": elementwise * 2 * n * T * width * depth / (self.card.memory * MEMORY),
        }

    def training(self, n: int) -> dict[str, float]:
        """Seconds of each part of a training step of n images per GPU."""
        memory, parts = self.card.memory * MEMORY, self.passes(n, 3, 1 + 2.5 * 6 / 5, 86)
        update = 40 * self.weights / (self.gpus if self.sharded else 1)
        copies = 8 * self.weights if self.gpus > 1 and not self.sharded else 0  # DDP's, into its buckets
        parts["update"] = (update + 12 * self.linear + copies) / memory
        parts["code table"] = 4 * (n * L * self.spec.hidden_size + 4 * self.table) / memory
        parts["links"] = 8 * self.table * (1 - 1 / self.gpus) / self.card.links
        parts["the rest"] = LAUNCHES["train"] * self.spec.depth
        return parts

    def sampling(self, n: int) -> dict[str, float]:
        """Seconds of each part of a guided step of sampling of n images."""
        return {**self.passes(2 * n, 1, 1, 21.1), "the rest": LAUNCHES["sample"] * self.spec.depth}

    def share(self, passes_per_second: float) -> float:
        """Of the data sheet's FLOPs, with so many forward passes per second, each backward pass counted as two."""
        return passes_per_second * self.flops / self.card.flops

    def gigabytes(self) -> float:
        """GiB of weights, gradients, moments and EMA per GPU, without activations."""
        gathered = 2 * self.linear + 4 * (self.weights - self.linear) if self.sharded else 0
        return (20 * self.weights / (self.gpus if self.sharded else 1) + gathered) / 2**30


def main() -> None:
    flags_of(__doc__)[0].parse_args()
    rows = []
    one = [(name, 1, False) for name in ("H100", "H200", "A100", "RTX 4090")]
    for name, gpus, sharded in [*one, *(("H100", gpus, sharded) for gpus in (4, 8) for sharded in (False, True))]:
        roofline = Roofline("DiTSEM-XL/2", CARDS[name], gpus, sharded)
        for work, n in ("training", 256 // gpus), *([("sampling", 64)] if gpus == 1 else []):
            parts = roofline.training(n) if work == "training" else roofline.sampling(n)
            seconds = sum(parts.values())
            per_image, steps = (3, 1) if work == "training" else (2, 250)
            how = f"{gpus} x {name}" + (", FSDP" if sharded else ", DDP" if gpus > 1 else "")
            rows.append({
                "cards": how, "": f"{work}, {n} images per GPU", **dict.fromkeys(roofline.training(1)),
                **{part: 1e3 * value for part, value in parts.items()}, "ms": 1e3 * seconds,
                "images/s per GPU": n / seconds / steps, "of the data sheet": roofline.share(per_image * n / seconds),
                "weights GiB": roofline.gigabytes() if work == "training" else None,
            })  # fmt: skip
    record("roofline", rows)


if __name__ == "__main__":
    main()
