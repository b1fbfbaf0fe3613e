"""Sources of images: what all have in common, and how paths become images in their order, classes and labels.

For an ordinary folder with one subfolder per class, classes, order and labels equal torchvision's ImageFolder. But
ImageFolder silently skips folders that the disk fails to list, and it takes a notebook's .ipynb_checkpoints for a
class, which shifts all later labels by one, an error that then stays in the features. Here an error of the disk stops
the listing, hidden and system folders and files are left out, and the remark counts what was left out.
"""

import csv
import errno
import functools
import hashlib
import itertools
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

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
LONGEST_REMARK, LONGEST_NAME = 280, 24  # characters
MOST_REASONS = 5  # counted separately
HIDDEN = "hidden or system files and folders"  # why they are left out
ONE_CLASS = "all"  # the class of images that have none
MOST_CLASSES = 2**16  # whole numbers below this are classes by themselves, and others names of classes


class Source(ABC):
    """Images in an order that stays, wherever they lie. A subclass has a place in `SOURCES` of dlc/data/images.py.

    It has `takes(path)`, whether it reads what lies there, and a constructor of (path, flag, labels, names), see
    `open_source`.

    Args:
        root: by what errors call them.
        names: of all images: paths relative to the root.
        classes, labels: names, and the class of each image, (n,) int64; None where nobody asks for them.
        remarks: a line each, for the user.
        marks: what else tells each image from another set's, for `sha256`.
    """

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        classes: Sequence[str] = (),
        labels: np.ndarray | None = None,
        remarks: Sequence[str] = (),
        marks: Iterable[object] | None = None,
    ):
        self.root, self.classes, self.labels, self.remarks, self.marks = root, list(classes), labels, remarks, marks
        # one array, because reference counts would make each worker copy a list of a million strings
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> str:
        """Where an image lies, for errors."""
        return os.path.join(self.root, self.name(index))

    @functools.cached_property
    def indices(self) -> dict[str, int]:
        """The images' places by their names."""
        return {self.name(index): index for index in range(len(self))}

    @abstractmethod
    def open(self, index: int) -> str | BinaryIO:
        """The path of an image file, or one that is open. Called by forked processes and by threads."""

    def sha256(self) -> str:
        """A digest of the set, which changes when images are added, removed or renamed."""
        names = map(os.fsdecode, self.names)
        return listing_sha256(names if self.marks is None else map("{}\t{}".format, names, self.marks))


def listing_sha256(paths: Iterable[str]) -> str:
    """A digest of paths in their order."""
    return hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def is_hidden(name: str) -> bool:
    return name[:1] == "." or name.lower() in SYSTEM


def entries_of(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """The names of the folders and of the other files in a folder, without hidden ones; none if it is none."""
    try:
        with os.scandir(path) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name)]
    except OSError:  # which the listing raises, in its own words
        return [], []
    return [name for name, is_folder in found if is_folder], [name for name, is_folder in found if not is_folder]


class LeftOut(Counter):
    """How many paths a listing leaves out, by the reason; files of other kinds by their ending."""

    def __init__(self):
        super().__init__()
        self.examples = {}

    def note(self, reason: str, path: str) -> None:
        self[reason] += 1
        self.examples[reason] = min(path, self.examples.get(reason, path))

    def __str__(self) -> str:
        """In words; "" for nothing."""
        kinds = self.most_common(MOST_REASONS)
        parts = [
            f"{count:,} {one_line(reason, 60)} ({example(self.examples[reason], count)})" for reason, count in kinds
        ]
        others = self.total() - sum(count for _, count in kinds)
        parts += [f"{others:,} of other endings"] if others else []
        return f"left out {', '.join(parts)}" if parts else ""


def example(name: str, count: int) -> str:
    return one_line(name, LONGEST_NAME) + (", …" if count > 1 else "")


def paths_below(root: str, left_out: LeftOut) -> Iterator[str]:
    """The paths of all files and, with a "/" at the end, folders below a root, but for hidden ones. Links are followed,
    but not into a folder that they lie in.

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
                    if is_hidden(entry.name):
                        left_out.note(HIDDEN, path)
                    elif is_folder:
                        todo.append((f"{path}/", [*above, own]))
                    elif is_file or is_dangling and is_image(entry.name):  # to read such a link says so, and is noted
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


def by_folder(path: str) -> tuple[str, str]:
    """The sorting key of images: the folder's path, then the name."""
    folder, _, name = path.rpartition("/")
    return folder, name


def list_images(
    root: str,
    paths: Iterable[str],
    left_out: LeftOut,
    flag: str,
    labels: str | None = None,
    own: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str], np.ndarray, list[str], list[int] | None]:
    """What a `Source` takes after its root: names, classes, labels, remarks and marks.

    As in torchvision's ImageFolder, the classes are the folders in the root, sorted by name; the images of a class are
    the files in and below its folder whose names end in one of ENDINGS; empty classes count. Where no folder has
    images, those in the root itself are one class. A remark counts what was left out, and the classes that are empty;
    another says what may be a mistake.

    Args:
        paths: of all that lies below the root, see `paths_below`.
        left_out: what is already known to be.
        flag: by which errors and remarks call the root.
        labels: .csv file of the labels of all images, instead of the folders.
        own: labels by path, of files beside the images, if there are any.

    Raises ValueError if there is nothing to list, or where the folders are no classes, as a data set's train and val;
    and OSError as the paths do.
    """
    found, outside = {}, []  # the images by the folder at the top that they lie in, and those that lie in none
    for path in paths:
        top, slash, _ = path.partition("/")
        images = found.setdefault(top, []) if slash else outside
        if is_image(path):
            images.append(path)
        elif path and path[-1] != "/":  # no folder
            left_out.note(os.path.splitext(path)[1].lower().rstrip(".") or "without an ending", path)
    found, outside = {name: sorted(found[name], key=by_folder) for name in sorted(found)}, sorted(outside)
    names, remarks, marks = [*outside, *itertools.chain(*found.values())], [], None
    if not names:
        advice = "give a folder with a folder of such files for each class, or one of archives alone"
        raise ValueError(
            f"{flag} {root} has no images ({' '.join(ENDINGS)}): {'; '.join(filter(None, (advice, str(left_out))))}"
        )
    if labels or own:
        names.sort(key=by_folder)
        classes, numbers = classes_of(read_labels(labels, names) if labels else map(own.get, names))
        marks = numbers.tolist()
    else:
        if any(found.values()):
            remarks = doubts(root, found, flag)
            for name in outside:
                left_out.note("images outside the class folders", name)
        else:
            found, remarks = {ONE_CLASS: outside}, [unlabelled("class folders")]
        classes, names = list(found), [*itertools.chain(*found.values())]
        numbers = np.repeat(np.arange(len(found)), [*map(len, found.values())])
    said = "; ".join(filter(None, (str(left_out), empty_classes(classes, numbers))))
    remarks = [one_line(f"{flag} {root}: {one}", LONGEST_REMARK) for one in (*remarks, said) if one]
    return names, classes, numbers, remarks, marks


def doubts(root: str, found: dict[str, list[str]], flag: str) -> list[str]:
    """What speaks against the folders' being classes, in words. found: the images' paths by class.

    Raises ValueError where the images lie deeper than in class folders. In one folder of the same name in each class,
    as Tiny ImageNet has them, they may.
    """
    found = {name: paths for name, paths in found.items() if paths}
    deep = [paths[0] for paths in found.values() if all(path.count("/") > 1 for path in paths)]
    inner = {os.path.dirname(path).partition("/")[2] for paths in found.values() for path in paths}
    are_splits, is_one = len(found) > 1 and {name.lower() for name in found} <= SPLITS, len(found) == 1
    if not (deep or are_splits or is_one):
        return []
    path, advice = (deep or next(iter(found.values())))[0], "give the folder whose folders are the classes"
    folders = f"its folders {one_line(', '.join(found), 60)}"
    if deep and (are_splits or len(deep) == len(found) and (len(inner) > 1 or is_one)):
        better = os.path.join(root, os.path.dirname(os.path.dirname(path)))
        raise ValueError(
            f"{flag} {root}: {folders} are not classes, since images lie deeper, as {one_line(path, 60)}: {advice}, "
            f"such as {better}"
        )
    return [f"{folders} are taken for classes, with images such as {one_line(path, 60)}: if they are none, {advice}"]


def empty_classes(classes: Sequence[str], labels: np.ndarray) -> str:
    """Words on the classes without images; "" where there are none."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    return f"{len(empty):,} empty classes ({example(classes[empty[0]], len(empty))})" if len(empty) else ""


def unlabelled(what: str) -> str:
    return f"there are no {what}: all images are one class, {ONE_CLASS!r}"


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


def read_labels(path: str | os.PathLike, names: Sequence[str]) -> list[str]:
    """The label of each image of these names, from the columns `name` and `label` of a .csv file.

    Spaces around a label are none of it. Names are compared as Unicode composes them: a Mac writes é as two letters.

    Raises ValueError, naming file and name, where it is no such table, or where a name is missing, unknown or double.
    """
    rows, label = [], ""
    with reading(path), open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            table = csv.DictReader(file, strict=True)
            columns = table.fieldnames or []
            if (columns.count("name"), columns.count("label")) != (1, 1):
                raise ValueError(f"its first line names the columns {one_line(columns, 60)}")
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
    labels, counts, wanted = dict(rows), Counter(name for name, _ in rows), {*names}
    faults = {
        "names twice": [name for name in counts if counts[name] > 1],
        "has no label for": [name for name in names if not labels.get(name)],
        "names images that are not there, such as": [name for name in labels if name not in wanted],
    }
    said = [
        f"{what} {one_line(repr(wrong[0]), 80)}" + (f" (one of {len(wrong):,})" if len(wrong) > 1 else "")
        for what, wrong in faults.items()
        if wrong
    ]
    if said:
        raise ValueError(f"--labels {path} {'; '.join(said)}")
    return [labels[name] for name in names]
