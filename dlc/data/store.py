"""FEATURES/ for writing and reading: packed shards of latents, codes, labels and paths."""

import hashlib
import io
import itertools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dlc.data.manifest import KINDS, Manifest, kind_dir, read_manifest
from dlc.data.rows import NpyRows, array_files, load_array
from dlc.machine.files import read_json, remove_temporaries, write_bytes, write_json
from dlc.machine.folder import ResumableFolder
from dlc.machine.part import WHOLE, Part


class NotFinite(ValueError):
    """Latents or codes that training cannot use: NaN, infinite, or too large for the type they are stored in."""


def as_stored(values: np.ndarray, dtype: str | np.dtype, name: Callable[[int], str], advice: str) -> np.ndarray:
    """Values (n, ...) cast to the type they are stored in.

    Args:
        name: name(i) is row i in words.
        advice: what to do about a value that is NaN or infinite before the cast.

    Raises NotFinite for the first row that is not finite in that type.
    """
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    bad = ~np.isfinite(stored).all(axis=tuple(range(1, stored.ndim)))  # there may be no rows
    if bad.any():
        row = int(bad.argmax())
        if np.isfinite(values[row].astype(np.float64)).all():
            raise NotFinite(f"{name(row)} are too large for {dtype}: give --dtype float32")
        raise NotFinite(f"{name(row)} are not finite numbers: {advice}")
    return stored


#################################################################################
#                                    Writing                                    #
#################################################################################


class FeatureWriter(ResumableFolder):
    """Writes shards in any order from any number of processes, and the manifest at the end.

    Until the manifest is written, `progress/` holds the settings and one record per finished shard, so a run that was
    killed continues after its last whole shard.

    Args:
        root: FEATURES/.
        manifest: the `Manifest`, still without rows.
        part: what this launch writes of all shards.
    """

    record_type, record_name, holds, elsewhere = Manifest, "manifest.json", ".npy files", "give another path"

    def __init__(self, root: str | Path, manifest: Manifest, part: Part = WHOLE):
        super().__init__(root, part)
        self.root, self.manifest, self.progress = self.path, manifest, self.path / "progress"
        self.files = tuple(f"imagenet*_{kind}/*.npy" for kind in manifest.kinds)  # of any image size

    @property
    def is_complete(self) -> bool:
        return (self.root / "manifest.json").is_file()

    @property
    def record_path(self) -> Path:
        """The manifest, or before it is written the settings of the launch that began."""
        return self.root / "manifest.json" if self.is_complete else self.progress / "settings.json"

    def start(self, mended: Callable[[str], bool] = lambda path: False) -> bool:
        """Lock the directory and create its folders. One process of a launch calls this, before any process writes.

        Returns True if there is something to do, False if the features are complete.

        Args:
            mended: whether an image that earlier launches skipped, by its path, can be read now; its shard is then
                written anew.

        Raises ValueError if another launch holds the lock, or if the directory holds features made with other
        settings; the error names the difference.
        """
        self.compare(self.manifest)  # before the lock: with other settings there is nothing to wait for
        if self.is_complete and not self.progress.exists() and not self._outdated(mended):
            self.missing(self.manifest)  # needs no lock, which a read-only disk could not give
            return False
        with self.entering():
            self.begin(self.manifest)
            self._reopen(self._outdated(mended))
            if not self.is_complete:
                for directory in self._folders():
                    directory.mkdir(exist_ok=True)
                return True
            if self.is_alone():  # complete, perhaps by the launch that held the lock
                self.clear()
            self.lock.release()
            return False

    def missing(self, record: Manifest, part: Part = WHOLE) -> list[int]:
        """The shards that are not written, ascending. Raises ValueError if complete features lack a file."""
        if self.is_complete:
            refuse_missing_files(shard_rows(self.root, read_manifest(self.root)))
            return []
        return [shard for shard in part.share(range(record.num_shards)) if not self.is_done(shard)]

    def write_record(self, record: Manifest) -> None:
        self.progress.mkdir(exist_ok=True)
        super().write_record(record)

    def _records(self):
        """The records of the shards that are written, by their number, also of complete features."""
        if not self.is_complete:
            done = (shard for shard in range(self.manifest.num_shards) if self.is_done(shard))
            return {shard: read_json(self.shard_record(shard)) for shard in done}
        manifest = read_manifest(self.root)
        skipped = iter(manifest.skipped)
        return {
            number: {**shard, "skipped": list(itertools.islice(skipped, shard.get("skipped", 0)))}
            for number, shard in enumerate(manifest.shards)
        }

    def _outdated(self, mended):
        """The shards of this launch that lack an image which can be read now."""
        records = self._records()
        return [
            shard for shard in self.part.share(records) if any(mended(path) for path, _ in records[shard]["skipped"])
        ]

    def _reopen(self, shards):
        """Make these shards missing. A launch that is killed here leaves features that are complete, or continues."""
        if shards and self.is_complete:
            shutil.rmtree(self.progress, ignore_errors=True)
            self.progress.mkdir()
            for shard, record in self._records().items():
                write_json(self.shard_record(shard), record)
            write_json(self.progress / "settings.json", self.manifest.to_json())
            self.record_path.unlink()
        for shard in shards:
            self.shard_record(shard).unlink()

    def clear(self) -> None:
        """See `ResumableFolder`. Of complete features nothing is left that is none; a picture may be on its way."""
        if self.is_complete:
            shutil.rmtree(self.progress, ignore_errors=True)
        remove_temporaries(self.root, self.record_name)
        for directory in self._folders():
            remove_temporaries(directory)

    def _folders(self):
        return [self.progress, *(self.folder(kind) for kind in self.manifest.kinds)]

    def folder(self, kind: str) -> Path:
        return kind_dir(self.root, self.manifest.image_size, kind)

    def shard_record(self, shard: int) -> Path:
        return self.progress / f"{shard:06d}.json"

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written: its record is there and, in case a crash of the machine lost them, its files."""
        files = [self.shard_record(shard), *(self.shard_path(kind, shard) for kind in self.manifest.kinds)]
        return all(path.is_file() for path in files)

    def shard_path(self, kind: str, shard: int) -> Path:
        return self.folder(kind) / f"{shard:06d}.npy"

    def write(self, shard: int, arrays: dict[str, np.ndarray], skipped: list[list[str]], transparent: int = 0) -> None:
        """Write one shard, whole or not at all.

        Args:
            arrays: arrays of equal length, by kind.
            skipped: the skipped images, [path, reason] each.
            transparent: how many images are.

        Raises OSError, naming the file, if the disk fails.
        """
        rows = {len(array) for array in arrays.values()}
        assert len(rows) == 1, rows
        record = dict(rows=rows.pop(), skipped=skipped, transparent=transparent, sha256={})
        for kind, array in arrays.items():
            content = io.BytesIO()  # np.save into a file does not notice a full disk
            np.save(content, array, allow_pickle=False)
            write_bytes(self.shard_path(kind, shard), content.getbuffer())
            record["sha256"][kind] = hashlib.sha256(content.getbuffer()).hexdigest()
        write_json(self.shard_record(shard), record)

    def finish(self, num_shards: int) -> Manifest | None:
        """Write the manifest from the records of all shards, and return it. One process calls this, after all writing.

        Of shards without any row nothing is left. Returns None where other launches are left to write some shards.

        Raises OSError if a record cannot be read or the manifest cannot be written.
        """
        with self.leaving() as whole:
            if not whole or self.is_complete:
                return read_manifest(self.root) if whole else None
            os.listdir(self.progress)  # a network disk may have cached that a record was not there
            try:
                records = [read_json(self.shard_record(shard)) for shard in range(num_shards)]
            except ValueError as error:
                raise OSError(str(error)) from None
            manifest = replace(
                self.manifest,
                count=sum(record["rows"] for record in records),
                shards=[
                    {**record, "name": f"{shard:06d}", "skipped": len(record["skipped"])}
                    for shard, record in enumerate(records)
                ],
                skipped=[item for record in records for item in record["skipped"]],
            )
            if manifest.count:
                write_json(self.root / "manifest.json", manifest.to_json())
            else:
                for directory in self._folders():
                    shutil.rmtree(directory)
            return manifest


#################################################################################
#                                    Reading                                    #
#################################################################################


def shard_rows(root: str | Path, manifest: Manifest) -> dict[str, NpyRows]:
    """The `NpyRows` of each kind of array that extraction wrote or that lies beside, by kind. No file is opened yet."""
    ends = np.cumsum([shard["rows"] for shard in manifest.shards], dtype=np.int64)
    names, size = [f"{shard['name']}.npy" for shard in manifest.shards], manifest.image_size
    there = [kind for kind in KINDS if kind != "sem" and array_files(kind_dir(root, size, kind))]  # codes need V
    return _rows_of(root, size, {*manifest.kinds, *there}, names, len(manifest.classes), manifest.V, ends)


def _rows_of(root, size, kinds, names, num_classes, V, ends=None):
    limits = dict(labels=num_classes, sem=V)
    return {
        kind: NpyRows(
            kind_dir(root, size, kind),
            names,
            array.ndim,
            array.dtype,
            ends=ends,
            lone=ends is None,
            limit=limits.get(kind),
        )
        for kind, array in KINDS.items()
        if kind in kinds
    }


def refuse_missing_files(rows_by_kind: dict[str, NpyRows]) -> None:
    """Raise ValueError for the first file of some `NpyRows` that is not there."""
    for rows in rows_by_kind.values():
        there = set(os.listdir(os.fsencode(rows.folder))) if rows.folder.is_dir() else set()
        for index, name in enumerate(rows.names.tolist()):
            if name not in there:
                raise ValueError(f"{rows.path(index)} is missing, though the manifest lists it")


class Features:
    """FEATURES/ for reading.

    Args:
        root: FEATURES/.
        V, num_classes: what a directory of the reference scripts does not record; otherwise None.

    Attributes:
        arrays: the `NpyRows` of each kind of array that is there, a key of KINDS.
        latents, codes, labels, paths: four of them; codes are None if there are none, paths in a reference directory.
        count: number of rows.
        image_size: pixels.
        L, V: None without codes.
        num_classes.
        latent_kind: one of LATENTS.
        latent_shape: (C, S/f, S/f), also for moments, whose rows have 2C channels; f is the VAE's factor.
        manifest: the `Manifest`, or None for a reference directory.

    Raises ValueError if root is missing or half-written, or if its parts contradict each other.
    """

    def __init__(self, root: str | Path, V: int | None = None, num_classes: int | None = None):
        self.root, self.manifest = Path(root), None
        if not self.root.is_dir():
            raise ValueError(f"features path {root} does not exist: make it with extract_features_withdlc.py")
        if (self.root / "manifest.json").is_file():
            rows = self._open_shards(V, num_classes)
        elif (self.root / "progress").exists():
            raise ValueError(self._half_written())
        else:
            self.V, self.num_classes = V, num_classes or 1000
            rows = self._open_lone_files()
        self.arrays = rows
        self.latents, self.labels = rows["features"], rows["labels"]
        self.codes, self.paths = rows.get("sem"), rows.get("path")
        self.count = len(self.latents)
        if not self.count:
            raise ValueError(f"features path {self.root} has no rows")
        self.L = self.codes.array(0).shape[1] if self.codes is not None else None
        self.latent_kind = self.manifest.latents if self.manifest else "sample"
        self.latent_shape = self.latents.array(0).shape[1:]
        if self.manifest is not None:
            channels, wanted = self.latent_shape[0], self.manifest.stored_channels
            for what, there, said in (("channels of latents", channels, wanted), ("L", self.L, self.manifest.L)):
                if there != said:
                    raise ValueError(f"{self.root}: {what}: the files have {there}, manifest.json says {said}")
            self.latent_shape = (self.manifest.latent_channels, *self.latent_shape[1:])

    def gather(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) of a kind of array, a key of KINDS, as (n, ...).

        Raises ValueError, naming the file, where it cannot be read or has classes or tokens out of range.
        """
        if kind not in self.arrays:
            raise ValueError(f"features path {self.root} has no {kind_dir(self.root, self.image_size, kind).name}")
        return self.arrays[kind].gather(rows)

    def source(self) -> dict:
        """What a training run records of its data, see `Manifest.source`; of a reference directory nothing is known."""
        return self.manifest.source() if self.manifest else Manifest.unknown_source()

    def _half_written(self):
        return (
            f"features path {self.root} is half-written (shards, but no manifest.json): run the "
            "command that writes it again to complete it"
        )

    def _open_shards(self, V, num_classes):
        self.manifest = manifest = read_manifest(self.root)
        self.image_size, self.V, self.num_classes = manifest.image_size, manifest.V, len(manifest.classes)
        rows = shard_rows(self.root, manifest)
        refuse_missing_files(rows)
        for flag, given, recorded in (("V", V, self.V), ("num-classes", num_classes, self.num_classes)):
            if given not in (None, recorded):
                raise ValueError(f"--{flag} {given}: {self.root}/manifest.json says {recorded}; leave out the flag")
        return rows

    def _open_lone_files(self):
        found = [re.fullmatch(r"imagenet(\d+)_features", path.name) for path in self.root.iterdir()]
        sizes = [int(match[1]) for match in found if match]
        if len(sizes) != 1:
            also = f"and several sizes {sizes}" if sizes else "and no imagenet{S}_features"
            raise ValueError(f"features path {self.root} has no features: no manifest.json {also}")
        self.image_size = sizes[0]
        folders = {kind: kind_dir(self.root, self.image_size, kind) for kind in KINDS}
        names = {kind: array_files(folder) for kind, folder in folders.items() if KINDS[kind].needed or folder.is_dir()}
        if not names["features"]:
            raise ValueError(f"{folders['features']} has no .npy files")
        for kind in names:
            unpaired = sorted({*names[kind]} ^ {*names["features"]})
            if unpaired:
                raise ValueError(
                    f"{unpaired[0]} is not in both {folders['features']} and {folders[kind]} "
                    f"({len(unpaired)} such files)"
                )
        in_order = names["features"]
        if load_array(folders["features"] / in_order[0]).shape[:-3] not in ((), (1,)):
            raise ValueError(self._half_written())
        return _rows_of(self.root, self.image_size, names, in_order, self.num_classes, self.V)

    def validate(self) -> None:
        """Check the shapes of all shards, every label, and every code whose type can hold a value outside 0..V-1.

        Raises ValueError naming file and row.
        """
        for kind, rows in self.arrays.items():
            if rows.limit is not None:
                rows.check()
            elif self.manifest is not None and kind != "path":
                for index in range(len(rows.names)):
                    rows.array(index)  # opening a file checks its shape
