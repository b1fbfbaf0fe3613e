"""Convert other layouts of features to shards: the commands pack and import-hf."""

import json
from pathlib import Path

import numpy as np

from dlc.cli import one_line, progress
from dlc.disk import is_plain_name, read_json, recorded_id
from dlc.features.inspection import needs_V
from dlc.features.manifest import Manifest
from dlc.features.rows import check_range
from dlc.features.store import Features, FeatureWriter, as_stored
from dlc.listing import listing_sha256

# Types of dataset columns: those that are read here, and those that are allowed beside them, unread.
PLAIN_COLUMNS = ("Value", "ClassLabel", "Sequence", "List", "LargeList", "Array2D", "Array3D", "Array4D", "Array5D")
OTHER_COLUMNS = ("Image", "Audio", "Video", "Translation", "TranslationVariableLanguages")


def write_shards(args, source, count, latent_shape, names, read, **keys):
    """Write rows 0..count-1 as shards to args.new.

    Args:
        source: the id of what is converted.
        latent_shape: (C, h, w).
        names: the names by which the source's rows are told apart.
        read: a function read(rows) of an index range that returns the arrays by kind.
        keys: the other keys of the `Manifest` that are known; the latents are cast to its dtype.

    Raises ValueError if latents are not square, or not finite in that type.
    """
    new, shard_size = args.new, args.shard_size
    if latent_shape[1] != latent_shape[2]:
        raise ValueError(
            f"{source} has latents of shape {tuple(latent_shape)}, wanted (channels, height, width) with "
            "height and width alike"
        )
    manifest = Manifest(
        latents="sample",
        latent_channels=int(latent_shape[0]),
        shard_size=shard_size,
        images=count,
        converted_from=source,
        listing_sha256=listing_sha256(names),
        **keys,
    )
    writer = FeatureWriter(new, manifest)
    if not writer.start():
        print(f"{new} is complete; nothing to do")
        return
    shards = range(-(-count // shard_size))
    for shard in progress(shards, desc="packing", unit="shard", delay=2):
        if not writer.is_done(shard):
            rows = range(shard * shard_size, min((shard + 1) * shard_size, count))
            arrays = read(rows)
            arrays["features"] = as_stored(
                arrays["features"],
                manifest.dtype,
                lambda row, rows=rows: f"{source}, row {rows[row]}",
                "mend that row, or take it out",
            )
            arrays.update({kind: arrays[kind].astype(dtype) for kind, dtype in manifest.dtypes.items()})
            writer.write(shard, arrays, [])
    writer.finish(len(shards))
    print(f"done: {count:,} rows in {len(shards):,} shards at {new}")


def pack(args):
    """The command pack: one .npy per image, as the reference scripts write them, to shards."""
    old = Features(args.old, args.V, args.num_classes)
    if old.manifest is not None:
        raise ValueError(f"{args.old} has a manifest.json: it is packed already")
    needs_V(args.V, old.codes is not None)
    names = [path.name for path in old.latents.paths]
    dtype = args.dtype or str(old.latents.array(0).dtype)

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
        args,
        recorded_id(args.old),
        old.count,
        old.latent_shape,
        names,
        read,
        image_size=old.image_size,
        dtype=dtype,
        L=old.L,
        V=old.V if old.codes is not None else None,
        classes=[str(i) for i in range(old.num_classes)],
    )


def check_dataset(directory):
    """Raise ValueError if a dataset saved to disk names files outside it, or has columns that open other files.

    Columns of images, for example, hold paths and URLs, which datasets opens when the columns are read. The types of
    columns are named in dataset_info.json, and again in each Arrow file.
    """
    import pyarrow

    root = Path(directory)
    folders = [root] if (root / "state.json").is_file() else []
    if (root / "dataset_dict.json").is_file():
        folders += [root / name for name in plain_names(root / "dataset_dict.json", "splits", lambda split: split)]
    for folder in folders:
        columns = [read_json(folder / "dataset_info.json").get("features")]
        for name in plain_names(folder / "state.json", "_data_files", lambda entry: entry.get("filename")):
            with pyarrow.memory_map(str(folder / name)) as source:
                metadata = pyarrow.ipc.open_stream(source).schema.metadata or {}
            columns.append(json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features"))
        for kinds in filter(None, columns):
            unknown = {
                kind
                for key, column in kinds.items()
                for kind in column_kinds(column)
                if kind not in (PLAIN_COLUMNS if key in ("features", "labels") else PLAIN_COLUMNS + OTHER_COLUMNS)
            }
            if unknown:
                raise ValueError(f"columns of the kind {one_line(min(unknown), 60)}, wanted numbers and lists of them")


def plain_names(path, key, name_of):
    """The names that a JSON file lists under a key. Raises ValueError if one leads out of the file's folder."""
    names = [name_of(entry) for entry in read_json(path)[key]]
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"{path.name} names {one_line(repr(name)[:1000], 80)}, wanted names in its own folder")
    return names


def column_kinds(column):
    """Every type that a column's description names, at any depth."""
    kinds, left = set(), [column]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            kinds |= {str(part["_type"])} if "_type" in part else set()
            left += part.values()
        elif isinstance(part, list):
            left += part
    return kinds


def open_dataset(args):
    """The columns features and labels of a saved dataset, in NumPy format, and its id.

    Raises ValueError if it is not a dataset saved to disk, or has no such columns or rows.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise ValueError("import-hf needs the package datasets: pip install datasets") from None
    if not Path(args.directory).is_dir():  # datasets would look for it on the network
        raise ValueError(f"{args.directory} is not a dataset saved to disk: no such directory")
    try:
        check_dataset(args.directory)
        data = load_from_disk(args.directory)
    except Exception as error:  # datasets and Arrow raise many types
        raise ValueError(f"{args.directory} is not a dataset saved to disk ({one_line(error, 150)})") from None
    source = recorded_id(args.directory)
    if isinstance(data, DatasetDict):
        if args.split not in data:
            raise ValueError(f"{args.directory} has no split {args.split!r}: --split one of {', '.join(data)}")
        data, source = data[args.split], f"{source}, split {args.split}"
    for column in ("features", "labels"):
        if column not in data.column_names:
            raise ValueError(f"{args.directory} has no column {column!r}, only {', '.join(data.column_names)}")
    data = data.select_columns(["features", "labels"]).with_format("numpy")
    if not len(data):
        raise ValueError(f"{args.directory} has no rows")
    return data, source


def import_hf(args):
    """The command import-hf: a Hugging Face dataset saved to disk, to shards."""
    data, source = open_dataset(args)
    first = data[:1]
    latent_shape = first["features"].shape[-3:]
    if first["features"].size != np.prod(latent_shape) or len(latent_shape) != 3:
        raise ValueError(
            f"{args.directory}: column 'features' has rows of shape {first['features'].shape[1:]}, wanted "
            "latents (channels, height, width)"
        )
    L = first["labels"].size if first["labels"].ndim > 1 else None  # one number per row is a class, not a code
    needs_V(args.V, L is not None)
    num_classes = 1 if L else args.num_classes or 1000
    dtype = args.dtype or "float32"

    def read(rows):
        block = data[rows.start : rows.stop]
        try:
            latents = block["features"].reshape(len(rows), *latent_shape)
            values = block["labels"].reshape(len(rows), *([L] if L else []))
        except ValueError:
            raise ValueError(
                f"{args.directory}, rows {rows.start} to {rows.stop - 1}: not all have latents "
                f"{latent_shape} and {f'{L} tokens' if L else 'one label'}"
            ) from None
        arrays = dict(features=latents, path=np.array([str(row) for row in rows]))
        check_range(values, args.V if L else num_classes, lambda i: (f"{args.directory}, column 'labels'", rows[i]))
        if L:
            return dict(arrays, sem=values, labels=np.zeros(len(rows)))
        return dict(arrays, labels=values)

    write_shards(
        args,
        source,
        len(data),
        latent_shape,
        [source],
        read,
        dtype=dtype,
        L=L,
        image_size=latent_shape[-1] * args.factor,
        V=args.V if L else None,
        classes=["all"] if L else [str(i) for i in range(num_classes)],
    )
