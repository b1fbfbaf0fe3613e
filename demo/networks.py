"""A small VAE and a small SEM encoder for your images, trained on a CPU or a GPU in minutes.

    python -m demo.networks --data-path FOLDER --image-size 64 --out NETWORKS
    python extract_features_withdlc.py --data-path FOLDER --image-size 64 --vae NETWORKS/vae --encoder NETWORKS/sem

writes NETWORKS/vae, a diffusers AutoencoderKL whose latents have standard deviation 1 once they are multiplied by the
scaling factor in its config, NETWORKS/sem, a dlc.nets.encoder.SEMEncoder, and quality.json, the numbers that are
printed at the end. Run it again to continue after a stop.

The autoencoder minimises the squared error and a small KL term. The encoder learns from pairs of distorted views of an
image: the views of one image should agree in their tokens and the views of others not (InfoNCE, van den Oord et al.
2018, arXiv 1807.03748, with the share of agreeing tokens as similarity), every token should be used, and a decoder that
is thrown away must find a thumbnail of the undistorted image in the simplicial embedding. No label is used.

The defaults rebuild the digits' networks, assets/digits-vae and assets/digits-sem, in about six minutes on two CPU
cores, from the folder demo_output/digits/train of demo.sh: networks like those, not the same bytes.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from diffusers import AutoencoderKL

from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize, open_source, to_uint8
from dlc.data.views import Views
from dlc.machine.cli import SEED, ArgumentParser, number, progress
from dlc.machine.files import DirectoryLock, check_outside, read_json, write_folder, write_json, write_whole
from dlc.machine.records import differences
from dlc.nets.digest import weights_sha256
from dlc.nets.encoder import SEMEncoder, save_encoder, tokens
from dlc.nets.vae import decode, encode, pixels_per_cell
from dlc.weights.foreign.safe import load_tensors
from dlc.weights.networks import load_vae
from evaluation.similarity import psnr
from evaluation.tokens import token_agreement

KL_WEIGHT = 4e-4  # of the KL per latent number, against the squared error per pixel of images in -1..1
SEM_TEMPERATURE = 0.2  # of the softmax over V: low, so that the argmax keeps most of what the embedding knows
NCE_TEMPERATURE = 0.1  # of InfoNCE, over similarities in 0..1
USAGE_WEIGHT, THUMBNAIL_WEIGHT = 0.5, 30.0
REPORTS = 10  # lines of a training, after each of which it can be continued
BATCH = 64  # images at once where nothing is trained

# the largest distortion of a view: radians, then shares of half the image's size, then a share of the brightness
ROTATION, SHEAR, SHIFT, SCALE, WARP, CONTRAST = 0.14, 0.1, 0.084, 0.084, 0.06, 0.2


def parse_args(argv: list[str] | None = None) -> tuple[ArgumentParser, argparse.Namespace]:
    parser = ArgumentParser(__doc__, prog="python -m demo.networks")
    add, count = parser.add_argument, number(int, 1)
    add("--data-path", required=True, help="train on these images: a folder, archive or dataset")
    add("--heldout-path", help="measure the networks on these images [those of --data-path]")
    add("--out", required=True, help="write vae/, sem/ and quality.json into this folder")
    add("--image-size", type=number(int, 8), default=64, help="crop images to this height and width, pixels")
    add("--seed", type=SEED, default=0, help="seed the weights and all draws in training")
    group = parser.add_argument_group("VAE")
    add = group.add_argument
    add("--vae", help="use this VAE, as extraction takes it, and train the encoder alone [train one]")
    add(
        "--factor",
        type=int,
        choices=(2, 4, 8, 16),
        default=8,
        help="make latent cells of this many pixels along each axis",
    )
    add("--latent-channels", type=count, default=4, help="give the latents this many channels")
    add("--vae-width", type=number(int, 4), default=16, help="channels of the finer half of the layers, a multiple of "
        "4; the others have twice as many")  # fmt: skip
    add("--vae-steps", type=number(int, 20), default=500, help="train for this many steps")
    add("--vae-batch", type=count, default=32, help="train on this many images per step")
    add("--vae-lr", type=number(float, 0), default=3e-3, help="set the highest learning rate")
    group = parser.add_argument_group("SEM encoder")
    add = group.add_argument
    add("--L", type=count, default=32, help="make codes of this many positions")
    add("--V", type=number(int, 2, 65536), default=16, help="choose from this many tokens at each position")
    add("--patch", type=count, default=16, help="side of the Vision Transformer's patches, pixels")
    add("--sem-width", type=count, default=96, help="width of the Vision Transformer, a multiple of 3")
    add("--sem-depth", type=count, default=3, help="blocks of the Vision Transformer")
    add("--thumbnail", type=count, default=8, help="train codes to give back a thumbnail of this side, pixels")
    add("--sem-steps", type=number(int, 20), default=2000, help="train for this many steps")
    add("--sem-batch", type=number(int, 2), default=64, help="images per step, of two views each")
    add("--sem-lr", type=number(float, 0), default=2e-3, help="set the highest learning rate")
    return parser, parser.parse_args(argv)


#################################################################################
#                              Images and training                              #
#################################################################################


def load_images(data_path: str, image_size: int, flag: str) -> tuple[torch.Tensor, str]:
    """The centre crops of the images at a path, (n, S, S, 3) uint8, without those that are broken; and a digest.

    Raises ValueError, naming the flag, where there are fewer than two, and OSError for one that the disk does not give.
    """
    source = open_source(data_path, flag=flag)
    views = Views(source, np.zeros((len(source), 1), bool), image_size, None)
    crops, broken = [], []
    for index in progress(range(len(source)), desc=f"reading {data_path}", unit="img", delay=2):
        (crop,), _, _, failure = views[index]
        if failure is None:
            crops.append(crop)
        elif failure[2]:
            broken.append(f"{source.name(index)} ({failure[1]})")
        else:
            raise OSError(f"cannot read {source.path(index)!r} ({failure[1]}): fix the file")
    skipped = [f"{len(broken):,} of {len(source):,} images cannot be read, as {broken[0]}"] if broken else []
    for remark in [*source.remarks, *skipped]:
        print(f"note: {remark}")
    if len(crops) < 2:
        raise ValueError(f"{flag} {data_path}: {len(crops)} images can be read, two or more are needed")
    return torch.from_numpy(np.stack(crops)), source.sha256()


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Images (n, S, S, 3) uint8 to (n, 3, S, S) float32 in 0..1."""
    return images.permute(0, 3, 1, 2).float() / 255


class Distortion:
    """Images (n, 3, S, S) in 0..1 as other pictures of the same: turned, sheared, scaled, moved, warped, dimmed.

    What moves into the picture has the median colour of the edges of the images, (n, S, S, 3) uint8.
    """

    def __init__(self, images: torch.Tensor):
        edges = torch.cat([images[:, [0, -1]].flatten(0, 2), images[:, :, [0, -1]].flatten(0, 2)])
        self.fill = edges.median(dim=0).values.view(3, 1, 1).float() / 255

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        n = len(pixels)

        def uniform(*shape):
            return torch.rand(n, *shape, generator=generator) * 2 - 1

        angle, shear, shift, scale = uniform() * ROTATION, uniform() * SHEAR, uniform(2) * SHIFT, 1 + uniform(2) * SCALE
        cos, sin = angle.cos(), angle.sin()
        columns = [
            torch.stack([cos, sin], dim=1) * scale[:, :1],
            torch.stack([shear * cos - sin, shear * sin + cos], dim=1) * scale[:, 1:],
            shift,
        ]
        warp = F.interpolate(uniform(2, 4, 4) * WARP, size=pixels.shape[2:], mode="bicubic")  # (n, 2, S, S)
        grid = F.affine_grid(torch.stack(columns, dim=2), pixels.shape, align_corners=False) + warp.permute(0, 2, 3, 1)
        brightness, fill = (1 + uniform(1, 1, 1) * CONTRAST).to(pixels.device), self.fill.to(pixels.device)
        moved = F.grid_sample(pixels - fill, grid.to(pixels.device), align_corners=False) + fill
        return (moved * brightness).clamp(0, 1)


def train(
    name: str,
    modules: nn.ModuleList,
    loss_of: Callable,
    images: torch.Tensor,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    state_path: Path,
) -> None:
    """AdamW on loss_of(pixels) -> (loss, what to print), over random batches; one learning rate cycle.

    The state is written to state_path after each of REPORTS parts, and read from there where it exists.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    parts, first = dict(modules=modules, optimizer=optimizer, schedule=schedule), 0
    if state_path.exists():
        try:
            state = load_tensors(state_path)
        except ValueError as error:
            raise ValueError(f"{error}; remove it to train the {name} from the beginning") from None
        for key, part in parts.items():
            part.load_state_dict(state[key])
        generator.set_state(state["generator"])
        first = state["step"]
        print(f"{name}: continued from step {first:,}")
    start = time.time()
    for step in progress(range(first + 1, steps + 1), initial=first, total=steps, desc=name, unit="step"):
        batch = images[torch.randperm(len(images), generator=generator)[:batch_size]]
        loss, report = loss_of(pixels_of(batch.to(next(modules.parameters()).device)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // REPORTS) == 0:
            values = "  ".join(f"{key} {value:.4f}" for key, value in report.items())
            print(f"{name}  step {step}/{steps}  {time.time() - start:.0f} s  {values}", flush=True)
            state = {key: part.state_dict() for key, part in parts.items()}
            state |= dict(step=step, generator=generator.get_state())
            write_whole(state_path, lambda file, state=state: torch.save(state, file))


#################################################################################
#                                    Networks                                   #
#################################################################################


def build_vae(args: argparse.Namespace, images: torch.Tensor, device: torch.device, state_path: Path) -> nn.Module:
    """An AutoencoderKL trained on images (n, S, S, 3) uint8, its scaling factor measured on them."""
    torch.manual_seed(args.seed)
    generator, distort = torch.Generator().manual_seed(args.seed), Distortion(images)
    levels = args.factor.bit_length()
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=args.latent_channels,
        sample_size=args.image_size,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=[args.vae_width * (1 if 2 * level < levels else 2) for level in range(levels)],
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae = vae.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU

    def loss_of(pixels):
        pixels = (distort(pixels, generator) * 2 - 1).to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        mse = F.mse_loss(vae.decode(posterior.mean + posterior.std * noise).sample, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return mse + KL_WEIGHT * kl, {"mse": mse.item(), "kl": kl.item(), "posterior std": posterior.std.mean().item()}

    modules = nn.ModuleList([vae])
    train("vae", modules, loss_of, images, args.vae_steps, args.vae_batch, args.vae_lr, generator, state_path)
    vae.eval().register_to_config(scaling_factor=1.0)
    with torch.inference_mode():
        latents = torch.cat([encode(vae, normalize(part.to(device))).cpu() for part in images.split(BATCH)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 3))
    return vae


def info_nce(views: torch.Tensor) -> torch.Tensor:
    """InfoNCE over simplicial embeddings (2n, L, V); rows i and n + i are views of the same image.

    The similarity of two views is the chance that their tokens agree, averaged over the L positions.
    """
    n2, device = len(views), views.device
    similarity = views.flatten(1) @ views.flatten(1).T / views.shape[1]  # (2n, 2n)
    others = similarity.masked_fill(torch.eye(n2, dtype=torch.bool, device=device), -torch.inf)
    return F.cross_entropy(others / NCE_TEMPERATURE, torch.arange(n2, device=device).roll(n2 // 2))


def build_encoder(args: argparse.Namespace, images: torch.Tensor, device: torch.device, state_path: Path) -> SEMEncoder:
    """A SEMEncoder trained on images (n, S, S, 3) uint8."""
    torch.manual_seed(args.seed)
    generator, distort = torch.Generator().manual_seed(args.seed), Distortion(images)
    vit = dict(patch_size=args.patch, embed_dim=args.sem_width, depth=args.sem_depth, num_heads=3, reg_tokens=4)
    encoder = SEMEncoder("vit_tiny_patch16_224", args.image_size, args.L, args.V, SEM_TEMPERATURE, vit).to(device)
    numbers, hidden = 3 * args.thumbnail**2, 256
    decoder = nn.Sequential(nn.Linear(args.L * args.V, hidden), nn.GELU(), nn.Linear(hidden, numbers)).to(device)

    def loss_of(pixels):
        views = torch.cat([distort(pixels, generator), distort(pixels, generator)])
        embedding = encoder(TF.normalize(views, IMAGENET_MEAN, IMAGENET_STD))  # (2n, L, V)
        usage = embedding.mean(dim=0)  # (L, V)
        unused = np.log(args.V) + (usage * (usage + 1e-8).log()).sum(dim=1).mean()  # 0: all tokens share equally
        thumbnails = F.adaptive_avg_pool2d(pixels, args.thumbnail).flatten(1).repeat(2, 1)
        thumbnail_mse = F.mse_loss(decoder(embedding.flatten(1)), thumbnails)
        nce = info_nce(embedding)
        first, second = embedding.argmax(dim=2).chunk(2)
        report = {
            "nce": nce.item(),
            "unused": unused.item(),
            "thumbnail mse": thumbnail_mse.item(),
            "agreement": (first == second).float().mean().item(),
        }
        return nce + USAGE_WEIGHT * unused + THUMBNAIL_WEIGHT * thumbnail_mse, report

    modules = nn.ModuleList([encoder, decoder])
    train("sem", modules, loss_of, images, args.sem_steps, args.sem_batch, args.sem_lr, generator, state_path)
    return encoder.eval()


#################################################################################
#                                    Quality                                    #
#################################################################################


@torch.inference_mode()
def quality(vae: nn.Module, encoder: SEMEncoder, images: torch.Tensor, device: torch.device) -> dict:
    """What the networks keep of images (n, S, S, 3) uint8, by name."""
    decibels, codes, kept = [], [], []
    for part in images.split(BATCH):
        part = part.to(device)
        reconstruction = to_uint8(decode(vae, encode(vae, normalize(part))))
        decibels.append(psnr(part, reconstruction))
        codes.append(tokens(encoder.encode_pixels(part)))
        kept.append(tokens(encoder.encode_pixels(reconstruction)))
    codes, kept = torch.cat(codes).cpu(), torch.cat(kept).cpu()
    usage = F.one_hot(codes, encoder.V).float().mean(dim=0)  # (L, V)
    perplexity = torch.exp(-torch.xlogy(usage, usage).sum(dim=1))  # (L,)
    agreement = token_agreement(codes.numpy(), kept.numpy(), encoder.V)
    return {
        "images": len(images),
        "scaling factor of the latents": vae.config.scaling_factor,
        "PSNR of reconstructions, dB": round(torch.cat(decibels).mean().item(), 2),
        "tokens that reconstructions keep, share": round(agreement["share"], 3),
        "the same by chance": round(agreement["chance"], 3),
        "dead tokens, share": round((usage == 0).float().mean().item(), 3),
        "perplexity of a position, mean": round(perplexity.mean().item(), 1),
        "perplexity of a position, least": round(perplexity.min().item(), 1),
        "distinct codes": len(codes.unique(dim=0)),
    }


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out)
    with parser.one_line_errors():
        vae = load_vae(args.vae, device) if args.vae else None
        factor = pixels_per_cell(vae.config) if vae else args.factor
        for flag, value, divisor, whose in (
            ("--image-size", args.image_size, factor, ", the VAE's factor" if vae else " (--factor)"),
            ("--image-size", args.image_size, args.patch, " (--patch)"),
            ("--vae-width", args.vae_width, 4, ""),
            ("--sem-width", args.sem_width, 3, ""),
        ):
            if value % divisor:
                raise ValueError(f"{flag} {value} is not a multiple of {divisor}{whose}")
        check_outside(args.out, "--out", args.data_path)
        images, listing = load_images(args.data_path, args.image_size, "--data-path")
        heldout = load_images(args.heldout_path, args.image_size, "--heldout-path")[0] if args.heldout_path else images
        paths = ("data_path", "heldout_path", "out", "vae")
        settings = {key: value for key, value in vars(args).items() if key not in paths}
        settings |= dict(images=len(images), listing_sha256=listing, **({"vae": weights_sha256(vae)} if vae else {}))
        lock = DirectoryLock(out)
        lock.acquire()
        if (out / "networks.json").exists() and (other := differences(read_json(out / "networks.json"), settings)):
            raise ValueError(f"--out {out} holds networks made with other settings: {other}; give another folder")
        write_json(out / "networks.json", settings)
    try:
        with parser.one_line_errors("what is trained is kept", "--vae-batch or --sem-batch"):
            if not args.vae:
                vae = build_vae(args, images, device, out / "vae.training.pt")
                write_folder(out / "vae", vae.save_pretrained, temporary=out / ".vae.tmp")
            encoder = build_encoder(args, images, device, out / "sem.training.pt")
            write_folder(out / "sem", lambda folder: save_encoder(encoder, folder), temporary=out / ".sem.tmp")
            numbers = quality(vae, encoder, heldout, device)
            write_json(out / "quality.json", numbers)
    finally:
        lock.release()
    for what, value in numbers.items():
        print(f"    {what:<45}{value}")


if __name__ == "__main__":
    main()
