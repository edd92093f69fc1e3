"""``corewise explain``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from corewise.cli.declare import flag, grouped, option
from corewise.cli.environment import compute_on_usable_cores
from corewise.cli.options import AsJson, AudioOptions, ImageOptions, ModelReference, SampleOptions, TextOptions, reader
from corewise.cli.output import check_file, console, only_json, print_json, write_file
from corewise.cli.quantities import choice, whole


@dataclass(frozen=True, kw_only=True)
class ErrorOptions:
    """How errors are measured."""

    measured: Annotated[
        int,
        option(
            "--measured",
            panel="Errors",
            metavar="N",
            parse=whole(1),
            help="How many of the other samples to measure errors on. The time grows with it.",
        ),
    ] = 16
    bits: Annotated[
        str | None,
        option(
            "--bits",
            panel="Errors",
            metavar="7|8",
            parse=choice("7", "8"),
            help="Bits of the weights.",
            default="8, or 7 where the CPU adds int8 products in 16 bits",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed and written."""

    all_layers: Annotated[bool, flag("--all", panel="Output", help="Show every layer, not only the 20 worst.")] = False
    plot: Annotated[
        Path | None, option("--plot", panel="Output", metavar="FILE.svg", help="Draw all layers into this file.")
    ] = None
    as_json: AsJson = False


@grouped
def command(
    model: ModelReference,
    samples: SampleOptions,
    images: ImageOptions,
    audio: AudioOptions,
    texts: TextOptions,
    errors: ErrorOptions,
    output: OutputOptions,
) -> None:
    """Show layer by layer what int8 costs in accuracy and saves in time, the worst layer first.

    Quantizes the model with corewise's own quantizer. On samples that calibration did not see it measures the error at
    the outputs with each layer alone in int8, and with all layers but that one. Times need OpenVINO.

    Example: corewise explain model.py:build --samples photos
    """
    from corewise.report.sensitivity import data, render, svg
    from corewise.report.terminal import Progress
    from corewise.search.explanation import explain

    compute_on_usable_cores()
    read = reader(model, samples, images, audio)
    check_file(output.plot)
    texts.check()
    screen = console(stderr=output.as_json)
    plot = None if output.plot is None else output.plot.absolute()  # the user's code may change the working directory
    with Progress(screen, "live" if screen.is_terminal else "plain") as progress, only_json(output.as_json):
        explanation = explain(
            model,
            read,
            calibration=samples.calibration,
            measured=errors.measured,
            seed=samples.seed,
            tokenizer=texts.tokenizer,
            pooling=texts.pooling,
            weight_bits=None if errors.bits is None else int(errors.bits),
            on_event=progress,
        )
    if output.as_json:
        print_json(data(explanation))
    else:
        screen.print(render(explanation, everything=output.all_layers))
    if plot is not None:
        write_file(plot, svg(explanation))
        if not output.as_json:
            print(f"\nwrote {output.plot}")
