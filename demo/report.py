"""Print how long demo.sh's stages took, draw its pictures, and compare the prior. demo.table compares the images.

    python -m demo.report demo_output --sources DIGIT.png DIGIT.png

demo.png shows held-out images, their VAE reconstructions, and samples: sample i was drawn from the code of held-out row
i. composed.png shows samples from composed codes between the two images they are composed of. prior.png shows samples
for a prior's codes, for the digits above a row for codes whose positions are independent. prior.txt and prior.json
compare bounds on the digits' held-out codes.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from demo.codes import NUM, simple_models
from demo.table import Demo, read_samples
from diffusion.masked import mean_bound
from dlc.data.images import image_grid, read_png, save_png
from dlc.machine.files import write_bytes
from dlc.sampling.prior_draw import newest_prior
from dlc.training.heldout import heldout_bounds
from dlc.weights.load import load_prior, process_of

COLUMNS = 10  # of every picture
DRAWN_ROWS = 4  # of prior.png, for codes that the prior drew


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print the demo's times and draw its pictures.")
    parser.add_argument("folder", type=Path, help="read what demo.sh made, and write its pictures here")
    parser.add_argument(
        "--sources",
        type=Path,
        nargs="+",
        required=True,
        help="the two images that all codes were composed of, or those of each file of composed codes in turn",
    )
    return parser.parse_args()


def draw_heldout(demo: Demo, path: Path) -> None:
    """Held-out images, spread over the classes, above their reconstructions and samples."""
    kinds = {
        "held out": demo.images,
        "by the VAE": demo.reconstructions(),
        "from its code": read_samples(demo.sets("samples")[0]),
    }
    shown = np.linspace(0, len(demo.images) - 1, 2 * COLUMNS).astype(int)
    images = np.concatenate([images[some] for some in (shown[::2], shown[1::2]) for images in kinds.values()])
    save_png(path, image_grid(images, COLUMNS, [*kinds] * 2))


def name_of(path: Path) -> str:
    """What a picture shows, by its path: emoji have a name after their number, digits are in a folder of their own."""
    return path.stem.partition("-")[2] or path.parent.name


def draw_composed(samples: np.ndarray, pairs: list[list[Path]], path: Path) -> None:
    """A row for each file of composed codes, between the two images that its codes are composed of."""
    images, captions = [], []
    for (first, last), row in zip(pairs, np.split(samples, len(pairs))):
        images += [read_png(first), *row[: COLUMNS - 2], read_png(last)]
        captions += [name_of(first), *[""] * (COLUMNS - 2), name_of(last)]
    save_png(path, image_grid(images, COLUMNS, captions=captions))


def draw_prior(demo: Demo, path: Path) -> None:
    """Samples for codes that the prior drew; of the digits, a row for codes of independent positions below."""
    images, words = demo.samples("samples_prior")[: DRAWN_ROWS * COLUMNS], []
    if demo.what == "digits":
        images = np.concatenate([images, demo.samples("samples_simple")[-NUM:][:COLUMNS]])
        words = ["the prior's codes"] * DRAWN_ROWS + ["independent positions"]
    save_png(path, image_grid(images, COLUMNS, words))


def prior_bound(demo: Demo, **condition) -> tuple[float, float]:
    """The prior's bound on held-out codes, at every number of masked tokens, and its standard error, nats per token."""
    model, meta = load_prior(newest_prior(demo.folder / "results_prior"))
    codes = torch.from_numpy(demo.codes)
    bounds = heldout_bounds(model, process_of(meta), codes, torch.arange(len(codes)), model.L, condition)
    return tuple(mean_bound(bounds, model.L))


def compare_priors(demo: Demo) -> None:
    """Write the table of bounds on held-out codes, and print it."""
    simple = {name: float(model.nats(demo.codes).mean()) for name, model in simple_models(demo).items()}
    bounds = {
        "uniform tokens": (math.log(demo.features.V), None),
        "independent positions": (simple["independent"], None),
        "a mixture of 320 products": (simple["mixture"], None),
        "the prior, at most": prior_bound(demo),
        "the prior, told the class, at most": prior_bound(demo, y=torch.from_numpy(demo.labels.astype(np.int64))),
    }
    lines = ["held-out codes, nats per token"]
    for name, (nats, error) in bounds.items():
        lines.append(f"{name:36}{nats:7.3f}" + (f" +- {error:.3f}" if error else ""))
    write_bytes(demo.folder / "prior.txt", ("\n".join(lines) + "\n").encode())
    write_bytes(demo.folder / "prior.json", (json.dumps(bounds, indent=1) + "\n").encode())
    print("", *lines, sep="\n")


def main() -> None:
    args = parse_args()
    demo = Demo(args.folder)

    print("\nstage                          seconds in this run")
    times = [line.split(maxsplit=1) for line in (args.folder / "times.txt").read_text().splitlines()]
    for seconds, stage in times + [(sum(int(seconds) for seconds, _ in times), "all")]:
        print(f"{stage:30} {seconds:>7}")

    draw_heldout(demo, args.folder / "demo.png")
    files = len(list((args.folder / "composed_codes").glob("*.npy")))
    pairs = [args.sources[i : i + 2] for i in range(0, len(args.sources), 2)]
    pairs = pairs if len(pairs) == files else pairs * files
    draw_composed(demo.samples("composed"), pairs, args.folder / "composed.png")
    draw_prior(demo, args.folder / "prior.png")
    if demo.what == "digits":
        compare_priors(demo)
    print(f"\nlook at {', '.join(map(str, sorted(args.folder.glob('*.png'))))}")


if __name__ == "__main__":
    main()
