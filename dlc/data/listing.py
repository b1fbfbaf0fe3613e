"""List the images of a folder with one subfolder per class: classes, order, labels, and remarks on what is left out.

Of an ordinary folder, classes, order and labels are those of torchvision's ImageFolder. But ImageFolder silently skips
folders that the disk fails to list, and it takes a notebook's .ipynb_checkpoints for a class, which shifts all later
labels by one, an error that then stays in the features. Here an error of the disk stops the listing, hidden and system
folders and files are left out, and the remarks say what was left out, listed twice or empty.
"""

import errno
import hashlib
import os
import stat
import unicodedata
from array import array
from collections import Counter

import numpy as np

from dlc.machine.cli import LONGEST_LINE, printable

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's, in any case
OTHER_IMAGES = {
    ".apng",
    ".arw",
    ".avif",
    ".cr2",
    ".dcm",
    ".dib",
    ".dng",
    ".eps",
    ".exr",
    ".gif",
    ".heic",
    ".heif",
    ".ico",
    ".j2k",
    ".jfi",
    ".jfif",
    ".jif",
    ".jp2",
    ".jpe",
    ".jpx",
    ".jxl",
    ".nef",
    ".pbm",
    ".pfm",
    ".pjp",
    ".pjpeg",
    ".pnm",
    ".psd",
    ".raw",
    ".svg",
    ".tga",
}  # named first in remarks
# what systems put among a user's files, in lower case; names that begin with a dot are left out as well
SYSTEM = {
    "__macosx",
    "__pycache__",
    "lost+found",
    "$recycle.bin",
    "system volume information",
    "temporary items",
    "network trash folder",
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@__thumb",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
DANGLING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # of a link: its target is missing, or is the link itself
LONGEST_ROOT, LONGEST_NAME = 40, 24  # characters
NAMES, KINDS = 3, 5  # in a remark: examples, and endings counted separately


class Examples:
    """A count of paths, and the first few of them in order."""

    def __init__(self):
        self.count, self.first = 0, []

    def add(self, path):
        self.count += 1
        self.first = sorted([*self.first, path])[:NAMES]

    def text(self, singular, plural, names=NAMES):
        """The count with examples, such as "1 class (a)" or "4 classes (a, b, c, …)"."""
        names = [shortened(path, LONGEST_NAME) for path in self.first[:names]] + ["…"] * (self.count > names)
        return f"{self.count:,} {singular if self.count == 1 else plural} ({', '.join(names)})"


def shortened(text, limit):
    """The printable text; if it is longer than limit, only its end."""
    text = printable(text)
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def is_image(name):
    return name.lower().endswith(ENDINGS)


class Walk:
    """A walk through the folders below a root, which records what it leaves out and what it meets twice.

    A folder is identified by its device and inode. A chain is a tuple of these, from the root down to a folder.
    """

    def __init__(self, root):
        self.root, self.endings = root, Counter()  # of files that are not images
        self.outside, self.folders, self.files, self.files_like_images = (Examples() for _ in range(4))
        self.dangling, self.cycles, self.special, self.twice = (Examples() for _ in range(4))
        self.seen = set()  # folders
        self.links = []  # to images: path, (device, inode) of the target
        self.inodes = []  # of the other images: (device, inodes) of each folder

    def scan(self, folder, chain):
        """The sorted names of the images in a folder (a path relative to the root), and {path: chain} of its folders.

        Raises OSError, naming the path, if the disk fails to list the folder or to follow a link.
        """
        images, folders, inodes = [], {}, array("Q")
        again = chain[-1] in self.seen
        self.seen.add(chain[-1])
        place = os.path.join(self.root, folder)
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    name = entry.name
                    lower = name.lower()
                    if name[0] == "." or lower in SYSTEM:
                        self._hide(os.path.join(folder, name), entry)
                    elif entry.is_file(follow_symlinks=False):  # known without another disk access
                        if lower.endswith(ENDINGS):
                            images.append(name)
                            inodes.append(entry.inode())
                        else:
                            self.endings[os.path.splitext(name)[1].lower().rstrip(".")] += 1
                    elif self._is_image(os.path.join(folder, name), entry, chain, folders, again):
                        images.append(name)
        except OSError as error:
            raise OSError(
                f"cannot list {str(error.filename or place)!r} ({error.strerror or error}), without which "
                "images or whole classes would be missing: mend it, or take it out of --data-path"
            ) from None
        images.sort()
        if again:
            for name in images:
                self.twice.add(os.path.join(folder, name))
        self.inodes.append((chain[-1][0], inodes))
        return images, folders

    def _hide(self, path, entry):
        # not searched: such a folder may hold snapshots of a whole disk, or be readable by the system only
        if entry.is_dir(follow_symlinks=False):
            self.folders.add(path)
        else:
            (self.files_like_images if is_image(path) else self.files).add(path)

    def _is_image(self, path, entry, chain, folders, again):
        """Whether to list an entry that is not a plain file as an image. A folder is added to `folders`."""
        is_link = entry.is_symlink()
        try:
            status = entry.stat()
        except OSError as error:
            if not is_link or error.errno not in DANGLING:
                raise
            if is_image(path):
                return True  # reading it fails later, and the reason is recorded
            if len(chain) == 1:  # perhaps a class on a disk that is not mounted
                raise
            self.dangling.add(path)
            return False
        identity = status.st_dev, status.st_ino
        if stat.S_ISDIR(status.st_mode):
            if identity in chain:
                self.cycles.add(path)
            else:
                folders[path] = (*chain, identity)
        elif not stat.S_ISREG(status.st_mode):
            self.special.add(path)  # such as a pipe, at which a reader would hang
        elif is_image(path):
            if not again:
                self.links.append((path, identity))
            return True
        else:
            self.endings[os.path.splitext(path)[1].lower().rstrip(".")] += 1
        return False

    def images(self, folder, chain):
        """The paths of all images in and below a folder, sorted by their folder's path, then by name."""
        found, todo = {}, {folder: chain}
        while todo:
            inner, its_chain = todo.popitem()
            found[inner], folders = self.scan(inner, its_chain)
            todo.update(folders)
        return [os.path.join(inner, name) for inner in sorted(found) for name in found[inner]]

    def resolve_links(self):
        """Record the links to images that are listed elsewhere as well."""
        # by the inodes that came with the names; a disk that gives other ones there hides some of these links
        wanted, met = {inode for _, (_, inode) in self.links}, set()
        if wanted:
            met.update((device, inode) for device, inodes in self.inodes for inode in inodes if inode in wanted)
        for path, identity in sorted(self.links):
            if identity in met:
                self.twice.add(path)
            met.add(identity)

    def left_out(self, names=NAMES):
        """What was left out, in words: a list of phrases, each with so many examples."""
        parts = []
        if self.endings:
            kinds = sorted(self.endings.items(), key=lambda kind: (kind[0] not in OTHER_IMAGES, -kind[1], kind[0]))
            counts = [f"{count:,} {shortened(ending, 12) or 'without an ending'}" for ending, count in kinds[:KINDS]]
            rest = sum(count for _, count in kinds[KINDS:])
            counts += [f"{rest:,} of other endings"] if rest else []
            parts.append(f"left out {', '.join(counts)}")
        for examples, singular, plural in (
            (self.outside, "image outside the class folders", "images outside the class folders"),
            (self.folders, "hidden or system folder", "hidden or system folders"),
            (self.files_like_images, "hidden file named as an image", "hidden files named as images"),
            (self.files, "hidden or system file", "hidden or system files"),
            (self.dangling, "link to nowhere", "links to nowhere"),
            (
                self.cycles,
                "folder met twice, a link to one that it lies in",
                "folders met twice, links to ones that they lie in",
            ),
            (self.special, "that is no file", "that are no files"),
        ):
            if examples.count:
                parts.append(f"left out {examples.text(singular, plural, names)}")
        return parts


def list_images(data_path) -> tuple[list[str], list[str], np.ndarray, list[str]]:
    """Returns classes, the images' paths relative to data_path, labels (n,) int64, and remarks, a list of lines.

    As in torchvision's ImageFolder, the classes are the folders in data_path, sorted by name; the images of a class are
    the files in and below its folder whose names end in one of ENDINGS; links are followed; empty classes count.

    Hidden and system folders and files (a leading dot, or SYSTEM) are left out, and so are links to a folder that they
    lie in. The remarks, rarely more than one line, say what was left out, what is listed twice through links, and which
    classes are empty.

    Raises ValueError if there is nothing to list, OSError if the disk fails to list a folder.
    """
    root = os.fspath(data_path)
    walk, paths, counts, empty, alike = Walk(root), [], [], Examples(), Examples()
    outside, folders = walk.scan("", (folder_identity(root),))
    for name in outside:
        walk.outside.add(name)
    if not folders:
        raise ValueError(
            "; ".join([f"--data-path {root} has no class folders: images go into one folder a class", *walk.left_out()])
        )
    walk.links, walk.inodes = [], []  # images outside the classes are not listed
    classes = sorted(folders)
    forms = Counter(unicodedata.normalize("NFC", name) for name in classes)
    for name in classes:
        images = walk.images(name, folders[name])
        paths += images
        counts.append(len(images))
        if not images:
            empty.add(name)
        if forms[unicodedata.normalize("NFC", name)] > 1:
            alike.add(name)
    if not paths:
        raise ValueError(
            "; ".join(
                [f"--data-path {root} has class folders but no images in them ({' '.join(ENDINGS)})", *walk.left_out()]
            )
        )
    walk.resolve_links()
    lines = remarks(walk, empty, alike, NAMES)
    if len(lines) > 1:
        lines = remarks(walk, empty, alike, 1)
    return classes, paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts), lines


def folder_identity(root):
    """Device and inode of --data-path. Raises ValueError if it is no folder, OSError if the disk does not say."""
    try:
        status = os.stat(root)
    except OSError as error:
        if error.errno not in DANGLING:
            raise OSError(f"cannot look at --data-path {root} ({error.strerror or error})") from None
        status = None
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"--data-path {root} is not a folder")
    return status.st_dev, status.st_ino


def remarks(walk, empty, alike, names):
    """What was left out, listed twice, empty or alike, in as few lines as possible, each with so many examples."""
    parts, lines = walk.left_out(names), []
    for examples, singular, plural in (
        (walk.twice, "image met twice, by links, and kept", "images met twice, by links, and kept"),
        (empty, "empty class", "empty classes"),
        (alike, "", "classes whose names look the same"),
    ):
        if examples.count:
            parts.append(examples.text(singular, plural, names))
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= LONGEST_LINE - 32:  # the log puts a date before it
            lines[-1] += f"; {part}"
        else:
            lines.append(f"--data-path {shortened(walk.root, LONGEST_ROOT)}: {part}")
    return lines


def listing_sha256(paths):
    """A digest of a listing, which changes when images are added, removed or renamed."""
    return hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
