"""Features as large as ImageNet's that take no room on the disk."""

import json

import numpy as np

from dlc.data import FeatureWriter, Manifest, kind_dir

IMAGENET = 1_281_167  # images of its training set


def sparse_features(root, count, per_shard=1024):
    """Write features of which each file is a header and a hole."""
    manifest = Manifest(latents="sample", dtype="float16", image_size=256, images=0, L=512, V=256, classes=["a"])
    writer = FeatureWriter(root, manifest)
    writer.start()
    shards = range(-(-count // per_shard))
    for number in shards:
        rows = min(per_shard, count - number * per_shard)
        for kind, shape, dtype in (
            ("features", (4, 32, 32), "<f2"),
            ("sem", (512,), "|u1"),
            ("labels", (), "<i8"),
            ("path", (), "<U40"),
        ):
            with open(kind_dir(root, 256, kind) / f"{number:06d}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, dict(descr=dtype, fortran_order=False, shape=(rows, *shape)))
                file.truncate(file.tell() + rows * int(np.prod(shape)) * np.dtype(dtype).itemsize)
        writer.shard_record(number).write_text(json.dumps(dict(rows=rows, skipped=[])))
    writer.finish(len(shards))
