"""The pictures of demo.sh, and how long its stages took. The table of numbers is demo.table's.

    python -m demo.report --features HELDOUT_FEATURES --samples SAMPLES --times TIMES --out PICTURE.png
        --composed SAMPLES --sources DIGIT.png DIGIT.png --composed-out PICTURE.png

The first picture shows held-out digits, their VAE reconstructions, and samples: sample i was drawn from the code of
held-out row i. The second shows samples from composed codes, 12 per row, between the two digits they are composed of.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.digits import load_split
from dlc.features import Features
from dlc.images import image_grid, to_uint8
from dlc.vae import decode, load_vae

COLUMNS = 20  # of the picture: two per digit
COMPOSED = 12  # codes per pair of weights


def parse_args():
    parser = argparse.ArgumentParser(description="Print the demo's times and draw its pictures.")
    parser.add_argument("--features", required=True, help="read the features of the held-out digits from here")
    parser.add_argument("--samples", required=True, help="read the samples (sequential codes) from this --sample-dir")
    parser.add_argument("--times", required=True, help="read lines of 'seconds stage' from this file")
    parser.add_argument("--out", required=True, help="write this PNG: digits, reconstructions, samples")
    parser.add_argument("--composed", required=True, help="read the samples from composed codes from this --sample-dir")
    parser.add_argument("--sources", nargs=2, required=True, help="the two digits they are composed of")
    parser.add_argument("--composed-out", required=True, help="write this PNG: composed samples between their sources")
    return parser.parse_args()


def read_samples(directory):
    (npz,) = Path(directory).glob("*.npz")
    with np.load(npz) as archive:
        return archive["arr_0"]


def draw_composed(samples, sources, path):
    """Draw COMPOSED samples per row, between the two images they are composed of."""
    rows = samples.reshape(-1, COMPOSED, *samples.shape[1:])
    first, last = (
        np.broadcast_to(np.array(Image.open(source)), (len(rows), 1, *samples.shape[1:])) for source in sources
    )
    image_grid(np.concatenate([first, rows, last], axis=1).reshape(-1, *samples.shape[1:]), COMPOSED + 2).save(path)


def main():
    args = parse_args()
    features = Features(args.features)
    rows = np.arange(features.count)
    labels = features.labels.gather(rows)  # folders 0 to 9, so the class index is the digit
    reals, real_labels = load_split("heldout")
    order = np.argsort(real_labels, kind="stable")  # the listing goes class by class
    reals = reals[order]
    assert (real_labels[order] == labels).all()

    vae = load_vae(features.manifest.vae)
    with torch.inference_mode():
        latents = torch.from_numpy(features.latents.gather(rows)).float()
        reconstructions = torch.cat([to_uint8(decode(vae, part)) for part in latents.split(64)]).numpy()
    samples = read_samples(args.samples)

    print("\nstage                          seconds in this run")
    times = [line.split(maxsplit=1) for line in Path(args.times).read_text().splitlines()]
    for seconds, stage in times + [(sum(int(seconds) for seconds, _ in times), "all")]:
        print(f"{stage:30} {seconds:>7}")

    shown = np.concatenate([np.flatnonzero(labels == digit)[: COLUMNS // 10] for digit in range(10)])
    image_grid(np.concatenate([reals[shown], reconstructions[shown], samples[shown]]), COLUMNS).save(args.out)
    draw_composed(read_samples(args.composed), args.sources, args.composed_out)
    print(f"\nlook at {args.out}: held-out digits, reconstructions, samples from their codes")
    print(f"and at {args.composed_out}: samples from codes composed of the two digits beside them")


if __name__ == "__main__":
    main()
