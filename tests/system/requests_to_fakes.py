"""Requests to artifacts of the fake engine, and what it answers."""

import numpy as np
from serving_tools import ARTIFACT

from corewise import artifact
from corewise.engines.fake import FakeSession

INPUTS, OUTPUTS = artifact.read(ARTIFACT).golden()
ROWS = INPUTS[0]


def tensor(rows, **more):
    return {"name": "input", "shape": list(rows.shape), "datatype": "FP32", "data": rows.reshape(-1).tolist(), **more}


def infer(server, rows, model="toy", headers=None, **more):
    body = {"inputs": [tensor(rows)], **more}
    return server.post(f"/v2/models/{model}/infer", json=body, headers=headers)


def output(response):
    found = response.json()["outputs"][0]
    return np.array(found["data"], np.float32).reshape(found["shape"])


def expected(rows):
    """What the fake engine answers."""
    session = FakeSession(
        inputs=1,
        outputs=artifact.read(ARTIFACT).manifest.outputs,
        noise=0.0,
        seconds_per_call=0.0,
        seconds_per_item=0.0,
        fails_above=np.inf,
        dies_above=np.inf,
    )
    return session.run([rows])[0]
