"""Which images lie in a folder with one folder of images a class, in which order, and what is left out of them.

Of a sane folder, classes, order and labels are those of torchvision's ImageFolder. That passes over in silence what the
disk does not give, and takes a notebook's .ipynb_checkpoints for a class, by which the labels after it shift by one: an
error that stays in the features. Here an error of the disk stops the listing, hidden and system folders and files are
left out, and what is left out, met twice or empty is said.
"""
import errno
import hashlib
import os
import stat
import unicodedata
from array import array
from collections import Counter

import numpy as np

from dlc.cli import LONGEST_LINE, printable

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")       # torchvision's, in any case
OTHER_IMAGES = {".apng", ".arw", ".avif", ".cr2", ".dcm", ".dib", ".dng", ".eps", ".exr", ".gif", ".heic", ".heif",
                ".ico", ".j2k", ".jfi", ".jfif", ".jif", ".jp2", ".jpe", ".jpx", ".jxl", ".nef", ".pbm", ".pfm", ".pjp",
                ".pjpeg", ".pnm", ".psd", ".raw", ".svg", ".tga"}                           # told first
# what systems put among a user's files, in small letters; beside these, every name that begins with a dot
SYSTEM = {"__macosx", "__pycache__", "lost+found", "$recycle.bin", "system volume information", "temporary items",
          "network trash folder", "@eadir", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot",
          "~snapshot", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)        # a link's target that is not there, or is the link itself
LONGEST_ROOT, LONGEST_NAME = 40, 24                         # characters
NAMES, KINDS = 3, 5                                         # examples of a sort, endings told apart


class Some:
    """A count of paths, and the first few of them."""

    def __init__(self):
        self.count, self.first = 0, []

    def add(self, path):
        self.count += 1
        self.first = sorted([*self.first, path])[:NAMES]

    def text(self, one, more, names=NAMES):
        """"1 class (a)", "4 classes (a, b, c, …)", out of the words for one and for more."""
        names = [shortened(path, LONGEST_NAME) for path in self.first[:names]] + ["…"] * (self.count > names)
        return f"{self.count:,} {one if self.count == 1 else more} ({', '.join(names)})"


def shortened(text, limit):
    """The printable text, of one that is too long its end."""
    text = printable(text)
    return text if len(text) <= limit else f"…{text[1 - limit:]}"


def is_image(name):
    return name.lower().endswith(ENDINGS)


class Walk:
    """A walk through the folders below a root, which notes what it leaves out or meets twice.

    A folder is known by its device and inode. A chain is a tuple of them, from the root down to a folder.
    """

    def __init__(self, root):
        self.root, self.endings = root, Counter()           # of files that are no images
        self.outside, self.folders, self.files, self.files_like_images = (Some() for _ in range(4))
        self.nowhere, self.cycles, self.special, self.twice = (Some() for _ in range(4))
        self.seen = set()                                   # folders
        self.links = []                                     # to images: path, (device, inode) of what it leads to
        self.inodes = []                                    # of the other images: a folder's device, array of inodes

    def scan(self, folder, chain):
        """Names of the images in a folder (its path relative to the root), sorted; {path: chain} of the folders in it.

        Raises OSError, naming it, where the disk does not give a folder or what a link leads to.
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
                    elif entry.is_file(follow_symlinks=False):              # known without asking the disk once more
                        if lower.endswith(ENDINGS):
                            images.append(name)
                            inodes.append(entry.inode())
                        else:
                            self.endings[os.path.splitext(name)[1].lower().rstrip(".")] += 1
                    elif self._is_image(os.path.join(folder, name), entry, chain, folders, again):
                        images.append(name)
        except OSError as error:
            raise OSError(f"cannot list {str(error.filename or place)!r} ({error.strerror or error}), without which "
                          "images or whole classes would be missing: mend it, or take it out of --data-path") from None
        images.sort()
        if again:
            for name in images:
                self.twice.add(os.path.join(folder, name))
        self.inodes.append((chain[-1][0], inodes))
        return images, folders

    def _hide(self, path, entry):
        # not looked into: these may hold snapshots of a whole disk, or be closed to all but the system
        if entry.is_dir(follow_symlinks=False):
            self.folders.add(path)
        else:
            (self.files_like_images if is_image(path) else self.files).add(path)

    def _is_image(self, path, entry, chain, folders, again):
        """Whether what is no plain file is to be listed as an image; a folder goes into `folders`."""
        is_link = entry.is_symlink()
        try:
            status = entry.stat()
        except OSError as error:
            if not is_link or error.errno not in NOWHERE:
                raise
            if is_image(path):
                return True                                 # and skipped, with the reason, when it is to be read
            if len(chain) == 1:                             # a class on a disk that is not mounted, say
                raise
            self.nowhere.add(path)
            return False
        identity = status.st_dev, status.st_ino
        if stat.S_ISDIR(status.st_mode):
            if identity in chain:
                self.cycles.add(path)
            else:
                folders[path] = (*chain, identity)
        elif not stat.S_ISREG(status.st_mode):
            self.special.add(path)                          # a pipe, which a reader would wait at for ever
        elif is_image(path):
            if not again:
                self.links.append((path, identity))
            return True
        else:
            self.endings[os.path.splitext(path)[1].lower().rstrip(".")] += 1
        return False

    def images(self, folder, chain):
        """Paths of all images in and below a folder, by the text of their folder's path, then by name."""
        found, todo = {}, {folder: chain}
        while todo:
            inner, its_chain = todo.popitem()
            found[inner], folders = self.scan(inner, its_chain)
            todo.update(folders)
        return [os.path.join(inner, name) for inner in sorted(found) for name in found[inner]]

    def resolve_links(self):
        """Note the links to images that are listed elsewhere, too."""
        # by the inodes that came with the names: a disk that gives none there hides some of these
        wanted, met = {inode for _, (_, inode) in self.links}, set()
        if wanted:
            met.update((device, inode) for device, inodes in self.inodes for inode in inodes if inode in wanted)
        for path, identity in sorted(self.links):
            if identity in met:
                self.twice.add(path)
            met.add(identity)

    def left_out(self, names=NAMES):
        """What was left out, in words, a list of parts; of each sort, so many names."""
        parts = []
        if self.endings:
            kinds = sorted(self.endings.items(), key=lambda kind: (kind[0] not in OTHER_IMAGES, -kind[1], kind[0]))
            told = [f"{count:,} {shortened(ending, 12) or 'without an ending'}" for ending, count in kinds[:KINDS]]
            rest = sum(count for _, count in kinds[KINDS:])
            told += [f"{rest:,} of other endings"] if rest else []
            parts.append(f"left out {', '.join(told)}")
        for some, one, more in (
                (self.outside, "image outside the class folders", "images outside the class folders"),
                (self.folders, "hidden or system folder", "hidden or system folders"),
                (self.files_like_images, "hidden file named as an image", "hidden files named as images"),
                (self.files, "hidden or system file", "hidden or system files"),
                (self.nowhere, "link to nowhere", "links to nowhere"),
                (self.cycles, "folder met twice, a link to one that it lies in",
                 "folders met twice, links to ones that they lie in"),
                (self.special, "that is no file", "that are no files")):
            if some.count:
                parts.append(f"left out {some.text(one, more, names)}")
        return parts


def list_images(data_path):
    """The classes, the images' paths relative to data_path, labels (n,) int64; and lines that say what to know of them.

    As torchvision's ImageFolder has them: a class is a folder in data_path, in order of their names; its images are all
    files in and below it whose names end in one of ENDINGS; links are followed. Empty classes count, too.

    Hidden and system folders (a dot in front, or SYSTEM) are no classes, and they and such files are left out. So is a
    link to a folder that it lies in. The lines, seldom more than one, say what was left out, what is listed twice
    by links, and which classes are empty.

    Raises ValueError where there is nothing to list, OSError where the disk does not give a folder.
    """
    root = os.fspath(data_path)
    try:
        status = os.stat(root)
    except OSError as error:
        if error.errno not in NOWHERE:
            raise OSError(f"cannot look at --data-path {root} ({error.strerror or error})") from None
        status = None
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"--data-path {root} is not a folder")
    walk, paths, counts, empty, alike = Walk(root), [], [], Some(), Some()
    outside, folders = walk.scan("", ((status.st_dev, status.st_ino),))
    for name in outside:
        walk.outside.add(name)
    if not folders:
        raise ValueError("; ".join([f"--data-path {root} has no class folders: images go into one folder a class",
                                    *walk.left_out()]))
    walk.links, walk.inodes = [], []                        # those outside are not listed
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
        raise ValueError("; ".join([f"--data-path {root} has class folders but no images in them ({' '.join(ENDINGS)})",
                                    *walk.left_out()]))
    walk.resolve_links()
    lines = remarks(walk, empty, alike, NAMES)
    if len(lines) > 1:
        lines = remarks(walk, empty, alike, 1)
    return classes, paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts), lines


def remarks(walk, empty, alike, names):
    """What was left out, met twice, empty or alike, in as few lines as hold it; of each sort, so many names."""
    parts, lines = walk.left_out(names), []
    for some, one, more in ((walk.twice, "image met twice, by links, and kept", "images met twice, by links, and kept"),
                            (empty, "empty class", "empty classes"),
                            (alike, "", "classes whose names look the same")):
        if some.count:
            parts.append(some.text(one, more, names))
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= LONGEST_LINE - 32:       # a log's date stands before it
            lines[-1] += f"; {part}"
        else:
            lines.append(f"--data-path {shortened(walk.root, LONGEST_ROOT)}: {part}")
    return lines


def listing_sha256(paths):
    """A digest of a listing, which tells whether images were added, taken away or renamed."""
    return hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
