"""FEATURES/ for writing and reading: packed shards of latents, codes, labels and paths."""
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np

from dlc.disk import DirectoryLock, differences, read_json, remove_temporaries, write_json, write_whole
from dlc.features.manifest import NAMES_ONLY, SAMPLE_NDIM, kind_dir, read_manifest
from dlc.features.rows import Stack, file_order, load_array


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


def shard_stacks(root, manifest):
    """The `Stack` of each kind that a manifest lists, no file of them opened yet."""
    shards = manifest["shards"]
    ends = np.cumsum([shard["rows"] for shard in shards], dtype=np.int64)
    return {kind: Stack([kind_dir(root, manifest["image_size"], kind) / f"{shard['name']}.npy" for shard in shards],
                        ends, ndim) for kind, ndim in SAMPLE_NDIM.items() if kind != "sem" or manifest["V"]}


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
        return {kind: Stack(paths[kind], None, SAMPLE_NDIM[kind], lone=True) for kind in names}

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
