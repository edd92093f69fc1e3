"""The memory that the server and an engine process share."""

import os

import numpy as np
import pytest

from corewise.serving.child import KEPT_BYTES, Slot
from corewise.serving.remote import _Process


class Echo:
    """The line to a process that answers with its inputs."""

    def __init__(self, theirs):
        self._theirs = theirs

    def send(self, message):
        inputs = message["inputs"]
        self._answer = {"outputs": self._theirs.write(self._theirs.read(inputs), inputs)}

    def receive(self):
        return self._answer


@pytest.mark.parametrize(("size_bytes", "is_kept"), [(KEPT_BYTES, False), (KEPT_BYTES // 4, True)])
def test_what_a_large_call_took_of_shared_memory_is_given_back(size_bytes, is_kept):
    ours = Slot(os.memfd_create("ours"))
    theirs = Slot(os.dup(ours.fileno()))
    process = _Process.__new__(_Process)
    process.lines, process.slots = [Echo(theirs)], [ours]
    try:
        for k in (1, 2):
            given = np.full(size_bytes, k, np.uint8)
            (found,) = process.run(0, [given])
            np.testing.assert_array_equal(found, given)
            held_bytes = 512 * os.fstat(ours.fileno()).st_blocks
            assert held_bytes >= 2 * size_bytes if is_kept else held_bytes == 0
        (found,) = process.run(0, [np.arange(5)])
        assert found.tolist() == list(range(5))
    finally:
        ours.close()
        theirs.close()
