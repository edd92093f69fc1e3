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

from corewise import arguments
from corewise._version import __version__
from corewise.common.errors import CorewiseError, InputError, MissingExtra, OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from corewise.records.report import Preprocess

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
Seed = Annotated[int, typer.Option(min=0, help="Seed of the split into calibration and holdout.")]
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
    from corewise.doctor import diagnose, render
    from corewise.machine.inspect import inspect
    from corewise.records.jsonable import to_json

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
    objective: Annotated[
        Literal["throughput", "latency", "slo"] | None,
        typer.Option(help="What to be best at. [default: throughput, or slo where --slo-ms is given]"),
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option(help="Most requests per second of which 99 % are answered within this time.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Time for the search: 90s, 5m, 1h. The race at its end may take half a minute more."
        ),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory for the process that runs it: 500M, 2G.")
    ] = None,
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
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, for whoever the artifact serves.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json, with which the artifact serves text.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize and compile a model several ways, verify each, and save the fastest that is accurate enough."""
    from corewise import artifact
    from corewise.report.summary import summary
    from corewise.report.terminal import Progress, render
    from corewise.samples import read
    from corewise.search.optimization import DEFAULT_ENGINES
    from corewise.search.optimization import optimize as run

    artifact.check_output(output)
    _compute_on_usable_cores()
    wanted = _preprocess(resize, crop, mean, std, interpolation)
    names = None if labels is None else arguments.lines(labels)
    if tokenizer is not None and not tokenizer.is_file():
        raise InputError(f"there is no file {tokenizer}", "give a tokenizer.json")
    goal = objective or ("throughput" if slo_ms is None else "slo")
    budget_s = None if budget is None else arguments.seconds("--budget", budget)
    memory_limit_bytes = None if memory_limit is None else arguments.size_bytes("--memory-limit", memory_limit)
    console = _console(stderr=as_json)
    mode: Literal["live", "plain", "quiet"] = "quiet" if quiet else "live" if console.is_terminal else "plain"
    work = output.with_name(f"{output.name}.work")
    with Progress(console, mode, goal=goal) as progress, _resumable(work):
        result = run(
            model,
            lambda: read(samples, wanted, preprocess),
            metric=metric,
            max_drop=max_drop,
            strict=strict,
            objective=goal,
            slo_ms=slo_ms,
            budget_s=budget_s,
            memory_limit_bytes=memory_limit_bytes,
            engines=tuple(engine) if engine else DEFAULT_ENGINES,
            ignored=tuple(ignore or ()),
            calibration=calibration,
            seed=seed,
            timeout_s=timeout_s,
            work=work,
            tell=progress,
        )
        result.save(output, labels=names, tokenizer=tokenizer)
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
    from corewise.report.sensitivity import data, render, svg
    from corewise.report.terminal import Progress
    from corewise.samples import read
    from corewise.search.explanation import explain as run

    _compute_on_usable_cores()
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
    from corewise.artifact import tuned
    from corewise.machine.inspect import inspect
    from corewise.report.markdown import render as as_markdown
    from corewise.report.summary import summary
    from corewise.report.terminal import render

    sound = artifact.read(artifact_path)
    report = sound.report
    if as_json:
        _print_json(summary(report))
    elif markdown:
        typer.echo(as_markdown(report))
    elif page is None:
        _console().print(render(report))
        fit = tuned.fit(sound, inspect())
        if fit.tuned is not None:
            typer.echo(f"\nhere it {fit.tuned.label}")
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
    from corewise.artifact.open import verify as run
    from corewise.records.jsonable import to_json

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

    from corewise.artifact.open import bench as run
    from corewise.records.jsonable import to_json

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


@app.command()
def load(
    artifact_path: ArtifactPath,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second that arrive at random, whatever becomes of them.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="How many send, each when it has its last answer.")] = None,
    duration_s: Annotated[float, typer.Option(help="How long to send.")] = 10.0,
    slo_ms: Annotated[
        float | None, typer.Option(help="Each request must be answered within this time. [default: no limit]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of each instance. [default: the plan's]")] = None,
    instances: Annotated[int | None, typer.Option(help="Calls at the same time. [default: the plan's]")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests in a call at most. [default: the plan's]")] = None,
    as_json: AsJson = False,
) -> None:
    """Load an artifact as users would, by --rate or by --clients, and tell what became of their requests.

    Requests of one sample each go through the batcher to the plan's instances, and share calls as they come. With
    --threads, --instances or --batch the plan is yours: see what it is worth.
    """
    from corewise.artifact.loadtest import load_test, words
    from corewise.records.jsonable import to_json

    found = load_test(
        artifact_path,
        rate_per_s=rate,
        clients=clients,
        duration_s=duration_s,
        slo_ms=slo_ms,
        threads_per_instance=threads,
        instances=instances,
        batch=batch,
    )
    if as_json:
        _print_json({**to_json(found), "held": found.run.held, "goodput_per_s": found.run.goodput_per_s})
        return
    for line in words(found):
        typer.echo(line)


@app.command()
def retune(
    artifact_path: ArtifactPath,
    budget_s: Annotated[float, typer.Option(help="Time for all of it.")] = 30.0,
    model: Annotated[
        str | None, typer.Option(help="file.py:factory of a model that could not be exported; others need none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best plan on this machine or in this container, and keep it beside the artifact's own.

    Measures threads, instances and batches of the build that is there, and races the best against the plan used so
    far. Other machines keep theirs.
    """
    from corewise.records.jsonable import to_json
    from corewise.report.terminal import Progress
    from corewise.search.retuning import find, words

    console = _console(stderr=True)
    with Progress(console, "live" if console.is_terminal else "quiet") as progress:
        found = find(artifact_path, budget_s=budget_s, model=_module(model), tell=progress)
    if as_json:
        ratio = None if found.ratio is None else found.ratio._asdict()
        _print_json({**to_json(found), "folder": str(found.folder), "ratio": ratio, "kept": found.kept})
    else:
        for line in words(found):
            typer.echo(line)
    saved = found.save()
    if not as_json:
        typer.echo(f"saved {saved}")


@app.command()
def serve(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="[NAME[@VERSION]=]ARTIFACT...", help="Folders that corewise optimize wrote.")
    ],
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where HTTP listens; none for no HTTP.")] = (
        "127.0.0.1:8000"
    ),
    grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where gRPC listens. [default: nowhere]")
    ] = None,
    admin: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where models are loaded and unloaded. [default: nowhere]")
    ] = None,
    admin_grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The same over gRPC. [default: nowhere]")
    ] = None,
    timeout_ms: Annotated[float, typer.Option(min=1, help="Time for requests that name none.")] = 60_000.0,
    queue: Annotated[int, typer.Option(min=1, help="Most rows that wait, for each model.")] = 1024,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest body of a request, unpacked.")] = "64MiB",
    token_file: Annotated[Path | None, typer.Option(help="Bearer tokens, one a line: who has none is refused.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain, for both ports.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Open payloads that are code (inductor, torch-int8).")] = False,
    trust_file: Annotated[
        Path | None, typer.Option(help="sha256 of the manifests whose payloads may be code, one a line.")
    ] = None,
    shadow: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the requests that fp32 answers too, to watch for drift.")
    ] = 0.0,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Refuse inputs with NaN or infinities (400).")
    ] = False,
    drain_s: Annotated[float, typer.Option(min=0, help="On SIGTERM, time to finish what was accepted.")] = 30.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="debug has a line for every request.")
    ] = "info",
    traces: Annotated[
        bool,
        typer.Option("--traces", help="Send a span for each request to OpenTelemetry (OTEL_EXPORTER_OTLP_ENDPOINT)."),
    ] = False,
) -> None:
    """Serve artifacts by the Open Inference Protocol v2 over HTTP and gRPC, under the plans that were measured.

    Requests share calls as they come, and are refused at once where measurements say that they would be late. SIGTERM
    finishes what was accepted; SIGHUP opens the artifacts anew, and keeps what serves where one is not sound.
    """
    import importlib.util

    packages = ("starlette", "uvicorn", "httptools", "grpc", "grpc_health", "grpc_reflection")
    if any(importlib.util.find_spec(name) is None for name in packages):
        raise MissingExtra("starlette", "serve", "serving")
    from corewise.serving.logs import to_stderr
    from corewise.serving.protocol import Limits
    from corewise.serving.served import Source, Trust
    from corewise.serving.server import Options
    from corewise.serving.server import serve as run

    # A client that is gone must not end the server, as a closed pipe ends a command.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    to_stderr(log_level)
    digests = frozenset(arguments.lines(trust_file))
    tokens = tuple(arguments.lines(token_file))
    if token_file is not None and not tokens:
        raise InputError(f"{token_file} holds no token", "write one a line")
    options = Options(
        http=None if http == "none" else arguments.address("--http", http),
        grpc=None if grpc is None else arguments.address("--grpc", grpc),
        admin=None if admin is None else arguments.address("--admin", admin),
        admin_grpc=None if admin_grpc is None else arguments.address("--admin-grpc", admin_grpc),
        limits=Limits(timeout_s=timeout_ms / 1e3, body_bytes=arguments.size_bytes("--max-body", max_body)),
        max_waiting=queue,
        tokens=tokens,
        certificate=tls_cert,
        key=tls_key,
        trust=Trust(everything=trust, digests=digests),
        shadow=shadow,
        drain_s=drain_s,
        traces=traces,
        check_finite=check_finite,
    )
    if not run([Source.of(text) for text in artifacts], options, _tell_server):
        raise CorewiseError(f"not all that was accepted was answered in {drain_s:g} s", "give a longer --drain-s")


def _tell_server(what: str, value: Any) -> None:
    if what == "listening":
        ports = {"http": value.http, "grpc": value.grpc, "admin": value.admin, "admin-grpc": value.admin_grpc}
        typer.echo("listening: " + ", ".join(f"{name} on port {port}" for name, port in ports.items() if port))
    elif what == "ready":
        for one in value.served:
            for note in one.notes:
                typer.echo(f"note: {note}")
            build = one.manifest.build
            typer.echo(f"ready: {one.name}, version {one.version}: {build.engine} {build.precision}, {one.plan.label}")
    else:
        typer.echo("draining: what was accepted is finished, what comes is refused")


@contextmanager
def _resumable(work: Path) -> Iterator[None]:
    """Tell on Ctrl-C that finished trials are kept."""
    try:
        yield
    except KeyboardInterrupt:
        if work.is_dir():
            sys.stderr.write(f"corewise: finished trials are kept in {work}; the same command resumes\n")
        raise


def _compute_on_usable_cores() -> None:
    """Have torch, which is imported later, start no more threads: it does not know of a cgroup's quota."""
    from corewise.machine.inspect import inspect

    os.environ.setdefault("OMP_NUM_THREADS", str(inspect().usable_cores))


def _preprocess(resize: int, crop: int, mean: str, std: str, interpolation: Any) -> "Preprocess":
    from corewise.records.report import Preprocess

    return Preprocess(
        resize=resize,
        crop=crop,
        mean=arguments.floats("--mean", mean),
        std=arguments.floats("--std", std),
        interpolation=interpolation,
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


if __name__ == "__main__":
    main()
