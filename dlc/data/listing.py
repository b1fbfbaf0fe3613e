"""List the images of a folder or archive: classes, order, labels, and a remark on what is left out.

For an ordinary folder with one subfolder per class, classes, order and labels equal torchvision's ImageFolder. But
ImageFolder silently skips folders that the disk fails to list, and it takes a notebook's .ipynb_checkpoints for a
class, which shifts all later labels by one, an error that then stays in the features. Here an error of the disk stops
the listing, hidden and system folders and files are left out, and the remark counts what was left out.
"""

import csv
import errno
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from dlc.machine.cli import one_line
from dlc.machine.files import reading

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's, in any case
# what systems put among a user's files, in lower case; names that begin with a dot are left out as well
SYSTEM = {
    *("__macosx", "__pycache__", "lost+found", "$recycle.bin", "system volume information", "temporary items"),
    *("network trash folder", "@eadir", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot"),
    *("~snapshot", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}  # parts of a data set
DANGLING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # of a link: its target is missing, or is the link itself
LONGEST_REMARK, LONGEST_NAME = 220, 24  # characters
MOST_ENDINGS = 5  # counted separately
HOLDERS = (".zip", ".parquet", ".tar")  # hold images, in a folder of them alone
LABEL_ENDINGS = ("cls", "json")  # of WebDataset, the first one first
ONE_CLASS = "all"  # the class of images that have none
MOST_CLASSES = 2**16  # whole numbers below this are classes by themselves, and others names of classes


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def is_hidden(name: str) -> bool:
    return name[:1] == "." or name.lower() in SYSTEM


class LeftOut:
    """What a listing leaves out: files by their endings, and paths by the reason."""

    def __init__(self):
        self.endings, self.others, self.examples = Counter(), Counter(), {}

    def note(self, reason: str, path: str) -> None:
        self.others[reason] += 1
        self.examples[reason] = min(path, self.examples.get(reason, path))

    def __str__(self) -> str:
        """In words; "" for nothing."""
        kinds = self.endings.most_common()
        kinds = [*kinds[:MOST_ENDINGS], ("of other endings", sum(count for _, count in kinds[MOST_ENDINGS:]))]
        parts = [f"{count:,} {one_line(ending, 20)}" for ending, count in kinds if count]
        parts += [
            f"{count:,} {reason} ({example(self.examples[reason], count)})" for reason, count in self.others.items()
        ]
        return f"left out {', '.join(parts)}" if parts else ""


def paths_below(root: str, left_out: LeftOut) -> Iterator[str]:
    """The paths of all files and, with a "/" at the end, folders below a root. Links are followed, but not into a
    folder that they lie in; hidden folders are not entered.

    Raises OSError, naming what cannot be listed.
    """
    todo = [("", [])]
    while todo:
        folder, above = todo.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            own = status.st_dev, status.st_ino
            if own in above:
                left_out.note("links to a folder that they lie in", folder[:-1])
                continue
            yield folder
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path, is_folder, is_file = folder + entry.name, False, False
                    try:
                        is_folder, is_file = entry.is_dir(), entry.is_file()
                    except OSError as error:
                        if error.errno not in DANGLING:
                            raise
                    is_dangling = not (is_folder or is_file) and entry.is_symlink() and not os.path.exists(entry.path)
                    if is_folder and not is_hidden(entry.name):
                        todo.append((f"{path}/", [*above, own]))
                    # reading a link to nowhere says so, and is noted
                    elif is_file or is_hidden(entry.name) or is_dangling and is_image(entry.name):
                        yield path
                    elif is_dangling and not folder:
                        os.stat(entry.path)  # raises: perhaps a class on a disk that is not mounted
                    else:  # a pipe would block its reader
                        left_out.note("links to nowhere and special files", path)
        except OSError as error:
            place = str(error.filename or os.path.join(root, folder))
            raise OSError(
                f"cannot list {place!r} ({error.strerror or error}), without which images or whole classes would be "
                f"missing: make it readable, or take it out of {root}"
            ) from None


def sort_out(paths: Iterable[str], left_out: LeftOut) -> tuple[dict[str, list[str]], list[str]]:
    """The images among paths, by the folder at the top that they lie in; and those that lie in none."""
    found, outside, hidden = {}, [], set()
    for path in paths:
        *folders, name = parts = path.split("/")  # a folder's name is ""
        first = next((place for place, part in enumerate(parts) if is_hidden(part)), None)
        if ".." in parts:
            left_out.note("names that lead out of the archive", path)
        elif first is not None:
            hidden.add("/".join(parts[: first + 1]))
        else:
            images = found.setdefault(folders[0], []) if folders else outside
            if is_image(name):
                images.append(path)
            elif name:
                ending = os.path.splitext(name)[1].lower().rstrip(".") or "without an ending"
                left_out.endings[ending] += 1
                left_out.examples[ending] = min(path, left_out.examples.get(ending, path))
    for path in hidden:
        left_out.note("hidden or system files and folders", path)
    return {name: sorted(found[name], key=by_folder) for name in sorted(found)}, sorted(outside)


def by_folder(path: str) -> tuple[str, str]:
    """The sorting key of images: the folder's path, then the name."""
    folder, _, name = path.rpartition("/")
    return folder, name


class Tree:
    """The members of an archive, by their paths: `paths` are those below its root.

    One folder that all members lie in is the root: `prefix` is its path in the archive, "" or with a "/" at the end.

    Args:
        root: what the archive is called.
        names: of the members, in the archive's order; those of folders end in "/".
        inner: path of a folder in the archive to take for all of it.

    Raises ValueError where there is no such folder, and for two files of one name.
    """

    def __init__(self, root: str, names: Sequence[str], inner: str = ""):
        self.places = {}  # among the names, by path
        for index, name in enumerate(names):
            path = "/".join(part for part in name.split("/") if part not in ("", ".")) + "/" * name.endswith("/")
            if self.places.setdefault(path, index) != index and path[-1:] != "/":
                raise ValueError(f"{root} holds {name!r} twice")
        self.prefix, self.paths = "", [path for path in self.places if path != "/"]
        folder = inner.strip("/") or self._only_folder()
        while folder:
            self.prefix, self.paths = f"{self.prefix}{folder}/", self._within(folder)
            folder = self._only_folder()
        if not self.paths and inner:
            raise ValueError(f"{root} has no folder {inner!r}")
        self.root = os.path.join(root, self.prefix[:-1]).rstrip("/")

    def _within(self, folder):
        return [path.removeprefix(f"{folder}/") for path in self.paths if path.startswith(f"{folder}/")]

    def _only_folder(self):
        """The one that all paths lie in, if there are folders in it and no images; or ""."""
        tops = {top for path in self.paths if not is_hidden(top := path.partition("/")[0])}
        paths = self._within(only := tops.pop()) if len(tops) == 1 else []
        has_images = any("/" not in path and is_image(path) for path in paths)
        return only if any("/" in path for path in paths) and not has_images else ""

    def labels(self, read: Callable[[int], bytes]) -> dict[str, str]:
        """The labels that lie beside images as WebDataset has them, by image: 0.cls or 0.json, "label" or "cls" in it.
        Their files are taken from the paths.

        Args:
            read: gives a member's bytes by its place among the names.

        Raises ValueError, naming the file, where there are labels, but not one for each image.
        """
        images, labels, beside, keys = [], {}, set(), {}
        for path in self.paths:
            folder, slash, name = path.rpartition("/")
            if name and not is_hidden(name):  # by the name up to its first dot, the key of WebDataset
                keys.setdefault(f"{folder}{slash}{name.partition('.')[0]}", []).append(path)
        for key, paths in keys.items():
            found = [f"{key}.{ending}" for ending in LABEL_ENDINGS if f"{key}.{ending}" in paths]
            paths = [path for path in paths if is_image(path)]
            contents = [read(self.index(path)) for path in found] if paths else []
            values = [value for content, path in zip(contents, found) if (value := label_in(content, path)) is not None]
            images += paths
            if values:
                labels[paths[0]] = values[0]
                beside.update(found)
                if len(paths) > 1:
                    raise ValueError(f"{self.root} has one label for several images, as {paths[0]} and {paths[1]}")
        if labels and len(labels) < len(images):
            lacking = next(path for path in images if path not in labels)
            raise ValueError(f"{self.root} has labels (.cls, .json) for {len(labels):,} images, but none for {lacking}")
        self.paths = [path for path in self.paths if path not in beside]  # they are not left out
        return labels

    def index(self, path: str) -> int:
        """The place of a file, by its path below the root or in the archive, among the members' names.

        Raises ValueError where there is none.
        """
        index = self.places.get(f"{self.prefix}{path}", self.places.get(path))
        if index is None:
            raise ValueError(f"{self.root} has no {path}")
        return index


def example(name: str, count: int) -> str:
    return one_line(name, LONGEST_NAME) + (", …" if count > 1 else "")


def list_images(
    data_path: str | os.PathLike,
    paths: Iterable[str] | None = None,
    flag: str = "--data-path",
    labels_of: Callable[[list[str]], Iterable[str]] | None = None,
    left_out: LeftOut | None = None,
) -> tuple[list[str], list[str], np.ndarray, list[str]]:
    """Returns classes, the images' paths relative to data_path, labels (n,) int64, and remarks, a line each.

    As in torchvision's ImageFolder, the classes are the folders in data_path, sorted by name; the images of a class are
    the files in and below its folder whose names end in one of ENDINGS; links are followed; empty classes count. Where
    no folder has images, those in data_path itself are one class.

    Hidden and system folders and files (a leading dot, or SYSTEM) are left out, and so are links to a folder that they
    lie in. A remark counts what was left out, and the classes that are empty; others say what may be a mistake.

    Args:
        paths: of all that is to be listed, see `paths_below`, as of an archive; None: what is in the folder data_path.
        flag: by which errors and remarks call data_path.
        labels_of: labels by the images' paths, of all images below data_path; None: the folders are the classes.
        left_out: what is already known to be.

    Raises ValueError if there is nothing to list, or where the folders are no classes, as a data set's train and val;
    OSError if the disk fails to list a folder.
    """
    left_out, advice = left_out or LeftOut(), "put the images of each class into a folder of its own"
    root = os.fspath(data_path) if paths is not None else folder_of(data_path, flag)
    found, outside = sort_out(paths_below(root, left_out) if paths is None else paths, left_out)
    if labels_of:
        paths = sorted([*outside, *itertools.chain(*found.values())], key=by_folder)
        if not paths:
            raise ValueError(f"{flag} {root} has no images: {str(left_out) or advice}")
        classes, labels = classes_of(labels_of(paths))
        said = "; ".join(filter(None, (str(left_out), empty_classes(classes, labels))))
        return classes, paths, labels, [one_line(f"{flag} {root}: {said}", LONGEST_REMARK)] if said else []
    is_flat = bool(outside) and not any(found.values())
    if is_flat:
        found, outside = {ONE_CLASS: outside}, []
    for name in outside:
        left_out.note("images outside the class folders", name)
    paths = [path for paths in found.values() for path in paths]
    labels = np.repeat(np.arange(len(found)), np.array([*map(len, found.values())], np.int64))
    remark = "; ".join(filter(None, (str(left_out), empty_classes([*found], labels))))
    if not paths:
        advice = "save images of other kinds as one of these" if left_out.endings else advice
        for place in (os.path.dirname(left_out.examples.get(ending, "")) for ending in HOLDERS):
            advice = f"give the folder of its archives, such as {os.path.join(root, place)}" if place else advice
        what = f"images in its class folders ({' '.join(ENDINGS)})" if found else f"images ({' '.join(ENDINGS)})"
        raise ValueError(one_line(f"{flag} {root} has no {what}: {advice}{f'; {remark}' if remark else ''}"))
    remarks = [unlabelled("class folders")] if is_flat else doubts(root, found, flag)
    remarks = [f"{flag} {root}: {one}" for one in [*remarks, *([remark] if remark else [])]]
    return list(found), paths, labels, [one_line(one, LONGEST_REMARK) for one in remarks]


def folder_of(path: str | os.PathLike, flag: str) -> str:
    """The path as text. Raises ValueError where there is no folder."""
    if not os.path.isdir(path):
        raise ValueError(f"{flag} {os.fspath(path)} is not a folder")
    return os.fspath(path)


def empty_classes(classes: Sequence[str], labels: np.ndarray) -> str:
    """Words on the classes without images; "" where there are none."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    return f"{len(empty):,} empty classes ({example(classes[empty[0]], len(empty))})" if len(empty) else ""


def unlabelled(what: str) -> str:
    return f"there are no {what}: all images are one class, {ONE_CLASS!r}"


#################################################################################
#                         Labels that folders do not say                        #
#################################################################################


def classes_of(values: Iterable[str | int]) -> tuple[list[str], np.ndarray]:
    """The classes of labels, and the labels (n,) int64 among them.

    Whole numbers from 0 to MOST_CLASSES - 1 are the classes themselves, of which the empty ones count. Other labels are
    names, sorted as text.
    """
    values = [str(value) for value in values]
    whole = [re.fullmatch(r"([0-9]{1,9})(\.0*)?", value) for value in values]  # also 3.0, as tables with gaps have it
    if all(match and int(match[1]) < MOST_CLASSES for match in whole):
        labels = np.array([int(match[1]) for match in whole], np.int64)
        return [str(label) for label in range(labels.max() + 1)], labels
    classes, labels = np.unique(values, return_inverse=True)
    return classes.tolist(), labels.astype(np.int64)


def label_in(content: bytes, name: str) -> str | None:
    """The label in a file of LABEL_ENDINGS; None where there is none, as in a .json of captions."""
    try:
        value = json.loads(content) if name.endswith(".json") else content.decode().strip()
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return str(value) if isinstance(value, (str, int, float)) and value != "" and value == value else None


def read_labels(path: str | os.PathLike, names: Sequence[str]) -> list[str]:
    """The label of each image of these names, from the columns `name` and `label` of a .csv file.

    Spaces around a label are none of it. Names are compared as Unicode composes them: a Mac writes é as two letters.

    Raises ValueError, naming file and name, where it is no such table, or where a name is missing, unknown or double.
    """
    rows, label = [], ""
    with reading(path), open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            table = csv.DictReader(file, strict=True)
            columns = table.fieldnames or ()
            if sorted(name for name in columns if name in ("name", "label")) != ["label", "name"]:
                raise ValueError(f"its first line names the columns {one_line(list(columns), 60)}")
            for row in table:
                name, label = row["name"] or "", (row["label"] or "").strip()
                if any(row.get(None, ())):
                    raise ValueError(f"line {table.line_num} has a comma too many: text with commas goes in quotes")
                label.encode()  # raises for bytes that are no UTF-8
                rows += [(unicodedata.normalize("NFC", name), label)] if name or label else []
        except (ValueError, csv.Error) as error:
            what = f"label {one_line(ascii(label), 60)}" if isinstance(error, UnicodeEncodeError) else error
            raise ValueError(
                f"--labels {path}: {what}: wanted the columns name and label, separated by commas, in UTF-8"
            ) from None
    names = [unicodedata.normalize("NFC", name) for name in names]
    labels, wanted, faults = dict(rows), {*names}, []
    counts = Counter(name for name, _ in rows)
    for what, wrong in (
        ("names twice", [name for name in counts if counts[name] > 1]),
        ("has no label for", [name for name in names if not labels.get(name)]),
        ("names images that are not there, such as", [name for name in labels if name not in wanted]),
    ):
        if wrong:
            count = f" (one of {len(wrong):,})" if len(wrong) > 1 else ""
            faults.append(f"{what} {one_line(repr(wrong[0]), 80)}{count}")
    if faults:
        raise ValueError(f"--labels {path} {'; '.join(faults)}")
    return [labels[name] for name in names]


def doubts(root: str, found: dict[str, list[str]], flag: str) -> list[str]:
    """What speaks against the folders' being classes, in words. found: the images' paths by class.

    Raises ValueError where the images lie deeper than in class folders. In one folder of the same name in each class,
    as Tiny ImageNet has them, they may.
    """
    found = {name: paths for name, paths in found.items() if paths}
    deep = {name: paths[0] for name, paths in found.items() if all(path.count(os.sep) > 1 for path in paths)}
    inner = {os.path.dirname(path).partition(os.sep)[2] for paths in found.values() for path in paths}
    are_splits = len(found) > 1 and {name.lower() for name in found} <= SPLITS
    if deep and (are_splits or len(deep) == len(found) and (len(inner) > 1 or len(found) == 1)):
        path = next(iter(deep.values()))
        better = os.path.join(root, os.path.dirname(os.path.dirname(path)))
        raise ValueError(
            f"{flag} {root}: its folders {one_line(', '.join(found), 60)} are not classes, since images lie "
            f"deeper, as {one_line(path, 60)}: give the folder whose folders are the classes, such as {better}"
        )
    words = []
    if are_splits:
        words.append(f"its classes {', '.join(found)} look like the parts of a data set: is one of them meant?")
    elif len(found) == 1:
        words.append(f"there is one class, {next(iter(found))!r}: images of several go into a folder for each class")
    if deep:
        words.append(f"no image lies directly in {len(deep):,} of the class folders, as {next(iter(deep.values()))!r}")
    return words


def listing_sha256(paths: Iterable[str]) -> str:
    """A digest of a listing, which changes when images are added, removed or renamed."""
    return hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
