"""samples.places: files by URL, in a store in this process, and what a store's errors mean."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from corewise.common.errors import InputError, SamplesError
from corewise.pipeline import ImageRunner
from corewise.pipeline.runner import Rejected
from corewise.records.pipeline import ImagePipeline
from corewise.records.report import Preprocess
from corewise.samples import places
from corewise.samples.archives import Slice, Unpacked, read_archive
from corewise.samples.folders import list_files, list_images
from corewise.samples.places import RemotePath, place_of, refusal
from corewise.samples.tables import iterate_table

fsspec = pytest.importorskip("fsspec")
MemoryFileSystem = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
ROOT = "fsspec+memory://bucket"


@pytest.fixture
def bucket() -> Iterator[RemotePath]:
    """An empty one."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    place = place_of(f"{ROOT}/")
    assert isinstance(place, RemotePath)
    yield place
    store.store.clear()


def put(bucket: RemotePath, name: str, text: str) -> None:
    bucket.write_whole(name, lambda path: path.write_bytes(text.encode("utf-8", "surrogateescape")))


def test_a_file_is_written_whole_and_read(bucket: RemotePath) -> None:
    place = bucket / "a" / "grün 50% #1?.txt"
    assert (place.name, place.suffix, str(place)) == ("grün 50% #1?.txt", ".txt", f"{ROOT}/a/grün 50% #1?.txt")
    assert not place.is_file()
    put(bucket / "a", place.name, "two\nlines")
    assert place_of(str(place)) == place
    assert (place.read_bytes(), place.stat().st_size) == (b"two\nlines", 9)
    put(bucket / "a", place.name, "")
    assert place.read_text() == ""
    assert ((bucket / "a").names(), bucket.names()) == ([place.name], [])
    with pytest.raises(FileNotFoundError):
        (bucket / "none").read_bytes()


def test_what_fails_while_it_is_written_locally_leaves_nothing(bucket: RemotePath) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left"):
        bucket.write_whole("part", half)
    assert not bucket.files()


def test_folders_and_patterns_of_urls(bucket: RemotePath) -> None:
    for name in ("a/1.txt", "a/2.csv", "a/b/3.txt", "a/_job.json", "a/.hidden/4.txt", "a/x[1].txt"):
        put(bucket, name, "x")

    def named(*typed: str) -> list[str]:
        places = [f"{ROOT}/{name}" for name in typed]
        return [str(file).removeprefix(f"{ROOT}/") for file in list_files(places, (".txt", ".csv"), "texts")]

    assert named("a/") == ["a/1.txt", "a/2.csv", "a/b/3.txt", "a/x[1].txt"]
    assert named("a/*.txt") == ["a/1.txt", "a/x[1].txt"]
    assert named("a/**/*.txt", "a/2.csv") == ["a/.hidden/4.txt", "a/1.txt", "a/b/3.txt", "a/x[1].txt", "a/2.csv"]
    assert named("a/x[1].txt") == ["a/x[1].txt"]
    with pytest.raises(SamplesError, match=r"there is no file .*bucket/a/\*\.tsv; check the path or the pattern"):
        named("a/*.tsv")
    with pytest.raises(SamplesError, match="there are no images in"):
        list_images([f"{ROOT}/a"])
    with pytest.raises(
        SamplesError, match=r"a/1\.txt is given twice, so its rows would be there twice; give each input once"
    ):
        named("a/1.txt", "a")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.txt", "t.parquet"])
def test_tables_are_read_from_urls_as_from_disk(bucket: RemotePath, tmp_path: Path, name: str) -> None:
    import pyarrow
    from pyarrow import parquet

    local = tmp_path / name
    content = {"t.csv": 'text\n"two\nlines"\n\udcff\n', "t.tsv": "text\na\n", "t.jsonl": '{"text": "a"}\n3\n'}
    if name == "t.parquet":
        parquet.write_table(pyarrow.table({"text": ["a", "b"]}), local)
    else:
        local.write_text(content.get(name, "\ufeffa\n\nb\n"), errors="surrogateescape")
    bucket.write_whole(name, lambda path: path.write_bytes(local.read_bytes()))
    assert list(iterate_table(bucket / name)) == list(iterate_table(local))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", ""])
def test_tar_files_are_read_from_urls(bucket: RemotePath, tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(b"image")
    with tarfile.open(tmp_path / "images.tar", f"w:{kind}") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    bucket.write_whole("i.tar", lambda path: path.write_bytes((tmp_path / "images.tar").read_bytes()))
    assert [(one.name, one.content) for one in read_archive(bucket / "i.tar")] == [("a.png", b"image")]


def test_photos_are_answered_by_url(bucket: RemotePath, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(image)
    bucket.write_whole("a.png", lambda path: path.write_bytes(image.read_bytes()))
    put(bucket, "b.png", "<html>")
    pipeline = ImagePipeline(task="vectors", preprocess=Preprocess(resize=8, crop=8), labels=())
    runner = ImageRunner(pipeline, lambda inputs: [inputs[0].mean((2, 3))], instances=1, rows=2)
    urls = [f"{ROOT}/{name}" for name in ("a.png", "b.png", "none.png", "a.png")]
    first, second, third, fourth = runner.answers([str(image), *urls[1:]])
    np.testing.assert_allclose(first, fourth)
    assert (second, third) == (Rejected("is an HTML page"), Rejected("cannot be read: No such file or directory"))
    assert runner.calls_ended == 2
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(image, "a.png")
    bucket.write_whole("photos.tar", lambda path: path.write_bytes((tmp_path / "photos.tar").read_bytes()))
    (member,) = read_archive(bucket / "photos.tar", sliced=True)
    (fifth,) = runner.answers([member.slice])
    np.testing.assert_allclose(first, fifth)
    np.testing.assert_allclose(runner.predict(f"{ROOT}/photos.tar"), [first])


class FailingStore(MemoryFileSystem):  # type: ignore[misc]
    """Gives the first ``given`` bytes of a file, and then does not answer."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    given = 2**12

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("failing://", "memory://", 1)))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode == "wb":
            return file
        given = self.given

        class Failing(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() + (len(self.getbuffer()) if size is None or size < 0 else size) > given:
                    raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, timed out")
                return super().read(size)

        return Failing(file.getvalue())


@pytest.fixture
def failing() -> Iterator[RemotePath]:
    """A bucket of it, which does not fail yet, whose buffers are small."""
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    place = place_of("fsspec+failing://bucket")
    assert isinstance(place, RemotePath)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(places, "BUFFER_BYTES", 1024)
        patched.setattr(FailingStore, "given", 2**30)
        yield place
    FailingStore.store.clear()


@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.jsonl", "t.parquet"])
def test_a_store_that_fails_ends_a_table_and_sets_nothing_aside(
    failing: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import pyarrow
    from pyarrow import parquet

    local, texts = tmp_path / name, [f"text {number}" for number in range(3000)]
    if name == "t.parquet":
        parquet.write_table(pyarrow.table({"text": texts}), local, row_group_size=100)
    else:
        local.write_text("".join(f'"{text}"\n' for text in ["text", *texts]))
    failing.write_whole(name, lambda path: path.write_bytes(local.read_bytes()))
    assert len(list(iterate_table(failing / name))) >= 3000
    monkeypatch.setattr(FailingStore, "given", local.stat().st_size // 2)
    with pytest.raises(SamplesError, match=f"{name} cannot be read: the store does not answer; check AWS_ENDPOINT_URL"):
        list(iterate_table(failing / name))


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_store_that_fails_ends_an_archive_and_sets_nothing_aside(
    failing: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sliced: bool
) -> None:
    name = f"a.tar{'.' * bool(kind)}{kind}"
    with tarfile.open(tmp_path / name, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 1500
            archive.addfile(member, io.BytesIO(Random(number).randbytes(member.size)))
    failing.write_whole(name, lambda path: path.write_bytes((tmp_path / name).read_bytes()))
    slices = [one.slice for one in read_archive(failing / name, sliced=True)]
    assert len(slices) == 20
    whole = [one.slice.read() if one.slice else one.content for one in read_archive(failing / name, sliced=not kind)]
    assert whole == [Random(number).randbytes(1500) for number in range(20)]
    monkeypatch.setattr(FailingStore, "given", 16_000)
    said = f"{name} cannot be read: the store does not answer; check AWS_ENDPOINT_URL"
    with pytest.raises(SamplesError, match=said):
        list(read_archive(failing / name, sliced=sliced))
    last = slices[19]
    assert last is not None
    with pytest.raises(SamplesError, match=said):
        Unpacked().read(last) if last.compressed else last.read()


def test_a_part_of_a_tar_file_is_read_and_no_byte_more(bucket: RemotePath) -> None:
    put(bucket, "a", "0123456789")
    assert [(bucket / "a").read_range(*part) for part in ((2, 3), (8, 9), (10, 1), (99, 1))] == [
        b"234",
        b"89",
        b"",
        b"",
    ]
    with pytest.raises(FileNotFoundError):
        (bucket / "none").read_range(0, 1)
    with pytest.raises(OSError, match="a has changed: it is shorter now"):
        Slice(f"{ROOT}/a", 8, 9).read()


def test_what_is_local_and_what_is_wrong() -> None:
    assert place_of("file:///tmp/a%20b") == Path("/tmp/a b")
    assert place_of("a:b/c") == Path("a:b/c")
    assert place_of(Path("odd:/name")) == Path("odd:/name")
    assert place_of(Path("gs://bucket/name")) == RemotePath("gs://bucket/name")
    with pytest.raises(InputError, match=r"ftp://a/b is not in a store that can be read; give a path, or s3, gs"):
        place_of("ftp://a/b")
    with pytest.raises(InputError, match=r"s3:// names no bucket; give s3://BUCKET/NAME"):
        place_of("s3://")


def test_what_a_store_refuses_is_said_with_the_fix() -> None:
    prefix = "When getting information for key 'a' in bucket 'b': AWS Error "
    assert refusal(f"{prefix}ACCESS_DENIED during HeadObject operation: No response body.", "s3://b/a")[0] == (
        "the store denies access (ACCESS_DENIED)"
    )
    missing = f"{prefix}NO_SUCH_BUCKET during PutObject operation: The bucket does not exist (Request ID: x)"
    assert refusal(missing, "s3://b/a/c")[0] == "there is no bucket s3://b"
    assert refusal(f"{prefix}NETWORK_CONNECTION during HeadObject operation: curlCode: 7", "s3://b/a") == (
        "the store does not answer",
        "check AWS_ENDPOINT_URL, AWS_REGION and the network",
    )
    assert refusal(f"{prefix}UNKNOWN (HTTP status 400) during HeadObject operation: No response body.", "s3://b/a") == (
        "UNKNOWN: No response body",
        "check the URL, the region and the store's settings",
    )
    assert refusal("something\nelse. ", "gs://b/a")[0] == "something else"
