"""Texts served live, asked for by the clients that people have: OpenAI's, Hugging Face's, Triton's, and plain HTTP."""

import json
import socket
import threading
import warnings

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
from huggingface_hub import InferenceClient
from minilm_artifact import write_minilm
from serving_tools import serving, token_artifact
from waiting import eventually

from corewise.machine.inspect import inspect_cpu
from corewise.serving.texts import MOST_TEXTS

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

TOKEN = "sesame"
SENTENCES = ["A man plays the guitar.", "Somebody plays an instrument.", "The stock market fell today."]
CLASSES = tuple("abcdefgh")


@pytest.fixture(scope="module")
def server(tmp_path_factory, data_folder):
    """all-MiniLM-L6-v2 with its real weights, and small models that rank pairs and classify, with a token."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tokens").write_text(TOKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and transformers
        write_minilm(folder / "minilm.cw")
    ranker = token_artifact(folder / "ranker.cw", task="scores", pairs=True)
    sorter = token_artifact(folder / "sorter.cw", task="classes", labels=CLASSES, activation="softmax")
    with serving(folder / "minilm.cw", ranker, sorter, "--token-file", folder / "tokens") as found:
        found.client.headers["authorization"] = f"Bearer {TOKEN}"
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as found:
        yield found


def infer(server, texts, status=200, model="minilm", **more):
    described = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    found = server.post(f"/v2/models/{model}/infer", json={"inputs": [{**described, **more}]})
    assert found.status_code == status, found.text
    if status != 200:
        return found.json()["error"]
    tensor = found.json()["outputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def live(server, model="minilm"):
    return next(one for one in server.get("/live.json").json()["models"] if one["name"] == model)


def embedded(client, given, **more):
    found = client.embeddings.create(model="minilm", input=given, **more)
    return np.array([each.embedding for each in found.data], np.float32)


# --- OpenAI -------------------------------------------------------------------------------------------------------


def test_openais_client_embeds_texts_and_token_ids(server, client):
    expected = infer(server, SENTENCES)
    found = client.embeddings.create(model="minilm", input=SENTENCES)
    assert found.model == "minilm"
    assert [each.index for each in found.data] == [0, 1, 2]
    vectors = np.array([each.embedding for each in found.data])
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    np.testing.assert_allclose(embedded(client, SENTENCES, encoding_format="float"), vectors, atol=1e-4)
    np.testing.assert_allclose(embedded(client, SENTENCES[0]), vectors[:1], atol=1e-4)
    rows = server.post("/tokenize", json={"inputs": SENTENCES, "model": "minilm"}).json()
    ids = [[token["id"] for token in row] for row in rows]
    np.testing.assert_allclose(embedded(client, ids), vectors, atol=1e-4)
    np.testing.assert_allclose(embedded(client, ids[2]), vectors[2:], atol=1e-4)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
    assert embedded(client, "a", dimensions=384).shape == (1, 384)


def test_openais_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["minilm", "ranker", "sorter"]
    assert client.models.retrieve("minilm").owned_by == "corewise"
    assert client.models.retrieve("minilm").created > 1_700_000_000
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there is minilm, ranker, sorter"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("given", "error", "param", "match"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model", "there is no model 'gpt'"),
        ({"model": "sorter"}, openai.BadRequestError, "model", "classifies texts, and this path needs one that embeds"),
        ({"dimensions": 64}, openai.BadRequestError, "dimensions", "was not trained for 64; leave dimensions out"),
        ({"input": ""}, openai.BadRequestError, None, "text 0 is empty"),
        ({"input": []}, openai.BadRequestError, "input", "give at least one text"),
        ({"input": ["a", "b\0"]}, openai.BadRequestError, None, "text 1 has a null byte at character 1"),
        ({"input": ["word " * 600]}, openai.BadRequestError, None, "602 tokens, the model takes 512; send it in parts"),
        ({"input": ["x" * 10_000_000]}, openai.APIStatusError, None, "the body has more than 8388608 bytes"),
        (
            {"input": ["a"] * (MOST_TEXTS + 1)},
            openai.BadRequestError,
            "input",
            "8193 texts, but at most 8192 are allowed",
        ),
        (
            {"input": [101, 10_000_000]},
            openai.BadRequestError,
            None,
            "row 0 has the token 10000000, but the model knows",
        ),
        ({"extra_body": {"prompt_name": "q"}}, openai.BadRequestError, None, "the model has no prompt 'q'"),
        (
            {"extra_body": {"truncate": "ALL"}},
            openai.BadRequestError,
            "truncate",
            "give true, false, NONE, START or END",
        ),
        (
            {"extra_headers": {"x-request-timeout-ms": "1"}},
            openai.InternalServerError,
            None,
            "give it more time|try again later",  # which of them is said depends on how busy the machine is
        ),
    ],
)
def test_openais_client_is_told_what_is_wrong(client, given, error, param, match):
    with pytest.raises(error, match=match) as caught:
        client.embeddings.create(**{"model": "minilm", "input": "a", **given})
    assert caught.value.body["param"] == param
    assert caught.value.body["type"] in ("invalid_request_error", "not_found_error", "server_error")


def test_without_the_token_only_health_is_told(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="a token is missing or wrong"):
            stranger.embeddings.create(model="minilm", input="a")
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    assert httpx.get(f"{server.url}/health").json() == {"ready": True}
    assert httpx.post(f"{server.url}/embed", json={"inputs": "a"}).status_code == 401


def test_texts_are_cut_where_the_request_says(client):
    long = "The guitar is loud. " * 110 + "The stock market fell. " * 110
    start, end = (embedded(client, long, extra_body={"truncate": truncate})[0] for truncate in (True, "START"))
    guitar, market = embedded(client, ["The guitar is loud.", "The stock market fell."])
    assert start @ guitar > start @ market + 0.2
    assert end @ market > end @ guitar + 0.2
    with pytest.raises(openai.BadRequestError, match="send it in parts, or ask for truncation"):
        embedded(client, long, extra_body={"truncate": "NONE"})


def test_short_requests_are_answered_while_a_long_one_runs(server, client):
    texts = [f"Sentence {k} is about {'very ' * (k % 60)}different things." for k in range(240)]
    patience = {"extra_headers": {"x-request-timeout-ms": "300000"}}
    ended: list[str] = []
    found: list[np.ndarray] = []

    def ask_all():
        found.append(embedded(client, texts, **patience))
        ended.append("all")

    asking = threading.Thread(target=ask_all)
    asking.start()
    # It has come when one of its calls runs; then it has many to go.
    assert eventually(lambda: live(server)["waiting_rows"] > 0 or ended)
    while asking.is_alive() and len(ended) < 5:
        assert server.post("/embed", json={"inputs": "short"}).status_code == 200
        ended.append("one")
    asking.join()
    assert ended.index("all") >= 1
    assert found[0].shape == (240, 384)
    for k in (0, 33, 239):
        np.testing.assert_allclose(found[0][k], embedded(client, texts[k])[0], atol=1e-4)


def test_two_thousand_texts_are_answered_in_their_order(server):
    texts = [f"w{1 + k % 98} w{1 + k % 7}{' w3' * (k % 30)}" for k in range(2000)]
    answers = server.post("/predict", json={"inputs": [[text] for text in texts]}).json()
    assert len(answers) == 2000
    for k in (0, 1, 777, 1999):
        alone = server.post("/predict", json={"inputs": texts[k]}).json()
        assert [each["label"] for each in alone] == [each["label"] for each in answers[k]]
        assert [each["score"] for each in alone] == pytest.approx([each["score"] for each in answers[k]], abs=1e-5)


def test_a_client_that_goes_has_the_rest_of_its_long_request_given_up(server):
    body = json.dumps({"model": "minilm", "inputs": ["different words " * 60] * 4000}).encode()
    head = f"POST /embed HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {len(body)}\r\n\r\n"
    ended = 'corewise_requests_total{model="minilm",outcome="cancelled",protocol="http",version="1"} 1.0'
    with socket.create_connection(("127.0.0.1", server.ports["http"])) as connection:
        connection.sendall(head.encode() + body)
        assert eventually(lambda: live(server)["waiting_rows"] > 0)
    assert eventually(lambda: ended in server.get("/metrics").text)
    assert eventually(lambda: live(server)["waiting_rows"] == 0)


# --- Hugging Face -------------------------------------------------------------------------------------------------


def test_hugging_faces_client_embeds_and_classifies(server):
    def ask(path):
        return InferenceClient(model=f"{server.url}/{path}", token=TOKEN)

    vectors = ask("embed").feature_extraction(SENTENCES)
    np.testing.assert_allclose(vectors, infer(server, SENTENCES), atol=1e-4)
    likeness = ask("similarity").sentence_similarity(SENTENCES[0], SENTENCES[1:])
    assert likeness == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-4)
    best = ask("predict").text_classification("w1 w2", top_k=2)
    scores = infer(server, ["w1 w2"], model="sorter")[0]
    expected = np.exp(scores) / np.exp(scores).sum()
    assert [each.label for each in best] == [CLASSES[k] for k in np.argsort(-expected)[:2]]
    assert [each.score for each in best] == pytest.approx(np.sort(expected)[::-1][:2].tolist(), abs=1e-4)
    plain = ask("predict").text_classification("w1 w2", function_to_apply="none")
    assert [each.score for each in plain] == pytest.approx(np.sort(scores)[::-1].tolist(), abs=1e-4)


def test_text_embeddings_inferences_paths(server):
    raw = server.post("/predict", json={"inputs": "w1", "raw_scores": True}).json()
    assert raw[0]["score"] == pytest.approx(infer(server, ["w1"], model="sorter").max(), abs=1e-4)
    info = server.get("/info?model=minilm").json()
    assert (info["model_id"], info["max_input_length"]) == ("minilm", 512)
    assert "embedding" in info["model_type"]
    several = server.get("/info")
    assert several.status_code == 400
    assert several.json()["error"].startswith("several models here fit: minilm, ranker, sorter")
    tokens = server.post("/tokenize", json={"inputs": "a guitar", "model": "minilm"}).json()[0]
    assert [token["text"] for token in tokens] == ["[CLS]", "a", "guitar", "[SEP]"]
    assert [token["special"] for token in tokens] == [True, False, False, True]
    assert (tokens[2]["start"], tokens[2]["stop"], tokens[0]["start"]) == (2, 8, None)
    text = server.post("/decode", json={"ids": [token["id"] for token in tokens], "model": "minilm"}).json()
    assert text == ["a guitar"]
    for path, long in (("/tokenize", {"inputs": "a " * 2**17}), ("/decode", {"ids": [101] * 2**16})):
        refused = server.post(path, json={**long, "model": "minilm"})
        assert refused.status_code == 413
        assert "more than 262144 bytes" in refused.json()["error"]
    normalized = server.post("/embed", json={"inputs": "", "truncate": True})
    assert normalized.json() == {"error": "text 0 is empty", "error_type": "Validation"}


def test_documents_are_ranked_by_both_apis(server):
    documents = ["w5 w6", "w1", "w2 w9 w9", "w70"]

    def logit(document):
        given = [
            {"name": name, "datatype": "BYTES", "shape": [1], "data": [text]}
            for name, text in (("text", "w1"), ("text_pair", document))
        ]
        return server.post("/v2/models/ranker/infer", json={"inputs": given}).json()["outputs"][0]["data"][0]

    logits = np.array([*map(logit, documents)])
    order = np.argsort(-logits).tolist()
    scores = 1 / (1 + np.exp(-logits))
    ranked = server.post("/rerank", json={"query": "w1", "texts": documents, "return_text": True}).json()
    assert [each["index"] for each in ranked] == order
    assert [each["text"] for each in ranked] == [documents[k] for k in order]
    assert [each["score"] for each in ranked] == pytest.approx(scores[order].tolist(), abs=1e-4)
    raw = server.post("/rerank", json={"query": "w1", "texts": documents, "raw_scores": True}).json()
    assert [each["score"] for each in raw] == pytest.approx(logits[order].tolist(), abs=1e-4)
    found = server.post("/v1/rerank", json={"model": "ranker", "query": "w1", "documents": documents, "top_n": 2})
    assert [each["index"] for each in found.json()["results"]] == order[:2]
    assert found.json()["usage"]["total_tokens"] == 4 + 7
    refused = server.post("/v1/rerank", json={"query": "w1", "documents": []})
    assert (refused.status_code, refused.json()["detail"]) == (400, "documents is empty; give at least one text")


# --- the Open Inference Protocol --------------------------------------------------------------------------------


def test_metadata_lists_texts_and_grpc_takes_pairs(server):
    inputs = server.get("/v2/models/ranker").json()["inputs"]
    assert [one["name"] for one in inputs] == ["tokens", "text", "text_pair"]
    assert inputs[1]["parameters"] == {"replaces_other_inputs": True}
    missing = infer(server, ["w1"], 400, model="ranker")
    assert missing == "the input text_pair is missing"
    headers = {"authorization": f"Bearer {TOKEN}"}
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        described = client.get_model_metadata("ranker", headers=headers)
        assert [one.name for one in described.inputs] == ["tokens", "text", "text_pair"]
        given = []
        for name, text in (("text", b"w1"), ("text_pair", b"w5 w6")):
            given.append(triton_grpc.InferInput(name, [1], "BYTES"))
            given[-1].set_data_from_numpy(np.array([text], object))
        found = client.infer("ranker", given, headers=headers).as_numpy("scores")[0, 0]
    ranked = server.post("/rerank", json={"query": "w1", "texts": ["w5 w6"], "raw_scores": True}).json()
    assert ranked[0]["score"] == pytest.approx(found, abs=1e-4)


def test_text_is_taken_as_it_is_and_padded_to_few_lengths(server):
    together = infer(server, SENTENCES)
    assert together.shape == (3, 384)
    alone = np.concatenate([infer(server, [text]) for text in SENTENCES])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        given = triton_grpc.InferInput("text", [1], "BYTES")
        given.set_data_from_numpy(np.array([SENTENCES[0].encode()], object))
        found = client.infer("minilm", [given], headers={"authorization": f"Bearer {TOKEN}"}).as_numpy("output_0")
    np.testing.assert_allclose(found[0], together[0], atol=1e-4)
    # The model's own 512 positions count, not the 128 that its tokenizer.json cuts at.
    assert infer(server, ["word " * 400]).shape == (1, 384)
    assert "602 tokens, the model takes 512" in infer(server, ["word " * 600], 400)
    assert "send it in parts" in infer(server, ["word " * 5000], 400)
    assert "there is no input 'text'" not in infer(server, ["x"], 400, datatype="FP32")


def test_tokens_outside_of_the_model_are_refused(server):
    def ask(tokens):
        return server.post("/v2/models/minilm/infer", json={"inputs": tokens})

    inputs = server.get("/v2/models/minilm").json()["inputs"]
    names = [one["name"] for one in inputs if one["datatype"] == "INT64"]
    tokens = [
        {"name": name, "datatype": "INT64", "shape": [1, 8], "data": [101, 2158, 102, 0, 0, 0, 0, 0]} for name in names
    ]
    tokens[1]["data"] = [1, 1, 1, 0, 0, 0, 0, 0]
    before = ask(tokens)
    assert before.status_code == 200
    # What is no word has no vector, and no part of another request in its place.
    outside = [{**tokens[0], "data": [101, 10_000_000, *tokens[0]["data"][2:]]}, tokens[1]]
    assert ask(outside).status_code == 400
    assert "the value 10000000 in row 0; give values from 0 to 30521" in ask(outside).json()["error"]
    long = [{**each, "shape": [1, 520], "data": [1] * 520} for each in tokens]
    assert "give at most 512" in ask(long).json()["error"]
    assert ask(tokens).json()["outputs"] == before.json()["outputs"]


def test_the_server_describes_its_paths_and_logs_no_errors(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/v1/models", "/embed", "/rerank", "/v1/rerank"} <= set(paths)
    assert "/v1/embeddings" in server.get("/docs").text
    assert (
        'corewise_requests_total{model="minilm",outcome="ok",protocol="http",version="1"}'
        in server.get("/metrics").text
    )
    assert not any("Traceback" in line for line in server.logged)
