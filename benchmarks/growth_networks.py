"""Stages of benchmarks/growth.py in which a network runs: training, sampling, priors, extraction, evaluation."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from benchmarks.growth_stage import stage
from diffusion import create_diffusion
from diffusion.masked import MaskedDiffusion
from diffusion.masked_samplers import create_sampler as create_code_sampler
from dlc.data import FeatureWriter, Manifest
from dlc.data.images import Views, collate, flips_of
from dlc.data.listing import list_images
from dlc.nets.encoder import SEMEncoder
from dlc.nets.pixels import BatchEncoder, PixelEncoder, batches_of, extract
from dlc.sampling.decoder import Decoder
from dlc.sampling.latents import create_sampler, sample_latents
from dlc.sampling.prior_engine import sample_codes
from dlc.training.update import update_ema
from evaluation.measuring import measure
from evaluation.sets import open_images
from evaluation.tokens import EncoderNetwork
from models import DiT_models, SEMEmbedder
from prior import DLCPrior_models
from train_diffusion import losses_of
from train_prior import losses_of as prior_losses_of

TABLE = "AdamW and EMA touch the whole table of codes, (L, V + 1, D), once per step: 1 where it is most of the model"
ATTENTION = "attention compares all pairs of tokens: between 1 and 2"


def tiny_vae():
    """8 pixels per cell of 4 channels, untrained."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1, **blocks)
    return vae.eval().requires_grad_(False)


def tiny_encoder():
    """Codes of 16 tokens of views of 32 x 32, untrained."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    return SEMEncoder("vit_tiny_patch16_224", 32, 16, 256, backbone_args=sizes).eval()


#################################################################################
#                                   Training                                    #
#################################################################################


def trained(model, losses):
    """A step of training by losses(model), a function that gives those of a batch (n,)."""
    ema, optimizer = copy.deepcopy(model).requires_grad_(False), torch.optim.AdamW(model.parameters(), fused=True)
    weights, averages = list(model.parameters()), list(ema.parameters())

    def work():
        losses(model)[0]["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(averages, weights, 0.9999)

    return work


def diffusion_step(name, batch, side=16, L=16, V=256):
    """A step of train_diffusion.py on latents of side x side cells."""
    model, diffusion = DiT_models[name](input_size=side, L=L, V=V).train(), create_diffusion("")
    x, y, options = torch.randn(batch, 4, side, side), torch.randint(V, (batch, L)), dict(seed=0, dropout=0.1)
    return trained(
        model, lambda model: losses_of(model, diffusion, torch.arange(batch), x, y, draw_latents=False, **options)
    )


@stage("training step", "images per batch", (1, 10, 100), 1)
def step_by_batch(folder, size):
    return diffusion_step("DiTSEM-Ti/2", size)


@stage("training step", "L, tokens per code", (8, 80, 800), 2, why=TABLE)
def step_by_length(folder, size):
    return diffusion_step("DiTSEM-Ti/4", 16, L=size)


@stage("training step", "V, tokens per position", (100, 1_000, 10_000), 2, why=TABLE)
def step_by_tokens(folder, size):
    return diffusion_step("DiTSEM-Ti/4", 16, V=size)


@stage("training step", "tokens of the image, 64 x 64 to 640 x 640", (16, 144, 1_600), 16, why=ATTENTION)
def step_by_pixels(folder, size):
    return diffusion_step("DiTSEM-Ti/2", 4, side=2 * round(size**0.5))


def embedding(folder, L, V, backward):
    embedder, codes = SEMEmbedder(L, V, 192), torch.randint(V, (64, L))
    torch.nn.init.normal_(embedder.embedding_table)

    def work():
        with torch.set_grad_enabled(backward):
            embedded = embedder(codes)
        if backward:
            embedder.embedding_table.grad = None
            embedded.sum().backward()

    return work


@stage("embedding codes", "V, tokens per position", (100, 1_000, 10_000), 4)
def embedding_by_tokens(folder, size):
    return embedding(folder, 64, size, False)


@stage("embedding codes, and its gradient", "V, tokens per position", (100, 1_000, 10_000), 4)
def gradient_by_tokens(folder, size):
    return embedding(folder, 64, size, True)


@stage(
    "embedding codes, and its gradient",
    "L, tokens per code",
    (10, 100, 1_000),
    4,
    why="tensors above 32 MiB are memory that the kernel clears anew each time: linear where malloc keeps it",
)
def gradient_by_length(folder, size):
    return embedding(folder, size, 256, True)


#################################################################################
#                                   Sampling                                    #
#################################################################################


def sampling(count, name="ddpm", steps=10):
    model = DiT_models["DiTSEM-Ti/4"](input_size=16, L=16, V=256).eval()
    sampler, indices = create_sampler(name, steps), torch.arange(count)
    options = dict(y=torch.zeros(count, 16, dtype=torch.long), seed=0, latent_shape=(4, 16, 16), cfg_scale=1.5)
    return lambda: sample_latents(model, sampler, indices=indices, **options)


@stage("sampling, 10 steps", "images at once", (2, 20, 200), 1)
def sampling_by_count(folder, size):
    return sampling(size)


@stage("sampling, DDPM", "steps", (10, 100, 1_000), 2)
def sampling_by_steps(folder, size):
    return sampling(4, "ddpm", size)


@stage("sampling, DPM-Solver++", "steps", (9, 90, 900), 2)
def solver_by_steps(folder, size):
    return sampling(4, "dpmsolver++", size)


@stage("decoding and writing PNGs", "images of 128 x 128", (10, 100, 1_000), 1)
def decoding(folder, size):
    decoder, latents = Decoder(tiny_vae(), folder), torch.randn(10, 4, 16, 16)

    def work():
        for start in range(0, size, 10):
            decoder(range(start, start + 10), latents)
        decoder.wait()

    return work


#################################################################################
#                                    Priors                                     #
#################################################################################


def prior_step(batch, L=64, V=256):
    """A step of train_prior.py."""
    model, diffusion = DLCPrior_models["DLCPrior-Ti"](L=L, V=V).train(), MaskedDiffusion(V, masking="counted")
    x, options = torch.randint(V, (batch, L)), dict(seed=0, label_dropout=0.0)
    return trained(model, lambda model: prior_losses_of(model, diffusion, torch.arange(batch), x, None, **options))


@stage("training step of a prior", "codes per batch", (4, 40, 400), 1)
def prior_by_batch(folder, size):
    return prior_step(size)


@stage("training step of a prior", "L, tokens per code", (16, 160, 1_600), 2, why=ATTENTION)
def prior_by_length(folder, size):
    return prior_step(4, L=size)


@stage("training step of a prior", "V, tokens per position", (100, 1_000, 10_000), 4)
def prior_by_tokens(folder, size):
    return prior_step(4, L=16, V=size)


def drawing(count, name, steps, L=64):
    model = DLCPrior_models["DLCPrior-Ti"](L=L, V=256).eval()
    diffusion, sampler, indices = MaskedDiffusion(256), create_code_sampler(name, 256, steps), torch.arange(count)
    return lambda: sample_codes(model, diffusion, sampler, seed=0, indices=indices)


@stage("drawing codes, first hitting", "codes at once", (2, 20, 200), 1)
def drawing_by_count(folder, size):
    return drawing(size, "first-hitting", None)


@stage(
    "drawing codes, first hitting",
    "L, tokens per code and calls of the network",
    (16, 64, 256),
    4,
    why="L calls of a network over L tokens: L^2, and more by attention",
)
def drawing_by_length(folder, size):
    return drawing(4, "first-hitting", None, L=size)


@stage("drawing codes, analytic", "steps", (10, 100, 1_000), 2)
def analytic_by_steps(folder, size):
    return drawing(4, "analytic", size)


@stage("drawing codes, corrector", "steps", (40, 400, 4_000), 2)
def corrector_by_steps(folder, size):
    return drawing(4, "corrector", size)


#################################################################################
#                           Extraction and evaluation                           #
#################################################################################


def noise_images(folder, count, side):
    (folder / "images/a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    for index in range(count):
        Image.fromarray(np.roll(pixels, index, axis=0)).save(folder / f"images/a/{index:06d}.png")


def extraction(folder, side):
    """The pipeline of extraction, to new features, with one reader."""
    vae, encoder, state = tiny_vae(), tiny_encoder(), PartialState(cpu=True)

    def work():
        classes, paths, labels, _ = list_images(folder / "images")
        views = Views(folder / "images", paths, flips_of("random", len(paths), 0), side, encoder.image_size)
        settings = dict(latents="sample", dtype="float16", shard_size=64, seed=0, L=encoder.L, V=encoder.V)
        manifest = Manifest(image_size=side, images=len(paths), classes=classes, **settings)
        writer = FeatureWriter(Path(tempfile.mkdtemp(dir=folder)), manifest)
        writer.start()
        shards = -(-len(paths) // 64)
        batches = batches_of(range(shards), len(paths), 64, 4)
        encode = BatchEncoder(PixelEncoder(vae, encoder, state.device), views, labels, manifest, 4)
        extract(encode, ((batch, collate([views[i] for i in batch])) for batch in batches), writer, len(paths))
        writer.finish(shards)

    return work


def many_images(folder, size):
    noise_images(folder, size, 64)


@stage("extraction", "images of 64 x 64", (10, 100, 1_000), 4, many_images)
def extraction_by_count(folder, size):
    return extraction(folder, 64)


def large_images(folder, size):
    noise_images(folder, 8, round(size**0.5))


VAE_ATTENTION = "the VAE's middle block attends over all cells of 8 x 8 pixels"


@stage("extraction", "pixels of each of 8 images", (64**2, 192**2, 640**2), 32**2, large_images, VAE_ATTENTION)
def extraction_by_pixels(folder, size):
    return extraction(folder, round(size**0.5))


def images_to_evaluate(folder, size):
    np.savez(folder / "images.npz", np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8))


@stage("features for evaluation, their statistics", "images of 32 x 32", (100, 1_000, 10_000), 8, images_to_evaluate)
def evaluation_by_count(folder, size):
    network, state = EncoderNetwork(tiny_encoder(), torch.device("cpu")), PartialState(cpu=True)
    return lambda: measure(open_images(folder / "images.npz", "SAMPLES"), [network], state)
