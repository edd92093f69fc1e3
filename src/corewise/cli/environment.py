"""What the command line takes from the environment, and sets there for the libraries that it imports later."""

import os


def compute_on_usable_cores() -> None:
    """Have torch start no more threads than cores are usable; by default it ignores a cgroup's quota."""
    from corewise.machine.inspect import inspect_cpu

    os.environ.setdefault("OMP_NUM_THREADS", str(inspect_cpu().usable_cores))
