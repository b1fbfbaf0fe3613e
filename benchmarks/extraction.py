"""Images per second of extraction: decoding alone, each network alone, both networks, and the whole script.

    python -m benchmarks.extraction --precision bf16

The images are photograph-like JPEGs of 500x375 pixels. The networks are the Stable Diffusion VAE at 256x256 and a
ViT-L/14 with registers under a SEM head of L=512, V=256, both with random weights, on which a rate does not depend. The
networks share one device, so the whole is bounded by the slower of decoding and both networks. On a CPU, decoding
competes with them for the cores.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.record import record
from dlc.data import kind_dir
from dlc.data.images import Views, collate, flips_of
from dlc.machine.processes import PRECISIONS, cores_per_process, default_num_workers, set_numerics
from dlc.nets.encoder import SEMEncoder, load_encoder, save_encoder
from dlc.nets.pixels import PixelEncoder, encoding_pool, encoding_threads, in_order, set_exact_numerics
from dlc.nets.vae import load_vae

DECODED = 10  # times that each image is decoded to measure the rate
ON_GPU = torch.cuda.is_available()
SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)


def write_photographs(root, count):
    """Write JPEGs of about 110 kB, as large as ImageNet's. Returns their mean size in bytes."""
    random = np.random.default_rng(0)
    (root / "class").mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375))
        noise = random.normal(0, 12, (375, 500, 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(
            root / "class" / f"{index:06d}.jpg", quality=90
        )
    return sum(path.stat().st_size for path in (root / "class").iterdir()) / count


def images_per_second(work, batches, device):
    """The rate of work(batch) over the batches, in threads as in extraction, after one batch to warm up."""
    work(batches[0])
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with encoding_pool(device) as pool:
        for _ in in_order(pool, work, batches, encoding_threads(device)):
            pass
    return sum(len(batch[0]) for batch in batches) / (time.perf_counter() - start)


def rates_of_the_parts(root, args, tf32=False):
    """Images per second of decoding, the VAE, the encoder, and both networks. tf32: which extraction does not use."""
    vae, encoder = load_vae(str(root / "vae")), load_encoder(root / "sem")
    paths = sorted(path.name for path in (root / "images/class").iterdir())
    views = Views(root / "images/class", paths, flips_of("random", len(paths), 0), 256, encoder.image_size)
    batches = [list(range(i, min(i + args.batch_size, args.images))) for i in range(0, args.images, args.batch_size)]
    loader = iter(
        DataLoader(views, batch_sampler=(1 + DECODED) * batches, collate_fn=collate, num_workers=args.num_workers)
    )
    loaded = [next(loader) for _ in batches]
    start = time.perf_counter()
    for _ in loader:
        pass
    rates = {"decoding": DECODED * args.images / (time.perf_counter() - start)}

    set_exact_numerics()
    set_numerics(tf32, deterministic=True)
    device = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
    encoder = PixelEncoder(vae, encoder, device, args.precision, args.compile)

    def vae_alone(batch):
        encoder.moments(batch[1], args.batch_size).cpu()

    def encoder_alone(batch):
        encoder.codes(batch[2], args.batch_size).cpu()

    def both(batch):
        vae_alone(batch)
        encoder_alone(batch)

    for name, work in (("VAE", vae_alone), ("encoder", encoder_alone), ("both networks", both)):
        rates[name] = images_per_second(work, loaded, device)
    return rates


def rate_of_the_whole(root, args):
    """Images per second of the script from its first to its last shard; of a single one, as it reports them."""
    shard_size = max(4 * args.batch_size, args.images // 8)
    result = subprocess.run(
        [
            sys.executable,
            "extract_features_withdlc.py",
            "--data-path",
            root / "images",
            "--features-path",
            root / "features",
            "--vae",
            root / "vae",
            "--encoder",
            root / "sem",
            "--precision",
            args.precision,
            "--batch-size",
            str(args.batch_size),
            "--shard-size",
            str(shard_size),
            "--num-workers",
            str(args.num_workers),
            "--compile" if args.compile else "--no-compile",
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    written = sorted(path.stat().st_mtime for path in kind_dir(root / "features", 256, "features").glob("*.npy"))
    if len(written) == 1:
        return float(re.search(r"([\d.]+) images/s a process", result.stdout)[1])
    return (args.images - shard_size) / (written[-1] - written[0])


def prepare(root, args):
    """Write images and networks with random weights. Returns the images' mean size in bytes."""
    bytes_an_image = write_photographs(root / "images", args.images)
    write_networks(root)
    return bytes_an_image


def write_networks(root, encoder=True):
    """Write root/vae, of Stable Diffusion's shape, and root/sem, a ViT-L/14 with a SEM head, untrained."""
    torch.manual_seed(0)
    AutoencoderKL(**SD_VAE).save_pretrained(root / "vae")
    if encoder:
        save_encoder(SEMEncoder(), root / "sem")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096 if ON_GPU else 96, help="images [4096 on GPUs, 96 on CPUs]")
    parser.add_argument(
        "--batch-size", type=int, default=32 if ON_GPU else 4, help="images per batch [32 on GPUs, 4 on CPUs]"
    )
    parser.add_argument(
        "--num-workers", type=int, default=default_num_workers(), help="data loader workers [%(default)s]"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="precision of both networks [%(default)s]"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=ON_GPU,
        help="torch.compile both networks [only on GPUs]",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        bytes_an_image = prepare(root, args)
        rates = {**rates_of_the_parts(root, args), "the whole": rate_of_the_whole(root, args)}

    bound = min(rates["decoding"], rates["both networks"])
    record(
        f"extraction-{args.precision}",
        [
            {"part": name, "images/s": round(rate, 3), "times the bound": round(rate / bound, 3)}
            for name, rate in rates.items()
        ],
        images=args.images,
        bytes_an_image=round(bytes_an_image),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        cores=cores_per_process(),
    )


if __name__ == "__main__":
    main()
