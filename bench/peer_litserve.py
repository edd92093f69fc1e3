"""LitServe's server for ``peers.py`` and ``elastic_curve.py``, a file of its own because its workers import it.

    python -m bench.peer_litserve --port P [--artifact ART]

Its requests are JSON, so the tensors come and go in base64.
"""

import base64

import litserve as ls
import numpy as np
from fastapi import Request

from bench.peer_servers import BATCH, WAIT_S, Model, parser_of


class Api(ls.LitAPI):  # type: ignore[misc]
    """The model with LitServe's batching."""

    artifact: str | None = None

    def setup(self, device: str) -> None:
        self.model = Model(self.artifact)

    def decode_request(self, request: Request) -> np.ndarray:
        return self.model.row(base64.b64decode(request["tensor"]))  # by now it is what its JSON says

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model.run(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> str:
        return base64.b64encode(output.tobytes()).decode()


def main() -> None:
    """Serve until killed."""
    options = parser_of(__doc__).parse_args()
    api = Api(max_batch_size=BATCH, batch_timeout=WAIT_S)
    api.artifact = options.artifact
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
