"""What the replicas of a Ray Serve application are told: a record, which crosses as JSON."""

from dataclasses import dataclass
from pathlib import Path

from corewise.serving.host import Options
from corewise.serving.protocol import Limits
from corewise.serving.served import Source, Trust
from corewise.serving.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it; equal settings are the same version of an application, so that nothing is replaced."""

    version: str
    """The version of the corewise that made the application."""
    name: str
    model_version: str
    folder: Path
    """The artifact's folder, which all nodes see."""
    identity: str
    """The artifact's identity."""
    cpus: int
    """Hardware threads that Ray gives each replica."""
    rows_at_once: int
    """Rows of the calls that the artifact's plan runs at a time."""
    retune_s: float
    token_digests: tuple[str, ...]
    """The tokens themselves stay where they are: a cluster shows what its applications are told."""
    timeout_s: float
    body_bytes: int
    max_waiting: int
    memory_bytes: int | None
    shadow: float
    trust: bool
    trusted: tuple[str, ...]
    cors_origins: tuple[str, ...]
    traces: bool
    check_finite: bool

    @property
    def source(self) -> Source:
        """The artifact, with its name and version."""
        return Source(name=self.name, version=self.model_version, folder=self.folder)

    @property
    def tokens(self) -> Tokens:
        """Those that requests need."""
        return Tokens.of_digests(self.token_digests)

    @property
    def vouched_for(self) -> Trust:
        """Which payloads that are code it may open."""
        return Trust(everything=self.trust, digests=frozenset(self.trusted))

    def options(self, memory_bytes: int) -> Options:
        """Those of a process with this much memory, unless another limit was named."""
        return Options(
            limits=Limits(timeout_s=self.timeout_s, body_bytes=self.body_bytes),
            max_waiting=self.max_waiting,
            trust=self.vouched_for,
            shadow=self.shadow,
            memory_bytes=self.memory_bytes or memory_bytes,
            cors_origins=self.cors_origins,
            traces=self.traces,
            check_finite=self.check_finite,
        )
