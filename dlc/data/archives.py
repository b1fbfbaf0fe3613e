"""Images in zip and tar files: found once, then read at their places by any number of processes and threads.

    source = Archive("images.zip", "--data-path")
    source.name(7), source.open(7)               # "cat/0.png", its bytes as a file

A file is opened for each read: an open one would share its position with the processes that were forked off, and a
thousand shards would be too many. So a read costs what that of a lone file costs.
"""

import errno
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dlc.data.listing import HIDDEN, LeftOut, Source, entries_of, is_hidden, is_image, list_images
from dlc.machine.cli import progress
from dlc.machine.files import Damaged, reading_whole

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")  # what is said to be no archive of ours
LARGEST = 2**30  # bytes of a member
LOCAL_HEADER = struct.Struct("<4s22x2H")  # of a zip's member: signature, lengths of name and extra field
UTF_8 = 0x800  # the flag of a zip's member whose name is stored so
LINKS = "links, in whose place tar -h packs files"  # also sparse files and devices
TAIL = 10_240  # bytes: tar fills its last record, of this size, with zeros
FOLDER = (0, 0, 0, -1, False)
LABEL_ENDINGS = ("cls", "json")  # of WebDataset, the first one first

# A member's name, with a "/" at the end that of a folder; the offset of its bytes or, in a zip, of its local header;
# how many bytes it has in the archive, and unpacked; its CRC, -1 in a tar; and whether it is deflated.
Member = tuple[str, int, int, int, int, bool]


def zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name, as in the folder that was packed: Macs and zip on Linux store UTF-8, and may not say so."""
    if info.create_system == 0:  # Windows
        return info.filename.replace("\\", "/")
    return info.filename if info.flag_bits & UTF_8 else os.fsdecode(info.orig_filename.encode("cp437"))


def zip_members(path: str, bar, left_out: LeftOut) -> Iterator[Member]:
    """What a zip holds. Raises ValueError for what only its password or another program opens."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = zip_name(info)
            if info.is_dir():
                yield name, *FOLDER
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                left_out.note(LINKS, name)
                continue
            if info.flag_bits & 1:
                raise ValueError(f"{name!r} is encrypted: write the zip again without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name!r} is neither stored nor deflated: write the zip again with zip -0")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            yield name, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated
            bar.update(info.compress_size)


def tar_members(path: str, bar, left_out: LeftOut) -> Iterator[Member]:
    """What a tar holds, hard links as what they lead to, and no other links. Raises ValueError if it is cut off."""
    places, at = {}, 0
    with tarfile.open(path, "r:") as archive:  # r: without decompression, which knows no places
        while (member := archive.next()) is not None:
            archive.members.clear()  # which would fill the memory
            bar.update(archive.offset - at)
            at = archive.offset
            if member.islnk():
                places[member.name] = places.get(member.linkname)
            elif member.isreg() and not member.issparse():
                places[member.name] = member.offset_data, member.size, member.size, -1, False
            if member.isdir():
                yield f"{member.name}/", *FOLDER
            elif places.get(member.name):
                yield member.name, *places[member.name]
            else:
                left_out.note(LINKS, member.name)
    with open(path, "rb") as file:
        file.seek(at)
        end = file.read(TAIL)
    if not end or end.strip(b"\0"):
        raise ValueError("it has no end of a tar after its last whole member: it is cut off, or two in one file")


def members_of(file: str, bar, left_out: LeftOut) -> Iterator[Member]:
    """What an archive holds. Raises ValueError, naming it, if it is not whole, and OSError if it cannot be read."""
    wanted = "cannot be used as a whole .zip, or as a whole .tar that is not compressed"
    with reading_whole(file, wanted):
        yield from (zip_members if file.lower().endswith(".zip") else tar_members)(file, bar, left_out)


class Archive(Source):
    """Members of a .zip, or of a .tar or a folder of them, such as WebDataset's shards.

    A folder that all members lie in is the root. Raises ValueError, naming the file, for one that is not whole, for two
    members of one name and for a name or folder that is not there.
    """

    @staticmethod
    def takes(path: str) -> bool:
        return bool(Archive.files_of(path)[0])

    @staticmethod
    def files_of(path: str) -> tuple[list[str], str]:
        """The archives at a path, and the folder in the archive that the path goes on to, or ""."""
        folders, names = entries_of(path)
        if not folders and not any(map(is_image, names)):
            files = [os.path.join(path, name) for name in sorted(names)]
            for endings in (ARCHIVES, COMPRESSED):
                if ours := [file for file in files if file.lower().endswith(endings)]:
                    return ours, ""
        file = next((one for one in (Path(path), *Path(path).parents) if one.is_file()), None)
        if not file or not file.name.lower().endswith((*ARCHIVES, *COMPRESSED)):
            return [], ""
        return [str(file)], os.path.relpath(path, file) if Path(path) != file else ""

    def __init__(self, path: str, flag: str, labels: str | None = None, names: Sequence[str] | None = None):
        self.files, inner = self.files_of(path)
        self.states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, self.files)]
        root, left_out, members = self.files[0] if inner else path.rstrip("/"), LeftOut(), []
        with progress(
            total=sum(size for size, _ in self.states), desc="indexing", unit="B", unit_scale=True, delay=2
        ) as bar:
            for number, file in enumerate(self.files):
                members += [(*one, number) for one in members_of(file, bar, left_out)]
        everything = places_of(root, [name for name, *_ in members], left_out)
        self.members = np.array([one for _, *one in members], np.int64)
        places, folder = everything, inner.strip("/") or only_folder(everything)
        while folder:
            root, places = os.path.join(root, folder), within(places, folder)
            folder = only_folder(places)
        if inner and not places:
            raise ValueError(f"{self.files[0]} has no folder {inner!r}")
        if names is None:
            own = labels_beside(root, places, lambda path: self.read(places[path]))
            super().__init__(root, *list_images(root, places, left_out, flag, labels, own))
        else:
            super().__init__(root, names)
        found = [places.get(name, everything.get(name)) for name in map(os.fsdecode, self.names)]
        if None in found:
            raise ValueError(f"{root} has no {self.name(found.index(None))}")
        self.members = self.members[found]

    def open(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.read(index))

    def read(self, index: int) -> bytes:
        """A member's bytes.

        Raises `Damaged` if they are not those that were written, and OSError if the archive cannot be read or has
        changed since its members were found.
        """
        offset, packed, size, crc, is_deflated, number = self.members[index].tolist()
        if max(packed, size) > LARGEST:
            raise Damaged(f"{max(packed, size):,} bytes, more than {LARGEST:,}")
        with open(self.files[number], "rb", buffering=0) as file:
            state = os.fstat(file.fileno())
            if (state.st_size, state.st_mtime_ns) != self.states[number]:
                raise OSError(errno.ESTALE, "has changed since it was indexed", self.files[number])
            if crc >= 0:
                header = os.pread(file.fileno(), LOCAL_HEADER.size, offset)
                if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
                    raise Damaged("there is no such member where the zip says")
                offset += LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header)[1:])
            content = os.pread(file.fileno(), packed, offset)
        if is_deflated:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise Damaged(f"cannot be unpacked ({error})") from None
        if len(content) != size or crc >= 0 and zlib.crc32(content) != crc:
            raise Damaged("its bytes are not those that were written into the archive")
        return content


def places_of(root: str, names: Iterable[str], left_out: LeftOut) -> dict[str, int]:
    """The members' places by their paths, but for hidden ones; paths of folders end in "/".

    Raises ValueError for two files of one name.
    """
    places, hidden = {}, set()
    for place, name in enumerate(names):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        path = "/".join(parts) + "/" * name.endswith("/")
        first = next((at for at, part in enumerate(parts, 1) if is_hidden(part)), None)
        if ".." in parts:
            left_out.note("names that lead out of the archive", path)
        elif first:
            hidden.add("/".join(parts[:first]))
        elif places.setdefault(path, place) != place and path[-1:] != "/":
            raise ValueError(f"{root} holds {name!r} twice")
    for path in hidden:
        left_out.note(HIDDEN, path)
    places.pop("/", None)
    return places


def within(places: Mapping[str, int], folder: str) -> dict[str, int]:
    """The places of what lies in a folder, by the paths below it."""
    return {path.removeprefix(f"{folder}/"): at for path, at in places.items() if path.startswith(f"{folder}/")}


def only_folder(places: Mapping[str, int]) -> str:
    """The one that all paths lie in, if there are folders in it and no images; or ""."""
    tops = {path.partition("/")[0] for path in places}
    paths = within(places, only := tops.pop()) if len(tops) == 1 else {}
    has_images = any("/" not in path and is_image(path) for path in paths)
    return only if any("/" in path for path in paths) and not has_images else ""


def labels_beside(root: str, places: dict[str, int], read) -> dict[str, str]:
    """The labels that lie beside images as WebDataset has them, by image: 0.cls or 0.json, "label" or "cls" in it.
    Their files are taken from the places.

    Raises ValueError, naming the file, where there are labels, but not one for each image.
    """
    images, labels, groups = [], {}, {}
    for path in places:
        folder, slash, name = path.rpartition("/")
        if name:  # by the name up to its first dot, the key of WebDataset
            groups.setdefault(f"{folder}{slash}{name.partition('.')[0]}", []).append(path)
    for key, paths in groups.items():
        beside = [f"{key}.{ending}" for ending in LABEL_ENDINGS if f"{key}.{ending}" in paths]
        paths = [path for path in paths if is_image(path)]
        images += paths
        values = [value for path in beside if paths and (value := label_in(read(path), path)) is not None]
        if values:
            labels[paths[0]] = values[0]
            for path in beside:  # they are not left out
                del places[path]
            if len(paths) > 1:
                raise ValueError(f"{root} has one label for several images, as {paths[0]} and {paths[1]}")
    if labels and len(labels) < len(images):
        lacking = next(path for path in images if path not in labels)
        raise ValueError(f"{root} has labels (.cls, .json) for {len(labels):,} images, but none for {lacking}")
    return labels


def label_in(content: bytes, name: str) -> str | None:
    """The label in a file of LABEL_ENDINGS; None where there is none, as in a .json of captions."""
    try:
        value = json.loads(content) if name.endswith(".json") else content.decode().strip()
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return str(value) if isinstance(value, (str, int, float)) and value != "" and value == value else None
