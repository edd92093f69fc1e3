"""An artifact as an application of Ray Serve: what it is made of, and what is checked before a cluster is asked.

One application for each artifact, so that each has its own replicas, CPUs and route, is scaled by its own queue, and is
replaced without the others. Ray's multiplexing would put several into one process, where plans that were measured
alone would share cores.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corewise._version import __version__
from corewise.artifact import identity, read
from corewise.artifact.open import check_trusted
from corewise.cluster.connection import require_serve
from corewise.cluster.messages import packed
from corewise.cluster.settings import Settings
from corewise.common.errors import InputError
from corewise.search.retuning import BUDGET_S
from corewise.serving.host import Options
from corewise.serving.protocol import Limits
from corewise.serving.served import MAX_WAITING, Source, Trust
from corewise.serving.tokens import Tokens

QUEUE_S = 0.02
"""Replicas are added above this mean time in the queue."""
UP_S, DOWN_S, LOOK_BACK_S = 10.0, 300.0, 20.0
"""How long there must be too few replicas, or too many, before their number changes, by means over LOOK_BACK_S."""
WAITS, LEAST_REQUESTS = 4, 32
"""Requests in a replica for each row that it runs at once, and the least; a proxy keeps as many waiting."""
CONSTRUCTIONS = 2
"""Replicas that may fail to open before the application is given up."""
HEALTH_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many replicas there are, each on how many CPUs."""

    replicas: tuple[int, int] = (1, 1)
    """The fewest and the most."""
    cpus: int | None = None
    """By default as many as the artifact's plan has threads."""
    queue_s: float = QUEUE_S
    """The mean time in the queue that more replicas are started for, if their number may change."""
    drain_s: float = 30.0
    """How long a replica that is stopped may take for its requests."""
    retune_s: float = BUDGET_S
    surge: bool = True
    """Whether an update starts a new replica before an old one stops, which takes CPUs that are free."""

    def __post_init__(self) -> None:
        if self.cpus is not None and (not isinstance(self.cpus, int) or self.cpus < 1):
            raise InputError(f"a replica cannot have {self.cpus!r} CPUs", "give a whole number, 1 or more")
        if not self.queue_s > 0:
            raise InputError(f"the queue cannot be kept at {self.queue_s:g} s", "give more than 0")
        match self.replicas:
            case (int(least), int(most)) if 1 <= least <= most:
                return
            case (least, most):
                what = f"{least} to {most} replicas"
            case _:
                what = f"{self.replicas!r} replicas"
        raise InputError(f"there cannot be {what}", "give 1 or more, or the fewest and the most, e.g. 2 and 8")


def settings_of(source: Source, options: Options, scale: Scale) -> Settings:
    """What the replicas of an artifact are told. Raises ``ArtifactError`` if it cannot be read here, or not trusted."""
    folder = source.folder.absolute()
    artifact, digest = read(folder), identity(folder)
    check_trusted(artifact, artifact.manifest.build.engine)
    options.trust.check(artifact, digest)
    plan = artifact.manifest.plan
    return Settings(
        version=__version__,
        name=source.name,
        model_version=source.version,
        folder=folder,
        identity=digest,
        cpus=scale.cpus or plan.threads_per_instance * plan.instances,
        rows_at_once=plan.instances * plan.batch,
        retune_s=scale.retune_s,
        token_digests=Tokens(options.tokens).digests,
        timeout_s=options.limits.timeout_s,
        body_bytes=options.limits.body_bytes,
        max_waiting=options.max_waiting,
        memory_bytes=options.memory_bytes,
        shadow=options.shadow,
        trust=options.trust.everything,
        trusted=tuple(sorted(options.trust.digests)),
        cors_origins=options.cors_origins,
        traces=options.traces,
        check_finite=options.check_finite,
    )


def bound(settings: Settings, scale: Scale) -> Any:
    """The application, for ``ray.serve.run``."""
    from ray import serve

    from corewise.cluster.ingress import Ingress

    # Ray's proxy refuses more (503): handing a request to a replica only to be refused costs more than an answer.
    most_requests = min(2 * settings.max_waiting, max(LEAST_REQUESTS, WAITS * settings.rows_at_once))
    options: dict[str, Any] = {
        "name": settings.name,
        "ray_actor_options": {"num_cpus": settings.cpus},
        "max_ongoing_requests": most_requests,
        "max_queued_requests": most_requests,
        "graceful_shutdown_timeout_s": scale.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_S,
        "max_constructor_retry_count": CONSTRUCTIONS,
        # It costs more than many an answer; the server has its own log.
        "logging_config": {"enable_access_log": False},
        **_replicas(scale),
    }
    if scale.surge and "max_surge_percent" in inspect.signature(serve.deployment).parameters:
        options["max_surge_percent"] = 25
    return serve.deployment(**options)(Ingress).bind(packed(settings))


def _replicas(scale: Scale) -> dict[str, Any]:
    least, most = scale.replicas
    if least == most:
        return {"num_replicas": least}
    policy = {"policy_function": "corewise.cluster.scaling:QueueSeconds", "policy_kwargs": {"target_s": scale.queue_s}}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "upscale_delay_s": UP_S,
            "downscale_delay_s": DOWN_S,
            "look_back_period_s": LOOK_BACK_S,
            "policy": policy,
        }
    }


def deployment(
    folder: str | Path,
    *,
    name: str | None = None,
    replicas: int | tuple[int, int] = 1,
    cpus: int | None = None,
    queue_s: float = QUEUE_S,
    retune_s: float = BUDGET_S,
    timeout_s: float = 60.0,
    queue: int = MAX_WAITING,
    max_body_bytes: int = Limits.body_bytes,
    memory_bytes: int | None = None,
    drain_s: float = 30.0,
    surge: bool = True,
    tokens: str | Sequence[str] = (),
    trust: bool = False,
    shadow: float = 0.0,
    check_finite: bool = False,
) -> Any:
    """An artifact as an application of Ray Serve, for ``ray.serve.run`` and configurations of Ray Serve.

    Args:
        folder: the artifact, in a folder that all nodes see under the same path.
        name: the model's name in requests. Default: the folder's name without ``.cw``.
        replicas: number of replicas; or the least and the most of them, between which the number follows the queue.
        cpus: hardware threads of each replica. Default: as many as the artifact's plan has.
        queue_s: start more replicas if requests wait longer than this in the queue on average, in seconds.
        retune_s: seconds to search for a plan on each kind of machine for which the artifact has none; 0 skips the
            search.
        timeout_s: time limit, in seconds, of requests that set none themselves.
        queue: the most rows that may wait in a replica.
        max_body_bytes: the largest body of a request, unpacked.
        memory_bytes: memory of a replica and its engine together. Default: its CPUs' share of the node's memory.
        drain_s: seconds that the accepted requests of a replica may take when it is stopped.
        surge: start a new replica before an old one is stopped in an update, which takes free CPUs.
        tokens: bearer tokens, one of which each request must have; or a single token. Default: none is needed.
        trust: open artifacts whose payload is code (inductor, torch-int8).
        shadow: share of the requests, from 0 to 1, that fp32 answers too.
        check_finite: refuse inputs with NaN or infinities.

    Returns:
        The application, for ``ray.serve.run``.

    Raises:
        ArtifactError: the artifact is damaged.
        InputError: the number of replicas or CPUs, or the seconds in the queue, make no sense.
        MissingExtra: Ray is not installed.
        EngineError: the installed Ray has known security holes.

    Example:
        >>> import corewise.cluster, ray.serve  # doctest: +SKIP
        >>> app = corewise.cluster.deployment("model.cw", replicas=(2, 8))  # doctest: +SKIP
        >>> ray.serve.run(app, name="model", route_prefix="/model")  # doctest: +SKIP
    """
    require_serve()
    scale = Scale(
        replicas=(replicas, replicas) if isinstance(replicas, int) else replicas,
        cpus=cpus, queue_s=queue_s, drain_s=drain_s, retune_s=retune_s, surge=surge,
    )  # fmt: skip
    options = Options(
        limits=Limits(timeout_s=timeout_s, body_bytes=max_body_bytes),
        max_waiting=queue,
        tokens=(tokens,) if isinstance(tokens, str) else tuple(tokens),
        trust=Trust(everything=trust),
        shadow=shadow,
        memory_bytes=memory_bytes,
        check_finite=check_finite,
    )
    source = Source.of(str(folder))
    if name is not None:
        source = Source(name=name, version=source.version, folder=source.folder)
    return bound(settings_of(source, options, scale), scale)


def application(arguments: Mapping[str, Any]) -> Any:
    """``deployment`` for configurations of Ray Serve: ``import_path: corewise.cluster:application`` with ``args``."""
    given = dict(arguments)
    if isinstance(given.get("replicas"), list):
        given["replicas"] = tuple(given["replicas"])
    try:
        return deployment(**given)
    except TypeError as error:
        raise InputError(f"the application's args are wrong: {error}", "see corewise.cluster.deployment") from error
