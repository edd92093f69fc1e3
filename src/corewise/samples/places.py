"""Files by path or by URL. A file of an object store has those methods of ``pathlib.Path`` that jobs need.

Reading and writing go through ``pyarrow.fs``, which takes credentials, regions and endpoints from the variables and
files that the store's own tools use.
"""

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOENT
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from corewise.common.errors import CorewiseError, InputError, MissingExtra, OutputError, SamplesError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "fsspec+")
"""What URLs of object stores begin with; ``fsspec+NAME`` is any file system of an installed fsspec."""
URL = re.compile(r"([a-z][a-z0-9+.-]*):/+", re.IGNORECASE)
BUFFER_BYTES = 2**22
"""Bytes that one request brings of a file that is read in order."""
MOST_BYTES = 64 * 2**20
"""Bytes of a file that is read as a whole: as many as the server takes in one request."""
AWS_ERROR = re.compile(r"AWS Error (\w+)(?: \(.*?\))? during \w+ operation: *(.*?)(?: \(Request ID.*)?$", re.DOTALL)
DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH",
          "UNRECOGNIZED_CLIENT", "INVALID_SIGNATURE", "MISSING_AUTHENTICATION_TOKEN", "REQUEST_EXPIRED")  # fmt: skip


class Stat(NamedTuple):
    """What jobs ask of ``os.stat_result``."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an object store, by its URL, in which characters stand for themselves.

    What the store refuses raises ``SamplesError`` where it is read and ``OutputError`` where it is written.
    """

    url: str
    """``s3://bucket/prefix/name``."""
    known: Stat | None = field(default=None, compare=False)
    """What a listing said of it."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """As of a path."""
        return PurePosixPath(self.name).suffix

    def absolute(self) -> "RemotePath":
        """Itself."""
        return self

    def resolve(self) -> "RemotePath":
        """Itself."""
        return self

    def stat(self) -> Stat:
        """Its size and time. Raises ``FileNotFoundError`` if it is no file."""
        return self.known or self._look()

    def is_file(self) -> bool:
        """Whether there is such a file."""
        try:
            return self.known is not None or bool(self._look())
        except FileNotFoundError:
            return False

    def files(self) -> list["RemotePath"]:
        """All files below it, in the order of their names; none if there is nothing."""
        from pyarrow.fs import FileSelector, FileType

        store, place = _opened(self.url)
        try:
            with self._asking(SamplesError, "read"):
                found = store.get_file_info(FileSelector(place, recursive=True))
        except FileNotFoundError:
            return []
        files = [one for one in found if one.type == FileType.File]
        start = len(place.strip("/")) + 1
        below = [(one.path.strip("/")[start:], Stat(one.size, one.mtime_ns or 0)) for one in files]
        return sorted((RemotePath(f"{self.url}/{name}", stat) for name, stat in below), key=str)

    def children(self) -> list["RemotePath"]:
        """The files in it."""
        return [file for file in self.files() if file.url == f"{self.url}/{file.name}"]

    def names(self) -> list[str]:
        """The names of the files in it."""
        return [file.name for file in self.children()]

    def open(
        self, mode: str = "r", encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> Any:
        """Open it for reading, as bytes or as text."""
        store, place = _opened(self.url)
        with self._asking(SamplesError, "read"):
            file: Any = io.BufferedReader(_Stored(self, store.open_input_file(place)), BUFFER_BYTES)
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        """Its content. Raises ``OSError`` for more than ``MOST_BYTES``."""
        with self.open("rb") as file:
            content: bytes = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise OSError(None, f"it has more than {MOST_BYTES:,} bytes", self.url)
        return content

    def read_text(self, encoding: str = "utf-8") -> str:
        """Its content as text, of whatever size."""
        with self.open("rb") as file:
            return str(file.read(), encoding)

    def read_range(self, start: int, size_bytes: int) -> bytes:
        """That part of it and no byte more; less of it at its end."""
        store, place = _opened(self.url)
        with self._asking(SamplesError, "read"), store.open_input_file(place) as file:
            return bytes(file.read_at(size_bytes, start)) if start < file.size() else b""

    def write_whole(self, name: str, write: Callable[[Path], Any]) -> int:
        """Write a file in it by way of a local one. The store has the file as a whole or not at all.

        Returns its size in bytes.
        """
        with tempfile.TemporaryDirectory(prefix="corewise-") as folder:
            local = Path(folder) / "file"
            write(local)
            # In a thread of its own: an interrupt would close the stream, and leave the half that was sent as a file.
            with ThreadPoolExecutor(1) as pool, (self / name)._asking(OutputError, "written"):
                pool.submit((self / name)._upload, local).result()
            return local.stat().st_size

    def unlink(self) -> None:
        """Remove it."""
        store, place = _opened(self.url)
        with self._asking(OutputError, "removed"):
            store.delete_file(place)

    def _upload(self, local: Path) -> None:
        store, place = _opened(self.url)
        stream = store.open_output_stream(place, compression=None)  # which the name would say
        content = local.read_bytes()
        if content:
            stream.write(content)
        stream.close()

    def _look(self) -> Stat:
        from pyarrow.fs import FileType

        store, place = _opened(self.url)
        with self._asking(SamplesError, "read"):
            info = store.get_file_info(place)
        if info.type != FileType.File:
            raise FileNotFoundError(ENOENT, "No such file or directory", self.url)
        return Stat(info.size, info.mtime_ns or 0)

    @contextmanager
    def _asking(self, kind: type[CorewiseError], done: str) -> Iterator[None]:
        """Turn what the store refuses into one line with the fix."""
        from pyarrow import ArrowException

        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(ENOENT, "No such file or directory", self.url) from error
        except (OSError, ArrowException) as error:
            reason, fix = refusal(str(error), self.url)
            raise kind(f"{self.url} cannot be {done}: {reason}", fix) from error


class _Stored(io.RawIOBase):
    """A file of a store that is open. What the store refuses while it is read is no fault of what is in it."""

    def __init__(self, path: RemotePath, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with self._path._asking(SamplesError, "read"):
            return int(self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()


Place = Path | RemotePath


def place_of(typed: "str | Path | RemotePath") -> Place:
    """A local path, or a file of an object store if it begins with the store's scheme. ``file://`` is a path.

    Raises:
        InputError: The scheme is unknown, or the URL names no bucket.
        MissingExtra: pyarrow is not installed.
    """
    if isinstance(typed, RemotePath):
        return typed
    text = str(typed)
    found = URL.match(text)
    scheme = found[1].lower() if found else ""
    known = scheme in SCHEMES or scheme.startswith(SCHEMES[-1])
    # pathlib makes one slash of two; a local path has one, and no scheme before it.
    if found is None or not (known or scheme == "file" or (isinstance(typed, str) and "://" in found[0])):
        return Path(typed)
    rest = text[found.end() :]
    if scheme == "file":
        return Path("/" + unquote(rest.removeprefix("localhost/")))
    if not known:
        schemes = ", ".join(SCHEMES[:-1])
        raise InputError(f"{text} is not in a store that can be read", f"give a path, or {schemes}://...")
    if not rest:
        raise InputError(f"{text} names no bucket", f"give {scheme}://BUCKET/NAME")
    place = RemotePath(f"{scheme}://{rest.rstrip('/')}")
    _opened(place.url)
    return place


def unreadable(place: Place, error: OSError) -> SamplesError:
    """The error for a file that was open and then could not be read."""
    return SamplesError(f"{place} cannot be read: {error.strerror or error}", "check the path")


def matching(pattern: RemotePath) -> list[RemotePath]:
    """The files that a URL with ``*``, ``?``, ``[]`` or ``**`` names; none for one without them."""
    parts = pattern.url.split("/")
    first = next((k for k, part in enumerate(parts) if k > 2 and re.search(r"[*?[]", part)), None)
    if first is None:
        return []
    wanted = parts[first:]
    base = RemotePath("/".join(parts[:first]))
    return [file for file in base.files() if _matches(file.url.split("/")[first:], wanted)]


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[k:], pattern[1:]) for k in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def refusal(said: str, url: str) -> tuple[str, str]:
    """What a store's error means, and what to do about it. Pure."""
    found = AWS_ERROR.search(said)
    code, message = (found[1], found[2]) if found else ("", said)
    bucket = "/".join(url.split("/")[:3])
    if code == "NO_SUCH_BUCKET":
        return f"there is no bucket {bucket}", "check its name and AWS_ENDPOINT_URL, or create it"
    if code in DENIED:
        return (
            f"the store denies access ({code})",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to an account with that right",
        )
    if code == "NETWORK_CONNECTION":
        return "the store does not answer", "check AWS_ENDPOINT_URL, AWS_REGION and the network"
    text = " ".join(message.split())[:200].rstrip(". ")
    return ": ".join(filter(None, (code, text))), "check the URL, the region and the store's settings"


@lru_cache(maxsize=16)
def _store(root: str) -> tuple[Any, str]:
    """The store that a URL's scheme and bucket name, and what its paths begin with."""
    try:
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"reading and writing {root}") from None
    # A small file is then sent by one request, in which it is whole.
    at_once = "?allow_delayed_open=true" if root.startswith("s3:") else ""
    try:
        store, base = FileSystem.from_uri(root + at_once)
    except ImportError as error:
        raise InputError(f"{root} needs a package: {error}", "install it with pip") from error
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(f"{root} cannot be used: {refusal(str(error), root)[0]}", "check the URL") from error
    return store, str(base)


def _opened(url: str) -> tuple[Any, str]:
    """The store, and the file's path in it."""
    scheme, _, rest = url.partition("://")
    bucket, slash, key = rest.partition("/")
    store, base = _store(f"{scheme}://{bucket}")
    return store, f"{base}{slash}{key}"


def real_name(place: Place) -> str:
    """The place without links; of one whose links go round in a circle, for which ``resolve`` raises, as they begin."""
    return os.path.realpath(place) if isinstance(place, Path) else str(place.resolve())


def without_twins(places: Iterable[Place]) -> list[Place]:
    """The places. Raises ``SamplesError`` if one is there twice."""
    found: dict[Place, Place] = {}
    whole = lru_cache(maxsize=None)(Path.resolve)
    for place in places:
        # A link to another file may well stand for a row of its own; a folder is the same by whatever name.
        key = whole(place.parent) / place.name if isinstance(place, Path) else place
        if key in found:
            raise SamplesError(f"{place} is given twice, so its rows would be there twice", "give each input once")
        found[key] = place
    return list(found.values())
