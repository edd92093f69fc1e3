"""Pages for browsers: the live page, and how to call the server."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from corewise._version import __version__
from corewise.serving import protocol
from corewise.serving.models import Models
from corewise.serving.served import Served
from corewise.serving.statistics import HISTORY_S

LIVE, OPENAPI = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("live.html", "openapi.json"))
SAFE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
TEXT_PATHS = ("/v1/embeddings", "/v1/rerank", "/embed", "/similarity", "/rerank", "/predict", "/tokenize")
"""Described if a model takes texts."""
NOW_S = 5
"""The page's current rates are means over these last seconds."""
STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.55 system-ui,sans-serif;max-width:52rem;margin:0 auto}"
    "body{padding:1.25rem}code{font-size:.92em}"
    "pre{overflow-x:auto;padding:.75rem;border:1px solid #8884;border-radius:.4rem}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}"
)


def since(text: str) -> int:
    """From where a history is asked for: a Unix time, or 0 for all of it."""
    asked = int(text) if text.isascii() and text.isdecimal() and len(text) < 15 else 0
    return asked if asked > time.time() - HISTORY_S else 0


def live(models: Models, since: int = 0) -> bytes:
    """What the live page shows, as JSON: figures of each model, and its history after ``since`` (``since``)."""
    shown = [{**_figures(served), "history": served.statistics.history(since)} for served in models.served]
    return msgspec.json.encode(
        {
            "ready": models.ready,
            "draining": models.draining,
            "now": int(time.time()),
            "history_s": HISTORY_S,
            "version": __version__,
            "models": shown,
        }
    )


def _figures(served: Served) -> dict[str, Any]:
    shadow, outside = served.shadow, served.ranges.outside
    return {
        "name": served.name,
        "version": served.version,
        "ready": served.ready,
        "engine": served.manifest.build.engine,
        "precision": served.manifest.build.precision,
        "plan": served.plan_label,
        "wide": None if served.elastic is None else served.elastic.wide.layout_label,
        "images": None if served.photos is None else served.file_call,
        "waiting_rows": served.waiting_rows,
        "slowness": served.slowness,
        "restarts": served.remote.restarts,
        "started": int(served.statistics.started_s),
        "shadow": {"compared": shadow.compared, "sqnr_db": shadow.sqnr_db, "agreement": shadow.agreement}
        if shadow and shadow.compared
        else None,
        "outside": None if outside is None else asdict(outside),
        "now": asdict(served.statistics.recent(NOW_S)),
        **asdict(served.statistics.recent()),
    }


def docs(models: Sequence[Served]) -> str:
    """The page that says how to call the server and its models; in its commands HOST stands for the server."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>corewise: how to call it</title><style>{STYLE}</style><h1>How to call this server</h1>{INTRODUCTION}",
        "<table>",
        *(f"<tr><td><code>{escape(path)}</code><td>{escape(what)}" for path, what in PATHS),
        "</table>",
        *map(_model, models),
        "</html>",
    ]
    return "".join(parts)


INTRODUCTION = """<p>It speaks the <a href='https://github.com/kserve/open-inference-protocol'>Open Inference Protocol
v2</a> over HTTP and gRPC, with Triton's extensions for binary tensors, classification, model configuration, statistics
and streams: clients of Triton and KServe and perf_analyzer work unchanged. gRPC has server reflection and
<code>grpc.health.v1</code>. Programs find the same at <a href='/openapi.json'>/openapi.json</a>.
<p>A request can set its own time limit: <code>X-Request-Timeout-Ms</code>, the parameter <code>timeout</code>
(microseconds), or gRPC's deadline. If the server predicts from measurements that a request cannot be answered in
time, it refuses the request at once, with 503 and <code>Retry-After</code> (gRPC: RESOURCE_EXHAUSTED). If there is
not enough time for all requests, the less urgent ones are dropped first: the parameter <code>priority</code> is 1 for
the most urgent and 100 for the least; without it, it is 50.
<p>In JSON, NaN and infinite numbers are <code>null</code>; binary outputs keep them as they are."""

PATHS = (
    ("GET /v2/health/live, /v2/health/ready", "whether the process answers; whether every model does"),
    ("GET /v2/models/M", "inputs, with the ranges of their values, and outputs"),
    ("GET /v2/models/M/config", "its configuration in Triton's format"),
    ("POST /v2/models/M/infer", "run it on tensors"),
    (
        "POST /v2/models/M/classify",
        "name what is in an image (JPEG, PNG, WebP and others) or a recording (WAV, FLAC, Ogg, MP3)",
    ),
    ("POST /v2/models/M/detect", "find the objects in an image, for a detector"),
    (
        "POST /v1/embeddings, /v1/rerank",
        "texts to vectors in OpenAI's format; documents ranked in Cohere's and Jina's format",
    ),
    ("POST /embed, /similarity, /rerank, /predict, /tokenize", "texts, in Text Embeddings Inference's format"),
    ("GET /v1/models", "all models, as OpenAI lists them"),
    ("GET /v2/models/M/stats", "statistics of its requests"),
    ("GET /metrics", "metrics for Prometheus"),
)


def _model(served: Served) -> str:
    """The part of the page for one model."""
    parts = [f"<h2>{escape(served.name)}, version {escape(served.version)}</h2><table>"]
    for kind, tensors in (("takes", served.described_inputs()), ("gives", protocol.described(served.outputs))):
        for tensor in tensors:
            shape = ", ".join("any" if size < 0 else str(size) for size in tensor["shape"])
            ranges = ", ".join(
                f"{name.replace('_', ' ')} {number}" for name, number in tensor.get("parameters", {}).items()
            )
            parts.append(
                f"<tr><td>{kind}<td><code>{escape(tensor['name'])}</code><td>{tensor['datatype']} ({shape})"
                f"<td>{escape(ranges)}"
            )
    parts.append("</table>")
    if served.takes_files:
        verb, name = served.file_call or "classify", "cat.jpg" if served.audio is None else "speech.wav"
        command = f"curl --data-binary @{name} http://HOST/v2/models/{served.name}/{verb}"
        parts.append(f"<pre>{escape(command)}</pre>")
    if served.text is not None and served.text.pipeline.task == "vectors":
        embedded = json.dumps({"model": served.name, "input": ["a text"]})
        command = f"curl -H 'Content-Type: application/json' -d '{embedded}' http://HOST/v1/embeddings"
        parts.append(f"<pre>{escape(command)}</pre>")
    parts.append(f"<pre>{escape(_example(served))}</pre>")
    return "".join(parts)


def _example(served: Served) -> str:
    """A request in Python, of the right shape."""
    shapes = [[size or (1 if k == 0 else 16) for k, size in enumerate(spec.shape)] for spec in served.inputs]
    lines = ["import numpy as np, tritonclient.http as triton", 'client = triton.InferenceServerClient("HOST")']
    names = []
    for k, (spec, shape) in enumerate(zip(served.inputs, shapes, strict=True)):
        names.append(f"input{k}")
        datatype = protocol.DATATYPES[spec.dtype]
        lines.append(f'input{k} = triton.InferInput("{spec.name}", {shape}, "{datatype}")')
        lines.append(f'input{k}.set_data_from_numpy(np.zeros({shape}, "{spec.dtype}"))')
    lines.append(f'answer = client.infer("{served.name}", [{", ".join(names)}])')
    lines.append(f'answer.as_numpy("{served.outputs[0].name}")')
    return "\n".join(lines)


def openapi(models: Sequence[Served]) -> bytes:
    """The server's HTTP side as OpenAPI 3.1 (``openapi.json``), with its models' names."""
    return _openapi(
        tuple(sorted({one.name for one in models})),
        classifies=any(one.takes_files for one in models),
        detects=any(one.file_call == "detect" for one in models),
        takes_texts=any(one.text for one in models),
    )


@lru_cache(8)
def _openapi(names: tuple[str, ...], *, classifies: bool, detects: bool, takes_texts: bool) -> bytes:
    found: dict[str, Any] = json.loads(OPENAPI)
    found["info"]["version"] = __version__
    if names:
        found["components"]["parameters"]["name"]["schema"]["enum"] = names
    absent = tuple(path for path, there in (("/classify", classifies), ("/detect", detects)) if not there)
    found["paths"] = {
        path: calls
        for path, calls in found["paths"].items()
        if not path.endswith(absent) and (takes_texts or path not in TEXT_PATHS)
    }
    return msgspec.json.encode(found)
