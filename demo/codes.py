"""Codes for the demos to compare with: codes that no image has, and for the digits codes of simpler models.

    python -m demo.codes demo_output

writes into that folder, where they are not there yet: shuffled_codes.npy, the held-out codes with the tokens at each
position shuffled among the rows, so that each token occurs as often as before at its position, but the tokens of one
code no longer belong together; and for the digits simple_codes/{model}.npy, drawn from two models of the train codes:
independent positions, by the frequencies of their tokens, and a mixture of 320 such models, fitted by EM.
"""

import argparse
import io
from pathlib import Path

import numpy as np

from demo.table import Demo, read_codes
from dlc.machine.files import write_bytes
from dlc.machine.noise import Stream, permutation

EM_STEPS, SMOOTHING = 60, 0.05
SIMPLE = dict(mixture=320, independent=1)  # components; in the order in which --dlc-dir reads their files
NUM, SEED = 360, 0


def shuffle(codes: np.ndarray) -> np.ndarray:
    """Codes (n, L), each column in another order, which is a function of SEED and the position."""
    orders = [permutation(SEED, Stream.SAMPLE_ORDER, position, len(codes)) for position in range(codes.shape[1])]
    return np.take_along_axis(codes, np.stack(orders, axis=1), axis=0)


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


def simple_models(demo: Demo) -> dict[str, Mixture]:
    """The simpler models of the train codes, by name."""
    codes = read_codes(demo.folder / "features_train")
    return {name: Mixture(codes, demo.features.V, components) for name, components in SIMPLE.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write codes to compare with.")
    parser.add_argument("folder", type=Path, help="read and write in this folder, which demo.sh fills")
    demo = Demo(parser.parse_args().folder)
    draws = {"shuffled_codes": lambda: shuffle(demo.codes)}
    if demo.what == "digits":
        models = simple_models(demo)
        draws |= {f"simple_codes/{name}": lambda model=model: model.draw(NUM) for name, model in models.items()}
    for name, draw in draws.items():
        path, content = demo.folder / f"{name}.npy", io.BytesIO()
        if not path.exists():
            np.save(content, draw().astype(np.uint8))
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, content.getvalue())


if __name__ == "__main__":
    main()
