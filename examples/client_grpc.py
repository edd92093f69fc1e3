"""Call a server over gRPC with Triton's client, unchanged.

Needs ``pip install 'tritonclient[grpc]'``, in another environment than the server's: it takes an older protobuf.

python examples/client_grpc.py 127.0.0.1:8001 digits
"""

import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import triton_to_np_dtype

DEADLINE_S = 1.0


def main(address: str, model: str) -> None:
    """Send one row of random numbers and print what comes back."""
    random = np.random.default_rng(0)
    with triton.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata(model)
        tensors = []
        for spec in metadata.inputs:
            # -1 is a dimension of any size; the first one is the batch.
            shape = [1 if k == 0 else 16 if size < 0 else size for k, size in enumerate(spec.shape)]
            tensors.append(triton.InferInput(spec.name, shape, spec.datatype))
            values = random.uniform(0, 1, shape).astype(triton_to_np_dtype(spec.datatype))
            tensors[-1].set_data_from_numpy(values)
        # What cannot be answered within the deadline is refused at once: StatusCode.RESOURCE_EXHAUSTED.
        answer = client.infer(model, tensors, client_timeout=DEADLINE_S)
        for spec in metadata.outputs:
            array = answer.as_numpy(spec.name)
            print(f"{spec.name} {array.shape}: {np.array2string(array[0].reshape(-1)[:10], precision=3)}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
