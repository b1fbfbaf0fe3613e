"""The contract on disk between extraction, training and sampling: latents, codes and labels as packed shards.

FEATURES/ holds `imagenet{S}_features`, `imagenet{S}_sem`, `imagenet{S}_labels` and `imagenet{S}_path` (S: image size
in pixels), each with one `{shard:06d}.npy` a shard, and `manifest.json`, written last: its presence means complete.
Shard k covers the dataset indices [k * shard_size, (k + 1) * shard_size), less the images that were skipped. A
directory of the reference scripts, one `.npy` per image and no manifest, is read as well.

    features = Features("store/features")
    latents, codes = features.latents.gather(rows), features.codes.gather(rows)      # (n, 4, S/8, S/8), (n, L)

    python -m dlc.features info|check|pack|import-hf --help      # to look at, check and convert them
"""
from dlc.features.manifest import FORMAT_VERSION, SAMPLE_NDIM, kind_dir, read_manifest
from dlc.features.rows import Stack
from dlc.features.store import Features, FeatureWriter, NotFinite, as_stored, code_dtype

__all__ = ["FORMAT_VERSION", "SAMPLE_NDIM", "FeatureWriter", "Features", "NotFinite", "Stack", "as_stored", "code_dtype",
           "kind_dir", "read_manifest"]
