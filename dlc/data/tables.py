"""Datasets of other programs as rows, read by the package datasets: saved to disk or Parquet files, here or on the hub.

    table = open_table("lavoies/DLC_512x256", "train")  # table.count, table.source
    table.read(0, 1024)                                 # dict(features=array, labels=array)
    images = ImageTable("owner/name:test")              # images.names, images.labels, images.read(7)

Rows of features are read as they are asked for, in order, so that memory holds a batch of them. Parquet files on the
hub are not downloaded first. Images are read in any order: datasets fetches them, and keeps them in its cache as files
that are mapped. Columns are taken as Arrow holds them: nothing is decoded, so no column can name a file to open.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from dlc.data.listing import ONE_CLASS, classes_of, is_image, unlabelled
from dlc.machine.cli import one_line, progress
from dlc.machine.files import is_plain_name, is_pointer, recorded_id

COLUMNS = ("features", "labels")
HUB_ID = r"[\w.-]+/[\w.-]+(@[^/]+)?"
SAVED = ("dataset_dict.json", "state.json")  # one of them lies in a folder that save_to_disk wrote


@dataclass
class Table:
    """`count` rows with the columns of COLUMNS.

    name: for errors. source: the dataset's id, for the manifest. stream(row, size): Arrow tables from that row on.
    """

    name: str
    source: str
    count: int
    stream: Callable[[int, int], Iterator]
    at: int = -1  # the row after those that were read last
    tables: Iterator = iter(())

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start..stop-1 as arrays. To go on where the last call ended costs least."""
        with said_of(self.name):
            if self.at != start:
                self.close()
                self.tables = self.stream(start, stop - start)
            table, self.at = next(self.tables), stop
            return {column: _as_array(table[column], f"rows {start} to {stop - 1}") for column in COLUMNS}

    def close(self) -> None:
        """Close the open files: datasets' readers complain where the program's end does it."""
        getattr(self.tables, "close", bool)()


@contextlib.contextmanager
def said_of(name: str) -> Iterator[None]:
    """Turn all that datasets, Arrow and the hub's client raise into a ValueError of one line that names the dataset."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {one_line(error, 200)}") from None
    except Exception as error:
        again = "" if os.path.exists(_split_of(name)[0]) else "; what is written is kept: run the same command again"
        raise ValueError(f"{name} cannot be read ({type(error).__name__}: {one_line(error, 150)}){again}") from None


def open_table(name: str, split: str) -> Table:
    """The rows at a name.

    Args:
        name: a folder that Dataset.save_to_disk wrote, a folder with .parquet files or one such file, or a hub id of
            either, with or without @revision.
        split: the split to take, if there are several.

    Raises ValueError where there is none, where it has no such columns or rows, and without the package datasets.
    """
    datasets = import_datasets("import-hf")
    datasets.disable_progress_bars()
    with said_of(name):
        source, saved, files = _located(name)
        if saved:
            return _open_saved(name, source, datasets.load_from_disk(str(saved)), split)
        return _open_parquet(name, source, files, split)


def import_datasets(what: str) -> ModuleType:
    """The package datasets. Raises ValueError, which names what needs it, where it is absent."""
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{what} needs the package datasets: pip install datasets") from None
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)  # errors here are one line
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # old versions run scripts of the hub otherwise
    return datasets


def _located(name, is_cached=False):
    """What the manifest calls a dataset, the folder that save_to_disk wrote or None, and load_dataset's arguments.

    is_cached: without the hub, take what datasets has in its cache.
    """
    import huggingface_hub

    path, source, files = Path(name), recorded_id(name), dict(path="parquet", data_dir=str(name))
    if not path.exists():
        if not re.fullmatch(HUB_ID, name):
            raise ValueError("there is no such file or folder, and it is no hub id, owner/name[@revision]")
        repository, _, revision = name.partition("@")
        if is_cached and huggingface_hub.constants.HF_HUB_OFFLINE:
            return name, None, dict(path=repository)
        info = huggingface_hub.HfApi().dataset_info(repository, revision=revision or None)
        source, files = f"{repository}@{info.sha}", dict(path=repository, revision=info.sha)
        if {one.rfilename for one in info.siblings} & {*SAVED}:
            path = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=info.sha))
    elif path.is_file():
        files = dict(path="parquet", data_files=str(path))
    saved = path if any((path / one).is_file() for one in SAVED) else None
    if path.exists() and not saved and re.search(r"[*?[]|::", name):  # would be all files that it fits
        raise ValueError("the package datasets takes *, ?, [ and :: in a path for patterns: rename it")
    return source, saved, files


def _open_saved(name, source, data, split):
    if hasattr(data, "keys"):  # a DatasetDict
        if split not in data:
            raise ValueError(f"no split {split!r}: --split one of {', '.join(data)}")
        data, source = data[split], f"{source}, split {split}"
    _check_columns(data.column_names, len(data))
    data, count = data.select_columns(list(COLUMNS)).with_format("arrow"), len(data)
    return Table(name, source, count, lambda row, size: (data[at : at + size] for at in range(row, count, size)))


def _open_parquet(name, source, files, split):
    """files: what datasets' load_dataset takes, which also finds the splits, by the files' names."""
    import fsspec
    from datasets import load_dataset, load_dataset_builder
    from pyarrow.parquet import ParquetFile

    splits = load_dataset_builder(**files).config.data_files
    if split not in splits:
        raise ValueError(f"no .parquet files of the split {split!r}: --split one of {', '.join(map(str, splits))}")
    urls, ends = list(splits[split]), [0]
    folders = sorted({url.rpartition("/")[0] for url in urls})
    if len(folders) > 1:
        raise ValueError(f"several datasets have a split {split!r}, in {', '.join(folders)}: name the folder of one")
    for url in urls:
        with fsspec.open(url, "rb") as file, ParquetFile(file) as parquet:  # the footer only
            ends.append(ends[-1] + parquet.metadata.num_rows)
            _check_columns(parquet.schema_arrow.names, ends[-1])

    def stream(start, size):
        first = int(np.searchsorted(ends, start, side="right")) - 1  # earlier files are not opened
        data = load_dataset("parquet", data_files=urls[first:], split="train", streaming=True)
        return data.select_columns(list(COLUMNS)).with_format("arrow").skip(start - ends[first]).iter(size)

    return Table(name, source if "data_files" in files else f"{source}, split {split}", ends[-1], stream)


def _check_columns(names, rows):
    for column in COLUMNS:
        if column not in names:
            raise ValueError(f"there is no column {column!r}, only {', '.join(names)}")
    if not rows:
        raise ValueError("there are no rows")


def _as_array(column, where):
    """An Arrow column of numbers, or of lists of them of one shape, as an array (rows, ...)."""
    import pyarrow

    part, shape, types = column.combine_chunks(), [len(column)], pyarrow.types
    part = pyarrow.concat_arrays(part.chunks) if isinstance(part, pyarrow.ChunkedArray) else part
    while True:
        if isinstance(part.type, pyarrow.ExtensionType):  # datasets' Array3D, for example
            part = part.storage
        if part.null_count:
            raise ValueError(f"{where}: values are missing")
        if not (types.is_list(part.type) or types.is_large_list(part.type) or types.is_fixed_size_list(part.type)):
            break
        lengths = np.unique(part.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) != 1:
            raise ValueError(f"{where}: not all have lists of one length, but {lengths.min()} and {lengths.max()}")
        shape.append(int(lengths[0]))
        part = part.flatten()
    if not (types.is_integer(part.type) or types.is_floating(part.type)):
        raise ValueError(f"{where}: values of type {one_line(part.type, 60)}, wanted numbers and lists of them")
    return part.to_numpy(zero_copy_only=False).reshape(shape)


#################################################################################
#                                     Images                                    #
#################################################################################


def is_dataset(name: str) -> bool:
    """Whether name[:split] is a folder that save_to_disk wrote, a folder or file of .parquet, or a hub id."""
    name, _ = _split_of(name)
    path = Path(name)
    if path.is_dir():
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            shown = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
            folders = [name for name, is_folder in shown if is_folder]
            inner = path if not folders else path / "data"  # beside class folders a .parquet is something else,
            is_parquet = folders in ([], ["data"]) and any(inner.glob("*.parquet"))
            is_parquet &= not any(is_image(name) for name, _ in shown)  # and beside images, too
            return is_parquet or any((path / one).is_file() for one in SAVED)
        return False
    if path.exists():
        return path.suffix == ".parquet"
    return bool(re.fullmatch(HUB_ID, name)) and not os.path.exists(name.split("/")[0])


def _split_of(name):
    name, _, split = (str(name), "", "") if os.path.exists(name) else str(name).partition(":")
    return name, split or "train"


class ImageTable:
    """The images in the column `image`, or in the only column of images, and their labels in the column `label`.

    Images are named CLASS/FILE where the dataset says of which files they were made and these names differ, as of a
    folder that datasets read; otherwise by their row.

    Args:
        name: name[:split], see `is_dataset`; without a split, "train" is taken.
        needs_labels: whether the column `label`, if there is one, has to be whole.

    Attributes: names; labels (n,) int64 and classes; sizes: of the images, in bytes; remarks.
    Raises ValueError where there are no such columns or rows, and without the package datasets.
    """

    def __init__(self, name: str, needs_labels: bool = True):
        datasets = import_datasets(str(name))
        (place, split), self.name, self.remarks = _split_of(name), str(name), []
        is_here = os.path.exists(place)
        with said_of(name if is_here else f"{name} (no file or folder here, so a dataset of the hub)"):
            source, saved, files = _located(place, is_cached=True)
            if source == place and not is_here:
                self.remarks.append(
                    f"{name}: HF_HUB_OFFLINE is set, so the copy fetched last is taken, of any revision"
                )
            if os.path.isfile(place) and is_pointer(place):
                raise ValueError("a git-lfs pointer, not the file: run git lfs pull")
            data = datasets.load_from_disk(str(saved)) if saved else datasets.load_dataset(**files, split=split)
            if hasattr(data, "keys"):  # a DatasetDict
                if split not in data:
                    raise ValueError(f"no split {split!r}: give {place}:SPLIT, one of {', '.join(data)}")
                data = data[split]
            self.column = self._image_column(datasets, data)
            if isinstance(data.features[self.column], datasets.Image):
                data = data.cast_column(self.column, datasets.Image(decode=False))
            self.data = data.with_format("arrow")
            files, self.sizes = self._files()
            self.classes, self.labels = self._labels(datasets, data, needs_labels)
            self.names = self._names(files)

    def _image_column(self, datasets, data):
        found = [
            name
            for name, feature in data.features.items()
            if isinstance(feature, datasets.Image) or isinstance(feature, dict) and "bytes" in feature
        ]
        found += ["image"] if getattr(data.features.get("image"), "dtype", None) == "binary" else []
        if len(found) != 1 and "image" not in found:
            types = (f"{name} of {getattr(kind, 'dtype', kind)}" for name, kind in data.features.items())
            raise ValueError(f"wanted a column 'image' of images' bytes, there are {one_line(', '.join(types), 120)}")
        if not len(data):
            raise ValueError("there are no rows")
        return "image" if "image" in found else found[0]

    def _files(self):
        """The file's name that each row was made of, or "", and the size of the image in bytes."""
        import pyarrow
        from pyarrow import compute

        names, sizes = [], []
        rows = self.data.select_columns([self.column])
        with progress(total=len(rows), desc="indexing", unit="img", delay=2) as bar:
            for table in rows.iter(1024):
                column = table[self.column]
                is_struct = pyarrow.types.is_struct(column.type)
                content = compute.struct_field(column, "bytes") if is_struct else column
                sizes += compute.binary_length(content).to_pylist()
                paths = compute.struct_field(column, "path").to_pylist() if is_struct else [None] * len(column)
                names += [re.split(r"[/\\]", path or "")[-1] for path in paths]
                bar.update(len(table))
        if None in sizes:
            raise ValueError(f"row {sizes.index(None)} has no image, but at most a path: store the images' bytes")
        return names, sizes

    def _labels(self, datasets, data, needed):
        is_there = self.has_labels = "label" in data.features
        values = data.select_columns(["label"]).with_format("arrow")[:]["label"].to_pylist() if is_there else []
        lacking = [row for row, value in enumerate(values) if value in (None, -1, "")]
        if lacking and needed:
            which = f"row {lacking[0]} has no label ({len(lacking):,} of {len(values):,} rows)"
            raise ValueError(f"{which}: give --labels, or store a label in each, or no column label")
        if lacking or not is_there:
            self.has_labels = False
            self.remarks.append(f"{self.name}: {unlabelled('labels in a column label')}")
            return [ONE_CLASS], np.zeros(len(data), np.int64)
        if isinstance(data.features["label"], datasets.ClassLabel):
            return data.features["label"].names, np.array(values, np.int64)
        return classes_of(values)

    def _names(self, files):
        folders = self.classes if self.has_labels else [""]
        names = [os.path.join(folders[label], file) for label, file in zip(self.labels.tolist(), files)]
        is_usable = all(map(is_plain_name, {*files, *filter(None, folders)})) and len({*names}) == len(names)
        return names if is_usable else [f"{row:07d}" for row in range(len(names))]

    def read(self, row: int) -> bytes:
        """The bytes of an image. Raises as datasets and Arrow do."""
        value = self.data[row][self.column][0].as_py()
        return value["bytes"] if isinstance(value, dict) else value
