"""What features are, in words, and what is wrong with them: the commands info and check."""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dlc.cli import progress
from dlc.disk import write_whole
from dlc.features.manifest import read_manifest
from dlc.features.rows import Stack, check_range
from dlc.features.store import Features, code_dtype, shard_stacks

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
#                                      info                                     #
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
            print(f"  skipped {path!r}: {reason}")
        known = [f"{key} {manifest[key]}" for key in ("vae", "scaling_factor", "encoder", "precision", "flip", "seed")
                 if manifest.get(key) is not None]
        if known:
            print("made with: " + ", ".join(known))

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
                if limits.get(kind):
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
