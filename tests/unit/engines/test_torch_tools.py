"""torch_tools: what the torch engines share."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from corewise.engines.torch_tools import from_numpy, threads

FAULTS = """
import resource, sys
import torch
from corewise.engines.torch_tools import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(6):
        torch.ones(12_000_000).add_(1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_is_not_asked_for_again():
    def faults(mode):
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    default, kept = faults("default"), faults("keep")
    assert default > 1000
    assert kept < default / 20


def test_arrays_become_tensors_whatever_their_memory_is_like():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    read_only = array.copy()
    read_only.flags.writeable = False
    for given in (array, array[::-1], array[:, :, ::-1], array.T, read_only, np.array(3.0)):
        np.testing.assert_array_equal(from_numpy(given).numpy(), given)
    assert np.shares_memory(from_numpy(array).numpy(), array)


def test_the_callers_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_instances_in_threads_of_their_own_keep_their_own_numbers():
    together = threading.Barrier(3)
    seen = {}

    def run(count):
        with threads(count):
            together.wait(60)
            torch.ones(1000).add_(1)
            seen[count] = torch.get_num_threads()
            together.wait(60)

    before = torch.get_num_threads()
    running = [threading.Thread(target=run, args=(count,)) for count in (1, 2, 3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert seen == {1: 1, 2: 2, 3: 3}
    assert torch.get_num_threads() == before
