"""The command line of the benchmarks.

python -m bench --list
python -m bench NAME [options]
python -m bench NAME --help
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from bench.harness import parser_of

BENCHMARKS = (
    "placements",
    "build_cost",
    "plans",
    "main_job",
    "small_budget",
    "slo",
    "accuracy",
    "breadth",
    "tasks",
    "serving",
    "peers",
    "overload",
    "protocols",
    "handover",
    "soak",
    "attacks",
    "fuzz",
    "kills",
    "ray_kills",
    "ray_serve",
    "bulk",
    "bulk_scale",
    "padding",
    "packing",
    "photos",
    "photos_served",
    "detectors",
    "odd_photos",
    "text",
    "text_serving",
    "text_bulk",
    "text_heads",
    "shift",
    "elastic_calls",
    "elastic_queue",
    "elastic_curve",
    "elastic_switch",
    "elastic_slo",
    "elastic_simulated",
    "elastic_bound",
    "load_generators",
)
"""Modules of this package. Each has a docstring for its help, ``add_options(parser)`` and ``main(options)``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    options = parser.parse_args(arguments[:1])
    if options.list:
        for name in BENCHMARKS:
            print(f"{name:12s} {(import_module(f'bench.{name}').__doc__ or '').splitlines()[0]}")
        return
    if options.name is None:
        parser.error("give the name of a benchmark, or --list")
    benchmark = import_module(f"bench.{options.name}")
    benchmark.main(parser_of(options.name, benchmark).parse_args(arguments[1:]))


if __name__ == "__main__":
    main()
