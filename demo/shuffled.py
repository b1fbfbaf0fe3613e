"""The demo's negative control: codes that no image has.

    python -m demo.shuffled FEATURES CODES.npy

writes the codes of FEATURES with the tokens at each position shuffled among the rows. Each token then occurs as often
as before at its position, but the tokens of one code no longer belong together.
"""

import argparse
import io
from pathlib import Path

import numpy as np

from dlc.data import Features
from dlc.machine.files import write_new
from dlc.machine.noise import Stream, permutation

SEED = 0


def shuffle(codes: np.ndarray) -> np.ndarray:
    """Codes (n, L), each column in another order, which is a function of SEED and the position."""
    orders = [permutation(SEED, Stream.SAMPLE_ORDER, position, len(codes)) for position in range(codes.shape[1])]
    return np.take_along_axis(codes, np.stack(orders, axis=1), axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Shuffle the tokens of codes, position by position.")
    parser.add_argument("features", help="read codes from these features")
    parser.add_argument("out", help="write the shuffled codes (n, L) to this .npy")
    args = parser.parse_args()
    features = Features(args.features)
    buffer = io.BytesIO()
    np.save(buffer, shuffle(features.codes.gather(np.arange(features.count))))
    write_new(Path(args.out), buffer.getvalue(), "OUT")
    print(f"{features.count} codes of {features.L} shuffled tokens in {args.out}")


if __name__ == "__main__":
    main()
