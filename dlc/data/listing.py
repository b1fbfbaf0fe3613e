"""List the images of a folder with one subfolder per class: classes, order, labels, and a remark on what is left out.

Of an ordinary folder, classes, order and labels are those of torchvision's ImageFolder. But ImageFolder silently skips
folders that the disk fails to list, and it takes a notebook's .ipynb_checkpoints for a class, which shifts all later
labels by one, an error that then stays in the features. Here an error of the disk stops the listing, hidden and system
folders and files are left out, and the remark counts what was left out.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterable

import numpy as np

from dlc.machine.cli import one_line

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


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


class Walk:
    """A walk through the folders below a root, which counts what it leaves out: endings, and paths by the reason."""

    def __init__(self, root: str):
        self.root, self.endings, self.others, self.examples = root, Counter(), Counter(), {}

    def leave_out(self, reason: str, path: str) -> None:
        self.others[reason] += 1
        self.examples[reason] = min(path, self.examples.get(reason, path))

    def scan(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the images in a folder, and of its folders. Raises OSError, naming what cannot be listed."""
        images, folders, place = [], [], os.path.join(self.root, folder)
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    name, path = entry.name, os.path.join(folder, entry.name)
                    is_folder, is_file, is_dangling = self._type(entry)
                    if name[0] == "." or name.lower() in SYSTEM:
                        self.leave_out("hidden or system files and folders", path)
                    elif is_folder:
                        folders.append(name)
                    elif is_image(name) and (is_file or is_dangling):  # reading a link to nowhere says so, and is noted
                        images.append(name)
                    elif is_file:
                        self.endings[os.path.splitext(name)[1].lower().rstrip(".") or "without an ending"] += 1
                    elif is_dangling and not folder:
                        os.stat(entry.path)  # raises: perhaps a class on a disk that is not mounted
                    else:  # a pipe would block its reader
                        self.leave_out("links to nowhere and special files", path)
        except OSError as error:
            raise OSError(
                f"cannot list {str(error.filename or place)!r} ({error.strerror or error}), without which images or "
                "whole classes would be missing: make it readable, or take it out of --data-path"
            ) from None
        return images, folders

    def _type(self, entry):
        """Whether an entry, or what a link leads to, is a folder, a file, or a link to nowhere."""
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:
            if error.errno not in DANGLING:
                raise
            is_folder = is_file = False
        return is_folder, is_file, not (is_folder or is_file) and entry.is_symlink() and not os.path.exists(entry.path)

    def images(self, folder: str) -> list[str] | None:
        """The paths of all images in and below a folder, sorted by their folder's path, then by name.

        None where the folder is a link to one that it lies in.
        """
        found, todo = [], [(folder, [self._identity("")])]
        while todo:
            inner, above = todo.pop()
            own = self._identity(inner)
            if own in above:
                self.leave_out("links to a folder that they lie in", inner)
                if inner == folder:
                    return None
                continue
            images, folders = self.scan(inner)
            found += [(inner, name) for name in images]
            todo += [(os.path.join(inner, name), [*above, own]) for name in folders]
        return [os.path.join(inner, name) for inner, name in sorted(found)]

    def _identity(self, folder):
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


def example(name: str, count: int) -> str:
    return one_line(name, LONGEST_NAME) + (", …" if count > 1 else "")


def list_images(data_path: str | os.PathLike) -> tuple[list[str], list[str], np.ndarray, list[str]]:
    """Returns classes, the images' paths relative to data_path, labels (n,) int64, and remarks, a line each.

    As in torchvision's ImageFolder, the classes are the folders in data_path, sorted by name; the images of a class are
    the files in and below its folder whose names end in one of ENDINGS; links are followed; empty classes count.

    Hidden and system folders and files (a leading dot, or SYSTEM) are left out, and so are links to a folder that they
    lie in. A remark counts what was left out, and the classes that are empty; others say what may be a mistake.

    Raises ValueError if there is nothing to list, or where the folders are no classes, as a data set's train and val;
    OSError if the disk fails to list a folder.
    """
    root = os.fspath(data_path)
    if not os.path.isdir(root):
        raise ValueError(f"--data-path {root} is not a folder")
    walk = Walk(root)
    outside, folders = walk.scan("")
    for name in outside:
        walk.leave_out("images outside the class folders", name)
    found = {name: paths for name in sorted(folders) if (paths := walk.images(name)) is not None}
    paths, empty = [path for paths in found.values() for path in paths], [name for name in found if not found[name]]
    parts = [walk.left_out(), f"{len(empty):,} empty classes ({example(empty[0], len(empty))})" if empty else ""]
    remark = "; ".join(part for part in parts if part)
    if not paths:
        what = f"images in its class folders ({' '.join(ENDINGS)})" if found else "class folders"
        advice = "put the images of each class into a folder of its own"
        raise ValueError(one_line(f"--data-path {root} has no {what}: {advice}{f'; {remark}' if remark else ''}"))
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(paths) for paths in found.values()])
    remarks = [*doubts(root, found), *([remark] if remark else [])]
    return list(found), paths, labels, [one_line(f"--data-path {root}: {remark}", LONGEST_REMARK) for remark in remarks]


def doubts(root: str, found: dict[str, list[str]]) -> list[str]:
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
            f"--data-path {root}: its folders {one_line(', '.join(found), 60)} are no classes, since images lie "
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
