"""``corewise serve``."""

import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from corewise.cli.declare import argument, grouped
from corewise.cli.environment import quiet_grpc, settle_ray
from corewise.cli.options import check_cluster
from corewise.cli.serve_options import (
    ClusterOptions,
    LogOptions,
    PortOptions,
    RequestOptions,
    SecurityOptions,
    server_options,
)
from corewise.cli.streams import StreamFailed, takes_more
from corewise.common.errors import CorewiseError, MissingExtra

if TYPE_CHECKING:
    from corewise.serving.host import Options
    from corewise.serving.server import Listening


PACKAGES = ("starlette", "uvicorn", "httptools", "grpc", "grpc_health", "grpc_reflection")
"""What the extra serve installs."""


@grouped
def command(
    artifacts: Annotated[
        list[str],
        argument(
            "ARTIFACT",
            panel="Artifacts",
            help="Folders that corewise optimize wrote, or NAME=FOLDER or NAME@VERSION=FOLDER.",
        ),
    ],
    ports: PortOptions,
    requests: RequestOptions,
    security: SecurityOptions,
    logs: LogOptions,
    cluster: ClusterOptions,
) -> None:
    """Serve artifacts over HTTP and gRPC with the Open Inference Protocol v2, under the plans that were measured.

    Requests are batched dynamically; one that is predicted to miss its deadline is refused at once (503). On SIGTERM
    the server finishes the accepted requests and ends. On SIGHUP it opens the artifacts again and replaces each one
    whose checks pass.

    With --ray each artifact is an application of Ray Serve, until this command ends. Run the command again with another
    artifact of the same name to replace the replicas one by one.

    Example: corewise serve model.cw --http 127.0.0.1:8000 --grpc 127.0.0.1:8001
    """
    check_cluster(cluster)
    if any(find_spec(name) is None for name in PACKAGES):
        raise MissingExtra("starlette", "serve", "serving")
    quiet_grpc()
    from corewise.serving.logs import to_stderr
    from corewise.serving.served import Source
    from corewise.serving.server import serve

    options = server_options(ports, requests, security, logs)
    to_stderr(logs.log_level)
    if cluster.ray is not None:
        _serve_on_ray(artifacts, options, cluster)
        return
    if not serve([Source.of(text) for text in artifacts], options, _Announcer(options)):
        raise CorewiseError(
            f"not every accepted request was answered in {requests.drain_s:g} s", "give a longer --drain"
        )


def _serve_on_ray(artifacts: list[str], options: "Options", cluster: ClusterOptions) -> None:
    assert cluster.ray is not None
    settle_ray(cluster.ray)
    from corewise.cluster.applications import Scale
    from corewise.cluster.serving import serve_on_ray
    from corewise.serving.served import Source

    scale = Scale(
        replicas=(cluster.replicas.least, cluster.replicas.most),
        cpus=cluster.cpus,
        queue_s=cluster.queue_s,
        drain_s=options.drain_s,
        retune_s=cluster.retune_s,
        surge=not cluster.no_surge,
    )
    sources = [Source.of(text) for text in artifacts]
    serve_on_ray(cluster.ray, sources, options, scale, route=cluster.route, on_event=_print_cluster_event)


def _print_cluster_event(what: str, value: Any) -> None:
    with suppress(StreamFailed):
        if what == "listening":
            for name, route in value.applications.items():
                print(f"deploying: {name} at {value.http}{route.rstrip('/')}/v2/models/{name}")
            if value.grpc is not None:
                print(f"deploying: gRPC on port {value.grpc}, to the application in the metadata 'application'")
        elif what == "ready":
            for replica in value:
                if replica["notes"]:
                    print(f"note: {replica['node']}: {replica['notes']}")
                print(f"ready: {replica['model']}, {replica['plan']}, {replica['node']}")
        elif what == "replaced":
            print(f"replaced: {value} was deployed again or deleted by another command")
        elif what == "draining":
            print("draining: accepted requests are finished, new ones are refused")
        else:
            print(f"note: {value}")
        print(end="", flush=True)


class _Announcer:
    """Prints what the server reports. The ports are printed when all artifacts are open, because one may be refused."""

    def __init__(self, options: "Options") -> None:
        self._options = options
        self._listening: Listening | None = None

    def __call__(self, what: str, value: Any) -> None:
        # The server goes on where nobody reads this any more.
        with suppress(StreamFailed):
            if what == "listening":
                self._listening = value
            elif what == "ready":
                self._print_ready(value.served)
            elif takes_more(sys.stdout):  # otherwise the end would wait for whoever reads this
                print("draining: accepted requests are finished, new ones are refused", flush=True)

    def _print_ready(self, served: Any) -> None:
        ports = {name: getattr(self._listening, name) for name in ("http", "grpc", "admin", "admin_grpc")}
        named = (
            f"{name.replace('_', '-')} " + (f"at unix:{place}" if isinstance(place, Path) else f"on port {place}")
            for name, place in ports.items()
            if place
        )
        print("listening: " + ", ".join(named))
        if url := _page(self._options, ports["http"]):
            print(f"page: {url} in a browser, and {url}/docs says how to call the models")
        for note in getattr(self._listening, "notes", ()):
            print(f"note: {note}")
        for model in served:
            for note in model.notes:
                print(f"note: {note}")
            build = model.manifest.build
            plan = model.plan_label
            print(f"ready: {model.name}, version {model.version}: {build.engine} {build.precision}, {plan}")
        print(end="", flush=True)


def _page(options: "Options", port: Any) -> str:
    """The live page's URL; empty where a browser cannot open it."""
    if not isinstance(port, int) or not isinstance(options.http, tuple) or options.tokens:
        return ""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.http[0], options.http[0])
    scheme = "http" if options.certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
