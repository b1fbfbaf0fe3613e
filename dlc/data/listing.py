"""List the images of a folder or archive: classes, order, labels, and a remark on what is left out.

Of an ordinary folder with one subfolder per class, classes, order and labels are those of torchvision's ImageFolder.
But ImageFolder silently skips folders that the disk fails to list, and it takes a notebook's .ipynb_checkpoints for a
class, which shifts all later labels by one, an error that then stays in the features. Here an error of the disk stops
the listing, hidden and system folders and files are left out, and the remark counts what was left out.
"""

import csv
import errno
import hashlib
import json
import os
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
LABEL_ENDINGS = ("cls", "json")  # of WebDataset, the first one first
ONE_CLASS = "all"  # the class of images that have none
MOST_CLASSES = 2**16  # whole numbers below this are classes by themselves, and others names of classes


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def is_hidden(name: str) -> bool:
    return name[:1] == "." or name.lower() in SYSTEM


class Walk:
    """A walk through the folders below a root, which counts what it leaves out: endings, and paths by the reason."""

    def __init__(self, root: str):
        self.root, self.endings, self.others, self.examples = root, Counter(), Counter(), {}

    def leave_out(self, reason: str, path: str) -> None:
        self.others[reason] += 1
        self.examples[reason] = min(path, self.examples.get(reason, path))

    def scan(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the images in a folder, and of its folders. Raises OSError, naming what cannot be listed."""
        images, folders = [], []
        try:
            for name, is_folder, is_file, is_dangling in self.entries(folder):
                path = os.path.join(folder, name)
                if is_hidden(name):
                    self.leave_out("hidden or system files and folders", path)
                elif is_folder:
                    folders.append(name)
                elif is_image(name) and (is_file or is_dangling):  # reading a link to nowhere says so, and is noted
                    images.append(name)
                elif is_file:
                    self.endings[os.path.splitext(name)[1].lower().rstrip(".") or "without an ending"] += 1
                elif is_dangling and not folder:
                    os.stat(os.path.join(self.root, path))  # raises: perhaps a class on a disk that is not mounted
                else:  # a pipe would block its reader
                    self.leave_out("links to nowhere and special files", path)
        except OSError as error:
            place = str(error.filename or os.path.join(self.root, folder))
            raise OSError(
                f"cannot list {place!r} ({error.strerror or error}), without which images or whole classes would be "
                f"missing: make it readable, or take it out of {self.root}"
            ) from None
        return images, folders

    def entries(self, folder: str) -> Iterator[tuple[str, bool, bool, bool]]:
        """Of each entry of a folder its name, and whether it, or what a link leads to, is a folder, a file, missing."""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                is_folder = is_file = False
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError as error:
                    if error.errno not in DANGLING:
                        raise
                is_dangling = not (is_folder or is_file) and entry.is_symlink() and not os.path.exists(entry.path)
                yield entry.name, is_folder, is_file, is_dangling

    def images(self, folder: str) -> list[str] | None:
        """The paths of all images in and below a folder, sorted by their folder's path, then by name.

        None where the folder is a link to one that it lies in.
        """
        found, todo = [], [(folder, [self.identity("")] if folder else [])]
        while todo:
            inner, above = todo.pop()
            own = self.identity(inner)
            if own in above:
                self.leave_out("links to a folder that they lie in", inner)
                if inner == folder:
                    return None
                continue
            images, folders = self.scan(inner)
            found += [(inner, name) for name in images]
            todo += [(os.path.join(inner, name), [*above, own]) for name in folders]
        return [os.path.join(inner, name) for inner, name in sorted(found)]

    def identity(self, folder: str) -> object:
        """What tells a folder from all others, whatever link leads to it."""
        status = os.stat(os.path.join(self.root, folder))
        return status.st_dev, status.st_ino

    def left_out(self) -> str:
        """What was left out, in words; "" for nothing."""
        kinds = self.endings.most_common()
        kinds = [*kinds[:MOST_ENDINGS], ("of other endings", sum(count for _, count in kinds[MOST_ENDINGS:]))]
        parts = [f"{count:,} {one_line(ending, 20)}" for ending, count in kinds if count]
        parts += [
            f"{count:,} {reason} ({example(self.examples[reason], count)})" for reason, count in self.others.items()
        ]
        return f"left out {', '.join(parts)}" if parts else ""


class Tree(Walk):
    """The same of the members of an archive, by their names, of which those of folders end in "/".

    One folder that all members lie in is the root: `prefix` is its path in the archive, "" or with a "/" at the end.

    Args:
        root: what the archive is called.
        inner: path of a folder in the archive to take for all of it.

    Raises ValueError where there is no such folder, and for two files of one name.
    """

    def __init__(self, root: str, names: Sequence[str], inner: str = ""):
        super().__init__(root)
        self.folders = {"": {}}  # by path: by the name of an entry the index of a file, None for a folder
        for index, name in enumerate(names):
            *above, last = parts = [part for part in name.split("/") if part not in ("", ".")] or [""]
            if ".." in parts:
                self.leave_out("names that lead out of the archive", name)
            elif name.endswith("/"):
                self._folder("/".join(parts))
            elif self._folder("/".join(above)).setdefault(last, index) != index:
                raise ValueError(f"{root} holds {name!r} twice")
        self.prefix = f"{inner.strip('/')}/" if inner else ""
        if self.prefix[:-1] not in self.folders:
            raise ValueError(f"{root} has no folder {inner!r}")
        while len(only := [name for name in self._in("") if not is_hidden(name)]) == 1:
            inner = self._in(only[0]) if self._in("")[only[0]] is None else {}
            if None not in inner.values() or any(map(is_image, inner)):
                break
            self.prefix += f"{only[0]}/"
        self.root = os.path.join(root, self.prefix[:-1]).rstrip("/")

    def _folder(self, path):
        above, name = path, ""
        while above not in self.folders:
            self.folders[above] = {name: None} if name else {}
            above, _, name = above.rpartition("/")
        if name:
            self.folders[above].setdefault(name, None)
        return self.folders[path]

    def _in(self, folder):
        return self.folders[f"{self.prefix}{folder}".rstrip("/")]

    def entries(self, folder: str) -> Iterator[tuple[str, bool, bool, bool]]:
        for name, index in self._in(folder).items():
            yield name, index is None, index is not None, False

    def identity(self, folder: str) -> object:
        return folder

    def labels(self, read: Callable[[int], bytes]) -> dict[str, str]:
        """The labels that lie beside images as WebDataset has them, by image: 0.cls or 0.json, "label" or "cls" in it.

        Args:
            read: gives a member's bytes by its place among the names.

        Raises ValueError, naming the file, where there are labels, but not one for each image.
        """
        images, labels, beside = [], {}, []
        for folder, entries in self.folders.items():
            if not f"{folder}/".startswith(self.prefix):
                continue
            keys = {}  # of WebDataset: the name up to its first dot
            for name in entries:
                if entries[name] is not None and not is_hidden(name):
                    keys.setdefault(name.partition(".")[0], []).append(name)
            for key, names in keys.items():
                paths = [f"{folder}/{name}".lstrip("/")[len(self.prefix) :] for name in names if is_image(name)]
                found = [name for ending in LABEL_ENDINGS if paths and (name := f"{key}.{ending}") in entries]
                values = [value for name in found if (value := label_in(read(entries[name]), name)) is not None]
                images += paths
                if values:
                    labels[paths[0]] = values[0]
                    beside += [(entries, name) for name in found]
                    if len(paths) > 1:
                        raise ValueError(f"{self.root} has one label for several images, as {paths[0]} and {paths[1]}")
        if labels and len(labels) < len(images):
            lacking = next(path for path in images if path not in labels)
            raise ValueError(f"{self.root} has labels (.cls, .json) for {len(labels):,} images, but none for {lacking}")
        for entries, name in beside:  # they are not left out
            del entries[name]
        return labels

    def index(self, path: str) -> int:
        """The place of a file, by its path below the root or in the archive, among the members' names.

        Raises ValueError where there is none.
        """
        for whole in (f"{self.prefix}{path}", path):
            folder, _, name = whole.rpartition("/")
            index = self.folders.get(folder, {}).get(name)
            if index is not None:
                return index
        raise ValueError(f"{self.root} has no {path}")


def example(name: str, count: int) -> str:
    return one_line(name, LONGEST_NAME) + (", …" if count > 1 else "")


def list_images(
    data_path: str | os.PathLike,
    walk: Walk | None = None,
    flag: str = "--data-path",
    labels_of: Callable[[list[str]], Iterable[str]] | None = None,
) -> tuple[list[str], list[str], np.ndarray, list[str]]:
    """Returns classes, the images' paths relative to data_path, labels (n,) int64, and remarks, a line each.

    As in torchvision's ImageFolder, the classes are the folders in data_path, sorted by name; the images of a class are
    the files in and below its folder whose names end in one of ENDINGS; links are followed; empty classes count. Where
    no folder has images, those in data_path itself are one class.

    Hidden and system folders and files (a leading dot, or SYSTEM) are left out, and so are links to a folder that they
    lie in. A remark counts what was left out, and the classes that are empty; others say what may be a mistake.

    Args:
        walk: through what is listed; None: through the folder.
        flag: by which errors and remarks call data_path.
        labels_of: labels by the images' paths, of all images below data_path; None: the folders are the classes.

    Raises ValueError if there is nothing to list, or where the folders are no classes, as a data set's train and val;
    OSError if the disk fails to list a folder.
    """
    walk = walk or Walk(folder_of(data_path, flag))
    root, advice = walk.root, "put the images of each class into a folder of its own"
    if labels_of:
        paths = walk.images("")
        if not paths:
            raise ValueError(f"{flag} {root} has no images: {walk.left_out() or advice}")
        remarks = [one_line(f"{flag} {root}: {walk.left_out()}", LONGEST_REMARK)] if walk.left_out() else []
        classes, labels = classes_of(labels_of(paths))
        return classes, paths, labels, remarks
    outside, folders = walk.scan("")
    found = {name: paths for name in sorted(folders) if (paths := walk.images(name)) is not None}
    is_flat = bool(outside) and not any(found.values())
    if is_flat:
        found, outside = {ONE_CLASS: sorted(outside)}, []
    for name in outside:
        walk.leave_out("images outside the class folders", name)
    paths, empty = [path for paths in found.values() for path in paths], [name for name in found if not found[name]]
    parts = [walk.left_out(), f"{len(empty):,} empty classes ({example(empty[0], len(empty))})" if empty else ""]
    remark = "; ".join(part for part in parts if part)
    if not paths:
        what = f"images in its class folders ({' '.join(ENDINGS)})" if found else f"images ({' '.join(ENDINGS)})"
        raise ValueError(one_line(f"{flag} {root} has no {what}: {advice}{f'; {remark}' if remark else ''}"))
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(paths) for paths in found.values()])
    remarks = [unlabelled("class folders")] if is_flat else doubts(root, found, flag)
    remarks = [f"{flag} {root}: {one}" for one in [*remarks, *([remark] if remark else [])]]
    return list(found), paths, labels, [one_line(one, LONGEST_REMARK) for one in remarks]


def folder_of(path: str | os.PathLike, flag: str) -> str:
    """The path as text. Raises ValueError where there is no folder."""
    if not os.path.isdir(path):
        raise ValueError(f"{flag} {os.fspath(path)} is not a folder")
    return os.fspath(path)


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
    if all(value.isascii() and value.isdigit() and int(value) < MOST_CLASSES for value in values):
        labels = np.array([int(value) for value in values], np.int64)
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
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def read_labels(path: str | os.PathLike, names: Sequence[str]) -> list[str]:
    """The label of each image of these names, from the columns `name` and `label` of a .csv file.

    Raises ValueError, naming file and name, where it is no such table, or where a name is missing, unknown or double.
    """
    with reading(path), open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            table = csv.DictReader(file, strict=True)
            lacking = {"name", "label"} - {*(table.fieldnames or ())}
            if lacking:
                raise ValueError(
                    f"its first line names no column {min(lacking)!r}, but {one_line(table.fieldnames, 60)}"
                )
            rows = [(row["name"], row["label"]) for row in table]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"--labels {path}: {error}: wanted the columns name and label") from None
    labels, wanted = dict(rows), {*names}
    counts = Counter(name for name, _ in rows)
    for what, wrong in (
        ("names twice", [name for name in counts if counts[name] > 1]),
        ("has no label for", [name for name in names if not labels.get(name)]),
        ("names images that are not there, such as", [name for name in labels if name not in wanted]),
    ):
        if wrong:
            count = f" (one of {len(wrong):,})" if len(wrong) > 1 else ""
            raise ValueError(f"--labels {path} {what} {one_line(repr(wrong[0]), 80)}{count}")
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
            f"{flag} {root}: its folders {one_line(', '.join(found), 60)} are no classes, since images lie "
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
