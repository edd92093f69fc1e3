"""corewise predict from and to a real S3 server, in this process and on a Ray cluster."""

import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.dataset
import pytest
from command_line import command
from PIL import Image
from pyarrow import fs, parquet
from serving_tools import image_artifact, write_bulk_job
from waiting import eventually, free_port

import corewise
from corewise.cluster.actor import Answerer
from corewise.cluster.bulk import Bulk
from corewise.cluster.distributed import task_of
from corewise.cluster.driving import parts_of_rows
from corewise.cluster.messages import Answered, Prepared, answer, packed, packed_rows
from corewise.common.errors import CorewiseError, OutputError, SamplesError
from corewise.machine.inspect import inspect_cpu
from corewise.pipeline.job import records
from corewise.samples import places
from corewise.samples.texts import GUESSED

pytest.importorskip("moto")

ROWS = 3_000
BUCKET = "s3://bucket"
DENIED = "the store denies access .*; set AWS_ACCESS_KEY_ID"


class Server:
    """An S3 server of moto."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-p", str(self.port)], stdout=file, stderr=subprocess.STDOUT
            )

    def ask(self, method: str, path: str, body: bytes | None = None) -> bool:
        request = urllib.request.Request(
            f"{self.url}{path}", data=body, method=method, headers={"Content-Type": "text/plain"}
        )
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With one bucket."""
    made = Server(tmp_path_factory.mktemp("moto") / "log")
    try:
        assert eventually(lambda: made.ask("PUT", "/bucket"), 60)
        yield made
    finally:
        made.process.terminate()
        made.process.wait(60)


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    places._store.cache_clear()
    yield
    places._store.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tokens, and a file of texts of which one has a null byte."""
    made = tmp_path_factory.mktemp("predict")
    write_bulk_job(made, ROWS)
    corewise.predict(made / "words.cw", made / "texts.txt", made / "alone.npy")
    return made


def store() -> fs.FileSystem:
    """The server; the class itself does not look at AWS_ENDPOINT_URL."""
    return fs.FileSystem.from_uri(BUCKET)[0]


def put(path: Path, key: str) -> None:
    """Copy a local file to the bucket."""
    with store().open_output_stream(f"bucket/{key}", compression=None) as file:
        file.write(path.read_bytes())


def check_rows(output: str, alone: np.ndarray) -> None:
    """Each row is there once, with the answer of one process and local files."""
    table = pyarrow.dataset.dataset(output).to_table()
    rows = table.column("row").to_numpy()
    assert sorted(rows) == [row for row in range(ROWS) if row != 7]
    np.testing.assert_allclose(np.stack(table.column("vector").to_numpy()), alone[rows], atol=1e-5)
    (failed,) = map(json.loads, read(f"{output}/_part-000000.failed").splitlines())
    assert (failed["row"], failed["where"]) == (7, "line 8")


def read(url: str) -> str:
    with store().open_input_file(url.removeprefix("s3://")) as file:
        return bytes(file.read()).decode()


def test_a_job_that_was_interrupted_is_resumed_in_the_bucket(folder: Path) -> None:
    put(folder / "texts.txt", "in/texts.txt")
    output, alone = f"{BUCKET}/out a%20", np.load(folder / "alone.npy")

    def stop(progress: corewise.BulkProgress) -> None:
        if progress.rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corewise.predict(folder / "words.cw", f"{BUCKET}/in/*.txt", output, on_progress=stop)
    first = store().get_file_info("bucket/out a%20/part-000000.parquet").mtime
    put(folder / "texts.txt", "out a%20/_part-000001.failed")  # as an attempt that was killed leaves it
    result = corewise.predict(folder / "words.cw", f"{BUCKET}/in/*.txt", output)
    assert (result.output, result.rows, result.resumed, result.failed) == (output, ROWS, 1024, 1)
    assert store().get_file_info("bucket/out a%20/part-000000.parquet").mtime == first
    assert json.loads(read(f"{output}/_result.json"))["rows"] == ROWS
    assert not store().get_file_info("bucket/out a%20/_part-000001.failed").is_file
    table = parquet.read_table("bucket/out a%20", filesystem=store())
    rows = table.column("row").to_numpy()
    assert sorted(rows) == [row for row in range(ROWS) if row != 7]
    np.testing.assert_allclose(np.stack(table.column("vector").to_numpy()), alone[rows], atol=1e-5)
    put(folder / "words.cw.json", "in/texts.txt")
    with pytest.raises(OutputError, match="holds the parts of another job, or its inputs or artifact have changed"):
        corewise.predict(folder / "words.cw", f"{BUCKET}/in/*.txt", output)


def test_folders_and_files_of_all_kinds(folder: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["w1", "w2 w3"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text\nw1\n")
    (tmp_path / "c.jsonl").write_text('{"text": "w4"}\n')
    for path in sorted(tmp_path.iterdir()):
        put(path, f"kinds/{path.name}")
    corewise.predict(folder / "words.cw", f"{BUCKET}/kinds", tmp_path / "out.jsonl")
    corewise.predict(folder / "words.cw", tmp_path / "b.csv", tmp_path / "parts")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["row"], row["input"].rpartition("/")[2]) for row in rows] == [
        (0, "a.parquet"),
        (1, "a.parquet"),
        (2, "b.csv"),
        (3, "c.jsonl"),
    ]
    assert rows[0]["input"] == f"{BUCKET}/kinds/a.parquet"
    assert parquet.read_table(tmp_path / "parts").column("row").to_pylist() == [0]


def test_what_the_store_refuses_is_one_line_with_the_fix(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "texts.txt", "in/texts.txt")

    def wrong(source: str, output: str, kind: type[CorewiseError], what: str) -> None:
        with pytest.raises(kind, match=what) as caught:
            corewise.predict(folder / "words.cw", source, output)
        assert "\n" not in str(caught.value)

    texts = str(folder / "texts.txt")
    wrong(f"{BUCKET}/none.txt", f"{BUCKET}/o", SamplesError, "there is no file s3://bucket/none.txt; check the path")
    wrong("s3://nobody/a.txt", f"{BUCKET}/o", SamplesError, "there is no bucket s3://nobody; check its name")
    wrong(texts, "s3://nobody/o", CorewiseError, "s3://nobody/o.*: there is no bucket s3://nobody; check its name")
    wrong(texts, f"{BUCKET}/o.npy", OutputError, "is the name of a file; give a folder for Parquet files")
    wrong(texts, f"{BUCKET}/in", OutputError, "s3://bucket/in has files that are not from such a job")
    wrong(f"{BUCKET}/in/", f"{BUCKET}/in/out", OutputError, "s3://bucket/in/out is among the inputs in s3://bucket/in")
    server.ask("POST", "/moto-api/reset-auth", b"0")
    try:
        wrong(f"{BUCKET}/in/texts.txt", f"{BUCKET}/o", SamplesError, DENIED)
        wrong(texts, f"{BUCKET}/o", CorewiseError, DENIED)
    finally:
        server.ask("POST", "/moto-api/reset-auth", b"999999999")
    assert "o" not in [info.base_name for info in store().get_file_info(fs.FileSelector("bucket"))]
    for name in ("pyarrow", "pyarrow.fs"):
        monkeypatch.setitem(sys.modules, name, None)
    places._store.cache_clear()
    wrong(f"{BUCKET}/in/texts.txt", "o", CorewiseError, "needs the package .pyarrow.; pip install")


@pytest.mark.slow
def test_on_a_cluster(folder: Path) -> None:
    put(folder / "texts.txt", "ray/texts.txt")
    typed = command("predict", "words.cw", f"{BUCKET}/ray", "-o", f"{BUCKET}/on-ray", "--ray", "local", quick=False)
    done = subprocess.run(typed, cwd=folder, capture_output=True, text=True, env={**os.environ}, timeout=240)
    assert done.returncode == 0, done.stderr
    check_rows(f"{BUCKET}/on-ray", np.load(folder / "alone.npy"))
    again = corewise.predict(folder / "words.cw", f"{BUCKET}/ray", f"{BUCKET}/on-ray")
    assert (again.rows, again.resumed, len(again.nodes)) == (ROWS, ROWS, 1)


@pytest.mark.filterwarnings("ignore:.* was tuned on .*, this is .*")
def test_a_node_reads_images_of_tar_files_of_all_kinds_from_the_bucket(tmp_path: Path) -> None:
    """In parts of four images, the later ones first."""
    image_artifact(tmp_path / "photos.cw")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), np.uint8)
    pngs = [png(one) for one in pixels]
    for name, some in (("a.tar", pngs[:6]), ("b.tar.gz", pngs[6:13]), ("c.tar.xz", pngs[13:18])):
        with tarfile.open(tmp_path / name, f"w:{name.partition('.tar.')[2]}") as archive:  # type: ignore[call-overload]
            for number, content in enumerate([*some, b"no image"]):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        put(tmp_path / name, f"photos/{name}")
    for number, content in enumerate(pngs[18:]):
        (tmp_path / "one.png").write_bytes(content)
        put(tmp_path / "one.png", f"photos/d/{number}.png")
    sources, alone = (f"{BUCKET}/photos/*.tar*", f"{BUCKET}/photos/d"), tmp_path / "alone"
    corewise.predict(tmp_path / "photos.cw", sources, alone)

    given = {"columns": GUESSED, "prompt": None, "top": None, "score_threshold": None, "iou_threshold": None,
             "draw": None, "preprocess": None, "ray": "local"}  # fmt: skip
    job = Bulk.of(tmp_path / "photos.cw", sources, f"{BUCKET}/by-node", **given).job  # type: ignore[arg-type]
    with job.kept.begun(job.facts()):
        task = task_of(tmp_path / "photos.cw", job, None)
        node = Answerer(packed(task), keep_cores=lambda count: inspect_cpu())
        prepared = answer(Prepared, node.prepare(1), "here")
        answer(tuple[str, ...], node.open(packed(prepared.plan)), "here")
        for part in [*parts_of_rows(records(job, sliced=True), 4, {})][::-1]:
            answer(Answered, node.answer(part.number, packed_rows(part.rows)), "here")
    made, expected = (pyarrow.dataset.dataset(str(place)).to_table().sort_by("row") for place in (job.output, alone))
    assert made.column("row").to_pylist() == [row for row in range(23) if row not in (6, 14, 20)]
    for name in ("row", "input", "label"):
        assert made.column(name) == expected.column(name)
    np.testing.assert_allclose(made.column("probability"), expected.column("probability"), atol=1e-2)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
