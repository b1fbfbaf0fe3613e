"""The stages of demo.sh about the prior: codes of simpler models to compare with, bounds on held-out codes, a picture.

    python -m demo.prior codes demo_output
    python -m demo.prior report demo_output

`codes` draws codes of two simpler models of the train codes: independent positions, by the frequencies of their tokens,
and a mixture of 320 such models, fitted by EM. `report` compares bounds on the held-out codes and writes prior.txt,
prior.json and prior.png; the images are compared by demo.table.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from demo.table import Demo, read_codes
from diffusion.masked import mean_bound
from dlc.data import Features
from dlc.data.images import image_grid, save_png
from dlc.machine.files import write_bytes
from dlc.sampling.prior_draw import newest_prior
from dlc.training.heldout import heldout_bounds
from dlc.weights.load import load_prior, process_of

EM_STEPS, SMOOTHING = 60, 0.05
SIMPLE = dict(mixture=320, independent=1)  # components; in the order in which --dlc-dir reads their files
NUM, GRID_COLUMNS = 360, 10


class Mixture:
    """A mixture of K products of independent positions, fitted to codes (n, L) int64; K = 1 is independent positions.

    seed: of the start, where each code goes to the nearest of K of them.
    """

    def __init__(self, codes: np.ndarray, V: int, K: int, seed: int = 0):
        self.V = V
        centres = codes[np.random.default_rng(seed).choice(len(codes), K, replace=False)]
        share = np.zeros((len(codes), K))
        share[np.arange(len(codes)), (codes[:, None] != centres).sum(axis=2).argmin(axis=1)] = 1
        for _ in range(1 if K == 1 else EM_STEPS):
            self.weights = (share.sum(axis=0) + SMOOTHING) / (share + SMOOTHING / len(codes)).sum()
            counts = (share.T @ self._one_hot(codes)).reshape(K, codes.shape[1], V) + SMOOTHING
            self.log_p = np.log(counts / counts.sum(axis=2, keepdims=True))  # (K, L, V)
            joint = self._joint(codes)
            share = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))

    def _one_hot(self, codes):
        return np.eye(self.V)[codes].reshape(len(codes), -1)  # (n, L*V)

    def _joint(self, codes):
        """log p(code, component), (n, K)."""
        return self._one_hot(codes) @ self.log_p.reshape(len(self.log_p), -1).T + np.log(self.weights)

    def nats(self, codes: np.ndarray) -> np.ndarray:
        """-log p(code) / L, (n,): exact."""
        return -np.logaddexp.reduce(self._joint(codes), axis=1) / codes.shape[1]

    def draw(self, n: int, seed: int = 0) -> np.ndarray:
        """Codes (n, L)."""
        rng = np.random.default_rng(seed)
        component = rng.choice(len(self.weights), n, p=self.weights / self.weights.sum())
        bounds = np.exp(self.log_p).cumsum(axis=2)[component]  # (n, L, V)
        u = rng.random((*bounds.shape[:2], 1)) * bounds[..., -1:]
        return (bounds < u).sum(axis=2)


def simple_models(folder: Path) -> dict[str, Mixture]:
    """The simpler models of the train codes, by name."""
    codes, V = read_codes(folder / "features_train"), Features(folder / "features_train").V
    return {name: Mixture(codes, V, components) for name, components in SIMPLE.items()}


def draw_simple_codes(folder: Path) -> None:
    """Write NUM codes of each of the simpler models."""
    out = folder / "simple_codes"
    out.mkdir(exist_ok=True)
    for name, model in simple_models(folder).items():
        np.save(out / f"{name}.npy", model.draw(NUM).astype(np.uint8))


def prior_bound(results: Path, codes: np.ndarray, **condition) -> tuple[float, float]:
    """A prior's bound on codes, at every number of masked tokens, and its standard error, in nats per token."""
    model, meta = load_prior(newest_prior(results))
    codes = torch.from_numpy(codes)
    bounds = heldout_bounds(model, process_of(meta), codes, torch.arange(len(codes)), model.L, condition)
    return tuple(mean_bound(bounds, model.L))


def report(folder: Path) -> None:
    """Write the table of bounds and the picture, and print the table."""
    demo, models, results = Demo(folder), simple_models(folder), folder / "results_prior"
    labels = torch.from_numpy(demo.labels.astype(np.int64))
    bounds = {
        "uniform tokens": (math.log(demo.features.V), None),
        "independent positions": (float(models["independent"].nats(demo.codes).mean()), None),
        "a mixture of 320 products": (float(models["mixture"].nats(demo.codes).mean()), None),
        "the prior, at most": prior_bound(results, demo.codes),
        "the prior, told the class, at most": prior_bound(results, demo.codes, y=labels),
    }
    lines = ["held-out codes, nats per token"]
    for name, (nats, error) in bounds.items():
        lines.append(f"{name:36}{nats:7.3f}" + (f" +- {error:.3f}" if error else ""))
    write_bytes(folder / "prior.txt", ("\n".join(lines) + "\n").encode())
    write_bytes(folder / "prior.json", (json.dumps(bounds, indent=1) + "\n").encode())
    independent = demo.samples("samples_simple")[-NUM:]
    images = np.concatenate([demo.samples("samples_prior")[: 4 * GRID_COLUMNS], independent[:GRID_COLUMNS]])
    words = ["the prior's codes"] * 4 + ["independent positions"]
    save_png(folder / "prior.png", image_grid(images, GRID_COLUMNS, words))
    print("", *lines, "", sep="\n")
    print(f"look at {folder / 'prior.png'}: digits for codes that the prior drew; bottom row: independent positions")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a prior's bound on codes with that of simpler models.")
    parser.add_argument("command", choices=["codes", "report"], help="draw the simpler models' codes, or report")
    parser.add_argument("folder", type=Path, help="read and write in this folder, which demo.sh fills")
    args = parser.parse_args()
    (draw_simple_codes if args.command == "codes" else report)(args.folder)


if __name__ == "__main__":
    main()
