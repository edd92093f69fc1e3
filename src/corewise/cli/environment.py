"""What the command line takes from the environment, and sets there for the libraries that it imports later."""

import os
import secrets


def compute_on_usable_cores() -> None:
    """Have torch start no more threads than cores are usable; by default it ignores a cgroup's quota."""
    from corewise.machine.inspect import inspect_cpu

    os.environ.setdefault("OMP_NUM_THREADS", str(inspect_cpu().usable_cores))


def quiet_grpc() -> None:
    """Have gRPC's library log nothing by itself: it writes a line for each call that breaks a limit."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def settle_ray(address: str) -> None:
    """Have Ray send no usage data, and use tokens; a cluster that is started for this command gets one of its own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    if address == "local":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
