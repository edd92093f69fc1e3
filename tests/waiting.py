"""Waiting for what must come, however slow the machine is, and ports that nobody takes meanwhile."""

import os
import random
import socket
import time
from pathlib import Path

PATIENCE_S = 60.0
"""How long a test waits for what must come: a hang fails, a slow machine does not."""


def eventually(condition, seconds=PATIENCE_S):
    """Whether the condition holds within these seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def free_port():
    """A port of this machine that is free, and below those that the kernel gives to connections and to other tests."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    choice = random.Random(f"{os.getpid()} {time.monotonic_ns()}")
    while True:
        port = choice.randrange(10_000, max(10_100, lowest))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
