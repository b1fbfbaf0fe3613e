"""The contract on disk between extraction, training and sampling: latents, codes and labels as packed shards.

FEATURES/ holds `imagenet{S}_features`, `imagenet{S}_sem`, `imagenet{S}_labels` and `imagenet{S}_path` (S: image size
in pixels), each with one `{shard:06d}.npy` a shard, and `manifest.json`, written last: its presence means complete.
Shard k covers the dataset indices [k * shard_size, (k + 1) * shard_size), less the images that were skipped. A
directory of the reference scripts, one `.npy` per image and no manifest, is read as well.

    features = Features("store/features")
    latents, codes = features.latents.gather(rows), features.codes.gather(rows)      # (n, 4, S/8, S/8), (n, L)

    python -m dlc.features info|check|pack|import-hf --help      # to look at, check and convert them
"""
import io
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from dlc.cli import one_line, progress
from dlc.disk import (TEXT, DirectoryLock, check_values, differences, is_plain_name, list_of, or_null, read_json,
                      real_number, remove_temporaries, whole_number, write_json, write_whole)

FORMAT_VERSION = 1
NAMES_ONLY = ("vae", "encoder")     # settings that say where a model lay, not what it was
DTYPES = ("float16", "float32")                                      # of stored latents
LONGEST_HEADER = 10_000     # bytes of a .npy's header, of which NumPy writes 118; NumPy's own limit
MAX_OPEN = 8192             # maps that a Stack keeps open; Linux allows a process 65,530 of them
SAMPLE_NDIM = {"features": 3, "sem": 1, "labels": 0, "path": 0}      # dimensions of one row of each kind
LATENTS = ("sample", "mean", "moments")                              # of the VAE's posterior; moments: mean, then std


def kind_dir(root, image_size, kind):
    return Path(root) / f"imagenet{image_size}_{kind}"


def code_dtype(V):
    """The type that codes of V tokens are stored in."""
    return np.uint8 if V <= 256 else np.uint16


class NotFinite(ValueError):
    """Latents or codes that no training could use: not numbers, or too large for the type they are stored in."""


def as_stored(latents, dtype, locate, advice):
    """Latents (n, ...) in the type they are stored in.

    Raises NotFinite where one is not finite in it, naming the first by locate(row), with advice on what is no number.
    """
    with np.errstate(over="ignore"):
        stored = latents.astype(dtype)
    finite = np.isfinite(stored)
    if not finite.all():
        row = int(np.argmin(finite.reshape(len(stored), -1).all(axis=1)))
        if np.isfinite(latents[row].astype(np.float64)).all():
            raise NotFinite(f"latents of {locate(row)} are too large for {dtype}: give --dtype float32")
        raise NotFinite(f"latents of {locate(row)} are not finite numbers: {advice}")
    return stored


def load_array(path, mmap=True):
    """A `.npy` without pickled objects, memory-mapped or read. Raises ValueError naming the file.

    A header that claims more than the file holds is refused before memory is taken. The map is held by torch: NumPy's
    keeps its file open, and a large set has more shards than that allows.
    """
    try:
        if not os.path.isfile(path):                    # a pipe would be waited at for ever
            raise ValueError("it is no file" if os.path.exists(path) else "it does not exist")
        with open(path, "rb") as file:
            shape, fortran_order, dtype = read_npy_header(file)
            if dtype.hasobject:
                raise ValueError("pickled objects")
            count, offset, size = math.prod(shape), file.tell(), os.fstat(file.fileno()).st_size
            if count * dtype.itemsize > size - offset:
                raise ValueError(f"its header claims {count * dtype.itemsize:,} bytes, {size - offset:,} follow")
            if not mmap:
                data = np.fromfile(file, dtype, count)
        if mmap:
            storage = torch.UntypedStorage.from_file(str(path), False, size)
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()[offset:offset + count * dtype.itemsize]
            data = data.view(dtype)
            data.flags.writeable = False
        return data.reshape(shape, order="F" if fortran_order else "C")
    except (ValueError, EOFError, OSError, RuntimeError) as error:
        if str(error) == "pickled objects":
            raise ValueError(f"{path} holds pickled objects") from None
        raise ValueError(f"{path} is not a readable .npy ({one_line(error, 120)})") from None


def load_floats(path, mmap=True):
    """The same, of floats that torch knows."""
    array = load_array(path, mmap)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{path} has values of type {array.dtype}, wanted floats of 16, 32 or 64 bits")
    return array


def read_npy_header(stream):
    """Shape, whether in Fortran order, and dtype of the .npy that a stream begins with; leaves it behind the header.

    Raises ValueError for what is no header of plain numbers or text, without reading more than its longest.
    """
    try:
        version = np.lib.format.read_magic(stream)
        length = stream.read(2 if version == (1, 0) else 4)
        if version not in ((1, 0), (2, 0)) or int.from_bytes(length, "little") > LONGEST_HEADER:
            raise ValueError(f"version {version}, a header of {int.from_bytes(length, 'little'):,} bytes")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(io.BytesIO(length + stream.read(int.from_bytes(length, "little"))))
    except (ValueError, OSError):
        raise
    except Exception:                       # Python's parser, which NumPy asks, raises all kinds
        raise ValueError("a header that cannot be read") from None
    if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise ValueError(f"shape {one_line(shape, 60)}")
    if dtype.kind not in "biufcUO" or not dtype.itemsize:
        raise ValueError(f"values of type {one_line(dtype, 60)}")
    return shape, fortran_order, dtype


def file_order(path):
    """A sorting key by which 2.npy comes before 10.npy."""
    return len(path.name), path.name


#################################################################################
#                                    Writing                                    #
#################################################################################

class FeatureWriter:
    """Writes shards in any order from any number of processes, and the manifest at the end.

    `progress/` holds the settings and a record of each finished shard until the manifest takes their place, so a run
    that was killed goes on after its last whole shard. `.lock` keeps a second launch out meanwhile.

    Args:
        root: FEATURES/.
        settings: JSON-able dict of all that decides the bytes; becomes part of the manifest. Has image_size.
    """

    def __init__(self, root, settings):
        self.root, self.settings = Path(root), settings
        self.progress = self.root / "progress"
        self.lock = DirectoryLock(self.root)

    def start(self):
        """Take the directory, and make its folders. Called by one process of a launch, before any writes.

        Returns True where there is something to do, False where the features are complete.

        Raises ValueError where another launch holds the directory, and where it holds features made with other
        settings, naming the difference.
        """
        directories = [kind_dir(self.root, self.settings["image_size"], kind) for kind in SAMPLE_NDIM]
        if not self._is_complete():
            if not (self.progress / "settings.json").is_file() and any(
                    True for directory in directories for _ in directory.glob("*.npy")):
                raise ValueError(f"{self.root} holds .npy files that this did not write; give another path")
            self.progress.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        if self._is_complete():                                 # maybe by the launch that was waited for
            missing_file(shard_stacks(self.root, read_manifest(self.root)))
            self._clear()
            return False
        for directory in directories:
            directory.mkdir(exist_ok=True)
        for directory in (self.root, self.progress, *directories):
            remove_temporaries(directory)
        write_json(self.progress / "settings.json", self.settings)
        return True

    def _is_complete(self):
        """Whether there is a manifest. Raises ValueError where that, or shards without one, are of other settings."""
        deciding = {key: value for key, value in self.settings.items() if key not in NAMES_ONLY}
        for path in (self.root / "manifest.json", self.progress / "settings.json"):
            if path.is_file() and (path.parent == self.root or any(self.progress.glob("0*.json"))):
                different = differences(read_json(path), deciding)
                if different:
                    if "listing_sha256" in different:
                        different += " (the names of the images)"
                    raise ValueError(f"{self.root} holds features made with other settings: {different}; give another "
                                     "path")
        return (self.root / "manifest.json").is_file()

    def _clear(self):
        """Leave the directory with nothing but features in it."""
        shutil.rmtree(self.progress, ignore_errors=True)
        self.lock.release()

    def record_path(self, shard):
        return self.progress / f"{shard:06d}.json"

    def is_done(self, shard):
        """Whether a shard is on the disk: its record and, should a crash of the machine have undone them, its files."""
        return self.record_path(shard).is_file() and all(
            self.shard_path(kind, shard).is_file() for kind in self._kinds())

    def _kinds(self):
        return [kind for kind in SAMPLE_NDIM if kind != "sem" or self.settings["V"]]

    def shard_path(self, kind, shard):
        return kind_dir(self.root, self.settings["image_size"], kind) / f"{shard:06d}.npy"

    def write(self, shard, arrays, skipped):
        """Write one shard whole: arrays maps kinds to arrays of equal length; skipped lists [image path, reason].

        Raises OSError, naming the file, where the disk does not take it.
        """
        rows = {len(array) for array in arrays.values()}
        assert len(rows) == 1, rows
        for kind, array in arrays.items():
            buffer = io.BytesIO()               # np.save into a file itself does not see that a disk is full
            np.save(buffer, array, allow_pickle=False)
            write_whole(self.shard_path(kind, shard), lambda file: file.write(buffer.getbuffer()))
        write_json(self.record_path(shard), dict(rows=rows.pop(), skipped=skipped))

    def finish(self, num_shards):
        """Write the manifest out of all shards' records, and return it. Called by one process, after all writing.

        Raises OSError where a record cannot be read, or the manifest not be written.
        """
        os.listdir(self.progress)               # a network disk may remember that a record was not there
        try:
            records = [read_json(self.record_path(shard)) for shard in range(num_shards)]
        except ValueError as error:
            raise OSError(str(error)) from None
        manifest = dict(
            self.settings, count=sum(record["rows"] for record in records),
            shards=[dict(name=f"{shard:06d}", rows=record["rows"]) for shard, record in enumerate(records)],
            skipped=[item for record in records for item in record["skipped"]])
        write_json(self.root / "manifest.json", manifest)
        self._clear()
        return manifest


#################################################################################
#                                    Reading                                    #
#################################################################################

class Stack:
    """The rows of many `.npy` files as one array, gathered through memory maps.

    Args:
        paths: the files, each (n, ...), or with lone=True one sample each, with or without a leading 1.
        ends: (len(paths),) the running total of rows; None reads it off the files.
        sample_ndim: dimensions of one row.
        load: load(path, mmap) gives the array of a file.
    """

    def __init__(self, paths, ends=None, sample_ndim=0, lone=False, load=load_array):
        self.paths, self.sample_ndim, self.lone, self.ends, self.load = paths, sample_ndim, lone, None, load
        self._open, self._first_opened = {}, None
        if lone:
            ends = range(1, len(paths) + 1)
        elif ends is None:
            ends = np.cumsum([len(self.array(index)) for index in range(len(paths))])
        self.ends = np.asarray(ends)
        self._starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)       # the row each file begins with

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}       # a process started afresh opens its own maps

    def array(self, index):
        """File number index as an array (n, ...): memory-mapped and kept open, or read where it is one sample."""
        if index in self._open:
            return self._open[index]
        array = self.load(self.paths[index], mmap=not self.lone)
        if array.ndim == self.sample_ndim:
            array = array[None]
        rows = len(array) if self.ends is None else self.rows(index)
        if array.ndim != self.sample_ndim + 1 or len(array) != rows:
            raise ValueError(f"{self.paths[index]} has shape {array.shape}, wanted {rows} row(s) of "
                             f"{self.sample_ndim} dimensions")
        self._first_opened = self._first_opened or (self.paths[index], array.shape[1:])
        if array.shape[1:] != self._first_opened[1]:
            raise ValueError(f"{self.paths[index]} has rows of shape {array.shape[1:]}, "
                             "{} of {}".format(*self._first_opened))
        if not self.lone:
            if len(self._open) == MAX_OPEN:
                self._open.clear()
            self._open[index] = array
        return array

    def rows(self, index):
        """How many rows file number index holds."""
        return int(self.ends[index] - self._starts[index])

    def locate(self, row):
        """The file that holds a row, and the row's number within it."""
        index = int(np.searchsorted(self.ends, row, side="right"))
        return self.paths[index], int(row - self._starts[index])

    def gather(self, rows, limit=None):
        """Rows (n,) as one array (n, ...), read in ascending order; with a limit, range-checked too."""
        rows = np.asarray(rows)
        order = np.argsort(rows, kind="stable")
        files = np.searchsorted(self.ends, rows[order], side="right")
        places = zip(order.tolist(), files.tolist(), (rows[order] - self._starts[files]).tolist())
        arrays = {index: self.array(index) for index in np.unique(files).tolist()}
        first = next(iter(arrays.values()))
        out = np.empty((len(rows), *first.shape[1:]), np.result_type(*{array.dtype for array in arrays.values()}))
        for i, file, row in places:             # random rows lie in as many files: a copy each is fastest
            out[i] = arrays[file][row]
        if limit is not None:
            check_range(out, limit, lambda i: self.locate(rows[i]))
        return out

    def check_range(self, limit):
        """Raise ValueError, naming file and row, at the first value outside 0..limit-1."""
        for index, path in enumerate(progress(self.paths, desc="checking", unit="file", delay=2)):
            check_range(self.array(index), limit, lambda i: (path, i))


def check_range(array, limit, locate):
    """Raise ValueError at a row with a value outside 0..limit-1; locate(i) is the (file, row) of row i."""
    if array.dtype.kind not in "ui":
        raise ValueError(f"{locate(0)[0]} has values of type {array.dtype}, wanted integers")
    if array.dtype.kind == "u" and np.iinfo(array.dtype).max < limit:
        return                                          # this type holds no value outside
    for start in range(0, len(array), 4096):            # by parts: never a whole file in memory
        part = array[start:start + 4096]
        bad = (part < 0) | (part >= limit)
        if bad.any():
            i = int(np.argmax(bad.reshape(len(part), -1).any(axis=1)))
            path, row = locate(start + i)
            raise ValueError(f"{path}, row {row}: value {int(part[i][bad[i]].flat[0])} outside 0..{limit - 1}")


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


def shard_stacks(root, manifest):
    """The `Stack` of each kind that a manifest lists, no file of them opened yet."""
    shards = manifest["shards"]
    ends = np.cumsum([shard["rows"] for shard in shards], dtype=np.int64)
    return {kind: Stack([kind_dir(root, manifest["image_size"], kind) / f"{shard['name']}.npy" for shard in shards],
                        ends, ndim, load=load_floats if kind == "features" else load_array)
            for kind, ndim in SAMPLE_NDIM.items() if kind != "sem" or manifest["V"]}


def missing_file(stacks):
    """Raise ValueError at the first file of the stacks that is not there."""
    for stack in stacks.values():
        there = set(os.listdir(stack.paths[0].parent)) if stack.paths and stack.paths[0].parent.is_dir() else set()
        for path in stack.paths:
            if path.name not in there:
                raise ValueError(f"{path} is missing, though the manifest lists it")


class Features:
    """FEATURES/ for reading: one `Stack` a kind.

    Args:
        root: FEATURES/.
        V, num_classes: what a directory of the reference scripts does not say of itself; otherwise None.

    Attributes: latents, codes (None where there are none), labels, paths: each a Stack (paths None for a reference
    directory); count; image_size; L, V (None without codes); num_classes; latent_kind, one of LATENTS; latent_shape,
    (4, S/8, S/8) for all of them, though a row of moments has 8 channels; manifest (None for a reference directory).

    Raises ValueError where root is missing, half-written, or its parts do not belong together.
    """

    def __init__(self, root, V=None, num_classes=None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"features path {root} does not exist: make it with extract_features_withdlc.py")
        self.manifest = None
        if (self.root / "manifest.json").is_file():
            self.manifest = read_manifest(self.root)
            stacks = self._open_shards()
            for flag, given, there in (("V", V, self.V), ("num-classes", num_classes, self.num_classes)):
                if given not in (None, there):
                    raise ValueError(f"--{flag} {given}: {self.root}/manifest.json says {there}; leave out the flag")
        elif (self.root / "progress").exists():
            raise ValueError(self._half_written())
        else:
            stacks = self._open_lone_files()
            self.V, self.num_classes = V, num_classes or 1000
        self.latents, self.labels = stacks["features"], stacks["labels"]
        self.codes, self.paths = stacks.get("sem"), stacks.get("path")
        self.count = len(self.latents)
        if not self.count:
            raise ValueError(f"features path {self.root} has no rows")
        self.L = self.codes.array(0).shape[1] if self.codes is not None else None
        self.latent_kind = self.manifest["latents"] if self.manifest else "sample"
        channels, *sides = self.latents.array(0).shape[1:]
        self.latent_shape = (channels // 2 if self.latent_kind == "moments" else channels, *sides)
        if self.manifest is not None and self.L != self.manifest["L"]:
            raise ValueError(f"{self.root}: codes have L={self.L}, manifest.json says {self.manifest['L']}")

    def _half_written(self):
        return (f"features path {self.root} is half-written (shards, but no manifest.json): run the "
                "command that writes it again to complete it")

    def _open_shards(self):
        manifest = self.manifest
        self.image_size, self.V, self.num_classes = manifest["image_size"], manifest["V"], len(manifest["classes"])
        stacks = shard_stacks(self.root, manifest)
        missing_file(stacks)
        return stacks

    def _open_lone_files(self):
        sizes = [int(match[1]) for path in self.root.iterdir()
                 if (match := re.fullmatch(r"imagenet(\d+)_features", path.name))]
        if len(sizes) != 1:
            raise ValueError(f"features path {self.root} has " + ("no features: no manifest.json and no "
                             "imagenet{S}_features" if not sizes else f"no manifest.json and several sizes {sizes}"))
        self.image_size = sizes[0]
        directories = {kind: kind_dir(self.root, self.image_size, kind) for kind in ("features", "sem", "labels")}
        names = {kind: {name for name in os.listdir(directory) if name.endswith(".npy")}
                 for kind, directory in directories.items() if directory.is_dir()}
        if not names["features"]:
            raise ValueError(f"{directories['features']} has no .npy files")
        for kind in ("labels", *names):
            unpaired = sorted(names.get(kind, set()) ^ names["features"])
            if unpaired:
                raise ValueError(f"{unpaired[0]} is not in both {directories['features']} and {directories[kind]} "
                                 f"({len(unpaired)} such files)")
        paths = {kind: sorted((directories[kind] / name for name in names[kind]), key=file_order) for kind in names}
        if load_array(paths["features"][0]).shape[:-3] not in ((), (1,)):
            raise ValueError(self._half_written())
        return {kind: Stack(paths[kind], None, SAMPLE_NDIM[kind], True,
                            load_floats if kind == "features" else load_array) for kind in names}

    def validate(self):
        """Look at every label, and at every code whose type could hold a value outside 0..V-1.

        Raises ValueError naming file and row.
        """
        if self.manifest is not None:
            for index in range(len(self.latents.paths)):
                self.latents.array(index)                   # opening it checks its rows and their shape
        self.labels.check_range(self.num_classes)
        if self.codes is not None and self.V is not None:
            self.codes.check_range(self.V)


if __name__ == "__main__":          # the tools import this file, so they are another
    from dlc.feature_tools import main
    main()
