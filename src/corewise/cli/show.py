"""``corewise show``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from corewise.cli.declare import flag, grouped, option
from corewise.cli.options import ArtifactPath, AsJson
from corewise.cli.output import check_file, console, print_json, write_file


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """In which form the report is shown."""

    markdown: Annotated[bool, flag("--markdown", panel="Output", help="Print the report as Markdown.")] = False
    page: Annotated[
        Path | None,
        option("--html", panel="Output", metavar="FILE.html", help="Write the report as one page for a browser."),
    ] = None
    as_json: AsJson = False


@grouped
def command(artifact_path: ArtifactPath, output: OutputOptions) -> None:
    """Show an artifact's report: its plan, accuracy, speed against the baseline, and why each other build lost."""
    from corewise import artifact
    from corewise.artifact import tuned
    from corewise.machine.inspect import inspect_cpu
    from corewise.report import html, markdown
    from corewise.report.summary import summarize
    from corewise.report.terminal import render

    check_file(output.page)
    opened = artifact.read(artifact_path)
    report = opened.report
    if output.as_json:
        print_json(summarize(report))
    elif output.markdown:
        print(markdown.render(report))
    elif output.page is None:
        console().print(render(report))
        fit = tuned.fit(opened, inspect_cpu())
        if fit.tuned is not None:
            print(f"\nhere it {fit.tuned.label}")
    if output.page is not None:
        write_file(output.page, html.render(report))
        if not output.as_json and not output.markdown:
            print(f"wrote {output.page}")
