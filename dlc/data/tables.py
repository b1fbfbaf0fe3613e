"""Datasets of other programs as rows, read by the package datasets: saved to disk or Parquet files, here or on the hub.

    table = open_table("lavoies/DLC_512x256", "train")  # table.count, table.source
    table.read(0, 1024)                                 # dict(features=array, labels=array)

Rows are read as they are asked for, in order, so that memory holds a batch of them. Parquet files on the hub are not
downloaded first. Columns are taken as Arrow holds them: nothing is decoded, so no column can name a file to open.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlc.machine.cli import one_line
from dlc.machine.files import recorded_id

COLUMNS = ("features", "labels")
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
        what = f"{type(error).__name__}: {one_line(error, 150)}"
        raise ValueError(
            f"{name} cannot be read ({what}); what is written is kept: run the same command again"
        ) from None


def open_table(name: str, split: str) -> Table:
    """The rows at a name.

    Args:
        name: a folder that Dataset.save_to_disk wrote, a folder with .parquet files or one such file, or a hub id of
            either, with or without @revision.
        split: the split to take, if there are several.

    Raises ValueError where there is none, where it has no such columns or rows, and without the package datasets.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise ValueError("import-hf needs the package datasets: pip install datasets") from None
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)  # errors here are one line
    datasets.disable_progress_bars()
    path, source, files = Path(name), recorded_id(name), dict(path="parquet", data_dir=str(name))
    with said_of(name):
        if not path.exists():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/]+)?", name):
                raise ValueError("there is no such file or folder, and it is no hub id, owner/name[@revision]")
            repository, _, revision = name.partition("@")
            info = huggingface_hub.HfApi().dataset_info(repository, revision=revision or None)
            source, files = f"{repository}@{info.sha}", dict(path=repository, revision=info.sha)
            if {one.rfilename for one in info.siblings} & {*SAVED}:
                path = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=info.sha))
        elif path.is_file():
            files = dict(path="parquet", data_files=str(path))
        if any((path / one).is_file() for one in SAVED):
            return _open_saved(name, source, datasets.load_from_disk(str(path)), split)
        return _open_parquet(name, source, files, split)


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
