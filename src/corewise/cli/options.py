"""Options that several commands share: the model, the samples and how they are prepared, the cluster."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from corewise.cli.declare import argument, flag, option
from corewise.cli.quantities import above_zero, choice, duration_or_zero, numbers, whole
from corewise.common.errors import InputError

if TYPE_CHECKING:
    from corewise.samples import RawSamples, Samples

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Fit = Literal["crop", "squash", "letterbox", "keep"]
OWN = "the model's own, else "
"""Before the default of what models bring."""


def check_cluster(options: Any) -> None:
    """Raise ``InputError`` for an option of a cluster without ``--ray``: it would have no effect."""
    for field in fields(options):
        if options.ray is None and getattr(options, field.name) != field.default:
            name = get_args(field.type)[1].default  # where typer keeps the first name of an annotated option
            raise InputError(f"{name} is for a cluster", f"give --ray ADDRESS too, or leave out {name}")


ModelReference = Annotated[
    str,
    argument(
        "MODEL",
        panel="Model",
        help="FILE.py:FUNCTION or MODULE:FUNCTION that returns the model, a torch.export .pt2 file, or a name after "
        "st: (sentence-transformers), hf:, timm: or torchvision:.",
    ),
]
Pooling = Literal["mean", "cls", "max", "last", "none"]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts become inputs."""

    tokenizer: Annotated[
        Path | None,
        option(
            "--tokenizer",
            panel="Texts",
            metavar="tokenizer.json",
            help="The model's tokenizer, if it takes token ids and brings none; st: and hf: models bring theirs.",
        ),
    ] = None
    pooling: Annotated[
        Pooling | None,
        option(
            "--pooling",
            panel="Texts",
            metavar="METHOD",
            parse=choice(*get_args(Pooling)),
            help="Make one vector of each text: mean, cls, max or last of its token vectors, or none. For hf: and "
            "models with --tokenizer; st: models bring their own.",
        ),
    ] = None

    def check(self) -> None:
        """Raise ``InputError`` for a file that is not there, before any work is done."""
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise InputError(f"there is no file {self.tokenizer}", "give a tokenizer.json to --tokenizer")


ArtifactPath = Annotated[Path, argument("ARTIFACT", panel="Artifact", help="A folder that corewise optimize wrote.")]
RetuneTime = Annotated[
    float,
    option(
        "--retune",
        panel="Cluster",
        metavar="TIME",
        parse=duration_or_zero,
        help="How long to search for a plan on each kind of machine for which the artifact has none; 0 skips the "
        "search.",
        default="30s",
    ),
]
AsJson = Annotated[bool, flag("--json", panel="Output", help="Print JSON and nothing else.")]
ModelOfArtifact = Annotated[
    str | None,
    option(
        "--model",
        panel="Model",
        metavar="FILE.py:FUNCTION",
        help="A function that returns the model; needed only if the model could not be exported.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which samples, and how they are split."""

    samples: Annotated[
        str,
        option(
            "--samples",
            panel="Samples",
            metavar="PATH",
            help="A folder of images or recordings (with class folders or labels.csv), a file of texts (.txt, .csv, "
            ".tsv, .jsonl, .parquet), an .npz or .safetensors file, or FILE.py:FUNCTION.",
        ),
    ]
    calibration: Annotated[
        int | None,
        option(
            "--calibration",
            panel="Samples",
            metavar="N",
            parse=whole(1),
            help="How many samples to calibrate int8 with. Accuracy is judged on the others.",
            default="2 of 5, at most 200",
        ),
    ] = None
    seed: Annotated[
        int,
        option(
            "--seed",
            panel="Samples",
            metavar="N",
            parse=whole(0),
            help="Seed of the random split into calibration samples and the others.",
        ),
    ] = 0
    max_samples: Annotated[
        int | None,
        option(
            "--max-samples",
            panel="Samples",
            metavar="N",
            parse=whole(2),
            help="Read at most N samples, drawn at random with --seed; the others are not decoded.",
            default="all; 2,000 of a folder or of a file of texts",
        ),
    ] = None
    text: Annotated[
        str | None,
        option(
            "--text",
            panel="Samples",
            metavar="COLUMN",
            help="The column with the text, in a .csv, .tsv, .jsonl or .parquet file.",
            default="text or sentence",
        ),
    ] = None
    pair: Annotated[
        str | None,
        option("--pair", panel="Samples", metavar="COLUMN", help="The column with the second text of a pair."),
    ] = None
    label: Annotated[
        str | None,
        option(
            "--label",
            panel="Samples",
            metavar="COLUMN",
            help="The column with the label.",
            default="label or labels, if there is one",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How a recording becomes an input, where the model does not say so."""

    rate_hz: Annotated[
        int | None,
        option(
            "--sample-rate",
            panel="Recordings",
            metavar="HZ",
            parse=whole(1),
            help="Sample rate that the model takes; recordings of other rates are resampled.",
            default="that of an hf: model",
        ),
    ] = None
    seconds: Annotated[
        float | None,
        option(
            "--seconds",
            panel="Recordings",
            metavar="S",
            parse=above_zero("5"),
            help="Length of all inputs. Longer recordings are cut at their end, and shorter ones are padded with "
            "silence, except for an hf: model with an attention mask.",
            default="each recording's own",
        ),
    ] = None
    layout: Annotated[
        Literal["frames", "channels"] | None,
        option(
            "--layout",
            panel="Recordings",
            metavar="HOW",
            parse=choice("frames", "channels"),
            help="Shape of an input: frames for (frames,), channels for (1, frames).",
            default="frames",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The given options as fields of ``AudioPreprocess``."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How an image becomes an input, where the model does not say so or the user knows better."""

    resize: Annotated[
        int | None,
        option(
            "--resize",
            panel="Images",
            metavar="PIXELS",
            parse=whole(1),
            help="Length to which the shorter side is resized.",
            default=f"{OWN}256",
        ),
    ] = None
    crop: Annotated[
        int | None,
        option(
            "--crop",
            panel="Images",
            metavar="PIXELS",
            parse=whole(1),
            help="Side of the square that is cut out of the middle.",
            default=f"{OWN}224",
        ),
    ] = None
    mean: Annotated[
        str | None,
        option(
            "--mean",
            panel="Images",
            metavar="R,G,B",
            help="Mean of each channel, for pixels from 0 to 1.",
            default=f"{OWN}.485,.456,.406",
        ),
    ] = None
    std: Annotated[
        str | None,
        option(
            "--std",
            panel="Images",
            metavar="R,G,B",
            help="Standard deviation of each channel.",
            default=f"{OWN}.229,.224,.225",
        ),
    ] = None
    interpolation: Annotated[
        Interpolation | None,
        option(
            "--interpolation",
            panel="Images",
            metavar="METHOD",
            parse=choice(*get_args(Interpolation)),
            help="How to resize: nearest, bilinear, bicubic or lanczos.",
            default=f"{OWN}bilinear",
        ),
    ] = None
    fit: Annotated[
        Fit | None,
        option(
            "--fit",
            panel="Images",
            metavar="HOW",
            parse=choice(*get_args(Fit)),
            help="How an image becomes a square: crop resizes the shorter side, squash resizes both, letterbox resizes "
            "the longer one and fills the rest with grey. keep resizes the shorter side, with the longer one 1333 at "
            "most, and makes no square.",
            default=f"{OWN}crop",
        ),
    ] = None
    preprocess: Annotated[
        str | None,
        option(
            "--preprocess",
            panel="Images",
            metavar="FILE.py:FUNCTION",
            help="A function that makes an array from a PIL image, used instead of the six options above. For "
            "recordings, it gets the frames and their rate.",
        ),
    ] = None

    def checked(self) -> dict[str, Any]:
        """The given options as fields of ``Preprocess``. Raises ``InputError`` where they do not fit together."""
        mean = None if self.mean is None else numbers("--mean", self.mean)
        std = None if self.std is None else numbers("--std", self.std)
        for name, values in (("--mean", mean), ("--std", std)):
            if values is not None and (len(values) not in (1, 3) or (name == "--std" and 0 in values)):
                raise InputError(
                    f"{name} {getattr(self, name[2:])} does not fit",
                    "give 3 numbers for RGB or 1 for grey, and no 0 for --std",
                )
        if mean is not None and std is not None and len(mean) != len(std):
            raise InputError(
                f"--mean {self.mean} and --std {self.std} do not fit together",
                "give 3 numbers each for RGB or 1 each for grey",
            )
        if self.fit == "keep" and self.crop is not None:
            raise InputError("--crop makes squares, and --fit keep makes none", "leave out one of them")
        cuts = self.fit in (None, "crop", "squash")
        if self.crop is not None and self.resize is not None and self.crop > self.resize and cuts:
            raise InputError(f"--crop {self.crop} is more than --resize {self.resize}", "give a smaller --crop")
        given = {
            "resize": self.resize,
            "crop": self.crop,
            "mean": mean,
            "std": std,
            "interpolation": self.interpolation,
            "fit": self.fit,
        }
        return {name: value for name, value in given.items() if value is not None}


def reader(
    model: str, samples: SampleOptions, images: ImageOptions, audio: AudioOptions
) -> "Callable[[], Samples | RawSamples]":
    """Reads the samples when it is called. Raises ``InputError`` at once for options and paths that are wrong."""
    from corewise.samples.files import check_reference

    check_reference(samples.samples)
    given = images.checked()

    def read() -> "Samples | RawSamples":
        from corewise.source import read_for

        return read_for(
            model,
            samples.samples,
            given=given,
            audio=audio.given(),
            function=images.preprocess,
            text=samples.text,
            pair=samples.pair,
            label=samples.label,
            max_samples=samples.max_samples,
            seed=samples.seed,
        )

    return read


def load_model(reference: str | None) -> Any:
    """The model that ``--model`` names; ``None`` without one."""
    if reference is None:
        return None
    from corewise.source import load

    return load(reference)
