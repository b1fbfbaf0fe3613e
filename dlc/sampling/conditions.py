"""What each sample is drawn for: a row of computed codes, or a class. A function of (global seed, sample index)."""
import hashlib
from pathlib import Path

import numpy as np
import torch

from dlc.checkpoints.tensor_files import read_torch, storage_fault
from dlc.disk import recorded_id
from dlc.features.rows import NpyRows, file_order, load_array
from dlc.features.store import Features
from dlc.noise import Stream, integers, permutation

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)


def load_codes(path, mmap=True):
    """The array in a `.npy` or the tensor in a `.pt`, memory-mapped where it can be: (n, L), or (L,) as it is.

    Several codes an image, (n, k, L), become n * k rows. Raises ValueError naming the file.
    """
    if path.suffix != ".pt":
        array = load_array(path, mmap)
    else:
        tensor = read_torch(path, "a tensor")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path} holds a {type(tensor).__name__}, wanted a tensor (n, L) or (n, k, L)")
        fault = storage_fault(tensor)
        if fault or tensor.dtype not in INTEGERS:
            raise ValueError(f"{path} has values of type {tensor.dtype}, {fault or 'wanted integers'}")
        array = tensor.numpy()
    if array.ndim not in (1, 2, 3) or not array.shape[-1]:
        raise ValueError(f"{path} has shape {array.shape}, wanted (n, L) or (n, k, L)")
    return array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array


def open_codes(source):
    """The `NpyRows` of codes at source, and the `Features` they are of, or None.

    Args:
        source: a features directory, a folder of `.npy` or of `.pt` files, or one such file.

    Raises ValueError where there are none.
    """
    path, features = Path(source), None
    if path.is_file():
        codes = NpyRows([path], sample_ndim=1, load=load_codes)
    elif not path.is_dir():
        raise ValueError(f"code source {source} does not exist")
    else:
        files = sorted([*path.glob("*.npy"), *path.glob("*.pt")], key=file_order)
        if len({file.suffix for file in files}) > 1:
            raise ValueError(f"code source {source} holds both .npy and .pt files: keep those meant, or name one file")
        if files:
            # files of one code each need not all be opened now, and there may be a million
            lone = all(load_codes(file).shape[:-1] in ((), (1,)) for file in (files[0], files[-1]))
            codes = NpyRows(files, sample_ndim=1, lone=lone, load=load_codes)
        else:
            features = Features(path)
            codes = features.codes
            if codes is None:
                raise ValueError(f"features {source} hold no codes")
    if not len(codes):
        raise ValueError(f"code source {source} has no rows")
    return codes, features


def conditions_sha256(conditions, count):
    """A digest of what samples 0..count-1 are drawn for, which also reads and checks all of it."""
    digest = hashlib.sha256()
    for start in range(0, count, 4096):
        digest.update(conditions(np.arange(start, min(start + 4096, count))).numpy())
    return digest.hexdigest()


class ComputedCodes:
    """Codes out of a file or folder: sample i gets row order(i), cycling where there are more samples than rows.

    Args:
        source: as in `open_codes`.
        meta: of the model's checkpoint, to compare the encoders.
        order: "random", a permutation of all rows keyed by the seed, or "sequential".

    Raises ValueError where the source has no codes, or not such as the model was trained on.
    """
    name = "code_rows"

    def __init__(self, source, model, meta, order, seed):
        self.source, self.order_name = recorded_id(str(source)), order
        self.V = model.sem_embedder.V
        self.codes, features = open_codes(source)
        if features is not None and features.manifest is not None:
            if features.V != self.V:
                raise ValueError(f"codes of {source} have V={features.V}, the checkpoint's model V={self.V}")
            encoders = [features.manifest.encoder_sha256, meta.encoder_sha256]
            if None not in encoders and len(set(encoders)) > 1:
                raise ValueError(f"codes of {source} come from another encoder than those the model was trained on")
        L = self.codes.array(0).shape[1]
        if L != model.sem_embedder.L:
            raise ValueError(f"codes of {source} have L={L}, the checkpoint's model L={model.sem_embedder.L}")
        self.order = (permutation(seed, Stream.SAMPLE_ORDER, 0, len(self.codes)) if order == "random"
                      else np.arange(len(self.codes)))

    def describe(self):
        return f"{len(self.order):,} codes of {self.source} in {self.order_name} order"

    def values(self, indices):
        """The row of each sample."""
        return self.order[indices % len(self.order)]

    def __call__(self, indices):
        """Codes (N, L) of the samples. Raises ValueError, naming file and row, for a value outside 0..V-1."""
        return torch.from_numpy(self.codes.gather(self.values(indices), limit=self.V).astype(np.int64))


class ClassLabels:
    """A class for each sample: "random", or "equal" to its index modulo the number of classes, so often each."""
    name = "labels"

    def __init__(self, model, sampling, seed):
        self.num_classes, self.sampling, self.seed = model.y_embedder.num_classes, sampling, seed

    def describe(self):
        return f"{self.sampling} labels of {self.num_classes} classes"

    def values(self, indices):
        return self(indices).numpy()

    def __call__(self, indices):
        indices = torch.from_numpy(indices)
        if self.sampling == "equal":
            return indices % self.num_classes
        return integers(self.seed, Stream.SAMPLE_LABEL, indices, self.num_classes)
