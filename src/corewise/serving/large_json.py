"""Large JSON in pieces: the frame of a request without its long lists of numbers, and such a list bit by bit. Pure."""

import re
import secrets
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from corewise.serving.protocol import ProtocolError

MAX_FRAME_BYTES = 2**20
"""The frame is all that is not a long list of numbers: names, shapes, parameters, texts."""
MAX_FRAME_MARKS = 20_000
"""Strings and objects in it."""
CUT_BYTES = 1024
"""Shorter lists stay in the frame."""

Regions = dict[bytes, memoryview]
"""Lists of numbers that were cut out of a frame, by what stands there instead."""

_KEY = secrets.token_hex(16)
"""Nobody outside knows what stands for a list that was cut out."""
PLACEHOLDER_BYTES = len(f'"{_KEY}00000000"')

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_NUMBERS = rb"\[[-+0-9.eE,\s\[\]truefalsn]*+"
"""What a list of numbers or bools consists of, as far as it goes; brackets that close what is around it may follow."""
_TOKEN = re.compile(_STRING + rb"|" + _NUMBERS + rb"|[{\"]", re.DOTALL)
_MORE_NUMBERS = re.compile(rb"[-+0-9.eE,\s\[\]truefalsn]*+")
_OPENING = re.compile(rb"[\s\[]*+")


def frame(text: memoryview, window_bytes: int) -> tuple[bytes, Regions]:
    """The JSON without its lists of ``CUT_BYTES`` and more, and these.

    No step looks at more than ``window_bytes``, so that threads take turns. Raises ``ProtocolError`` where too much
    is left.
    """
    kept: list[bytes] = []
    regions: Regions = {}
    size = marks = start = 0
    while start < len(text):
        window_end = min(len(text), start + window_bytes)
        token = _TOKEN.search(text, start, window_end)
        first, end = (window_end, window_end) if token is None else token.span()
        if token is not None and text[first] == ord("["):
            end = _numbers_end(text, first, end, window_bytes)
        elif token is not None and end - first == 1 and text[first] == ord('"'):
            # The string does not end in this window: look again from its start, once.
            token = _TOKEN.match(text, first, min(len(text), first + MAX_FRAME_BYTES))
            end = first if token is None else token.end()
            if end - first < 2:
                raise ProtocolError("a string of the request does not end, or is too long")
        is_cut = end - first >= CUT_BYTES and text[first] == ord("[")
        kept.append(bytes(text[start : first if is_cut else end]))
        if is_cut:
            placeholder = f'"{_KEY}{len(regions):08x}"'.encode()
            regions[placeholder] = text[first:end]
            kept.append(placeholder)
        size, marks, start = size + len(kept[-1]) + first - start, marks + (token is not None), end
        if size > MAX_FRAME_BYTES or marks > MAX_FRAME_MARKS:
            raise ProtocolError(
                f"the request has more than {MAX_FRAME_BYTES} bytes or {MAX_FRAME_MARKS} strings beside its numbers",
                "send strings as binary tensors, or fewer at a time",
                413,
            )
    return b"".join(kept), regions


def nesting(text: memoryview) -> int:
    """How many lists begin before the first value."""
    opening = _OPENING.match(text, 0, 256)
    return 0 if opening is None else opening.group().count(b"[")


def pieces(text: memoryview, shape: Sequence[int], nesting: int, piece_bytes: int) -> Iterator[bytes]:
    """A long list of numbers as many short ones, each as deep: joined they have the values in their order.

    Raises ``ProtocolError`` where the lists in it do not nest as the shape says, as soon as that shows.
    """
    sizes = [prod(shape[k:nesting]) for k in range(1, nesting)]
    start = depth = commas = 0
    while start < len(text):
        piece = bytes(text[start : start + piece_bytes])
        is_last = start + len(piece) == len(text)
        end = len(piece) if is_last else piece.rfind(b",")
        if end <= 0:
            raise ProtocolError("a number is too long", "write it with fewer digits")
        characters = np.frombuffer(piece, np.uint8)[: end + (not is_last)]
        steps = (characters == ord("[")).astype(np.int8) - (characters == ord("]"))
        depths = depth + np.cumsum(steps, dtype=np.int32)
        at_commas = depths[np.flatnonzero(characters == ord(","))]
        order = np.arange(commas + 1, commas + 1 + len(at_commas))
        expected = nesting - sum((order % size == 0 for size in sizes), start=np.zeros(len(order), np.int32))
        before, depth = depth, int(depths[-1])
        if not np.array_equal(at_commas, expected) or not (0 <= depth <= nesting) or (is_last and depth):
            raise ProtocolError("the data of an input do not nest as its shape says")
        commas += len(at_commas)
        if is_last and commas + 1 != prod(shape):
            raise ProtocolError(f"the data of an input are {commas + 1} values, but its shape needs {prod(shape)}")
        yield b"[" * before + piece[:end] + b"]" * depth
        start += end + 1


def _numbers_end(text: memoryview, first: int, end: int, window_bytes: int) -> int:
    """Where the list of numbers that begins at ``first`` ends, of which ``end`` is a part."""
    while True:
        more = _MORE_NUMBERS.match(text, end, min(len(text), end + window_bytes))
        if more is None or more.end() == end:
            break
        end = more.end()
    for window_end in range(end, first, -window_bytes):
        window_start = max(first, window_end - window_bytes)
        last = bytes(text[window_start:window_end]).rfind(b"]")
        if last >= 0:
            return window_start + last + 1
    if end - first >= CUT_BYTES:
        raise ProtocolError("a list of numbers in the request does not end")
    return first + 1
