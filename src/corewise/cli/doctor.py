"""``corewise doctor``."""

import os
from typing import Annotated

from corewise.cli.declare import flag
from corewise.cli.options import AsJson
from corewise.cli.output import console, print_json


def command(
    torch: Annotated[
        bool, flag("--torch", panel="Output", help="Import torch and add how it was built; this takes seconds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what this CPU can do, what this process may use of it, and which engines are installed."""
    from corewise.doctor import diagnose, render
    from corewise.machine.inspect import inspect_cpu
    from corewise.records.jsonable import to_json

    diagnosis = diagnose(inspect_cpu(), torch=torch, environment=os.environ)
    if as_json:
        print_json(to_json(diagnosis))
    else:
        console().print(render(diagnosis))
