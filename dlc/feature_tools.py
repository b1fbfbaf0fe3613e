"""Look at features, check them, and convert other layouts to them.

    python -m dlc.features info FEATURES              what they are, in words; FEATURES/codes.png
    python -m dlc.features check FEATURES             every shard and value; exit 1 with a list of what is wrong
    python -m dlc.features pack OLD NEW --V 256       one .npy per image (the reference scripts' layout) into shards
    python -m dlc.features import-hf DIR NEW --V 256  a Hugging Face dataset saved to disk into shards
"""
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dlc.cli import ArgumentParser, number, one_line, progress
from dlc.disk import is_plain_name, read_json, recorded_id, write_whole
from dlc.features import (FORMAT_VERSION, Features, FeatureWriter, Stack, as_stored, check_range, code_dtype,
                          read_manifest, shard_stacks)

# Kinds of columns of datasets: those that are read here, and those that may stand beside them, unread.
PLAIN_COLUMNS = ("Value", "ClassLabel", "Sequence", "List", "LargeList", "Array2D", "Array3D", "Array4D", "Array5D")
OTHER_COLUMNS = ("Image", "Audio", "Video", "Translation", "TranslationVariableLanguages")
PART = 4096                 # rows looked at together, so that no file need fit in memory


def parts(stack, what):
    """The arrays of a Stack's files, cut into parts, with a progress bar."""
    for index in progress(range(len(stack.paths)), desc=what, unit="file", delay=2):
        array = stack.array(index)
        for start in range(0, len(array), PART):
            yield array[start:start + PART]


def needs_V(V, has_codes):
    if has_codes and V is None:
        raise ValueError("there are codes, and no manifest.json to say V: give --V, the tokens a position can have")


#################################################################################
#                                     info                                      #
#################################################################################

def latent_statistics(features):
    """Mean and standard deviation (4,) of each channel over all rows; of moments, of a draw of the posterior."""
    total = squares = 0
    for part in parts(features.latents, "latents"):
        part = part.astype(np.float32)
        total += part.sum(axis=(0, 2, 3), dtype=np.float64)
        squares += np.square(part).sum(axis=(0, 2, 3), dtype=np.float64)
    values = features.count * np.prod(features.latent_shape[1:])
    mean, squares = total / values, squares / values
    if features.latent_kind == "moments":           # E[draw^2] = E[mean^2] + E[std^2]
        mean, squares = mean[:4], squares[:4] + squares[4:]
    return mean, np.sqrt(squares - mean**2)


def code_usage(features):
    """How often each position has each token (L, V) int64, and how many rows have the code of a row before them.

    Codes are compared by a random linear hash to 64 bits. Two flips of one image count as one row.
    """
    counts = np.zeros(features.L * features.V, np.int64)
    weights = np.random.default_rng(0).integers(0, 2**63, features.L, dtype=np.uint64) * 2 + 1
    hashes = []
    for part in parts(features.codes, "codes"):
        places = part.astype(np.int64) + np.arange(features.L) * features.V
        counts += np.bincount(places.ravel(), minlength=len(counts))
        hashes.append(part.astype(np.uint64) @ weights)
    hashes = np.concatenate(hashes)
    if (features.manifest or {}).get("flip") == "both":
        hashes = hashes[::2]
    return counts.reshape(features.L, features.V), len(hashes) - len(np.unique(hashes))


def usage_picture(counts):
    """Token usage (L, V) as a picture: positions down, tokens across, dead tokens red, others dark to bright."""
    L, V = counts.shape
    relative = counts * V / counts.sum(axis=1, keepdims=True)                  # 1: as often as any other token
    bright = np.clip(np.log2(np.maximum(relative, 1e-9)) / 8 + 0.5, 0, 1)
    pixels = np.repeat((30 + 225 * bright[..., None]).astype(np.uint8), 3, axis=2)
    pixels[counts == 0] = (170, 20, 20)
    height, width = (max(1, 512 // side) for side in (L, V))
    pixels = pixels.repeat(height, axis=0).repeat(width, axis=1)
    caption = [f"{L} positions (down) x {V} tokens (across)", "black: 1/16 of even use; white: 16 times; red: never"]
    picture = Image.new("RGB", (max(pixels.shape[1], 340), pixels.shape[0] + 34), "white")
    picture.paste(Image.fromarray(pixels), (0, 34))
    for line, text in enumerate(caption):
        ImageDraw.Draw(picture).text((4, 3 + 14 * line), text, fill="black")
    return picture


def info(args):
    features = Features(args.path, args.V, args.num_classes)
    needs_V(features.V, features.codes is not None)
    manifest, size = features.manifest, features.image_size
    if manifest is None:
        print(f"{args.path}: {features.count:,} rows at {size}x{size}, one .npy each (no manifest.json)")
    else:
        print(f"{args.path}: {features.count:,} rows of {manifest['images']:,} images at {size}x{size} in "
              f"{len(manifest['shards']):,} shards, {len(manifest['skipped']):,} images skipped")
        for path, reason in manifest["skipped"][:10]:
            print("  " + one_line(f"skipped {path!r}: {reason}"))
        known = [f"{key} {manifest[key]}" for key in ("vae", "scaling_factor", "encoder", "precision", "flip", "seed")
                 if manifest.get(key) is not None]
        if known:
            print(one_line("made with: " + ", ".join(known), 2000))

    mean, std = latent_statistics(features)
    print(f"latents: {features.latent_kind}, {features.latents.array(0).dtype}, {features.latent_shape}; of each "
          f"channel mean {np.round(mean, 3).tolist()}, std {np.round(std, 3).tolist()}")
    if not np.isfinite(std).all():
        print("warning: there are latents that are not finite: check says where")
    for channel in np.flatnonzero((std <= 0.5) | (std >= 2)):
        print(f"warning: channel {channel} of the latents has std {std[channel]:.3g}, outside 0.5 to 2: were they "
              "multiplied by the VAE's scaling factor, once?")

    features.labels.check_range(features.num_classes)
    labels = np.bincount(np.concatenate([part.astype(np.int64) for part in parts(features.labels, "labels")]))
    print(f"labels: {features.num_classes} classes, {np.count_nonzero(labels)} of them with rows, "
          f"{labels[labels > 0].min():,} to {labels.max():,} each")

    if features.codes is None:
        print("codes: none")
        return
    features.codes.check_range(features.V)
    counts, duplicates = code_usage(features)
    usage = counts / counts.sum(axis=1, keepdims=True)                                       # (L, V)
    perplexity = np.exp(-(usage * np.log(np.maximum(usage, 1e-300))).sum(axis=1))            # (L,)
    dead = (counts == 0).sum()
    print(f"codes: L={features.L}, V={features.V}, {features.codes.array(0).dtype}; perplexity of a position: mean "
          f"{perplexity.mean():.1f}, least {perplexity.min():.1f} (position {perplexity.argmin()}), most "
          f"{perplexity.max():.1f}")
    print(f"       dead tokens: {dead:,} of {counts.size:,} ({dead / counts.size:.1%}); duplicates: {duplicates:,} "
          f"image{'s have' if duplicates != 1 else ' has'} the code of one before")
    picture = Path(args.path) / "codes.png"
    write_whole(picture, lambda file: usage_picture(counts).save(file, "png"))
    print(f"token usage: {picture}")


#################################################################################
#                                     check                                     #
#################################################################################

def problems(root, V=None, num_classes=None):
    """What is wrong with FEATURES/, a line each: files, shapes, types, values, and what the manifest says of them."""
    manifest_path = Path(root) / "manifest.json"
    dtypes, widths = {}, {}
    try:
        if manifest_path.is_file():
            manifest = read_manifest(root)
            stacks = shard_stacks(root, manifest)
            V, num_classes = manifest["V"], len(manifest["classes"])
            dtypes = dict(features=manifest["dtype"], labels="int64", **(dict(sem=code_dtype(V)) if V else {}))
            widths = dict(features=8 if manifest["latents"] == "moments" else 4, sem=manifest["L"])
        else:
            features = Features(root, V, num_classes)
            needs_V(V, features.codes is not None)
            stacks = dict(features=features.latents, labels=features.labels, sem=features.codes)
            num_classes = features.num_classes
    except ValueError as error:
        yield str(error)
        return
    if manifest_path.is_file():
        listed = sum(shard["rows"] for shard in manifest["shards"])
        if not listed or listed != manifest["count"]:
            yield f"{manifest_path} counts {manifest['count']} rows, its shards {listed}"
        for stack in stacks.values():
            known = {path.name for path in stack.paths}
            for path in sorted(stack.paths[0].parent.glob("*.npy")) if stack.paths else ():
                if path.name not in known:
                    yield f"{path} is not in the manifest"
    limits = dict(labels=num_classes, sem=V)
    for kind, stack in stacks.items():
        shapes = {}
        for index in progress(range(len(stack.paths) if stack else 0), desc=kind, unit="file", delay=2):
            path = stack.paths[index]
            if not path.is_file():
                yield f"{path} is missing"
                continue
            try:
                # apart from the others, lest all be held against the first
                array = Stack([path], [stack.rows(index)], stack.sample_ndim, stack.lone).array(0)
                shapes[path] = array.shape[1:]
                if limits.get(kind) is not None:
                    check_range(array, limits[kind], lambda i: (path, i))
            except ValueError as error:
                yield str(error)
                continue
            if kind in dtypes and array.dtype != dtypes[kind]:
                yield f"{path} has values of type {array.dtype}, the manifest says {np.dtype(dtypes[kind])}"
            if kind in widths and array.shape[1] != widths[kind]:
                yield f"{path} has rows of shape {array.shape[1:]}, by the manifest the first is {widths[kind]}"
            if kind == "path" and array.dtype.kind != "U":
                yield f"{path} has values of type {array.dtype}, wanted unicode"
            if kind == "features" and array.dtype.kind != "f":
                yield f"{path} has values of type {array.dtype}, wanted floats"
            elif kind == "features":
                for start in range(0, len(array), PART):
                    finite = np.isfinite(array[start:start + PART]).all(axis=(1, 2, 3))
                    if not finite.all():
                        yield f"{path}, row {start + int(np.argmin(finite))}: a latent that is not finite"
                        break
        usual = Counter(shapes.values()).most_common(1)
        for path, shape in shapes.items():
            if shape != usual[0][0] and shape[0] == widths.get(kind, shape[0]):
                yield f"{path} has rows of shape {shape}, most files {usual[0][0]}"


def check(args):
    wrong = list(problems(args.path, args.V, args.num_classes))
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(1)
    print(f"{args.path}: nothing wrong with its {Features(args.path, args.V, args.num_classes).count:,} rows")


#################################################################################
#                              pack and import-hf                               #
#################################################################################

def write_shards(args, source, count, channels, names, read, **settings):
    """Write rows 0..count-1 into shards at args.new; read(rows) gives the arrays of an index range, one a kind.

    The latents become what settings["dtype"] says. Of the settings of an extraction, what is not known of other layouts
    is None.

    Raises ValueError where the latents have other than four channels, or one is not finite in that type.
    """
    if channels != 4:
        raise ValueError(f"{source} has latents of {channels} channels, wanted 4")
    new, shard_size = args.new, args.shard_size
    unknown = dict.fromkeys(("vae", "vae_sha256", "scaling_factor", "encoder", "encoder_sha256", "precision", "flip",
                             "seed"))
    settings = dict(unknown, format_version=FORMAT_VERSION, latents="sample", shard_size=shard_size, source=source,
                    images=count,
                    listing_sha256=hashlib.sha256("\n".join(names).encode()).hexdigest(), **settings)
    writer = FeatureWriter(new, settings)
    if not writer.start():
        print(f"{new} is complete; nothing to do")
        return
    shards = range(-(-count // shard_size))
    for shard in progress(shards, desc="packing", unit="shard", delay=2):
        if not writer.is_done(shard):
            rows = range(shard * shard_size, min((shard + 1) * shard_size, count))
            arrays = read(rows)
            arrays["features"] = as_stored(arrays["features"], settings["dtype"], lambda i: f"{source}, row {rows[i]}",
                                           "mend that row, or take it out")
            writer.write(shard, arrays, [])
    writer.finish(len(shards))
    print(f"done: {count:,} rows in {len(shards):,} shards at {new}")


def pack(args):
    old = Features(args.old, args.V, args.num_classes)
    if old.manifest is not None:
        raise ValueError(f"{args.old} has a manifest.json: it is packed already")
    needs_V(args.V, old.codes is not None)
    names = [path.name for path in old.latents.paths]
    dtype = args.dtype or str(old.latents.array(0).dtype)

    def read(rows):
        arrays = dict(features=old.latents.gather(rows), path=np.array([names[row] for row in rows]),
                      labels=old.labels.gather(rows, limit=old.num_classes).astype(np.int64))
        if old.codes is not None:
            arrays["sem"] = old.codes.gather(rows, limit=old.V).astype(code_dtype(old.V))
        return arrays

    write_shards(args, recorded_id(args.old), old.count, old.latent_shape[0], names, read, image_size=old.image_size,
                 dtype=dtype, L=old.L, V=old.V if old.codes is not None else None,
                 classes=[str(i) for i in range(old.num_classes)])


def check_dataset(directory):
    """Raise ValueError where a dataset saved to disk names files outside it, or has columns that would open some.

    Columns of images, for one, hold paths and URLs, which datasets opens when they are read. Their kinds are named in
    dataset_info.json, and once more in each Arrow file.
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
            unknown = {kind for key, column in kinds.items() for kind in column_kinds(column) if kind not in (
                PLAIN_COLUMNS if key in ("features", "labels") else PLAIN_COLUMNS + OTHER_COLUMNS)}
            if unknown:
                raise ValueError(f"columns of the kind {one_line(min(unknown), 60)}, wanted numbers and "
                                 "lists of them")


def plain_names(path, key, name_of):
    """The names that a JSON file lists under a key. Raises ValueError where one leads out of the file's folder."""
    names = [name_of(entry) for entry in read_json(path)[key]]
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"{path.name} names {one_line(repr(name)[:1000], 80)}, wanted names in its own folder")
    return names


def column_kinds(column):
    """Every kind that a column's description names, at any depth."""
    kinds, left = set(), [column]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            kinds |= {str(one["_type"])} if "_type" in one else set()
            left += one.values()
        elif isinstance(one, list):
            left += one
    return kinds


def import_hf(args):
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise ValueError("import-hf needs the package datasets: pip install datasets") from None
    if not Path(args.directory).is_dir():                       # datasets would take it for a place on the net, too
        raise ValueError(f"{args.directory} is not a dataset saved to disk: no such directory")
    try:
        check_dataset(args.directory)
        data = load_from_disk(args.directory)
    except Exception as error:                                  # datasets and Arrow raise all kinds
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

    first = data[:1]
    latent_shape = first["features"].shape[-3:]
    if first["features"].size != np.prod(latent_shape) or len(latent_shape) != 3:
        raise ValueError(f"{args.directory}: column 'features' has rows of shape {first['features'].shape[1:]}, wanted "
                         "latents (channels, height, width)")
    L = first["labels"].size if first["labels"].ndim > 1 else None             # a number a row is a class, not a code
    needs_V(args.V, L is not None)
    num_classes = 1 if L else args.num_classes or 1000
    dtype = args.dtype or "float32"

    def read(rows):
        part = data[rows.start:rows.stop]
        try:
            latents = part["features"].reshape(len(rows), *latent_shape)
            values = part["labels"].reshape(len(rows), *([L] if L else []))
        except ValueError:
            raise ValueError(f"{args.directory}, rows {rows.start} to {rows.stop - 1}: not all have latents "
                             f"{latent_shape} and {f'{L} tokens' if L else 'one label'}") from None
        arrays = dict(features=latents, path=np.array([str(row) for row in rows]))
        check_range(values, args.V if L else num_classes, lambda i: (f"{args.directory}, column 'labels'", rows[i]))
        if L:
            return dict(arrays, sem=values.astype(code_dtype(args.V)), labels=np.zeros(len(rows), np.int64))
        return dict(arrays, labels=values.astype(np.int64))

    write_shards(args, source, len(data), latent_shape[0], [source], read, dtype=dtype, L=L,
                 image_size=latent_shape[-1] * args.factor, V=args.V if L else None,
                 classes=["all"] if L else [str(i) for i in range(num_classes)])


def main():
    parser = ArgumentParser(__doc__, prog="python -m dlc.features")
    tools = parser.add_subparsers(required=True, dest="command", metavar="info|check|pack|import-hf")

    def tool(function, name, help):
        one = tools.add_parser(name, doc=help, help=help)
        one.set_defaults(function=function)
        one.add_argument("--V", type=number(int, 2, 65536),
                         help="tokens per code position: needed where there are codes and no manifest")
        one.add_argument("--num-classes", type=number(int, 1), help="classes, where there is no manifest [1000]")
        return one

    for function, help in ((info, "say what features are, and draw how their codes use the tokens, FEATURES/codes.png"),
                           (check, "look at every shard and value; exit 1 with a list of what is wrong")):
        tool(function, function.__name__, help).add_argument("path", help="features directory")
    one = tool(pack, "pack", "one .npy per image, as the reference scripts write them, into shards")
    two = tool(import_hf, "import-hf", "a Hugging Face dataset saved to disk, columns features (latents) and labels "
                                       "(codes, or classes), into shards")
    one.add_argument("old", help="features directory of one .npy per image")
    two.add_argument("directory", help="what Dataset.save_to_disk wrote")
    two.add_argument("--split", default="train", help="of a dataset that has several [%(default)s]")
    two.add_argument("--factor", type=number(int, 1), default=8, help="pixels per latent cell [%(default)s]")
    for packing, dtype in ((one, "as they are"), (two, "float32")):
        packing.add_argument("new", help="features directory to write")
        packing.add_argument("--shard-size", type=number(int, 1), default=1024, help="rows a shard [%(default)s]")
        packing.add_argument("--dtype", choices=["float16", "float32"], help=f"of the stored latents [{dtype}]")
    args = parser.parse_args()
    with parser.one_line_errors():
        args.function(args)
