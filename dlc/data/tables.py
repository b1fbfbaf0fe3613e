"""Datasets of other programs as rows: a Hugging Face dataset saved to disk, or Parquet files, here or on the hub.

    table = open_table("lavoies/DLC_512x256", "train")  # table.count, table.source
    table.read(0, 1024)                                 # dict(features=array, labels=array)

Of Parquet files, rows are read as they are asked for, in order, so that memory holds a batch of them. Files on the hub
are not downloaded first: only the two columns cross the network. No column is decoded but lists of numbers: columns of
images, for example, hold paths and URLs, which other readers would open.
"""

import bisect
import contextlib
import importlib
import json
import re
from pathlib import Path

import numpy as np

from dlc.machine.cli import one_line
from dlc.machine.files import is_plain_name, read_json, recorded_id
from dlc.weights.hub import Listing, fetch, is_id, list_files

COLUMNS = ("features", "labels")
# Types of dataset columns: those that are read here, and those that are allowed beside them, unread.
PLAIN_COLUMNS = ("Value", "ClassLabel", "Sequence", "List", "LargeList", "Array2D", "Array3D", "Array4D", "Array5D")
OTHER_COLUMNS = ("Image", "Audio", "Video", "Translation", "TranslationVariableLanguages")
OTHER_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
READ_AHEAD = 2**22  # bytes of a file on the hub that one request asks for
BUFFER = 2**20  # bytes of a column that are held undecoded


def open_table(name, split):
    """The rows at a name: a `Saved` or `Parquet`, whose columns are features and labels.

    Args:
        name: a folder that Dataset.save_to_disk wrote, a folder with .parquet files or one such file, or a hub id of
            either, with or without @revision.
        split: the split to take, if there are several.

    Raises ValueError where there is none, or where it has no such columns or rows.
    """
    path = Path(name)
    if is_id(name):
        files = list_files(name, flag="import-hf", kind="dataset")
        if any(file.endswith(".parquet") for file in files.sizes):
            return remote_parquet(name, split, files)
        patterns = [f"{folder}{file}" for folder in ("", f"{split}/") for file in ("*.json", "*.arrow")]
        folder = fetch(name, [("dataset_dict.json", "state.json")], patterns, "import-hf", "dataset")
        return Saved(folder, name, f"{name.partition('@')[0]}@{folder.name}", split)
    if path.is_file() and path.suffix == ".parquet":
        return Parquet(name, recorded_id(name), [path], open)
    if not path.is_dir():
        raise ValueError(f"{name} is not a dataset saved to disk: no such directory, nor a hub id")
    if not {"dataset_dict.json", "state.json"} & {entry.name for entry in path.iterdir()}:
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*.parquet") if file.is_file()}
        if files:
            chosen = files_of_split(name, split, files)
            return Parquet(name, f"{recorded_id(name)}, split {split}", [files[file] for file in chosen], open)
    return Saved(path, name, recorded_id(name), split)


#################################################################################
#                                 Parquet files                                 #
#################################################################################


def files_of_split(name, split, files):
    """The .parquet files of a split, by the names that the hub's datasets have: data/train-00000-of-00002.parquet.

    Files whose names are those of no split are of "train". Raises ValueError if there are none.
    """
    files = sorted(file for file in files if file.endswith(".parquet"))

    def of(split):
        return [file for file in files if re.search(rf"(?:^|/){re.escape(split)}(?:[-_./]|$)", file)]

    chosen = of(split) or (files if split == "train" and not any(map(of, OTHER_SPLITS)) else [])
    if not chosen:
        found = one_line(", ".join(sorted({re.split(r"[-.]", file)[0] for file in files})), 120)
        raise ValueError(f"{name} has no .parquet files of the split {split!r}: --split one of {found}")
    folders = sorted({file.rpartition("/")[0] for file in chosen})
    if len(folders) > 1:
        raise ValueError(
            f"{name} has several datasets with a split {split!r}, in {one_line(', '.join(folders), 80)}: download it, "
            "and name the folder of one"
        )
    return chosen


def remote_parquet(name, split, files: Listing):
    """The rows of a dataset on the hub, at one commit, read through HTTP."""
    from huggingface_hub import HfFileSystem

    system, source = HfFileSystem(), f"{files.repository}@{files.commit}"

    def open_remote(file, mode):
        return system.open(f"datasets/{files.repository}/{file}", mode, revision=files.commit, block_size=READ_AHEAD)

    return Parquet(name, f"{source}, split {split}", files_of_split(name, split, files.sizes), open_remote)


class Parquet:
    """The rows of Parquet files, in order.

    Args:
        name: of the dataset, for errors.
        source: its id, for the manifest.
        files: paths, or names that `opened` knows.
        opened: a function opened(file, "rb") that gives a file object.

    Raises ValueError if a file is damaged or has no such columns.
    """

    def __init__(self, name, source, files, opened):
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ValueError("import-hf needs the package pyarrow: pip install datasets, which brings it") from None
        self.name, self.source, self.files, self.opened = name, source, files, opened
        self.ends, self.at, self.rows, self.rest = [], None, iter(()), None  # rest: of a batch that was read in part
        for file in files:  # their footers only
            with self.open(file) as parquet:
                columns, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
            missing = [column for column in COLUMNS if column not in columns]
            if missing:
                raise ValueError(f"{name} has no column {missing[0]!r}, only {one_line(', '.join(columns), 80)}")
            self.ends.append(rows + (self.ends[-1] if self.ends else 0))
        self.count = self.ends[-1]
        if not self.count:
            raise ValueError(f"{name} has no rows")

    @contextlib.contextmanager
    def open(self, file):
        """A file as pyarrow's ParquetFile. Any failure within is a ValueError."""
        import pyarrow.parquet

        try:
            with (
                self.opened(file, "rb") as stream,
                pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False) as parquet,
            ):
                yield parquet
        except Exception as error:  # pyarrow, the hub's client and its transport raise many types
            raise ValueError(
                f"{self.name}: {one_line(Path(file).name, 80)} cannot be read ({type(error).__name__}: "
                f"{one_line(error, 80)}); what is written is kept: run the same command again"
            ) from None

    def read(self, start, stop):
        """Rows start..stop-1 as a dict of arrays. To go on where the last call ended costs least."""
        import pyarrow

        if self.at != start:
            self.rows, self.rest = self.batches(start, stop - start), None
        parts, left = [], stop - start
        while left:
            batch = self.rest or next(self.rows, None)
            if batch is None:
                raise ValueError(f"{self.name}: fewer rows than the footers of its files say")
            parts.append(batch.slice(0, left))
            self.rest = batch.slice(left)  # false where it is empty
            left -= parts[-1].num_rows
        self.at = stop
        table = pyarrow.Table.from_batches(parts)
        return {column: as_array(table[column], f"{self.name}, rows {start} to {stop - 1}") for column in COLUMNS}

    def batches(self, start, size):
        """Record batches of at most `size` rows, from row `start` on. Row groups before it are not read."""
        index = bisect.bisect_right(self.ends, start)
        skip = start - (self.ends[index - 1] if index else 0)
        for file in self.files[index:]:
            with self.open(file) as parquet:
                group, metadata = 0, parquet.metadata
                while group < metadata.num_row_groups and skip >= metadata.row_group(group).num_rows:
                    skip -= metadata.row_group(group).num_rows
                    group += 1
                groups = list(range(group, metadata.num_row_groups))
                for batch in parquet.iter_batches(size, row_groups=groups, columns=list(COLUMNS)):
                    taken = batch.slice(skip)
                    skip = max(0, skip - batch.num_rows)
                    if taken.num_rows:
                        yield taken.select(list(COLUMNS))


def as_array(column, where):
    """An Arrow column of numbers, or of lists of them of one shape, as an array (rows, ...).

    Raises ValueError, naming where, for other columns and for lists of several lengths.
    """
    import pyarrow

    parts = column.combine_chunks()
    parts = parts.chunks if isinstance(parts, pyarrow.ChunkedArray) else [parts]
    arrays = []
    for part in parts:
        shape, types = [len(part)], pyarrow.types
        while True:
            if isinstance(part.type, pyarrow.ExtensionType):  # datasets' Array3D, for example
                part = part.storage
            if part.null_count:
                raise ValueError(f"{where}: {column.type} with values that are missing")
            if types.is_list(part.type) or types.is_large_list(part.type) or types.is_fixed_size_list(part.type):
                lengths = np.unique(part.value_lengths().to_numpy(zero_copy_only=False))
                if len(lengths) > 1:
                    raise ValueError(f"{where}: not all have lists of one length, but {lengths[0]} and {lengths[-1]}")
                shape.append(int(lengths[0]) if len(lengths) else 0)
                part = part.flatten()
            else:
                break
        if not (types.is_integer(part.type) or types.is_floating(part.type)):
            raise ValueError(f"{where}: values of type {one_line(part.type, 60)}, wanted numbers and lists of them")
        arrays.append(part.to_numpy(zero_copy_only=False).reshape(shape))
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


#################################################################################
#                                 Saved to disk                                 #
#################################################################################


class Saved:
    """The rows of a dataset that Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""

    def __init__(self, folder, name, source, split):
        try:
            from datasets import load_from_disk
        except ImportError:
            raise ValueError("import-hf needs the package datasets: pip install datasets") from None
        try:
            folder, splits = chosen_folder(folder, split)
            if folder is not None:
                check_saved(folder)
                data = load_from_disk(str(folder))
        except Exception as error:  # datasets and Arrow raise many types
            raise ValueError(f"{name} is not a dataset saved to disk ({one_line(error, 150)})") from None
        if folder is None:
            raise ValueError(f"{name} has no split {split!r}: --split one of {', '.join(splits)}")
        for column in COLUMNS:
            if column not in data.column_names:
                raise ValueError(f"{name} has no column {column!r}, only {', '.join(data.column_names)}")
        self.data = data.select_columns(list(COLUMNS)).with_format("numpy")
        self.source, self.count = f"{source}, split {split}" if splits else source, len(data)
        if not self.count:
            raise ValueError(f"{name} has no rows")

    def read(self, start, stop):
        """Rows start..stop-1 as a dict of arrays."""
        return self.data[start:stop]


def chosen_folder(folder, split):
    """The folder of a split, or None, and the splits' names; of a dataset without splits, the folder itself, and []."""
    if not (folder / "dataset_dict.json").is_file():
        return folder, []
    splits = plain_names(folder / "dataset_dict.json", "splits", lambda split: split)
    return (folder / split if split in splits else None), splits


def check_saved(folder):
    """Raise ValueError if a dataset saved to disk names files outside it, or has columns that open other files.

    The types of columns are named in dataset_info.json, and again in each Arrow file.
    """
    import pyarrow

    columns = [read_json(folder / "dataset_info.json").get("features")]
    for name in plain_names(folder / "state.json", "_data_files", lambda entry: entry.get("filename")):
        with pyarrow.memory_map(str(folder / name)) as source:
            metadata = pyarrow.ipc.open_stream(source).schema.metadata or {}
        columns.append(json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features"))
    for kinds in filter(None, columns):
        unknown = {
            kind
            for key, column in kinds.items()
            for kind in column_kinds(column)
            if kind not in (PLAIN_COLUMNS if key in COLUMNS else PLAIN_COLUMNS + OTHER_COLUMNS)
        }
        if unknown:
            raise ValueError(f"columns of the kind {one_line(min(unknown), 60)}, wanted numbers and lists of them")


def plain_names(path, key, name_of):
    """The names that a JSON file lists under a key. Raises ValueError if one leads out of the file's folder."""
    names = [name_of(entry) for entry in read_json(path)[key]]
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"{path.name} names {one_line(repr(name)[:1000], 80)}, wanted names in its own folder")
    return names


def column_kinds(column):
    """Every type that a column's description names, at any depth."""
    kinds, left = set(), [column]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            kinds |= {str(part["_type"])} if "_type" in part else set()
            left += part.values()
        elif isinstance(part, list):
            left += part
    return kinds
