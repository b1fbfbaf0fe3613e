"""FEATURES/manifest.json: what features are, how they were made, and which shards hold them."""
from pathlib import Path

from dlc.cli import one_line
from dlc.disk import TEXT, check_values, is_plain_name, list_of, or_null, read_json, real_number, whole_number

FORMAT_VERSION = 1
DTYPES = ("float16", "float32")                                      # of stored latents
LATENTS = ("sample", "mean", "moments")                              # of the VAE's posterior; moments: mean, then std
NAMES_ONLY = ("vae", "encoder")     # settings that say where a model lay, not what it was
SAMPLE_NDIM = {"features": 3, "sem": 1, "labels": 0, "path": 0}      # dimensions of one row of each kind
# Every key of manifest.json that is read, of what kind, and which a manifest cannot do without.
ROWS, ID = whole_number(0, 2**40), or_null(TEXT)
OBJECT = (lambda value: isinstance(value, dict)), "an object"
PATH_AND_REASON = (lambda value: isinstance(value, list) and [type(one) for one in value] == [str, str],
                   "a path and a reason")
MANIFEST = dict(
    format_version=whole_number(1), image_size=whole_number(1, 2**20), count=ROWS, images=ROWS, latents=TEXT,
    dtype=TEXT, classes=list_of(TEXT), shards=list_of(OBJECT), skipped=list_of(PATH_AND_REASON),
    L=or_null(whole_number(1, 2**32)), V=or_null(whole_number(1, 65536)), vae=ID, vae_sha256=ID, encoder=ID,
    encoder_sha256=ID, listing_sha256=ID, scaling_factor=or_null(real_number(1e-30)), precision=ID, flip=ID,
    seed=or_null(whole_number(0)))
NEEDED = ("format_version", "image_size", "count", "images", "latents", "dtype", "classes", "shards", "skipped", "L",
          "V")


def kind_dir(root, image_size, kind):
    return Path(root) / f"imagenet{image_size}_{kind}"


def read_manifest(root):
    """FEATURES/manifest.json. Raises ValueError where it is not one that this code can read."""
    path = Path(root) / "manifest.json"
    manifest = read_json(path)
    check_values(f"{path} is not a manifest of ours", manifest, MANIFEST, NEEDED)
    for shard in manifest["shards"]:
        if not (is_plain_name(shard.get("name")) and ROWS[0](shard.get("rows"))):
            raise ValueError(f"{path} is not a manifest of ours: a shard is {one_line(repr(shard)[:1000], 80)}, wanted "
                             "a plain name and a number of rows")
        labels = kind_dir(root, manifest["image_size"], "labels") / f"{shard['name']}.npy"
        # a row takes a byte at least, so that nothing made for each row can outgrow the files
        if labels.is_file() and shard["rows"] > labels.stat().st_size:
            raise ValueError(f"{path} says {shard['rows']:,} rows of {labels}, which has "
                             f"{labels.stat().st_size:,} bytes")
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{path} is of format {manifest['format_version']}; this code reads up to {FORMAT_VERSION}")
    if manifest["latents"] not in LATENTS or manifest["dtype"] not in DTYPES:
        kind, dtype = (one_line(repr(manifest[key])[:1000], 40) for key in ("latents", "dtype"))
        raise ValueError(f"{path} has latents of kind {kind} and type {dtype}, wanted {', '.join(LATENTS)} and "
                         f"{', '.join(DTYPES)}")
    return manifest
