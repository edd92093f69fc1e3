"""Call a server over HTTP with nothing but the standard library and NumPy: the Open Inference Protocol, binary tensors.

python examples/client_http.py http://127.0.0.1:8000 digits
"""

import json
import sys
import urllib.request

import numpy as np

DTYPES = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4", "UINT8": "u1"}
LENGTH = "Inference-Header-Content-Length"
TIMEOUT_MS = 1000


def metadata(url: str, model: str) -> dict:
    """The model's inputs and outputs."""
    with urllib.request.urlopen(f"{url}/v2/models/{model}") as response:
        return json.load(response)


def infer(url: str, model: str, tensors: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Run the model on named tensors, each with its datatype; the outputs by name.

    Raises ``urllib.error.HTTPError``: 400 for a wrong request, 503 where it could not be answered in time.
    """
    described, payload = [], b""
    for name, (datatype, array) in tensors.items():
        data = array.astype(DTYPES[datatype]).tobytes()
        size = {"binary_data_size": len(data)}
        described.append({"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": size})
        payload += data
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    request = urllib.request.Request(
        f"{url}/v2/models/{model}/infer",
        data=head + payload,
        headers={LENGTH: str(len(head)), "X-Request-Timeout-Ms": str(TIMEOUT_MS)},
    )
    with urllib.request.urlopen(request) as response:
        body, length = response.read(), int(response.headers[LENGTH])
    answer, at, outputs = json.loads(body[:length]), length, {}
    for output in answer["outputs"]:
        size = output["parameters"]["binary_data_size"]
        values = np.frombuffer(body[at : at + size], DTYPES[output["datatype"]])
        outputs[output["name"]] = values.reshape(output["shape"])
        at += size
    return outputs


def main(url: str, model: str) -> None:
    """Send one row of random numbers and print what comes back."""
    random = np.random.default_rng(0)
    tensors = {}
    for spec in metadata(url, model)["inputs"]:
        if spec["datatype"] == "BYTES":  # the text that a model of texts takes in place of tokens
            continue
        # -1 is a dimension of any size; the first one is the batch.
        shape = [1 if k == 0 else 16 if size < 0 else size for k, size in enumerate(spec["shape"])]
        tensors[spec["name"]] = (spec["datatype"], random.uniform(0, 1, shape))
    for name, array in infer(url, model, tensors).items():
        print(f"{name} {array.shape}: {np.array2string(array[0].reshape(-1)[:10], precision=3)}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
