"""The messages of ``open_inference.proto``, from its compiled description.

Made with ``python -m grpc_tools.protoc -I. --descriptor_set_out=open_inference.desc open_inference.proto``. They live
in a pool of their own: clients define the same names, and protobuf's default pool may hold only one of each.
"""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

_files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.desc").read_bytes())
_pool = descriptor_pool.DescriptorPool()
for _file in _files.file:
    _pool.Add(_file)


def message(name: str) -> Any:
    """The class of a message, e.g. ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


_methods = {
    method.name: (message(method.input_type.name), message(method.output_type.name))
    for method in _pool.FindServiceByName(SERVICE).methods
}
REPOSITORY = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
"""Triton's calls that change what is served: for the admin port."""
EXTENSIONS = {
    name: classes for name, classes in _methods.items() if name in ("ModelConfig", "ModelStreamInfer", *REPOSITORY)
}
"""Triton's calls beside the protocol's own: each one's request and response."""
METHODS = {name: classes for name, classes in _methods.items() if name not in EXTENSIONS}
"""The protocol's calls, and statistics: each one's request and response."""


def files() -> list[bytes]:
    """The serialized descriptions, for a server that tells them to its clients."""
    return [file.SerializeToString() for file in _files.file]
