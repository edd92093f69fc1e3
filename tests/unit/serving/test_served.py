"""What a server knows of its requests, and how artifacts are named."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from corewise.batching import Answer, NotServed
from corewise.common.errors import InputError
from corewise.records.build import TensorSpec
from corewise.serving import oip, pages
from corewise.serving.models import Models
from corewise.serving.protocol import DATATYPES, ProtocolError
from corewise.serving.served import Source, _together
from corewise.serving.tokens import Tokens


@pytest.mark.parametrize(
    ("text", "name", "version", "folder"),
    [
        ("a/net.cw", "net", "1", "a/net.cw"),
        ("a/net", "net", "1", "a/net"),
        ("toy=a/net.cw", "toy", "1", "a/net.cw"),
        ("toy@7=a/net.cw", "toy", "7", "a/net.cw"),
        ("@7=a/net.cw", "net", "7", "a/net.cw"),
    ],
)
def test_artifacts_are_named_by_their_folder_or_by_whoever_serves(text, name, version, folder):
    assert Source.of(text) == Source(name=name, version=version, folder=Path(folder))


@pytest.mark.parametrize(
    ("text", "name", "folder"),
    [("lr=0.1/net.cw", "net", "lr=0.1/net.cw"), ("toy=lr=0.1/net.cw", "toy", "lr=0.1/net.cw")],
)
def test_folders_may_have_equals_signs_in_their_names(tmp_path, monkeypatch, text, name, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    assert Source.of(text) == Source(name=name, version="1", folder=Path(folder))


def answer(rows=1, waited_s=0.1, ran_s=0.2, batch=4):
    return Answer(outputs=[np.ones((rows, 2))], waited_s=waited_s, ran_s=ran_s, batch_rows=batch)


def test_parts_are_one_answer_in_their_order():
    parts = [Future() for _ in range(3)]
    whole = _together(parts)
    for k in (2, 0, 1):
        assert not whole.done()
        parts[k].set_result(Answer(outputs=[np.full((2, 1), k)], waited_s=k, ran_s=0.1, batch_rows=4))
    assert whole.result().outputs[0].ravel().tolist() == [0, 0, 1, 1, 2, 2]
    assert whole.result().waited_s == 2


def test_the_first_error_is_the_wholes_and_cancels_the_rest():
    parts = [Future() for _ in range(3)]
    whole = _together(parts)
    parts[1].set_exception(NotServed("expired"))
    assert isinstance(whole.exception(), NotServed)
    assert parts[0].cancelled()
    assert parts[2].cancelled()
    parts = [Future() for _ in range(2)]
    whole = _together(parts)
    assert whole.cancel()
    assert all(part.cancelled() for part in parts)


def test_models_are_found_by_name_and_the_newest_version():
    sources = [Source(name="a", version=version, folder=Path("x")) for version in ("9", "10", "beta")]
    models = Models(sources, lambda source: pytest.fail("nothing is opened"))
    assert models.versions("a") == ["beta", "9", "10"]
    assert not models.ready
    for wanted, status in ((("b",), 404), (("a", "7"), 404), (("a",), 503)):
        with pytest.raises(ProtocolError) as caught:
            models.find(*wanted)
        assert caught.value.status == status
    with pytest.raises(InputError, match="two models are named a, version 9"):
        Models([*sources, sources[0]], lambda source: pytest.fail("nothing is opened"))


def test_the_messages_are_those_of_the_proto_file(tmp_path):
    folder = Path(oip.__file__).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={tmp_path / 'made'}"]
    subprocess.run([*command, "open_inference.proto"], check=True)
    assert (tmp_path / "made").read_bytes() == (folder / "open_inference.desc").read_bytes()
    assert set(oip.METHODS) == {
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelInfer",
        "ModelStatistics",
    }


def test_openapi_knows_the_protocols_datatypes():
    described = json.loads(pages.openapi([]))["components"]["schemas"]["tensor"]["properties"]["datatype"]["enum"]
    assert described == list(DATATYPES.values())
    paths = json.loads(pages.openapi([]))["paths"]
    assert not {"/v2/models/{name}/classify", *pages.TEXT_PATHS} & set(paths)
    assert "/v1/models" in paths


@pytest.mark.parametrize("takes_files", [True, False])
def test_pages_show_classify_only_for_a_model_that_takes_files(takes_files):
    model = SimpleNamespace(
        **dict.fromkeys(("name", "version"), "m"),
        **dict.fromkeys(("photos", "audio", "media"), object()),
        takes_files=takes_files,
        file_call="classify" if takes_files else None,
        text=None,
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 2)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 2)),),
        described_inputs=list,
    )
    assert ("/v2/models/m/classify" in pages.docs([model])) == takes_files
    assert ("/v2/models/{name}/classify" in json.loads(pages.openapi([model]))["paths"]) == takes_files


@pytest.mark.parametrize(
    ("given", "admitted"),
    [
        (b"Bearer two", True),
        (b"bearer  one ", True),
        (b"Bearer three", False),
        (b"Basic one", False),
        (b"one", False),
        (b"", False),
    ],
)
def test_tokens_admit_whoever_has_one_of_them(given, admitted):
    assert Tokens(["one", "two"]).admit(given) == admitted
    assert Tokens.of_digests(Tokens(["one", "two"]).digests).admit(given) == admitted
    assert Tokens([]).admit(given)
