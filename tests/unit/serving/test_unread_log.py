"""A log that nobody reads: what has no room is counted, and whoever logs goes on."""

import json
import logging
import os

from corewise.serving.logs import JsonLines, _Handler


def test_a_pipe_that_is_full_holds_up_nobody_and_the_loss_is_told():
    reading, writing = os.pipe()
    handler = _Handler(writing)
    handler.setFormatter(JsonLines())
    log = logging.Logger("unread")
    log.addHandler(handler)
    for number in range(2000):
        log.info("line %d %s", number, "x" * 200)
    log.info("a traceback %s", "y" * 100_000)
    read = b""
    os.set_blocking(reading, False)

    def read_all():
        nonlocal read
        try:
            while part := os.read(reading, 1 << 16):
                read += part
        except BlockingIOError:
            pass

    read_all()
    log.info("read again")
    read_all()
    lines = [json.loads(line) for line in read.splitlines()]
    kept = [line["message"] for line in lines]
    assert kept[0].startswith("line 0 ")
    assert kept[-1] == "read again"
    assert kept[-2] == f"{2001 - (len(kept) - 2)} lines of this log are lost: nobody read it"
    os.close(reading)
    log.info("nobody reads this")  # as a closed pipe is no error either
    os.close(writing)
    log.info("nor this")


def test_a_line_that_was_cut_ends_there():
    reading, writing = os.pipe()
    handler = _Handler(writing)
    log = logging.Logger("cut")
    log.addHandler(handler)
    log.info("z" * 1_000_000)
    size = len(os.read(reading, 1_000_000))
    assert size < 1_000_000
    log.info("next")
    assert os.read(reading, 1000) == b"\nnext\n"
    log.info("last")
    assert os.read(reading, 1000) == b"last\n"
    for each in (reading, writing):
        os.close(each)


def test_arguments_that_do_not_fit_end_nothing(capsys):
    reading, writing = os.pipe()
    log = logging.Logger("wrong")
    log.addHandler(_Handler(writing))
    log.info("%d", "no number")
    log.info("fine")
    assert os.read(reading, 1000) == b"fine\n"
    assert "no number" in capsys.readouterr().err
    for each in (reading, writing):
        os.close(each)
