"""Stages of benchmarks/growth.py that list images, and read and write features."""

import contextlib
import importlib.util
import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.growth_stage import stage
from dlc.data import Features, FeatureWriter, Manifest, kind_dir
from dlc.data.convert import import_hf, pack
from dlc.data.inspection import print_info, problems
from dlc.data.listing import list_images, listing_sha256
from dlc.machine.files import write_json
from dlc.sampling.usage import Rows, usage
from dlc.training.batches import TrainingBatches
from dlc.training.codes import Codes

IMAGENET = 1_281_167  # images of its training set
PER_FILE = 30_000  # names of one file: a disk allows 65,000
L, V = 16, 256
SETTINGS = dict(latents="sample", dtype="float16", image_size=32, images=0, classes=["a"])
IMAGE_ROWS = (12_800, 128_000, IMAGENET)
NAMES = "names are sorted, n log n, and a million of them do not fit the caches"


def linked(folder, names, write):
    """Files of these names in a folder, which are PER_FILE links each to the same file, that write(path) makes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        if number % PER_FILE == 0:
            first = folder / name
            write(first)
        else:
            os.link(first, os.path.join(folder, name))


def silent(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


#################################################################################
#                                    Images                                     #
#################################################################################


def class_folders(folder, size):
    classes = min(1000, size // 10)
    for number in range(classes):
        names = (f"n{number:08d}_{index}.JPEG" for index in range(number, size, classes))
        linked(folder / f"n{number:08d}", names, Path.touch)


@stage("listing a folder of images", "files", (10_000, 100_000, IMAGENET), 100, class_folders, NAMES)
def listing(folder, size):
    def work():
        _, paths, _, _ = list_images(folder)
        assert len(paths) == size
        listing_sha256(paths)

    return work


#################################################################################
#                                   Features                                    #
#################################################################################


def small_features(folder, size):
    """Features of latents (4, 4, 4) and codes of L tokens in shards of 1,024 rows, as large sets are cut."""
    writer, random = FeatureWriter(folder / "features", Manifest(L=L, V=V, **SETTINGS)), np.random.default_rng(0)
    writer.start()
    for shard in range(-(-size // 1024)):
        rows = min(1024, size - shard * 1024)
        arrays = dict(
            features=random.standard_normal((rows, 4, 4, 4), dtype=np.float32).astype(np.float16),
            sem=random.integers(0, V, (rows, L), dtype=np.uint8),
            labels=np.zeros(rows, np.int64),
            path=np.full(rows, f"a/{shard}.png"),
        )
        writer.write(shard, arrays, [])
    writer.finish(shard + 1)


@stage("opening features", "rows", IMAGE_ROWS, 100, small_features)
def opening(folder, size):
    return lambda: Features(folder / "features")


@stage("checking features before training", "rows", IMAGE_ROWS, 100, small_features)
def validating(folder, size):
    return lambda: Features(folder / "features").validate()


@stage("a batch of 256 in the middle of an epoch, after a restart", "rows", IMAGE_ROWS, 100, small_features)
def resumed_batch(folder, size):
    features = Features(folder / "features")
    return lambda: TrainingBatches(
        features, features.codes, V, seed=0, global_batch=256, first_step=7, first_index=size // 2
    )[7]


@stage("python -m dlc.features check", "rows", IMAGE_ROWS, 100, small_features)
def checking(folder, size):
    return lambda: list(problems(folder / "features"))


@stage("python -m dlc.features info", "rows", IMAGE_ROWS, 100, small_features)
def informing(folder, size):
    args = SimpleNamespace(path=folder / "features", V=None, num_classes=None)
    return lambda: silent(print_info, args)


@stage(
    "codes of a prior: opening, holding out 1%, bound of independent positions", "rows", IMAGE_ROWS, 800, small_features
)
def codes_to_train(folder, size):
    return lambda: Codes(folder / "features", holdout=0.01).independent_nats()


@stage(
    "how codes use their tokens, beside the training codes",
    "codes",
    (1_280, 12_800, 128_000),
    100,
    small_features,
    "each of up to 1,024 codes is compared with every training code",
)
def code_usage(folder, size):
    codes = Features(folder / "features").codes
    return lambda: usage(Rows(size, codes.gather), V, Rows(size, codes.gather))


def one_row_files(folder, size):
    """Files of one row each, named alike in all folders: shards by a manifest, or one .npy per image without one."""
    names = [f"{number:06d}.npy" for number in range(size)]
    linked(folder / "files", names, lambda path: np.save(path, np.zeros((1, 4, 4, 4), np.float16)))
    for layout, kinds in (("shards", ("features", "labels", "path")), ("lone", ("features", "labels"))):
        (folder / layout).mkdir()
        for kind in kinds:  # only the first file of a kind is read
            kind_dir(folder / layout, 32, kind).symlink_to(folder / "files")
    shards = [dict(name=name[:-4], rows=1) for name in names]
    manifest = Manifest(L=None, V=None, count=size, shards=shards, **SETTINGS)
    write_json(folder / "shards/manifest.json", manifest.to_json())


@stage("opening features of one row per shard", "shards", (10_000, 100_000, 1_000_000), 100, one_row_files, NAMES)
def opening_shards(folder, size):
    return lambda: Features(folder / "shards")


@stage("opening one file per image", "files", (10_000, 100_000, 1_000_000), 100, one_row_files, NAMES)
def opening_files(folder, size):
    return lambda: Features(folder / "lone", num_classes=1)


def lone_features(folder, size):
    """One .npy per image, as the reference scripts write them."""
    for kind, row in (
        ("features", np.zeros((4, 4, 4), np.float16)),
        ("sem", np.zeros((L,), np.int64)),
        ("labels", np.zeros((1,), np.int64)),
    ):
        names = (f"{number}.npy" for number in range(size))
        linked(kind_dir(folder / "features", 32, kind), names, lambda path, row=row: np.save(path, row))


@stage("checking one file per image before training", "files", (500, 5_000, 50_000), 100, lone_features)
def validating_files(folder, size):
    return lambda: Features(folder / "features", V=V, num_classes=1).validate()


@stage("python -m dlc.features pack", "rows", (100, 1_000, 10_000), 100, lone_features)
def packing(folder, size):
    def work():
        new = tempfile.mkdtemp(dir=folder)
        args = dict(old=folder / "features", new=new, V=V, num_classes=1, shard_size=1024, dtype=None)
        silent(pack, SimpleNamespace(**args))

    return work


def parquet(folder, size):
    import pyarrow
    import pyarrow.parquet

    features, labels = np.random.default_rng(0).standard_normal((size, 64)), np.zeros((size, L), np.int64)
    columns = dict(features=features.astype(np.float32).reshape(size, 4, 4, 4).tolist(), labels=labels.tolist())
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")


def importing(folder, size):
    def work():
        new = tempfile.mkdtemp(dir=folder)
        args = dict(dataset=str(folder / "train.parquet"), split="train", new=new, V=V, num_classes=None)
        silent(import_hf, SimpleNamespace(**args, shard_size=1024, dtype=None, factor=8))

    return work


if importlib.util.find_spec("pyarrow"):
    stage("python -m dlc.features import-hf, Parquet", "rows", (1_000, 10_000, 100_000), 100, parquet)(importing)


def half_extracted(folder, size):
    """Shards of one row, of which every second one has no record yet."""
    writer = FeatureWriter(folder / "features", Manifest(L=L, V=V, shard_size=1, **SETTINGS))
    writer.start()
    writer.lock.release()
    for kind in ("features", "sem", "labels", "path"):
        linked(kind_dir(writer.root, 32, kind), (writer.shard_path(kind, one).name for one in range(size)), Path.touch)
    linked(
        writer.progress, (writer.record_path(one).name for one in range(0, size, 2)), lambda path: path.write_text("{}")
    )


@stage("resuming extraction: which shards are missing", "shards", (1_000, 10_000, 100_000), 100, half_extracted)
def resuming_extraction(folder, size):
    def work():
        writer = FeatureWriter(folder / "features", Manifest(L=L, V=V, shard_size=1, **SETTINGS))
        assert writer.start() and sum(map(writer.is_done, range(size))) == -(-size // 2)
        writer.lock.release()

    return work
