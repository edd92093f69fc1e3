"""The only room that imports Ray: bulk jobs, here or on the nodes of a cluster, and applications of Ray Serve.

``deployment`` and ``application`` are for programs and configurations of Ray Serve.
"""

from typing import Any

__all__ = ["application", "deployment"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from corewise.cluster import applications

        return getattr(applications, name)
    raise AttributeError(f"module 'corewise.cluster' has no attribute {name!r}")
