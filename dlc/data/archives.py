"""Members of zip and tar files: found once, then read at their places by any number of processes and threads.

    members = Members(["a.tar", "b.tar"])
    members.names[7], members.read(7)            # "cat/0.png", its bytes

A file is opened for each read: an open one would share its position with the processes that were forked off, and a
thousand shards would be too many. So a read costs what that of a lone file costs.
"""

import errno
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlc.data.listing import LeftOut
from dlc.machine.cli import one_line, progress
from dlc.machine.files import Damaged, is_pointer, reading

LARGEST = 2**30  # bytes of a member
LOCAL_HEADER = struct.Struct("<4s22x2H")  # of a zip's member: signature, lengths of name and extra field
UTF_8 = 0x800  # the flag of a zip's member whose name is stored so
LINKS = "links, in whose place tar -h packs files"  # also sparse files and devices
TAIL = 10_240  # bytes: tar fills its last record, of this size, with zeros


@dataclass(frozen=True)
class Member:
    """A file or, with a "/" at the end of its name, a folder in an archive.

    offset: of its bytes or, in a zip, of its local header. crc: None in a tar.
    """

    name: str
    offset: int = 0
    packed: int = 0  # bytes in the archive
    size: int = 0
    crc: int | None = None
    is_deflated: bool = False


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
                yield Member(name)
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                left_out.note(LINKS, name)
                continue
            if info.flag_bits & 1:
                raise ValueError(f"{name!r} is encrypted: write the zip again without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name!r} is neither stored nor deflated: write the zip again with zip -0")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            yield Member(name, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
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
                places[member.name] = member.offset_data, member.size
            if member.isdir():
                yield Member(f"{member.name}/")
            elif places.get(member.name):
                offset, size = places[member.name]
                yield Member(member.name, offset, size, size)
            else:
                left_out.note(LINKS, member.name)
    with open(path, "rb") as file:
        file.seek(at)
        end = file.read(TAIL)
    if not end or end.strip(b"\0"):
        raise ValueError("it has no end of a tar after its last whole member: it is cut off, or two in one file")


class Members:
    """All members of some archives: `names` in the archives' order, those of folders with a "/" at the end; and what is
    `left_out`.

    Raises ValueError, naming the file, for one that is not whole, and OSError if it cannot be read.
    """

    def __init__(self, files: Sequence[str | Path]):
        self.files, self.names, columns = [str(file) for file in files], [], []
        self.left_out = LeftOut()
        states = map(os.stat, self.files)
        self.states = [(state.st_size, state.st_mtime_ns) for state in states]
        total = sum(size for size, _ in self.states)
        with progress(total=total, desc="indexing", unit="B", unit_scale=True, delay=2) as bar:
            for number, file in enumerate(self.files):
                for one in self._members(file, bar):
                    self.names.append(one.name)
                    crc = -1 if one.crc is None else one.crc
                    columns.append((number, one.offset, one.packed, one.size, crc, one.is_deflated))
        self.columns = np.array(columns, np.int64).reshape(-1, 6)

    def _members(self, file, bar):
        try:
            with reading(file):
                yield from (zip_members if file.lower().endswith(".zip") else tar_members)(file, bar, self.left_out)
        except (ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, struct.error, zlib.error) as error:
            if is_pointer(file):
                raise ValueError(f"{file} is a git-lfs pointer, not the file: run git lfs pull") from None
            raise ValueError(
                f"{file} cannot be used ({one_line(error, 200)}): wanted a whole .zip, or a whole .tar that is not "
                "compressed"
            ) from None

    def read(self, index: int) -> bytes:
        """A member's bytes.

        Raises `Damaged` if they are not those that were written, and OSError if the archive cannot be read or has
        changed since its members were found.
        """
        number, offset, packed, size, crc, is_deflated = self.columns[index].tolist()
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
