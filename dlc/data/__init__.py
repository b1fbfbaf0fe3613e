"""The contract on disk between extraction, training and sampling: latents, codes and labels in packed shards.

FEATURES/ holds the folders `imagenet{S}_features`, `imagenet{S}_sem`, `imagenet{S}_labels` and `imagenet{S}_path` (S:
image size in pixels), each with one `{shard:06d}.npy` per shard, and `manifest.json`, which is written last: if it is
there, the features are complete. Shard k holds the rows of the images k * shard_size to (k + 1) * shard_size - 1,
without those that were skipped. Directories of the reference scripts, with one `.npy` per image and no manifest, are
read as well.

    features = Features("store/features")
    latents, codes = features.latents.gather(rows), features.codes.gather(rows)      # (n, C, S/f, S/f), (n, L)
    text = features.gather("text", rows)                       # (n, T, D), of another kind of array: see KINDS

    python -m dlc.features info|check|pack|import-hf --help      # describe, check and convert features
"""

from dlc.data.manifest import KINDS, Manifest, code_dtype, kind_dir, read_manifest
from dlc.data.rows import NpyRows
from dlc.data.store import Features, FeatureWriter, NotFinite

__all__ = [
    "KINDS",
    "FeatureWriter",
    "Features",
    "Manifest",
    "NotFinite",
    "NpyRows",
    "code_dtype",
    "kind_dir",
    "read_manifest",
]
