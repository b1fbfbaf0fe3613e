"""Describe features in words, and list what is wrong with them: the commands info and check."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dlc.data.codes import perplexity, token_counts
from dlc.data.images import image_grid, save_sheet
from dlc.data.manifest import Manifest, read_manifest
from dlc.data.rows import BLOCK, NpyRows, array_files
from dlc.data.store import Features, shard_rows
from dlc.machine.cli import one_line, progress
from dlc.machine.files import SHEET, check_output, sha256_of


def blocks(rows: NpyRows, what: str) -> Iterator[np.ndarray]:
    """The arrays of the files of some NpyRows, in blocks, with a progress bar."""
    for index in progress(range(len(rows.names)), desc=what, unit="file", delay=2):
        array = rows.array(index)
        for start in range(0, len(array), BLOCK):
            yield array[start : start + BLOCK]


def needs_V(V: int | None, has_codes: bool) -> None:
    if has_codes and V is None:
        raise ValueError("there are codes, and no manifest.json to say V: give --V, the tokens per position")


#################################################################################
#                                      info                                     #
#################################################################################


def latent_statistics(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of each channel over all rows; for moments, those of a draw of the posterior."""
    total = squares = 0
    for block in blocks(features.latents, "latents"):
        block = block.astype(np.float32)
        total += block.sum(axis=(0, 2, 3), dtype=np.float64)
        squares += np.square(block).sum(axis=(0, 2, 3), dtype=np.float64)
    channels, *sides = features.latent_shape
    mean, squares = (value / (features.count * np.prod(sides)) for value in (total, squares))
    if features.latent_kind == "moments":  # E[draw^2] = E[mean^2] + E[std^2]
        mean, squares = mean[:channels], squares[:channels] + squares[channels:]
    return mean, np.sqrt(squares - mean**2)


def code_usage(features: Features) -> tuple[np.ndarray, int]:
    """How often each token is used at each position (L, V) int64, and how many rows have the code of an earlier row.

    Codes are compared by a random linear hash of 64 bits. Two flips of one image count as one row.
    """
    counts = np.zeros((features.L, features.V), np.int64)
    weights = np.random.default_rng(0).integers(0, 2**63, features.L, dtype=np.uint64) * 2 + 1
    hashes = []
    for block in blocks(features.codes, "codes"):
        counts += token_counts(block, features.V)
        hashes.append(block.astype(np.uint64) @ weights)
    hashes = np.concatenate(hashes)
    if features.manifest is not None and features.manifest.flip == "both":
        hashes = hashes[::2]
    return counts, len(hashes) - len(np.unique(hashes))


def usage_picture(counts: np.ndarray) -> Image.Image:
    """Draw token usage (L, V): positions down, tokens across, dead tokens in red, others from black to white."""
    L, V = counts.shape
    relative = counts * V / counts.sum(axis=1, keepdims=True)  # 1: even use
    bright = np.clip(np.log2(np.maximum(relative, 1e-9)) / 8 + 0.5, 0, 1)
    pixels = np.repeat((30 + 225 * bright[..., None]).astype(np.uint8), 3, axis=2)
    pixels[counts == 0] = (170, 20, 20)
    pixels = pixels.repeat(max(1, 512 // L), axis=0).repeat(max(1, 512 // V), axis=1)
    words = f"{L} positions (down) x {V} tokens (across); black: 1/16 of even use, white: 16 times, red: never"
    return image_grid([pixels], 1, captions=[words])


def print_info(args: argparse.Namespace) -> None:
    """The command info."""
    features = Features(args.path, args.V, args.num_classes)
    needs_V(features.V, features.codes is not None)
    print_origin(features)
    print_latents(features)
    print_labels(features)
    if features.codes is None:
        print("codes: none")
    else:
        print_codes(features)
    if features.manifest and features.manifest.tokens:
        patches, width = features.manifest.tokens
        norm = "" if features.manifest.tokens_norm == "learned" else " without scale and shift"
        print(f"patch tokens: {patches} of {width:,} numbers per row, float16, after the encoder's final norm{norm}")


def print_origin(features: Features) -> None:
    manifest, rows = features.manifest, f"{features.root}: {features.count:,} rows"
    size = f"at {features.image_size}x{features.image_size}"
    if manifest is None:
        print(f"{rows} {size}, one .npy each (no manifest.json)")
        return
    print(
        f"{rows} of {manifest.images:,} images {size} in {len(manifest.shards):,} shards, {len(manifest.skipped):,} "
        f"images skipped, {manifest.transparent:,} blended"
    )
    for path, reason in manifest.skipped[:10]:
        print("  " + one_line(f"skipped {path!r}: {reason}"))
    known = {
        name: getattr(manifest, name) for name in ("vae", "scaling_factor", "encoder", "precision", "flip", "seed")
    }
    known["shift_factor"] = manifest.shift_factor or None
    said = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
    if said:
        print(one_line(f"made with: {said}", 2000))


def print_latents(features: Features) -> None:
    mean, std = latent_statistics(features)
    print(
        f"latents: {features.latent_kind}, {features.latents.array(0).dtype}, {features.latent_shape}; of each "
        f"channel mean {np.round(mean, 3).tolist()}, std {np.round(std, 3).tolist()}"
    )
    if not np.isfinite(std).all():
        print("warning: there are latents that are not finite: check says where")
    odd = np.flatnonzero((std <= 0.5) | (std >= 2))
    if len(odd):
        print(
            f"warning: {len(odd)} of {len(std)} channels of the latents have a std outside 0.5 to 2, as channel "
            f"{odd[0]} ({std[odd[0]]:.3g}): were they multiplied by the VAE's scaling factor, once, and does it suit "
            "these images?"
        )


def print_labels(features: Features) -> None:
    features.labels.check()
    counts = np.bincount(np.concatenate([block.astype(np.int64) for block in blocks(features.labels, "labels")]))
    print(
        f"labels: {features.num_classes} classes, {np.count_nonzero(counts)} of them with rows, "
        f"{counts[counts > 0].min():,} to {counts.max():,} each"
    )


def print_codes(features: Features) -> None:
    """Say how codes use their tokens, and draw it as FEATURES/codes.png."""
    features.codes.check()
    counts, duplicates = code_usage(features)
    used, dead = perplexity(counts), (counts == 0).sum()
    print(
        f"codes: L={features.L}, V={features.V}, {features.codes.array(0).dtype}; perplexity of a position: mean "
        f"{used.mean():.1f}, least {used.min():.1f} (position {used.argmin()}), most {used.max():.1f}"
    )
    print(
        f"       dead tokens: {dead:,} of {counts.size:,} ({dead / counts.size:.1%}); duplicates: {duplicates:,} "
        f"image{'s have' if duplicates != 1 else ' has'} the code of an earlier one"
    )
    if not os.access(features.root, os.W_OK):
        print(f"token usage: no picture, since {features.root} may not be written into")
        return
    picture = features.root / "codes.png"
    check_output(picture, "the picture", own=[SHEET])
    save_sheet(picture, usage_picture(counts))
    print(f"token usage: {picture}")


#################################################################################
#                                     check                                     #
#################################################################################


def problems(root: str | Path, V: int | None = None, num_classes: int | None = None) -> Iterator[str]:
    """Lines on what is wrong with FEATURES/: files, shapes, types, values, and what the manifest says of them."""
    manifest, dtypes, widths = None, {}, {}
    try:
        if (Path(root) / "manifest.json").is_file():
            manifest = read_manifest(root)
            kinds, dtypes, patches = shard_rows(root, manifest), manifest.dtypes, (manifest.tokens or [None])[0]
            widths = dict(features=manifest.stored_channels, sem=manifest.L, tokens=patches)
        else:
            features = Features(root, V, num_classes)
            needs_V(V, features.codes is not None)
            kinds = features.arrays
    except ValueError as error:
        yield str(error)
        return
    if manifest:
        listed = sum(shard["rows"] for shard in manifest.shards)
        if not listed or listed != manifest.count:
            yield f"{Path(root) / 'manifest.json'} counts {manifest.count} rows, its shards {listed}"
    for kind, rows in kinds.items():
        known, shapes = set(rows.names.tolist()), {}
        for name in array_files(rows.folder):
            if os.fsencode(name) not in known:
                yield f"{rows.folder / name} is not in the manifest"
        for index in progress(range(len(rows.names)), desc=kind, unit="file", delay=2):
            path = rows.path(index)
            try:
                # on its own, because NpyRows hold every file against the first
                one = NpyRows(
                    rows.folder, [path.name], rows.ndim, rows.dtype, ends=[rows.rows(index)], limit=rows.limit
                )
                array = one.array(0)
                shapes[path] = array.shape[1:]
                if rows.dtype != "U":
                    one.check_values(array, range(len(array)))
            except (ValueError, OSError) as error:
                yield str(error)
                continue
            if array.dtype != dtypes.get(kind, array.dtype):
                yield f"{path} has values of type {array.dtype}, the manifest says {dtypes[kind]}"
            digest = manifest and manifest.shards[index].get("sha256", {}).get(kind)
            if digest and sha256_of(path) != digest:
                yield f"{path} is not what was written: its digest is another one in manifest.json"
        usual = Counter(shapes.values()).most_common(1)
        if usual and widths.get(kind) and usual[0][0][0] != widths[kind]:
            yield f"{rows.folder} has rows of shape {usual[0][0]}, by the manifest the first is {widths[kind]}"
        for path, shape in shapes.items():
            if shape != usual[0][0]:
                yield f"{path} has rows of shape {shape}, most files {usual[0][0]}"


def print_problems(args: argparse.Namespace) -> None:
    """The command check."""
    lines = list(problems(args.path, args.V, args.num_classes))
    for line in lines:
        print(line)
    if lines:
        sys.exit(1)
    features = Features(args.path, args.V, args.num_classes)
    print(f"{args.path}: nothing wrong with its {features.count:,} rows{without(features.manifest)}")


def without(manifest: Manifest | None) -> str:
    """Words on the images that have no rows, and what to do."""
    if manifest is None or not manifest.skipped:
        return ""
    path, reason = manifest.skipped[0]
    return one_line(
        f"; {len(manifest.skipped):,} of {manifest.images:,} images were skipped, the first {path!r} ({reason}): mend "
        "them and run the extraction again"
    )
