"""How raw items become a model's inputs and its outputs become answers: data in the artifact, never code."""

from dataclasses import dataclass, field, replace
from typing import Literal

from corewise.common.detections import Head
from corewise.records.build import Plan, TensorSpec
from corewise.records.report import AudioPreprocess, Preprocess

TextTask = Literal["vectors", "classes", "tokens", "scores"]
Pooling = Literal["mean", "cls", "last", "max", "own", "none"]
"""What makes one vector of a text's token vectors; ``own``: the model does it in a way that is not known."""
TokenRole = Literal["ids", "mask", "types", "positions"]
Activation = Literal["softmax", "sigmoid", "none"]

STRICT = {"extra": "forbid"}
"""pydantic's configuration: a field that this corewise does not know is an error, because it would change answers."""


@dataclass(frozen=True, kw_only=True)
class TokenInput:
    """One input of the model, (N, tokens), and what of a tokenized text it takes."""

    __pydantic_config__ = STRICT

    name: str
    dtype: str
    role: TokenRole

    @classmethod
    def of(cls, spec: TensorSpec) -> "TokenInput":
        """The input with the role that its name tells: ``attention_mask``, ``token_type_ids``, ``position_ids``."""
        name = spec.name.lower()
        words: dict[str, TokenRole] = {"mask": "mask", "type": "types", "segment": "types", "position": "positions"}
        role: TokenRole = next((role for word, role in words.items() if word in name), "ids")
        return cls(name=spec.name, dtype=spec.dtype, role=role)


@dataclass(frozen=True, kw_only=True)
class TextPipeline:
    """How texts become a model's inputs, and its outputs answers.

    The model's program includes pooling and normalization, so that every engine runs them: ``pooling`` and
    ``normalize`` say what its vectors are. What the answers need beyond that is the activation and the labels.
    """

    __pydantic_config__ = STRICT

    kind: Literal["text"] = "text"
    task: TextTask
    """``vectors`` (N, D), or one (tokens, D) for each text without pooling; ``classes`` and ``scores`` of texts or
    pairs; ``tokens``: spans with labels."""
    pairs: bool = False
    """Items are pairs of texts, else single texts."""
    tokenizer: str = "tokenizer.json"
    """A file of the artifact, in the format of Hugging Face's tokenizers."""
    tokenizer_sha256: str
    inputs: tuple[TokenInput, ...]
    """In the order of the model's inputs."""
    max_length: int
    """The most tokens of an item, special ones included; longer items are cut at the side ``truncation``."""
    fixed_length: int | None = None
    """The tokens of every call, if the program takes only one length."""
    truncation: Literal["right", "left"] = "right"
    pad_id: int = 0
    pooling: Pooling = "none"
    normalize: bool = False
    dimensions: tuple[int, ...] = ()
    """How many leading dimensions of a vector may be used alone, as the model was trained (Matryoshka)."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Texts that go before each text, by name, such as ``query`` and ``passage``."""
    default_prompt: str | None = None
    """The name of the prompt that is used when none is named."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the outputs."""
    activation: Activation = "none"
    """What makes probabilities or scores of the model's outputs."""

    @property
    def pads(self) -> bool:
        """Whether texts may be padded: only a model that takes an attention mask answers them as if they were not."""
        return any(each.role == "mask" for each in self.inputs)

    @property
    def noun(self) -> str:
        """What an item is, in words."""
        return "pair of texts" if self.pairs else "text"


PACKED_INPUTS = ("input_ids", "positions", "segments")
"""The inputs of a packed program in their order, int64 (rows, tokens); segments number a row's texts from 1 on."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a second program answers rows that have several texts each, where that takes less time.

    It takes ``PACKED_INPUTS`` and gives vectors (rows, texts, D).
    """

    __pydantic_config__ = STRICT

    rows: int
    """Rows of each call."""
    tokens: int
    """Tokens of a row."""
    texts: int
    """The most texts of a row."""
    ms: float
    """What a call takes while all instances run, in the milliseconds of the table of the winner's own calls."""
    opening_ms: float = 0.0
    """What it takes to open the program."""

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens, self.texts) < 1 or not (self.ms > 0 and self.opening_ms >= 0):
            raise ValueError("packed calls have rows, tokens and texts of 1 or more, and take time")

    def under(self, plan: Plan) -> Plan:
        """The plan for packed calls, with the threads and instances of ``plan``."""
        return replace(plan, batch=self.rows)


@dataclass(frozen=True, kw_only=True)
class PhotoPlan:
    """How photos are answered from their files: the threads that decode, beside the instances of a plan."""

    plan: Plan
    decoders: int


@dataclass(frozen=True, kw_only=True)
class PhotoRate:
    """What was measured under it."""

    plan: PhotoPlan
    per_s: float
    decoding: float
    """The share of the processor time used that decoding took, with resizing."""
    memory_bytes: int = 0
    """Memory of the process that ran it."""


ImageTask = Literal["classes", "boxes", "vectors"]


@dataclass(frozen=True, kw_only=True)
class MediaPipeline:
    """What a model's outputs for images or recordings are. An artifact's manifest and golden outputs say it."""

    task: ImageTask
    """``classes`` (N, classes), ``boxes`` of a detector, else ``vectors``: the output as it is."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the outputs."""
    activation: Activation = "none"
    """What makes probabilities of the model's outputs."""
    head: Head | None = None
    """How a detector's outputs are read."""
    shape: tuple[int | None, ...] = ()
    """An input's shape if the model takes items of their own shapes and it is known: ``None`` for what may vary."""

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the model takes an input of that shape."""
        return len(shape) != len(self.shape) or all(
            most in (None, side) for side, most in zip(shape, self.shape, strict=True)
        )

    def label(self, number: int) -> str:
        """The name of a class; its number, where it has none."""
        return self.labels[number] if 0 <= number < len(self.labels) else str(number)


@dataclass(frozen=True, kw_only=True)
class ImagePipeline(MediaPipeline):
    """How images become a model's input, and its output answers."""

    preprocess: Preprocess

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the model takes an input of that shape; only photos that keep theirs may become another."""
        if self.preprocess.fit != "keep" or len(shape) != len(self.shape):
            return True
        if self.preprocess.dtype == "uint8":  # as pixels: (H, W, C)
            shape = (shape[2], *shape[:2])
        return super().takes(shape)


@dataclass(frozen=True, kw_only=True)
class AudioPipeline(MediaPipeline):
    """How recordings become a model's input, and its output answers."""

    preprocess: AudioPreprocess
    ragged: bool = False
    """Whether answers have several dimensions, such as scores of each of a recording's windows."""
