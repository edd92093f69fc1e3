"""Tar files of images, read as a stream: nothing is unpacked to disk, and memory is bounded whatever the file says."""

import bz2
import gzip
import io
import lzma
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EINVAL
from pathlib import PurePosixPath
from typing import IO, NamedTuple, TypeGuard

from corewise.common.errors import SamplesError
from corewise.samples.image_files import HEIC_SUFFIXES, image_suffixes
from corewise.samples.places import Place, RemotePath, place_of, unreadable

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MOST_BYTES = 64 * 2**20
"""Bytes of a member: as many as the server takes in one request."""
MOST_HEADERS_BYTES = 2**20
"""Bytes of headers before a member. tarfile would keep headers of any size, which a few compressed bytes can claim."""
BLOCK_BYTES = 2**16
STEP_BYTES = 64 * 2**20
OPENERS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item]
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
"""What decompresses a file, by the bytes that it begins with."""
HEAD_BYTES = 262
"""To the end of the word that says that a header is one of a tar file."""
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError, RecursionError)
"""What tarfile and the decompressors raise for bytes that are no whole archive."""


class Member(NamedTuple):
    """An image of an archive; ``problem`` says why it was not read, as the end of a sentence."""

    name: str
    content: bytes = b""
    problem: str = ""
    slice: "Slice | None" = None


class Slice(NamedTuple):
    """Where an image is: a part of a file."""

    path: str
    """Or URL."""
    start: int
    """Where it begins in the file, unpacked if it is compressed."""
    size_bytes: int
    compressed: bool = False

    def read(self) -> bytes:
        """Its content; of a file that is not compressed. Raises ``SamplesError`` for what a store refuses."""
        place = place_of(self.path)
        if isinstance(place, RemotePath):
            return _whole(place.read_range(self.start, self.size_bytes), self)
        with place.open("rb") as file:
            file.seek(self.start)
            return _whole(file.read(self.size_bytes), self)


def _whole(content: bytes, part: Slice) -> bytes:
    if len(content) < part.size_bytes:
        raise OSError(None, f"{part.path} has changed: it is shorter now")
    return content


class Unpacked(threading.local):
    """Compressed tar files, which each thread reads on from the last slice that it was asked for."""

    def __init__(self, on_skipped: Callable[[], None] = lambda: None) -> None:
        """``on_skipped`` is called as often as ``STEP_BYTES`` before a slice are unpacked, which may take minutes."""
        self._on_skipped = on_skipped
        self._opened = ExitStack()
        self._path = ""
        self._file: IO[bytes] = io.BytesIO()

    def read(self, part: Slice) -> bytes:
        """Its content. Raises ``OSError`` if it is not there, and ``SamplesError`` for what a store refuses."""
        try:
            if part.path != self._path:
                self.close()
                self._file = _decompressed(self._opened.enter_context(place_of(part.path).open("rb")))
                self._path = part.path
            self._skip_to(part.start)
            read, content = _reader(self._file), bytearray()
            while len(content) < part.size_bytes and (block := read(part.size_bytes - len(content))):
                content += block
        except BROKEN as error:
            if _of_the_disk(error):
                raise
            raise OSError(None, f"{part.path} has changed: {error}") from error
        return _whole(bytes(content), part)

    def _skip_to(self, place: int) -> None:
        if place < self._file.tell():
            self._file.seek(0)
        while (here := self._file.tell()) < place:
            if self._file.seek(min(place, here + STEP_BYTES)) == here:
                break  # the file ends before
            self._on_skipped()

    def close(self) -> None:
        """Close what this thread has open."""
        self._opened.close()
        self._path = ""


def is_archive(path: str | Place) -> bool:
    """Whether the name says that it is a tar file, compressed or not."""
    return str(path).lower().endswith(SUFFIXES)


def read_archive(path: Place, *, sliced: bool = False) -> Iterator[Member]:
    """The images of a tar file in their order; other files, folders and hidden ones are skipped.

    A member that is no regular file (a link, a device), leads out of the archive, or is larger than 64 MiB has a
    problem, and so has the rest of an archive that is broken.

    Args:
        path: The file.
        sliced: Members say where they are and not what is in them. Only headers are read, unless it is compressed.

    Raises:
        SamplesError: It is no archive at all; or its disk or store fails, as the images that follow would be lost.
    """
    read = 0
    try:
        with path.open("rb") as raw, _decompressed(raw) as file:
            jumps = sliced and file is raw
            end = path.stat().st_size if jumps else 0
            metered, mode = _Metered(file), "r:" if jumps else "r|"
            with tarfile.open(fileobj=metered, mode=mode, bufsize=BLOCK_BYTES) as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    read += 1
                    # Not its size: of a link or a folder, which no data follows, that may be any number.
                    metered.allow(archive.offset - member.offset_data)
                    archive.members = []  # it would keep a record of each
                    if jumps and member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    if (found := _image(archive, member, read=not jumps)) is not None:
                        if sliced and not found.problem:
                            place = Slice(str(path), member.offset_data, member.size, compressed=not jumps)
                            found = Member(found.name, slice=place)
                        yield found
    except BROKEN as error:
        if _of_the_disk(error):
            raise unreadable(path, error) from error
        if not read:
            raise SamplesError(f"{path} is not a readable tar file: {error}", "create it again") from error
        yield Member("", problem=f"cannot be read after member {read}: {error}")


def _of_the_disk(error: BaseException) -> TypeGuard[OSError]:
    """Whether the file could not be read.

    Decompressors raise an ``OSError`` without a number for what is in it, and a place that a header claims is EINVAL.
    """
    return isinstance(error, OSError) and error.errno not in (None, EINVAL)


def _image(archive: tarfile.TarFile, member: tarfile.TarInfo, *, read: bool) -> Member | None:
    """The member as an image, with its content if it is ``read``; ``None`` if its name is not that of an image."""
    path = PurePosixPath(member.name)
    hidden = any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in path.parts)
    if member.isdir() or hidden or path.suffix.lower() not in image_suffixes() | {*HEIC_SUFFIXES}:
        return None
    if ".." in path.parts or path.is_absolute():
        return Member(member.name, problem="leads out of the archive")
    if not member.isreg() or member.issparse():
        return Member(member.name, problem="is a link" if member.issym() or member.islnk() else "is not a regular file")
    if member.size > MOST_BYTES:
        return Member(member.name, problem=f"has {member.size:,} bytes, at most {MOST_BYTES:,} are allowed")
    content = archive.extractfile(member) if read else None
    return Member(str(path), content.read() if content is not None else b"")


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    """The file as bytes of a tar, by what it begins with."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head.endswith(b"ustar"):  # a tar, whatever the name of its first member begins with
        return file
    return next((opened(file) for magic, opened in OPENERS.items() if head.startswith(magic)), file)


def _reader(file: IO[bytes]) -> Callable[[int], bytes]:
    """A function that reads at most as many bytes of it as it is given.

    ``read`` of a decompressor loses what it has read where the file then ends too early or has junk behind it.
    """
    return file.read1 if isinstance(file, (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile)) else file.read


class _Metered:
    """A file that gives what a member may have, and ends the archive where its headers are longer."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._read = _reader(file)
        self._ended = False
        self.allow(0)

    def allow(self, size_bytes: int) -> None:
        """A member with that many bytes is read or skipped now, and then the next headers are read."""
        self._left = size_bytes + MOST_HEADERS_BYTES

    def seek(self, place: int) -> int:
        """Go there."""
        self._ended = False
        return self._file.seek(place)

    def tell(self) -> int:
        """Where it is."""
        return self._file.tell()

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, whatever a header claims."""
        data = self._read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError("its headers are too long")
        if not data and self._ended:  # to skip a member whose header claims 2^60 bytes, tarfile would read on and on
            raise tarfile.ReadError("unexpected end of data")
        self._ended = not data
        return data
