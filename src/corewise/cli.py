"""The command line: argv to one call, and the only module that prints, exits or reads the environment."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from corewise import __version__
from corewise.errors import CorewiseError, InputError, OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from corewise.values import Preprocess

app = typer.Typer(
    name="corewise",
    help="Make a PyTorch model run as fast on this CPU as the CPU allows, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

USAGE_ERROR = 2
INTERRUPTED = 130

ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that corewise optimize wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
ModelReference = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:factory, module:factory, a torch.export .pt2 file, or timm:, torchvision:, hf: and a name.",
    ),
]
SamplesReference = Annotated[
    str,
    typer.Option(
        help="A folder of images (with labels.csv or class folders), .npz, .safetensors, or file.py:function."
    ),
]
Calibration = Annotated[int | None, typer.Option(help="Samples to calibrate with. [default: 2 of 5, at most 200]")]
Seed = Annotated[int, typer.Option(help="Seed of the split into calibration and holdout.")]
Resize = Annotated[int, typer.Option(help="Images: length of the shorter side.")]
Crop = Annotated[int, typer.Option(help="Images: side of the centred square.")]
Mean = Annotated[str, typer.Option(help="Images: mean of each channel, pixels in 0..1.")]
Std = Annotated[str, typer.Option(help="Images: standard deviation of each channel.")]
Interpolation = Annotated[
    Literal["nearest", "bilinear", "bicubic", "lanczos"], typer.Option(help="Images: how to resize.")
]
ImageFunction = Annotated[
    str | None,
    typer.Option(help="Images: file.py:function(PIL image) -> array, instead of the five above."),
]


def main() -> None:
    """Run the command line; ``CorewiseError`` becomes one line on stderr and exit code 2."""
    # A reader that closes the pipe early (| head) ends us quietly, as it does other programs.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except CorewiseError as error:
        sys.stderr.write(f"corewise: {error}\n")
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("corewise: interrupted\n")
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"corewise {__version__}")
        raise typer.Exit


@app.command()
def doctor(
    as_json: AsJson = False,
    torch: Annotated[bool, typer.Option("--torch", help="Import torch and tell how it was built (slower).")] = False,
) -> None:
    """Tell what this CPU can do, what this process may use of it, and which engines are here."""
    from corewise.cpu import inspect
    from corewise.doctor import diagnose, render
    from corewise.values import to_json

    diagnosis = diagnose(inspect(), torch=torch, environment=os.environ)
    if as_json:
        _print_json(to_json(diagnosis))
    else:
        _console().print(render(diagnosis))


@app.command()
def optimize(
    model: ModelReference,
    samples: SamplesReference,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the artifact goes; must not exist.")],
    metric: Annotated[
        str | None,
        typer.Option(help="top1, top5, agreement, cosine or file.py:function(outputs, labels). [default: by labels]"),
    ] = None,
    max_drop: Annotated[float, typer.Option(help="How much of the metric may be lost.")] = 0.01,
    strict: Annotated[
        bool, typer.Option("--strict", help="The drop's 95 % interval must end below --max-drop, not its estimate.")
    ] = False,
    objective: Annotated[Literal["throughput", "latency"], typer.Option(help="What to be best at.")] = "throughput",
    engine: Annotated[
        list[str] | None, typer.Option(help="Try only these engines (repeatable); eager is always the baseline.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A layer that never runs in int8, as explain names it, or a pattern of names (repeatable)."),
    ] = None,
    calibration: Calibration = None,
    seed: Seed = 0,
    timeout_s: Annotated[float, typer.Option(help="Longest time for each step of a trial.")] = 600.0,
    resize: Resize = 256,
    crop: Crop = 224,
    mean: Mean = ".485,.456,.406",
    std: Std = ".229,.224,.225",
    interpolation: Interpolation = "bilinear",
    preprocess: ImageFunction = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize and compile a model several ways, verify each, and save the fastest that is accurate enough."""
    from corewise import artifact
    from corewise.optimize import DEFAULT_ENGINES
    from corewise.optimize import optimize as run
    from corewise.report.summary import summary
    from corewise.report.terminal import Progress, render
    from corewise.samples import read

    artifact.check_output(output)
    wanted = _preprocess(resize, crop, mean, std, interpolation)
    console = _console(stderr=as_json)
    mode: Literal["live", "plain", "quiet"] = "quiet" if quiet else "live" if console.is_terminal else "plain"
    work = output.with_name(f"{output.name}.work")
    with Progress(console, mode, goal=objective) as progress, _resumable(work):
        result = run(
            model,
            lambda: read(samples, wanted, preprocess),
            metric=metric,
            max_drop=max_drop,
            strict=strict,
            objective=objective,
            engines=tuple(engine) if engine else DEFAULT_ENGINES,
            ignored=tuple(ignore or ()),
            calibration=calibration,
            seed=seed,
            timeout_s=timeout_s,
            work=work,
            tell=progress,
        )
        result.save(output)
    result.home.remove()
    if as_json:
        _print_json(summary(result.report))
    elif not quiet:
        console.print(render(result.report))
        typer.echo(f"\nsaved {output}: try corewise verify {output}, corewise bench {output}")


@app.command()
def explain(
    model: ModelReference,
    samples: SamplesReference,
    calibration: Calibration = None,
    measured: Annotated[int, typer.Option(min=1, help="Other samples to measure errors on; time grows with it.")] = 16,
    seed: Seed = 0,
    bits: Annotated[
        int | None, typer.Option(min=7, max=8, help="Bits of the weights. [default: 8, or 7 where the CPU needs it]")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every layer, not the 20 worst.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Write a figure of all layers.")] = None,
    resize: Resize = 256,
    crop: Crop = 224,
    mean: Mean = ".485,.456,.406",
    std: Std = ".229,.224,.225",
    interpolation: Interpolation = "bilinear",
    preprocess: ImageFunction = None,
    as_json: AsJson = False,
) -> None:
    """Tell layer by layer what int8 costs in accuracy and saves in time, the worst first.

    Quantizes with corewise's own quantizer and measures at the outputs, on samples that calibration did not see, the
    error of each layer quantized alone and of all but it. Times need OpenVINO.
    """
    from corewise.explain import explain as run
    from corewise.report.sensitivity import data, render, svg
    from corewise.report.terminal import Progress
    from corewise.samples import read

    wanted = _preprocess(resize, crop, mean, std, interpolation)
    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        why = "it is a folder" if plot.is_dir() else f"there is no folder {plot.parent}"
        raise OutputError(f"{plot} cannot be written: {why}", "name another file")
    console = _console(stderr=as_json)
    with Progress(console, "live" if console.is_terminal else "plain") as progress:
        found = run(
            model,
            lambda: read(samples, wanted, preprocess),
            calibration=calibration,
            measured=measured,
            seed=seed,
            weight_bits=bits,
            tell=progress,
        )
    if as_json:
        _print_json(data(found))
    else:
        console.print(render(found, everything=everything))
    if plot is not None:
        _write(plot, svg(found))
        if not as_json:
            typer.echo(f"\nwrote {plot}")


@app.command()
def show(
    artifact_path: ArtifactPath,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown.")] = False,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE.html", help="Write the report as one page for a browser.")
    ] = None,
) -> None:
    """Tell what an artifact is: plan, accuracy, speed against the baseline, every loser's reason."""
    from corewise import artifact
    from corewise.report.markdown import render as as_markdown
    from corewise.report.summary import summary
    from corewise.report.terminal import render

    report = artifact.read(artifact_path).report
    if as_json:
        _print_json(summary(report))
    elif markdown:
        typer.echo(as_markdown(report))
    elif page is None:
        _console().print(render(report))
    if page is not None:
        from corewise.report.html import render as as_page

        _write(page, as_page(report))
        if not as_json and not markdown:
            typer.echo(f"wrote {page}")


@app.command()
def verify(
    artifact_path: ArtifactPath,
    model: Annotated[
        str | None, typer.Option(help="file.py:factory of a model that could not be exported; others need none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check hashes, CPU fit and golden outputs on the machine that will run it."""
    from corewise.loading import verify as run
    from corewise.values import to_json

    found = run(artifact_path, model=_module(model))
    if as_json:
        _print_json(to_json(found))
        return
    typer.echo(f"{artifact_path} is sound and fits this CPU")
    typer.echo(f"  {found.files} files, {found.size_bytes / 1e6:.1f} MB: every sha256 as in the manifest")
    typer.echo(f"  golden outputs of {found.golden_samples} samples: equal to {found.sqnr_db:.1f} dB")
    for note in found.notes:
        typer.echo(f"  note: {note}")


@app.command()
def bench(
    artifact_path: ArtifactPath,
    against: Annotated[str, typer.Option(help="The engine that runs the fp32 program: eager, openvino, ...")] = "eager",
    as_json: AsJson = False,
) -> None:
    """Race an artifact against fp32 in alternating runs; the ratio comes with its 95 % confidence interval."""
    from statistics import median

    from corewise.loading import bench as run
    from corewise.values import to_json

    found = run(artifact_path, against=against)
    if as_json:
        _print_json({"rates": to_json(found.rates), "ratio": found.ratio._asdict()})
        return
    for one in found.rates:
        typer.echo(f"{one.build.label:40s} {median(one.per_s):10.1f}/s   {one.plan.label}")
    ratio = found.ratio
    typer.echo(
        f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] over {len(found.rates[0].per_s)} alternating rounds"
    )


@contextmanager
def _resumable(work: Path) -> Iterator[None]:
    """Tell on Ctrl-C that finished trials are kept."""
    try:
        yield
    except KeyboardInterrupt:
        if work.is_dir():
            sys.stderr.write(f"corewise: finished trials are kept in {work}; the same command resumes\n")
        raise


def _preprocess(resize: int, crop: int, mean: str, std: str, interpolation: Any) -> "Preprocess":
    from corewise.values import Preprocess

    return Preprocess(
        resize=resize, crop=crop, mean=_floats("--mean", mean), std=_floats("--std", std), interpolation=interpolation
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "name another file") from error


def _module(reference: str | None) -> Any:
    if reference is None:
        return None
    from corewise.source import load

    return load(reference)


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text!r}", "give numbers with commas, e.g. .485,.456,.406") from error


if __name__ == "__main__":
    main()
