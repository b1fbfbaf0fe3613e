"""The end of demo.sh: how well samples follow the codes of digits that training never saw, as a table and a picture.

    python -m demo.report --features HELDOUT_FEATURES --samples SAMPLES --times TIMES --out PICTURE.png
        --composed SAMPLES --sources DIGIT.png DIGIT.png --composed-out PICTURE.png

Sample i was drawn for the code of held-out row i. A support vector machine fitted to the real train scans reads the
samples, the real held-out digits and their VAE reconstructions. The second picture has the samples from composed codes,
a row for each 12, between the two digits that the codes are of.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.digits import DigitReader, load_split
from dlc.features import Features
from dlc.images import image_grid, to_uint8
from dlc.vae import decode, load_vae

COLUMNS = 20      # two of each digit in the picture
COMPOSED = 12     # codes composed for each of the weights


def parse_args():
    parser = argparse.ArgumentParser(description="Print the demo's table and draw its picture.")
    parser.add_argument("--features", required=True, help="features of the held-out digits")
    parser.add_argument("--samples", required=True, help="--sample-dir of the sampler, sequential order of codes")
    parser.add_argument("--times", required=True, help="file of lines: seconds, stage")
    parser.add_argument("--out", required=True, help="PNG to write: digits, reconstructions, samples")
    parser.add_argument("--composed", required=True, help="--sample-dir of the samples from composed codes")
    parser.add_argument("--sources", nargs=2, required=True, help="the two digits that those are of")
    parser.add_argument("--composed-out", required=True, help="PNG to write: composed samples between their sources")
    return parser.parse_args()


def read_samples(directory):
    (npz,) = Path(directory).glob("*.npz")
    with np.load(npz) as archive:
        return archive["arr_0"]


def draw_composed(samples, sources, path):
    """A row for each COMPOSED samples, between the two images that they were composed of."""
    rows = samples.reshape(-1, COMPOSED, *samples.shape[1:])
    first, last = (np.broadcast_to(np.array(Image.open(source)), (len(rows), 1, *samples.shape[1:]))
                   for source in sources)
    image_grid(np.concatenate([first, rows, last], axis=1).reshape(-1, *samples.shape[1:]), COMPOSED + 2).save(path)


def main():
    args = parse_args()
    features = Features(args.features)
    rows = np.arange(features.count)
    labels = features.labels.gather(rows)                   # folders 0 to 9, so the class index is the digit
    reals, real_labels = load_split("heldout")
    order = np.argsort(real_labels, kind="stable")          # an ImageFolder lists class by class
    reals = reals[order]
    assert (real_labels[order] == labels).all()

    vae = load_vae(features.manifest.vae)
    with torch.inference_mode():
        latents = torch.from_numpy(features.latents.gather(rows)).float()
        reconstructions = torch.cat([to_uint8(decode(vae, part)) for part in latents.split(64)]).numpy()
    samples = read_samples(args.samples)

    read = DigitReader()
    print("\nstage                          seconds, this run")
    times = [line.split(maxsplit=1) for line in Path(args.times).read_text().splitlines()]
    for seconds, stage in times + [(sum(int(seconds) for seconds, _ in times), "all")]:
        print(f"{stage:30} {seconds:>7}")
    print(f"\nread as their own digit by a classifier of real ones ({features.count} held out)")
    for name, images in (("real held-out digits", reals), ("their VAE reconstructions", reconstructions),
                         ("samples from their codes", samples)):
        print(f"{name:30} {(read(images) == labels).mean():7.3f}")

    shown = np.concatenate([np.flatnonzero(labels == digit)[:COLUMNS // 10] for digit in range(10)])
    image_grid(np.concatenate([reals[shown], reconstructions[shown], samples[shown]]), COLUMNS).save(args.out)
    draw_composed(read_samples(args.composed), args.sources, args.composed_out)
    print(f"\nlook at {args.out}: held-out digits, reconstructions, samples from their codes")
    print(f"and at {args.composed_out}: samples from codes composed of the digits to their left and right")


if __name__ == "__main__":
    main()
