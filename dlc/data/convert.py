"""Convert other layouts of features to shards: the commands pack and import-hf."""

import argparse
import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlc.data.inspection import needs_V
from dlc.data.listing import listing_sha256
from dlc.data.manifest import Manifest, read_manifest
from dlc.data.rows import check_range
from dlc.data.store import Features, FeatureWriter, as_stored
from dlc.data.tables import open_table
from dlc.machine.cli import progress
from dlc.machine.files import recorded_id


def write_shards(
    new: str, source: str, latent_shape: tuple[int, ...], names: list[str], read: Callable[[range], dict], **keys
) -> None:
    """Write rows as shards to the features directory `new`.

    Args:
        source: the id of what is converted.
        latent_shape: (C, h, w).
        names: the names by which the source's rows are told apart.
        read: a function read(rows) of an index range that returns the arrays by kind.
        keys: the other keys of the `Manifest` that are known; the latents are cast to its dtype.

    Raises ValueError if latents are not square, or not finite in that type.
    """
    if latent_shape[1] != latent_shape[2]:
        raise ValueError(
            f"{source} has latents of shape {tuple(latent_shape)}, wanted (channels, height, width) with "
            "height and width alike"
        )
    manifest = Manifest(
        latents="sample",
        latent_channels=int(latent_shape[0]),
        converted_from=source,
        listing_sha256=listing_sha256(names),
        **keys,
    )
    writer = FeatureWriter(new, manifest)
    if not writer.start():
        print(f"{new} is complete; nothing to do")
        return
    count, shard_size = manifest.images, manifest.shard_size
    shards = range(-(-count // shard_size))
    for shard in progress(shards, desc="packing", unit="shard", delay=2):
        if not writer.is_done(shard):
            rows = range(shard * shard_size, min((shard + 1) * shard_size, count))
            arrays = read(rows)
            where, advice = lambda row, rows=rows: f"{source}, row {rows[row]}", "fix that row, or take it out"
            arrays["features"] = as_stored(arrays["features"], manifest.dtype, where, advice)
            arrays.update({kind: arrays[kind].astype(dtype) for kind, dtype in manifest.dtypes.items()})
            writer.write(shard, arrays, [])
    writer.finish(len(shards))
    print(f"done: {count:,} rows in {len(shards):,} shards at {new}")


def pack(args: argparse.Namespace) -> None:
    """The command pack: one .npy per image, as the reference scripts write them, to shards."""
    old = Features(args.old, args.V, args.num_classes)
    if old.manifest is not None:
        raise ValueError(f"{args.old} has a manifest.json: it is packed already")
    needs_V(args.V, old.codes is not None)
    names = [path.name for path in old.latents.paths]

    def read(rows):
        arrays = dict(
            features=old.latents.gather(rows),
            path=np.array([names[row] for row in rows]),
            labels=old.labels.gather(rows, limit=old.num_classes),
        )
        if old.codes is not None:
            arrays["sem"] = old.codes.gather(rows, limit=old.V)
        return arrays

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
    with contextlib.closing(open_table(args.dataset, args.split)) as table:
        _import_table(args, table)


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


def _import_table(args, table):
    first = table.read(0, 1)
    latent_shape = first["features"].shape[-3:]
    if first["features"].size != np.prod(latent_shape) or len(latent_shape) != 3:
        raise ValueError(
            f"{args.dataset}: column 'features' has rows of shape {first['features'].shape[1:]}, wanted "
            "latents (channels, height, width)"
        )
    L = first["labels"].size if first["labels"].ndim > 1 else None  # one number per row is a class, not a code
    needs_V(args.V, L is not None)
    num_classes = 1 if L else args.num_classes or 1000

    def read(rows):
        block = table.read(rows.start, rows.stop)
        try:
            latents = block["features"].reshape(len(rows), *latent_shape)
            values = block["labels"].reshape(len(rows), *([L] if L else []))
        except ValueError:
            raise ValueError(
                f"{args.dataset}, rows {rows.start} to {rows.stop - 1}: not all have latents "
                f"{latent_shape} and {f'{L} tokens' if L else 'one label'}"
            ) from None
        arrays = dict(features=latents, path=np.array([str(row) for row in rows]))
        check_range(values, args.V if L else num_classes, lambda i: (f"{args.dataset}, column 'labels'", rows[i]))
        if L:
            return dict(arrays, sem=values, labels=np.zeros(len(rows)))
        return dict(arrays, labels=values)

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
