"""What people see in a browser: the live page, and how to call the server."""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from corewise import __version__
from corewise.serving import protocol
from corewise.serving.served import Served

LIVE = Path(__file__).with_name("live.html").read_text(encoding="utf-8")
SAFE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.55 system-ui,sans-serif;max-width:52rem;margin:0 auto}"
    "body{padding:1.25rem}code{font-size:.92em}"
    "pre{overflow-x:auto;padding:.75rem;border:1px solid #8884;border-radius:.4rem}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}"
)


def figures(served: Served) -> dict[str, Any]:
    """What the live page shows of a model."""
    shadow = served.shadow
    return {
        "name": served.name,
        "version": served.version,
        "ready": served.ready,
        "engine": served.manifest.build.engine,
        "precision": served.manifest.build.precision,
        "plan": served.plan.label,
        "waiting_rows": served.waiting_rows,
        "restarts": served.remote.restarts,
        "shadow": {"compared": shadow.compared, "sqnr_db": shadow.sqnr_db} if shadow and shadow.compared else None,
        **asdict(served.statistics.recent()),
    }


def docs(models: Sequence[Served]) -> str:
    """How to call each model, with commands that work as they stand."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>corewise: how to call it</title><style>{STYLE}</style><h1>How to call this server</h1>",
        "<p>It speaks the <a href='https://github.com/kserve/open-inference-protocol'>Open Inference Protocol v2</a> "
        "over HTTP and gRPC, with binary tensors (<code>Inference-Header-Content-Length</code>): clients of Triton and "
        "KServe work unchanged. The same as data: <a href='/openapi.json'>/openapi.json</a>.</p>",
        "<table>",
    ]
    for path, what in PATHS:
        parts.append(f"<tr><td><code>{escape(path)}</code><td>{escape(what)}")
    parts.append("</table>")
    for served in models:
        parts.append(f"<h2>{escape(served.name)}, version {escape(served.version)}</h2><table>")
        for kind, specs in (("takes", served.inputs), ("gives", served.outputs)):
            for one in protocol.described(specs):
                shape = ", ".join("any" if size < 0 else str(size) for size in one["shape"])
                parts.append(f"<tr><td>{kind}<td><code>{escape(one['name'])}</code><td>{one['datatype']} ({shape})")
        parts.append("</table>")
        if served.manifest.preprocess is not None:
            command = f"curl --data-binary @cat.jpg http://HOST/v2/models/{served.name}/classify"
            parts.append(f"<pre>{escape(command)}</pre>")
        parts.append(f"<pre>{escape(_example(served))}</pre>")
    parts.append(
        "<p>A request may say how long it has: <code>X-Request-Timeout-Ms</code>, the parameter <code>timeout</code> "
        "(microseconds), or gRPC's deadline. Where measurements say that it cannot be answered in time it is refused "
        "at once, with 503 and <code>Retry-After</code> (gRPC: RESOURCE_EXHAUSTED). <code>priority</code>, a parameter "
        "too (the higher, the more urgent), decides who yields.</p></html>"
    )
    return "".join(parts)


PATHS = (
    ("GET /v2/health/live, /v2/health/ready", "whether the process answers; whether every model does"),
    ("GET /v2/models/M", "inputs and outputs"),
    ("POST /v2/models/M/infer", "run it on tensors"),
    ("POST /v2/models/M/classify", "run it on a JPEG, PNG or WebP image"),
    ("GET /v2/models/M/stats", "what became of its requests"),
    ("GET /metrics", "for Prometheus"),
)


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


def openapi(models: Sequence[Served]) -> dict[str, Any]:
    """The server's HTTP side as OpenAPI 3.1."""
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    wrong = {
        str(status): {"description": what, "content": {"application/json": {"schema": error}}}
        for status, what in (
            (400, "not a request that the model takes"),
            (401, "no token"),
            (404, "no such model"),
            (405, "no such method"),
            (408, "the body came too slowly"),
            (413, "too large"),
            (415, "not a known kind or encoding of body"),
            (500, "the call failed"),
            (501, "not supported by this model"),
            (503, "not now"),
        )
    }

    def answered(schema: dict[str, Any], **content: Any) -> dict[str, Any]:
        told = {"description": "the answer", "content": {"application/json": {"schema": schema}, **content}}
        return {"200": told, **wrong}

    anything: dict[str, Any] = {"type": "object"}
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": sorted({m.name for m in models}) or ["model"]},
    }
    timeout = {"name": "X-Request-Timeout-Ms", "in": "header", "schema": {"type": "number", "exclusiveMinimum": 0}}
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "datatype": {"type": "string", "enum": list(protocol.DTYPES)},
            "parameters": anything,
            "data": {"type": "array"},
        },
    }
    asked = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": anything,
            "inputs": {"type": "array", "items": tensor},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}, "parameters": anything},
                },
            },
        },
    }
    given = {**asked, "required": ["model_name", "outputs"]}
    given["properties"] = {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": tensor},
    }
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    def get(schema: dict[str, Any] = anything, parameters: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        return {"get": {"parameters": list(parameters), "responses": answered(schema)}}

    model = "/v2/models/{name}"
    image = {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}, "required": True}
    top = {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 100}}
    of_images = any(one.manifest.preprocess for one in models)
    classify = {
        f"{model}/classify": {
            "post": {"parameters": [name, timeout, top], "requestBody": image, "responses": answered(anything)}
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "corewise", "version": __version__},
        "paths": {
            "/v2": get(),
            "/v2/health/live": get(),
            "/v2/health/ready": get(),
            model: get(parameters=[name]),
            f"{model}/ready": get(parameters=[name]),
            f"{model}/stats": get(parameters=[name]),
            f"{model}/infer": {
                "post": {
                    "parameters": [name, timeout],
                    "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
                    "responses": answered(given, **binary),
                }
            },
            **(classify if of_images else {}),
        },
    }
