"""Stages of benchmarks/growth.py on samples, codes, the log of a run, and metrics: no network runs."""

import os
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState

from benchmarks.growth_features import IMAGENET, L, V, linked
from benchmarks.growth_stage import stage
from compose_dlc import compose
from dlc.data.images import save_png
from dlc.sampling.code_folder import CodeFolder, CodesRecord, open_codes
from dlc.sampling.conditions import ClassLabels
from dlc.sampling.pictures import check_npz, png_path, write_npz
from dlc.sampling.sample_folder import SampleFolder
from dlc.sampling.samples_record import SamplesRecord
from dlc.training.record import append_metrics, draw_losses, read_metrics, trim_metrics
from evaluation.measuring import measure
from evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall
from evaluation.sets import open_images

#################################################################################
#                                   Samples                                     #
#################################################################################

LABELS = ClassLabels(SimpleNamespace(y_embedder=SimpleNamespace(num_classes=1000)), "random", 0)


def samples_record(count):
    texts = dict.fromkeys(("checkpoint", "weights_sha256", "weights", "vae", "vae_sha256"), "a")
    return SamplesRecord(
        **texts, model="DiT-XL/2", step=1, image_size=32, vae_precision="fp32", sampler="ddpm", num_sampling_steps=250,
        eta=None, cfg_scale=1.5, cfg_channels=3, t_min=0, t_max=999, precision="fp32", tf32=True, global_seed=0,
        num_fid_samples=count, conditions={**LABELS.recorded, "sha256": "a"}, runs=[],
    )  # fmt: skip


def samples(folder, size):
    """A folder of PNGs with samples.json, from which every thousandth image is missing."""
    written = SampleFolder(folder / "images", LABELS)
    written.open(samples_record(size), {})
    written.lock.release()
    names = (png_path(written.path, index).name for index in range(size) if index % 1000 != 999)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    linked(written.path, names, lambda path: save_png(path, image))


@stage(
    "resuming sampling: samples.json, and which images are missing", "images", (5_000, 50_000, IMAGENET), 100, samples
)
def resuming_sampling(folder, size):
    def work():
        opened = SampleFolder(folder / "images", LABELS)
        assert len(opened.open(samples_record(size), {})) == size // 1000
        opened.lock.release()

    return work


def whole_samples(folder, size):
    samples(folder, size)
    for index in range(999, size, 1000):
        os.link(png_path(folder / "images", index - 1), png_path(folder / "images", index))


@stage("opening a folder of images in evaluation", "images", (500, 5_000, 50_000), 100, whole_samples)
def opening_images(folder, size):
    return lambda: open_images(folder / "images", "SAMPLES")


@stage("writing the .npz", "images of 32 x 32", (500, 5_000, 50_000), 100, whole_samples)
def writing_npz(folder, size):
    return lambda: write_npz(folder / "images.npz", folder / "images", size)


def random_npz(folder, size):
    np.savez(folder / "images.npz", np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8))


@stage("python -m dlc.sampling check", "images of 32 x 32", (500, 5_000, 50_000), 100, random_npz)
def checking_npz(folder, size):
    return lambda: check_npz(folder / "images.npz")


@stage("reading the .npz in evaluation", "images of 32 x 32", (500, 5_000, 50_000), 100, random_npz)
def reading_npz(folder, size):
    state = PartialState(cpu=True)
    return lambda: measure(open_images(folder / "images.npz", "SAMPLES"), [], state)


def drawn_codes(folder, size):
    codes, record = CodeFolder(folder / "codes"), codes_record(size)
    for shard in codes.open(record, {}):
        codes.write(shard, np.random.default_rng(shard).integers(0, V, (len(codes.places(shard, size)), L)), V)
    codes.finish()


def codes_record(count):
    return CodesRecord(
        model="DLCPrior-M", checkpoint="a", weights_sha256="a", step=1, weights="ema", L=L, V=V, encoder_sha256=None,
        options={}, given=None, precision="fp32", tf32=True, global_seed=0, num=count,
        labels=[0] * count, runs=[],
    )  # fmt: skip


@stage(
    "resuming codes of a prior: codes.json, missing shards, digest",
    "codes",
    (5_000, 50_000, IMAGENET),
    100,
    drawn_codes,
)
def resuming_codes(folder, size):
    def work():
        codes = CodeFolder(folder / "codes")
        assert not codes.open(codes_record(size), {})
        codes.finish()
        assert len(open_codes(folder / "codes")) == size

    return work


@stage("composing codes", "codes of 512 tokens", (160, 1_600, 16_000), 16)
def composing(folder, size):
    sources, weights = torch.randint(V, (3, 512)), torch.ones(3)
    return lambda: compose(sources, weights, size, 0)


#################################################################################
#                                 Run folder                                    #
#################################################################################


def metrics_lines(folder, size):
    line = dict(epoch=0.1234567, loss=0.1234567, mse=0.1234567, vb=0.0012345, mse_by_quarter_of_t=[0.1234567] * 4,
                grad_norm=0.1234567, skipped_steps=0, scaler_scale=None, peak_memory_gib=None, lr=1e-4,
                steps_per_second=1.234567, images_per_second=123.4567)  # fmt: skip
    for step in range(size):
        append_metrics(folder / "metrics.jsonl", dict(line, step=step))


@stage("resuming a run: its log, and the plot of its losses", "lines", (1_000, 10_000, 100_000), 100, metrics_lines)
def resuming_run(folder, size):
    def work():
        trim_metrics(folder / "metrics.jsonl", size)
        draw_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")

    return work


#################################################################################
#                                   Metrics                                     #
#################################################################################


@stage("statistics of features", "images", (1_000, 10_000, 100_000), 100)
def statistics(folder, size):
    batch = torch.randn(50, 512)

    def work():
        found = FeatureStatistics(512)
        for _ in range(size // 50):
            found.update(batch)
        return found.covariance

    return work


@stage("Fréchet distance", "features", (64, 256, 1_024), 16, why="roots of D x D matrices take D^3, and memory D^2")
def distance(folder, size):
    pair = [FeatureStatistics(size) for _ in range(2)]
    for one in pair:
        one.update(torch.randn(2 * size, size))
    return lambda: frechet_distance(*pair)


@stage(
    "precision and recall",
    "images in each set",
    (200, 2_000, 20_000),
    100,
    why="each image is compared with every one: N^2; the tiles of distances have one size",
)
def precision(folder, size):
    pair = [torch.randn(size, 64) for _ in range(2)]
    return lambda: precision_recall(*pair)
