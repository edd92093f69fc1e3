"""All that is known about one optimization."""

from dataclasses import dataclass
from typing import Literal

from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Requirements
from corewise.records.measurement import LoadRun, Rates
from corewise.records.reason import Reason
from corewise.records.trial import State, Trial
from corewise.records.tuned import Elasticity


@dataclass(frozen=True, kw_only=True)
class LosingTrial:
    """A trial that was not chosen, and why."""

    build: Build
    state: State
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The winner, how much faster than the baseline it is, and why each other trial lost."""

    winner: Build
    plan: Plan
    throughput_per_s: float
    baseline_throughput_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    reason: Reason
    losers: tuple[LosingTrial, ...]
    warnings: tuple[Reason, ...] = ()
    certified: LoadRun | None = None
    """For an SLO: the load that confirmed the winner's rate; ``None`` if nothing meets the SLO."""
    elasticity: Elasticity | None = None
    """What was measured of an elastic plan; ``None`` for one thread, without time for it, and in older reports."""

    @property
    def elastic(self) -> ElasticPlan | None:
        """What runs in place of the plan; ``None`` if one layout is as good."""
        return None if self.elasticity is None else self.elasticity.chosen


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an RGB image becomes a model's input (NCHW float32): pixels in 0..1, resized, cropped, normalised.

    ``fit`` says how it becomes a square of ``crop`` pixels: ``crop`` resizes the shorter side to ``resize`` and cuts
    out the middle, ``squash`` resizes both sides to ``resize`` and cuts out the middle, ``letterbox`` resizes the
    longer side to ``crop`` and fills the rest with the grey level ``fill``. With ``keep`` it becomes no square: the
    shorter side is resized to ``resize``, or to less where the longer one would be over ``longest``.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    fit: Literal["crop", "squash", "letterbox", "keep"] = "crop"
    longest: int = 1333
    """With ``keep``: the most pixels of the longer side."""
    multiple: int = 1
    """With ``keep``: both sides are rounded down to a multiple of this many pixels."""
    fill: int = 114
    bgr: bool = False
    """Whether the model takes blue first; ``mean`` and ``std`` are in the model's order."""
    decode: Literal["full", "scaled"] = "full"
    """``scaled``: a large JPEG is decoded at a half, a quarter or an eighth of its size, if ``sharpness`` allows."""
    sharpness: float = 2.0
    """How many pixels scaled decoding leaves, along each side, for each pixel of the resized image; at least 1."""
    dtype: Literal["float32", "uint8"] = "float32"
    """``uint8``: the engine takes the pixels, (N, crop, crop, C), and normalizes them itself; float32 it takes too."""
    origin: str | None = None
    """Whose preprocessing it is, such as ``timm's pretrained_cfg``, where the model brought it."""
    function: str | None = None
    """The user's ``module:function`` (PIL image -> array) that does it instead of all the above."""


@dataclass(frozen=True, kw_only=True)
class AudioPreprocess:
    """How a recording becomes a model's input, float32.

    The mean of its channels is resampled to ``rate_hz``, brought to the length ``seconds``, and normalised.
    """

    rate_hz: int
    """Frames per second."""
    seconds: float | None = None
    """The length of all inputs; ``None`` for each recording's own. The end of a longer recording is cut off."""
    pads: bool = True
    """Whether a recording that is shorter than ``seconds`` is padded with ``padding``, else it keeps its length."""
    padding: float = 0.0
    normalize: bool = False
    """Whether each input gets a mean of 0 and a variance of 1, its padding included."""
    shortest: int = 0
    """The frames of the shortest sample: a recording with fewer is not answered, because that was not verified."""
    layout: Literal["frames", "channels"] = "frames"
    """The shape of an input: (frames,), or (1, frames) for ``channels``."""
    origin: str | None = None
    """Whose preprocessing it is, such as ``its preprocessor_config.json``, where the model brought it."""
    function: str | None = None
    """The user's ``module:function`` that makes the input of the resampled and cut (frames,) and ``rate_hz``."""


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """How long texts are, in tokens, and what their padding costs: shares of all tokens that a model is given."""

    median: int
    p95: int
    longest: int
    most: int
    """What the model takes; longer texts are cut."""
    cut: float
    """The share of texts that are cut."""
    padding: float
    """Share of padding if texts of about one length share calls."""
    padding_unsorted: float
    """Share of padding if texts share calls in their own order."""


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """Where the samples came from and how they were split."""

    source: str
    fingerprint: str
    calibration: int
    holdout: int
    seed: int
    labelled: bool
    preprocess: Preprocess | None = None
    tokens: TokenFacts | None = None
    """The lengths of samples that are texts."""
    audio: AudioPreprocess | None = None
    """How samples that were recordings became inputs."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is known about one optimization; ``show`` prints it and the artifact keeps it."""

    model: str
    created: str
    versions: dict[str, str]
    cpu: Cpu
    requirements: Requirements
    samples: SampleFacts
    trials: tuple[Trial, ...]
    finals: tuple[Rates, ...]
    choice: Choice
    wall_s: float
    peak_memory_bytes: int
    notes: tuple[Reason, ...] = ()
    """Facts about the model that limited the search, e.g. why it could not be exported."""

    @property
    def winner(self) -> Trial:
        """The chosen build's trial."""
        return next(trial for trial in self.trials if trial.build == self.choice.winner)
