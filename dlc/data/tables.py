"""Datasets of other programs as rows, read by the package datasets: saved to disk or Parquet files, here or on the hub.

    table = FeatureTable("lavoies/DLC_512x256", "train")    # table.count, table.source
    next(table.read(0, 1024))                               # dict(features=array, labels=array)
    images = Table("owner/name:test", "--data-path")        # images.name(7), images.labels, images.open(7)

Rows of features are read as they are asked for, in order, so that memory holds a batch of them. Parquet files on the
hub are not downloaded first. Images are read in any order: datasets fetches them, and keeps them in its cache as files
that are mapped. Columns are taken as Arrow holds them: nothing is decoded, so no column can name a file to open.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from dlc.data.listing import ONE_CLASS, Source, classes_of, empty_classes, entries_of, is_image, read_labels, unlabelled
from dlc.machine.cli import one_line
from dlc.machine.files import is_plain_name, is_pointer, recorded_id

COLUMNS = dict(features="fiu", labels="iu")  # and NumPy's letters for the types of their values
HUB_ID = r"[\w.-]+/[\w.-]+(@[^/]+)?"
SAVED = ("dataset_dict.json", "state.json")  # one of them lies in a folder that save_to_disk wrote


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


@contextlib.contextmanager
def said_of(name: str) -> Iterator[None]:
    """Turn all that datasets, Arrow and the hub's client raise into a ValueError of one line that names the dataset."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {one_line(error, 200)}") from None
    except Exception as error:
        again = "" if os.path.exists(split_of(name)[0]) else "; what is written is kept: run the same command again"
        raise ValueError(f"{name} cannot be read ({type(error).__name__}: {one_line(error, 150)}){again}") from None


def split_of(name: str) -> tuple[str, str]:
    """A dataset and its split, of name[:split]."""
    name, _, split = (str(name), "", "") if os.path.exists(name) else str(name).partition(":")
    return name, split or "train"


def located(name: str, is_cached: bool = False) -> tuple[str, Path | None, dict]:
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
        if is_pointer(path):
            raise ValueError("a git-lfs pointer, not the file: run git lfs pull")
    saved = path if any((path / one).is_file() for one in SAVED) else None
    if path.exists() and not saved and re.search(r"[*?[]|::", name):  # would be all files that it fits
        raise ValueError("the package datasets takes *, ?, [ and :: in a path for patterns: rename it")
    return source, saved, files


def pick(splits, split: str):
    """Of several splits by name, one; and of a dataset without splits all."""
    if hasattr(splits, "keys") and split not in splits:
        raise ValueError(f"no split {split!r}: name one of {', '.join(map(str, splits))}")
    return splits[split] if hasattr(splits, "keys") else splits


#################################################################################
#                                    Features                                   #
#################################################################################


class FeatureTable:
    """`count` rows of the columns COLUMNS; `source` is the dataset's id, for the manifest.

    Args:
        name: a folder that Dataset.save_to_disk wrote, a folder with .parquet files or one such file, or a hub id of
            either, with or without @revision.
        split: the split to take, if there are several.

    Raises ValueError where there is none, where it has no such columns or rows, and without the package datasets.
    """

    def __init__(self, name: str, split: str):
        datasets = import_datasets("import-hf")
        datasets.disable_progress_bars()
        self.name = name
        with said_of(name):
            self.source, saved, files = located(name)
            if saved:
                data = datasets.load_from_disk(str(saved))
                has_splits, data = hasattr(data, "keys"), pick(data, split)
                self.count, columns = len(data), data.column_names
                self._from = lambda row: data.select(range(row, len(data)))
            else:
                has_splits, columns = "data_files" not in files, self._open_parquet(datasets, files, split)
            self.source += f", split {split}" if has_splits else ""
            for column in COLUMNS:
                if column not in columns:
                    raise ValueError(f"there is no column {column!r}, only {', '.join(columns)}")
            if not self.count:
                raise ValueError("there are no rows")

    def _open_parquet(self, datasets, files, split):
        """Gives the columns. files: what datasets' load_dataset takes, which finds the splits by the files' names."""
        import fsspec
        from pyarrow.parquet import read_metadata

        urls, ends = list(pick(datasets.load_dataset_builder(**files).config.data_files, split)), [0]
        folders = sorted({url.rpartition("/")[0] for url in urls})
        if len(folders) > 1:
            raise ValueError(
                f"several datasets have a split {split!r}, in {', '.join(folders)}: name the folder of one"
            )
        columns = []
        for url in urls:
            with fsspec.open(url, "rb") as file:
                metadata = read_metadata(file)
            ends.append(ends[-1] + metadata.num_rows)
            columns.append(metadata.schema.to_arrow_schema().names)

        def rows_from(row):
            first = int(np.searchsorted(ends, row, side="right")) - 1  # earlier files are not opened
            data = datasets.load_dataset("parquet", data_files=urls[first:], split="train", streaming=True)
            return data.skip(row - ends[first])

        self.count, self._from = ends[-1], rows_from
        return [name for name in columns[0] if all(name in one for one in columns)]

    def read(self, start: int, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Rows from `start` on as arrays, `size` at once. Close it: datasets' readers complain where the program's end
        does that."""
        with said_of(self.name):
            data = self._from(start).select_columns(list(COLUMNS)).with_format("arrow")
            with contextlib.closing(data.iter(size)) as tables:
                for at, table in zip(range(start, self.count, size), tables):
                    where = f"rows {at} to {at + len(table) - 1}"
                    yield {name: as_array(table[name], kinds, f"{name}, {where}") for name, kinds in COLUMNS.items()}


def as_array(column, kinds: str, where: str) -> np.ndarray:
    """An Arrow column of numbers, or of lists of them of one shape, as an array (rows, ...)."""
    import pyarrow

    part, shape = pyarrow.concat_arrays(column.chunks), [len(column)]
    while True:
        part = getattr(part, "storage", part)  # of datasets' Array3D, for example
        if part.null_count:
            raise ValueError(f"{where}: values are missing")
        if not hasattr(part, "value_lengths"):  # no lists
            break
        lengths = np.unique(part.value_lengths())
        if len(lengths) != 1:
            raise ValueError(f"{where}: not all have lists of one length, but {lengths.min()} and {lengths.max()}")
        shape.append(int(lengths[0]))
        part = part.flatten()
    array = part.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in kinds:
        wanted = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"{where}: values of type {one_line(part.type, 60)}, wanted {wanted} or lists of them")
    return array.reshape(shape)


#################################################################################
#                                     Images                                    #
#################################################################################


class Table(Source):
    """Rows of name[:split]: a folder that save_to_disk wrote, a folder or file of .parquet, or a hub id.

    The images are in the column `image`, or in the only column of images, their labels in the column `label`. Images
    are named CLASS/FILE where the dataset says of which files they were made and these names differ, as of a folder
    that datasets read; otherwise by their row. Without a split, "train" is taken.

    Raises ValueError where there are no such columns or rows, and without the package datasets.
    """

    @staticmethod
    def takes(path: str) -> bool:
        name, _ = split_of(path)
        place = Path(name)
        if place.is_dir():
            folders, files = entries_of(place)
            inner = entries_of(place / "data")[1] if folders else files
            # beside class folders or images a .parquet is something else
            is_parquet = folders in ([], ["data"]) and not any(map(is_image, files))
            is_parquet &= any(name.endswith(".parquet") for name in inner)
            return is_parquet or bool({*SAVED} & {*files})
        if place.exists():
            return place.suffix == ".parquet"
        return bool(re.fullmatch(HUB_ID, name)) and not os.path.exists(name.split("/")[0])

    def __init__(self, path: str, flag: str, labels: str | None = None, names: Sequence[str] | None = None):
        datasets, (place, split), remarks = import_datasets(path), split_of(path), []
        is_here = os.path.exists(place)
        with said_of(path if is_here else f"{path} (no file or folder here, so a dataset of the hub)"):
            source, saved, files = located(place, is_cached=True)
            if source == place and not is_here:
                remarks = [f"{path}: HF_HUB_OFFLINE is set, so the copy fetched last is taken, of any revision"]
            data = datasets.load_from_disk(str(saved)) if saved else datasets.load_dataset(**files, split=split)
            data = pick(data, split)
            self.column = image_column(datasets, data)
            if isinstance(data.features[self.column], datasets.Image):
                data = data.cast_column(self.column, datasets.Image(decode=False))
            self.data = data.with_format("arrow")
            files, sizes = self._files()
            classes, numbers = self._labels(datasets, labels is None and names is None)
        everything = image_names(files, classes, numbers)
        self.rows = range(len(files))
        if names is not None:
            places = {name: row for row, name in enumerate(everything)}
            for name in names:
                if name not in places:
                    raise ValueError(f"{path} has no {name}")
            self.rows = [places[name] for name in names]
            return super().__init__(path, names)
        if labels:
            classes, numbers = classes_of(read_labels(labels, everything))
        elif not classes:
            remarks += [f"{path}: {unlabelled('labels in a column label')}"]
            classes, numbers = [ONE_CLASS], np.zeros(len(files), np.int64)
        if empty := empty_classes(classes, numbers):
            remarks += [f"{path}: {empty}"]
        marks = [f"{label} {size}" for label, size in zip(numbers.tolist(), sizes)]
        super().__init__(path, everything, classes, numbers, remarks, marks)

    def _files(self):
        """The file's name that each row was made of, or "", and the size of the image in bytes."""
        import pyarrow
        from pyarrow import compute

        column = content = self.data[:][self.column]  # mapped: the images' bytes are not read
        paths = [None] * len(column)
        if pyarrow.types.is_struct(column.type):
            content, paths = compute.struct_field(column, "bytes"), compute.struct_field(column, "path").to_pylist()
        sizes = compute.binary_length(content).to_pylist()
        if None in sizes:
            raise ValueError(f"row {sizes.index(None)} has no image, but at most a path: store the images' bytes")
        return [re.split(r"[/\\]", path or "")[-1] for path in paths], sizes

    def _labels(self, datasets, needed):
        """Classes, and labels (n,); empty, and None, where there are none."""
        feature = self.data.features.get("label")
        values = self.data[:]["label"].to_pylist() if feature else []
        lacking = [row for row, value in enumerate(values) if value in (None, -1, "")]
        if lacking and needed:
            which = f"row {lacking[0]} has no label ({len(lacking):,} of {len(values):,} rows)"
            raise ValueError(f"{which}: give --labels, or store a label in each, or no column label")
        if lacking or not values:
            return [], None
        return (feature.names, np.array(values)) if isinstance(feature, datasets.ClassLabel) else classes_of(values)

    def open(self, index: int) -> io.BytesIO:
        value = self.data[self.rows[index]][self.column][0].as_py()
        return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)


def image_column(datasets: ModuleType, data) -> str:
    """The column of images. Raises ValueError where there is none, or one of several, and no rows."""
    kinds = data.features.items()
    found = [
        name for name, kind in kinds if isinstance(kind, datasets.Image) or isinstance(kind, dict) and "bytes" in kind
    ]
    found += ["image"] if getattr(data.features.get("image"), "dtype", None) == "binary" else []
    if len(found) != 1 and "image" not in found:
        types = (f"{name} of {getattr(kind, 'dtype', kind)}" for name, kind in kinds)
        raise ValueError(f"wanted a column 'image' of images' bytes, there are {one_line(', '.join(types), 120)}")
    if not len(data):
        raise ValueError("there are no rows")
    return "image" if "image" in found else found[0]


def image_names(files: Sequence[str], classes: Sequence[str], labels: np.ndarray | None) -> list[str]:
    """The images' names, of the files that they were made of and their classes, or their rows."""
    names = [os.path.join(classes[label], file) for label, file in zip(labels, files)] if classes else files
    is_usable = all(map(is_plain_name, {*files, *filter(None, classes)})) and len({*names}) == len(names)
    return names if is_usable else [f"{row:07d}" for row in range(len(names))]
