"""Convert other layouts of features to shards: the commands pack and import-hf."""

import argparse
import contextlib
import itertools
import os
import re
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np

from dlc.data.inspection import needs_V
from dlc.data.listing import listing_sha256
from dlc.data.manifest import Manifest, read_manifest
from dlc.data.rows import check_rows
from dlc.data.store import Features, FeatureWriter, as_stored
from dlc.data.tables import FeatureTable
from dlc.machine.cli import progress
from dlc.machine.files import recorded_id


def write_shards(
    new: str,
    source: str,
    latent_shape: Sequence[int],
    names: list[str],
    read: Callable[[int, int], Generator[dict[str, np.ndarray], None, None]],
    **keys,
) -> None:
    """Write rows as shards to the features directory `new`.

    Args:
        source: the id of what is converted.
        latent_shape: (C, h, w).
        names: the names by which the source's rows are told apart.
        read: read(start, size) yields arrays by kind: `size` rows at once, from row `start` on.
        keys: the other keys of the `Manifest` that are known; the latents are cast to its dtype.

    Raises ValueError if latents are not square, or not finite in that type.
    """
    if latent_shape[1] != latent_shape[2]:
        raise ValueError(
            f"{source} has latents of shape {tuple(latent_shape)}, wanted (channels, height, width) with "
            "height and width alike"
        )
    known = dict(converted_from=source, listing_sha256=listing_sha256(names), latent_channels=latent_shape[0])
    manifest = Manifest(latents="sample", **known, **keys)
    writer, size, count = FeatureWriter(new, manifest), manifest.shard_size, manifest.num_shards
    if not writer.start():
        print(f"{new} is complete; nothing to do")
        return
    shards = range(next((shard for shard in range(count) if not writer.is_done(shard)), count), count)
    with contextlib.closing(read(shards.start * size, size)) as blocks:
        for shard, arrays in zip(progress(shards, desc="packing", unit="shard", delay=2), blocks):
            name, advice = lambda i, at=shard * size: f"latents of {source}, row {at + i}", "fix it, or take it out"
            arrays["features"] = as_stored(arrays["features"], manifest.dtype, name, advice)
            arrays.update({kind: arrays[kind].astype(dtype) for kind, dtype in manifest.dtypes.items()})
            writer.write(shard, arrays, [])
    writer.finish(count)
    print(f"done: {manifest.images:,} rows in {count:,} shards at {new}")


def pack(args: argparse.Namespace) -> None:
    """The command pack: one .npy per image, as the reference scripts write them, to shards."""
    old = Features(args.old, args.V, args.num_classes)
    if old.manifest is not None:
        raise ValueError(f"{args.old} has a manifest.json: it is packed already")
    needs_V(args.V, old.codes is not None)
    names = [os.fsdecode(name) for name in old.latents.names]
    kinds = [kind for kind in ("features", "labels", "sem") if kind in old.arrays]

    def read(start, size):
        for at in range(start, old.count, size):
            rows = np.arange(at, min(at + size, old.count))
            yield dict({kind: old.gather(kind, rows) for kind in kinds}, path=np.array(names[at : at + size]))

    write_shards(
        args.new,
        recorded_id(args.old),
        old.latent_shape,
        names,
        read,
        shard_size=args.shard_size,
        images=old.count,
        image_size=old.image_size,
        dtype=args.dtype or str(old.latents.array(0).dtype),
        L=old.L,
        V=old.V if old.codes is not None else None,
        classes=[str(i) for i in range(old.num_classes)],
    )


def import_hf(args: argparse.Namespace) -> None:
    """The command import-hf: a Hugging Face dataset, saved to disk, in Parquet files or on the hub, to shards."""
    table = FeatureTable(args.dataset, args.split)
    with contextlib.closing(table.read(0, 1)) as rows:
        first = next(rows)
    latent_shape = first["features"].shape[-3:]
    if first["features"].size != np.prod(latent_shape) or len(latent_shape) != 3:
        raise ValueError(
            f"{args.dataset}: column 'features' has rows of shape {first['features'].shape[1:]}, wanted "
            "latents (channels, height, width)"
        )
    L = first["labels"].size if first["labels"].ndim > 1 else None  # one number per row is a class, not a code
    needs_V(args.V, L is not None)
    num_classes, column = 1 if L else args.num_classes or 1000, f"{args.dataset}, column 'labels'"

    def read(start, size):
        with contextlib.closing(table.read(start, size)) as blocks:
            for at, block in zip(itertools.count(start, size), blocks):
                rows = np.arange(at, at + len(block["labels"]))
                for name, array in block.items():
                    if array.shape[1:] != first[name].shape[1:]:
                        shapes = f"{array.shape[1:]} from row {at} on, and first {first[name].shape[1:]}"
                        raise ValueError(f"{args.dataset}: column {name!r} has rows of shape {shapes}")
                values = block["labels"].reshape(len(rows), *([L] if L else []))
                check_rows(values, args.V if L else num_classes, lambda i, at=at: f"{column}, row {at + i}")
                coded = dict(sem=values, labels=np.zeros(len(rows))) if L else dict(labels=values)
                yield dict(
                    coded, features=block["features"].reshape(-1, *latent_shape), path=np.array([*map(str, rows)])
                )

    write_shards(
        args.new,
        table.source,
        latent_shape,
        [table.source],
        read,
        shard_size=args.shard_size,
        images=table.count,
        dtype=args.dtype or "float32",
        L=L,
        image_size=latent_shape[-1] * args.factor,
        V=args.V if L else None,
        classes=["all"] if L else [str(i) for i in range(num_classes)],
    )


def fetch_features(dataset: str, path: str, V: int | None, num_classes: int | None) -> None:
    """Import a dataset as import-hf does by default, unless it is at that path already, which asks no hub.

    Raises ValueError, and where the path holds other features.
    """
    if not (Path(path) / "manifest.json").is_file():
        given = dict(dataset=dataset, new=path, V=V, num_classes=num_classes)
        return import_hf(argparse.Namespace(**given, split="train", factor=8, shard_size=1024, dtype=None))
    there, name = read_manifest(path).converted_from, recorded_id(dataset)
    name = name if Path(dataset).exists() else name.partition("@")[0]  # of the hub, at any revision
    if not re.match(rf"{re.escape(name)}(@|, split |$)", there or ""):
        holds = f"other features ({there or 'that were extracted'})"
        raise ValueError(f"--hf-dataset {dataset}: {path} holds {holds}: give another --features-path")
