"""Images per second of extraction: decoding alone, each network alone, both networks, and the whole script.

    python -m benchmarks.extraction --precision bf16

Images are photograph-like JPEGs of 500x375 pixels. The networks, with random weights, are the Stable Diffusion VAE at
256x256 and a ViT-L/14 with registers under a SEM head of L=512, V=256. They share one device.
"""

import argparse
import re
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.record import DEVICE, ON_GPU, flags, flags_of, record, run_script, seconds_of
from dlc.data import kind_dir
from dlc.data.images import open_source
from dlc.data.views import Views, collate, flips_of
from dlc.machine.exact import set_exact_numerics, side_by_side
from dlc.machine.processes import PRECISIONS, cores_per_process, default_num_workers, set_numerics
from dlc.machine.readers import read_ahead
from dlc.nets.encoder import SEMEncoder, save_encoder
from dlc.nets.pixels import PixelEncoder
from dlc.weights.networks import load_encoder, load_vae

DECODED = 10  # times that each image is decoded to measure the rate
SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)


def write_photographs(root: Path, count: int) -> None:
    """Write JPEGs of about 110 kB, as large as ImageNet's, into root/class."""
    random = np.random.default_rng(0)
    (root / "class").mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375))
        pixels = (np.asarray(coarse) + random.normal(0, 12, (375, 500, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"class/{index:06d}.jpg", quality=90)


def write_networks(root: Path, encoder: bool = True) -> None:
    """Write root/vae, of Stable Diffusion's shape, and root/sem, a ViT-L/14 with a SEM head, untrained."""
    from diffusers import AutoencoderKL  # here: not every row of benchmarks.gpu needs it

    torch.manual_seed(0)
    AutoencoderKL(**SD_VAE).save_pretrained(root / "vae")
    if encoder:
        save_encoder(SEMEncoder(), root / "sem")


def prepare(root: Path, args: argparse.Namespace) -> None:
    write_photographs(root / "images", args.images)
    write_networks(root)


def rates_of_the_parts(root: Path, args: argparse.Namespace) -> dict[str, float]:
    """Images per second of decoding, the VAE, the encoder, and both networks."""
    vae, encoder = load_vae(str(root / "vae")), load_encoder(root / "sem")
    source = open_source(root / "images")
    views = Views(source, flips_of("random", len(source), 0), 256, encoder.image_size)
    batches = [list(range(i, min(i + args.batch_size, args.images))) for i in range(0, args.images, args.batch_size)]
    load = lambda batch: collate([views[index] for index in batch])  # noqa: E731
    loader = read_ahead(load, (1 + DECODED) * batches, args.num_workers)
    loaded = [next(loader) for _ in batches]
    rates = {"decoding": DECODED * args.images / seconds_of(partial(deque, loader, 0), time.perf_counter)}

    set_exact_numerics()
    set_numerics(tf32=False, deterministic=True)
    encoder = PixelEncoder(vae, encoder, DEVICE, args.precision, args.compile)
    works = {
        "VAE": lambda batch: [encoder.moments(batch[0], args.batch_size).cpu()],
        "encoder": lambda batch: [encoder.codes(batch[1], args.batch_size).cpu()],
        "both networks": lambda batch: [works[name](batch) for name in ("VAE", "encoder")],
    }
    for name, work in works.items():
        work(loaded[0])
        all_of_them = partial(list, side_by_side(work, loaded, DEVICE))  # in threads, as in extraction
        rates[name] = args.images / seconds_of(all_of_them, time.perf_counter)
    return rates


def rate_of_the_whole(root: Path, args: argparse.Namespace, **environment) -> float:
    """Images per second of the script from its first to its last shard; if there is one shard, as it reports them."""
    shard_size = max(4 * args.batch_size, args.images // 8)
    paths = flags(
        data_path=root / "images", features_path=root / "features", vae=root / "vae", encoder=root / "sem",
        precision=args.precision, batch_size=args.batch_size, shard_size=shard_size, num_workers=args.num_workers,
    )  # fmt: skip
    compile = "--compile" if args.compile else "--no-compile"
    said = run_script("extract_features_withdlc.py", *paths, compile, **environment)
    written = sorted(path.stat().st_mtime for path in kind_dir(root / "features", 256, "features").glob("*.npy"))
    if len(written) == 1:
        return float(re.search(r"([\d.]+) images/s per process", said)[1])
    return (args.images - shard_size) / (written[-1] - written[0])


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--images", "extract this many images", 4096, 96)
    add("--batch-size", "encode this many images per batch", 32, 4)
    add("--num-workers", "use this many data readers", default_num_workers())
    add("--precision", "set the precision of both networks", "fp32", choices=PRECISIONS)
    add("--compile", "compile both networks [on GPUs]", ON_GPU)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        prepare(Path(root), args)
        rates = {**rates_of_the_parts(Path(root), args), "the whole": rate_of_the_whole(Path(root), args)}
    bound = min(rates["decoding"], rates["both networks"])
    rows = [
        {"part": name, "images/s": round(rate, 3), "times the bound": round(rate / bound, 3)}
        for name, rate in rates.items()
    ]
    record(f"extraction-{args.precision}", rows, **vars(args), cores=cores_per_process())


if __name__ == "__main__":
    main()
