"""samples.archives: tar files of images as a stream, and what hostile ones do not do."""

import gzip
import io
import subprocess
import tarfile
import tracemalloc
from pathlib import Path
from random import Random

import numpy as np
import pytest

from corewise.common.errors import SamplesError
from corewise.samples import archives
from corewise.samples.archives import Slice, Unpacked, is_archive, read_archive


def write(path: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["", ":gz", ":bz2", ":xz"])
def test_every_compression_gives_the_images_alone(tmp_path: Path, kind: str) -> None:
    members = (
        ("a.jpg", b"one"),
        ("labels.csv", b"no"),
        ("b/c.PNG", b"two"),
        ("b/.d.png", b"no"),
        ("__MACOSX/e.jpg", b""),
    )
    path = write(tmp_path / f"photos.tar{kind.replace(':', '.')}", *members, mode=f"w{kind}")
    assert is_archive(path)
    assert [(one.name, one.content, one.problem) for one in read_archive(path)] == [
        ("a.jpg", b"one", ""),
        ("b/c.PNG", b"two", ""),
    ]


@pytest.mark.parametrize(("end", "count"), [(None, 3), (8000, 3), (6000, 2)])
def test_slices_are_the_images_that_a_stream_gives(tmp_path: Path, end: int | None, count: int) -> None:
    members = [("a.jpg", b"one"), ("x.csv", b"no"), (f"{'long' * 60}.png", bytes(3000)), ("b/c.PNG", b"two" * 400)]
    path = write(tmp_path / "photos.tar", *members)
    path.write_bytes(path.read_bytes()[:end])  # which cuts the last member, or the one before
    whole, sliced = list(read_archive(path)), list(read_archive(path, sliced=True))
    assert [(one.name, one.problem) for one in sliced] == [(one.name, one.problem) for one in whole]
    assert [one.slice.read() for one in sliced if one.slice] == [one.content for one in whole if not one.problem]
    assert len(whole) == count


@pytest.mark.parametrize(("kind", "end"), [("gz", b"junk"), ("gz", b""), ("bz2", b""), ("xz", b"")])
def test_what_was_whole_before_a_small_compressed_archive_broke_is_read(tmp_path: Path, kind: str, end: bytes) -> None:
    noise = np.random.default_rng(0).bytes
    members = [(f"{number}.jpg", noise(150_000)) for number in range(7)]  # of bzip2, some blocks
    path = write(tmp_path / f"photos.tar.{kind}", *members, mode=f"w:{kind}")
    whole = path.read_bytes()
    path.write_bytes(whole + end if end else whole[:-5000])
    found = list(read_archive(path))
    whole = 7 if end else 6 if kind != "bz2" else 5
    assert [one.content for one in found if not one.problem] == [content for _, content in members][:whole]
    assert end or found[-1].problem.startswith("cannot be read after member")


def test_a_name_does_not_say_whether_an_archive_is_compressed(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.tar", ("BZhang.jpg", b"one"))  # as bzip2 begins
    packed = write(tmp_path / "packed.tar", ("a.jpg", b"one"), mode="w:gz")
    assert [[one.content for one in read_archive(path)] for path in (plain, packed)] == [[b"one"]] * 2
    slices = [one.slice for path in (plain, packed) for one in read_archive(path, sliced=True)]
    assert [part is not None and part.compressed for part in slices] == [False, True]


def test_a_sparse_file_is_set_aside_alone(tmp_path: Path) -> None:
    path, hole = tmp_path / "photos.tar", tmp_path / "hole.jpg"
    with hole.open("wb") as file:
        file.write(b"one")
        file.truncate(2**20)
    (tmp_path / "z.jpg").write_bytes(b"two")
    subprocess.run(["tar", "--sparse", "-cf", path, "-C", tmp_path, "hole.jpg", "z.jpg"], check=True)
    for sliced in (False, True):
        found = [(one.name, one.problem) for one in read_archive(path, sliced=sliced)]
        assert found == [("hole.jpg", "is not a regular file"), ("z.jpg", "")]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("cut_bytes", [0, 40])
def test_slices_of_compressed_files_are_read_on_in_any_order(tmp_path: Path, kind: str, cut_bytes: int) -> None:
    members = [(f"{number}.jpg", Random(number).randbytes(100_000)) for number in range(9)]
    path = write(tmp_path / f"photos.tar.{kind}", *members, mode=f"w:{kind}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut_bytes])
    other = write(tmp_path / "named.tar", ("a.png", b"one"), mode="w:gz")  # told by its content
    whole, sliced = list(read_archive(path)), list(read_archive(path, sliced=True))
    assert [(one.name, one.problem) for one in sliced] == [(one.name, one.problem) for one in whole]
    slices = [one.slice for one in sliced if one.slice]
    assert len(slices) in (8, 9)
    unpacked = Unpacked()
    for number in (2, 3, 7, 1):
        assert unpacked.read(slices[number]) == members[number][1]
    (elsewhere,) = read_archive(other, sliced=True)
    assert elsewhere.slice is not None
    assert elsewhere.slice.compressed
    assert unpacked.read(elsewhere.slice) == b"one"
    assert unpacked.read(slices[0]) == members[0][1]
    unpacked.close()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        unpacked.read(slices[0])


@pytest.mark.parametrize("kind", ["", "gz"])
def test_a_slice_of_a_file_that_is_shorter_now_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "photos.tar", ("a.jpg", bytes(9)), ("b.jpg", bytes(3000)), mode=f"w:{kind}")
    first, last = (one.slice for one in read_archive(path, sliced=True))
    assert first is not None
    assert last is not None
    whole = gzip.decompress(path.read_bytes()) if kind else path.read_bytes()
    path.write_bytes((gzip.compress if kind else bytes)(whole[: last.start + 2000]))
    unpacked = Unpacked()
    read = unpacked.read if kind else Slice.read
    assert read(first) == bytes(9)
    with pytest.raises(OSError, match=r"photos\.tar has changed: it is shorter now"):
        read(last)
    unpacked.close()


def test_what_is_no_file_or_leads_out_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    kinds = {
        "/etc/a.jpg": tarfile.REGTYPE,
        "x/../../b.jpg": tarfile.REGTYPE,
        "soft.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "pipe.jpg": tarfile.FIFOTYPE,
        "device.jpg": tarfile.CHRTYPE,
    }
    with tarfile.open(path, "w") as archive:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert [(one.name, one.content, one.problem) for one in read_archive(path)] == [
        ("/etc/a.jpg", b"", "leads out of the archive"),
        ("x/../../b.jpg", b"", "leads out of the archive"),
        ("soft.jpg", b"", "is a link"),
        ("hard.jpg", b"", "is a link"),
        ("pipe.jpg", b"", "is not a regular file"),
        ("device.jpg", b"", "is not a regular file"),
    ]


def test_a_bomb_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 2**20)
    size = 24 * 2**20
    large = write(tmp_path / "large.tar.gz", ("large.jpg", bytes(size)), ("small.jpg", b"one"), mode="w:gz")
    headers = tmp_path / "headers.tar.gz"
    longname = tarfile.TarInfo("name.jpg")
    longname.type, longname.size = tarfile.GNUTYPE_LONGNAME, size
    with gzip.open(headers, "wb") as file:
        file.write(longname.tobuf(tarfile.GNU_FORMAT) + b"x" * size)
    tracemalloc.start()
    try:
        assert [one.problem or one.name for one in read_archive(large)] == [
            f"has {size:,} bytes, at most {2**20:,} are allowed",
            "small.jpg",
        ]
        with pytest.raises(SamplesError, match="its headers are too long"):
            list(read_archive(headers))
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()


def claiming(kind: bytes, size: int, name: str = "a.jpg") -> bytes:
    """A header alone."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def test_a_size_that_no_data_follows_lifts_no_limit(tmp_path: Path) -> None:
    path = tmp_path / "link.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(claiming(tarfile.SYMTYPE, 8 * 2**30) + claiming(tarfile.GNUTYPE_LONGNAME, 2**30))
        file.write(bytes(4 * 2**20))
    _, rest = read_archive(path)
    assert rest.problem == "cannot be read after member 1: its headers are too long"


def test_a_size_that_no_data_follows_ends_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "link.tar"
    path.write_bytes(claiming(tarfile.LNKTYPE, 10**6) + write(tmp_path / "b.tar", ("b.jpg", b"two")).read_bytes())
    for sliced in (False, True):
        assert [(one.name, one.problem) for one in read_archive(path, sliced=sliced)] == [
            ("a.jpg", "is a link"),
            ("b.jpg", ""),
        ]


def test_a_size_beyond_all_files_ends_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "claims.tar"
    path.write_bytes(claiming(tarfile.REGTYPE, 2**60) + b"few bytes")
    large, rest = read_archive(path)
    assert large.problem.startswith(f"has {2**60:,} bytes")
    assert rest.problem == "cannot be read after member 1: unexpected end of data"


def test_headers_of_headers_without_end_are_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "chain.tar"
    path.write_bytes(claiming(tarfile.GNUTYPE_LONGNAME, 1).ljust(1024, b"\0") * 1000)
    with pytest.raises(SamplesError, match=r"chain\.tar is not a readable tar file"):
        list(read_archive(path))


def test_the_rest_of_a_broken_archive_is_set_aside(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar.gz", ("a.jpg", b"one"), ("b.jpg", bytes(range(256)) * 4096), mode="w:gz")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    first, rest = read_archive(cut)
    assert (first.name, first.content) == ("a.jpg", b"one")
    assert rest.problem.startswith("cannot be read after member 2: ")
    none = tmp_path / "none.tar"
    none.write_bytes(b"no archive" * 100)
    with pytest.raises(SamplesError, match=r"none\.tar is not a readable tar file"):
        list(read_archive(none))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"Z"])
def test_a_size_beyond_all_memory_ends_the_archive(tmp_path: Path, kind: bytes) -> None:
    path = write(tmp_path / "claims.tar", ("a.jpg", b"one"))
    path.write_bytes(path.read_bytes()[:1024] + claiming(kind, 2**62) + b"few bytes" * 99)
    for sliced in (False, True):
        first, *_, rest = read_archive(path, sliced=sliced)
        assert (first.name, first.problem) == ("a.jpg", "")
        assert rest.problem.startswith("cannot be read after member ")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_disk_that_fails_is_no_fault_of_the_archive(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.symlink_to("/proc/self/mem")  # whose first bytes are no memory
    for sliced in (False, True):
        with pytest.raises(SamplesError, match=rf"{name} cannot be read: Input/output error; check the path$"):
            list(read_archive(path, sliced=sliced))
    unpacked = Unpacked()
    with pytest.raises(OSError, match="Input/output error"):
        unpacked.read(Slice(str(path), 0, 3, compressed=True))
    unpacked.close()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_what_is_unpacked_before_a_slice_is_told_step_by_step(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "STEP_BYTES", 10_000)
    members = [(f"{number}.jpg", Random(number).randbytes(30_000)) for number in range(9)]
    path = write(tmp_path / f"photos.tar.{kind}", *members, mode=f"w:{kind}")
    slices = [one.slice for one in read_archive(path, sliced=True) if one.slice]
    steps: list[int] = []
    unpacked = Unpacked(lambda: steps.append(1))
    for number, most in ((5, 16), (1, 20), (8, 40)):
        assert unpacked.read(slices[number]) == members[number][1]
        assert most - 3 <= len(steps) <= most
    unpacked.close()
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(OSError, match="has changed"):
        unpacked.read(slices[8])
    unpacked.close()
