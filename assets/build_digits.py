"""Rebuild the two small assets of the digits demo, from its 1,437 train images.

    python assets/build_digits.py                                  # about six minutes on two CPU cores

writes, beside this file,

    digits-vae/    a diffusers AutoencoderKL: 64x64 RGB <-> 8x8x4 latents, whose standard deviation is 1 once they are
                   multiplied by the scaling factor in its config (1.1 MB)
    digits-sem/    a dlc.nets.encoder.SEMEncoder on a small ViT: an image -> L = 32 tokens of V = 16 (2.6 MB)

The autoencoder minimises the squared error and a small KL term. The encoder learns from pairs of distorted views of a
scan: the views of one scan should agree in their tokens and the views of others not (InfoNCE, van den Oord et al. 2018,
arXiv 1807.03748, with the share of agreeing tokens as similarity), every token should be used, and a decoder that is
thrown away must find the undistorted scan in the simplicial embedding. No label is used in training; the settings were
chosen among a handful by their scores on the held-out digits, so the table is a little kinder than fresh digits would
be.

Measured on the 360 held-out digits, as the table printed at the end:

    reconstruction MSE, pixels in 0..1           0.00043
    scaling factor of the latents                0.994
    digit read rightly: originals                0.992
    digit read rightly: reconstructions          0.994
    digit of the nearest train code              0.978
    digit by a linear probe of the code          0.981
    tokens used by the train codes               506 of 512
    perplexity of a position: mean, least, most  15.3, 14.0, 15.8 of 16
    distinct codes: train, held-out              1433 of 1437, 360 of 360
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))  # the repository, whichever way this script is started
from demo.digits import IMAGE_SIZE, SCAN_SIZE, DigitReader, load_split  # noqa: E402
from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD, to_uint8
from dlc.nets.encoder import SEMEncoder, save_encoder  # noqa: E402
from dlc.nets.vae import decode, encode
from dlc.weights.networks import load_encoder

SEED = 0
THREADS = 2

VAE_STEPS, VAE_BATCH, VAE_LR = 500, 32, 3e-3
KL_WEIGHT = 4e-4  # of the KL per latent number, against the squared error per pixel of images in -1..1

L, V = 32, 16  # code positions, tokens at each
SEM_STEPS, SEM_BATCH, SEM_LR = 2000, 64, 2e-3
SEM_TEMPERATURE = 0.2  # of the softmax over V: low, so that the argmax keeps most of what the embedding knows
NCE_TEMPERATURE = 0.1  # of InfoNCE, over similarities in 0..1
USAGE_WEIGHT, SCAN_WEIGHT = 0.5, 30.0

# the largest distortion of a view: radians, then shares of half the image's size, then a share of the brightness
ROTATION, SHEAR, SHIFT, SCALE, WARP, CONTRAST = 0.14, 0.1, 0.084, 0.084, 0.06, 0.2


#################################################################################
#                              Images and training                              #
#################################################################################


def to_float(images: np.ndarray) -> torch.Tensor:
    """Images (n, 64, 64, 3) uint8 to (n, 3, 64, 64) float32 in 0..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def to_encoder(images: torch.Tensor) -> torch.Tensor:
    """Images in 0..1 as the encoder takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (n, 3, 64, 64) in 0..1 as other scans of the same hand: turned, sheared, scaled, moved, warped, dimmed."""
    n = len(images)

    def uniform(*shape):
        return torch.rand(n, *shape, generator=generator) * 2 - 1

    angle, shear, shift, scale = uniform() * ROTATION, uniform() * SHEAR, uniform(2) * SHIFT, 1 + uniform(2) * SCALE
    cos, sin = angle.cos(), angle.sin()
    columns = [
        torch.stack([cos, sin], dim=1) * scale[:, :1],
        torch.stack([shear * cos - sin, shear * sin + cos], dim=1) * scale[:, 1:],
        shift,
    ]
    warp = F.interpolate(uniform(2, 4, 4) * WARP, size=images.shape[2:], mode="bicubic")  # (n, 2, 64, 64)
    grid = F.affine_grid(torch.stack(columns, dim=2), images.shape, align_corners=False) + warp.permute(0, 2, 3, 1)
    brightness = 1 + uniform(1, 1, 1) * CONTRAST
    return (F.grid_sample(images, grid, align_corners=False) * brightness).clamp(0, 1)


def train(
    name: str,
    modules: list[nn.Module],
    loss_of: Callable,
    images: torch.Tensor,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> None:
    """AdamW on loss_of(batch) -> (loss, what to print), over random batches; one learning rate cycle."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(1, steps + 1):
        batch = images[torch.randperm(len(images), generator=generator)[:batch_size]]
        loss, report = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            values = "  ".join(f"{key} {value:.4f}" for key, value in report.items())
            print(f"{name}  step {step}/{steps}  {time.time() - start:.0f} s  {values}", flush=True)


#################################################################################
#                                  Autoencoder                                  #
#################################################################################


def build_vae(images: torch.Tensor) -> nn.Module:
    """An AutoencoderKL trained on images (n, 3, 64, 64) in 0..1, its scaling factor measured on them."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae = vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def loss_of(batch):
        pixels = (distort(batch, generator) * 2 - 1).to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        mse = F.mse_loss(vae.decode(posterior.sample(generator)).sample, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return mse + KL_WEIGHT * kl, {"mse": mse.item(), "kl": kl.item(), "posterior std": posterior.std.mean().item()}

    train("vae", [vae], loss_of, images, VAE_STEPS, VAE_BATCH, VAE_LR, generator)
    vae.eval()
    vae.register_to_config(scaling_factor=1.0)
    with torch.no_grad():
        std = torch.cat([encode(vae, chunk * 2 - 1) for chunk in images.split(256)]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 3))
    return vae


#################################################################################
#                                    Encoder                                    #
#################################################################################


def info_nce(views: torch.Tensor) -> torch.Tensor:
    """InfoNCE over simplicial embeddings (2n, L, V); rows i and n + i are views of the same scan.

    The similarity of two views is the chance that their tokens agree, averaged over the L positions.
    """
    n2 = len(views)
    similarity = views.flatten(1) @ views.flatten(1).T / L  # (2n, 2n)
    others = similarity.masked_fill(torch.eye(n2, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(others / NCE_TEMPERATURE, torch.arange(n2).roll(n2 // 2))


def build_encoder(images: torch.Tensor) -> nn.Module:
    """A SEMEncoder trained on images (n, 3, 64, 64) in 0..1."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    encoder = SEMEncoder(
        "vit_tiny_patch16_224",
        IMAGE_SIZE,
        L,
        V,
        SEM_TEMPERATURE,
        dict(patch_size=16, embed_dim=96, depth=3, num_heads=3, reg_tokens=4),
    )
    scan_decoder = nn.Sequential(nn.Linear(L * V, 256), nn.GELU(), nn.Linear(256, SCAN_SIZE**2))

    def loss_of(batch):
        views = torch.cat([distort(batch, generator), distort(batch, generator)])
        embedding = encoder(to_encoder(views))  # (2n, L, V)
        usage = embedding.mean(dim=0)  # (L, V)
        unused = np.log(V) + (usage * (usage + 1e-8).log()).sum(dim=1).mean()  # 0: all tokens share equally
        scans = F.avg_pool2d(batch[:, 0], IMAGE_SIZE // SCAN_SIZE).flatten(1).repeat(2, 1)
        scan_mse = F.mse_loss(scan_decoder(embedding.flatten(1)), scans)
        nce = info_nce(embedding)
        first, second = embedding.argmax(dim=2).chunk(2)
        report = {
            "nce": nce.item(),
            "unused": unused.item(),
            "scan mse": scan_mse.item(),
            "agreement": (first == second).float().mean().item(),
        }
        return nce + USAGE_WEIGHT * unused + SCAN_WEIGHT * scan_mse, report

    train("sem", [encoder, scan_decoder], loss_of, images, SEM_STEPS, SEM_BATCH, SEM_LR, generator)
    return encoder.eval()


@torch.no_grad()
def codes_of(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, 64, 64) in 0..1 to codes (n, L) int64."""
    return torch.cat([encoder.codes(to_encoder(chunk)) for chunk in images.split(256)])


#################################################################################
#                                    Quality                                    #
#################################################################################


def quality(vae: nn.Module, encoder: nn.Module) -> list[tuple[str, str]]:
    """Rows (what, value) on the held-out digits. The only place where labels are used."""
    train_images, train_labels = load_split("train")
    images, labels = load_split("heldout")
    reader = DigitReader()
    originals = to_float(images)
    with torch.no_grad():
        reconstructions = torch.cat([decode(vae, encode(vae, chunk * 2 - 1)) for chunk in originals.split(180)])
    train_codes, codes = codes_of(encoder, to_float(train_images)), codes_of(encoder, originals)
    one_hot, train_one_hot = F.one_hot(codes, V), F.one_hot(train_codes, V)  # (n, L, V)
    usage = train_one_hot.float().mean(dim=0)  # (L, V)
    perplexity = torch.exp(-torch.xlogy(usage, usage).sum(dim=1))  # (L,)
    neighbour = KNeighborsClassifier(1, metric="hamming").fit(train_codes, train_labels)
    probe = LogisticRegression(max_iter=1000).fit(train_one_hot.flatten(1), train_labels)
    return [
        ("reconstruction MSE, pixels in 0..1", f"{F.mse_loss(reconstructions / 2 + 0.5, originals).item():.5f}"),
        ("scaling factor of the latents", f"{vae.config.scaling_factor}"),
        ("digit read rightly: originals", f"{(reader(images) == labels).mean():.3f}"),
        ("digit read rightly: reconstructions", f"{(reader(to_uint8(reconstructions).numpy()) == labels).mean():.3f}"),
        ("digit of the nearest train code", f"{neighbour.score(codes, labels):.3f}"),
        ("digit by a linear probe of the code", f"{probe.score(one_hot.flatten(1), labels):.3f}"),
        ("tokens used by the train codes", f"{(usage > 0).sum()} of {L * V}"),
        (
            "perplexity of a position: mean, least, most",
            f"{perplexity.mean():.1f}, {perplexity.min():.1f}, {perplexity.max():.1f} of {V}",
        ),
        (
            "distinct codes: train, held-out",
            f"{len(train_codes.unique(dim=0))} of {len(train_codes)}, {len(codes.unique(dim=0))} of {len(codes)}",
        ),
    ]


def main() -> None:
    torch.set_num_threads(THREADS)
    images = to_float(load_split("train")[0])
    build_vae(images).save_pretrained(ASSETS / "digits-vae")
    save_encoder(build_encoder(images), ASSETS / "digits-sem")
    vae, encoder = AutoencoderKL.from_pretrained(ASSETS / "digits-vae"), load_encoder(ASSETS / "digits-sem")
    for what, value in quality(vae, encoder):
        print(f"    {what:<45}{value}")


if __name__ == "__main__":
    main()
