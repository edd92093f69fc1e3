"""Artifacts that take the time they are told to, and a server in a process of its own."""

import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
from places import GOLDEN
from waiting import eventually

from corewise import artifact
from corewise.engines.fake import Fake
from corewise.engines.openvino import OpenVino
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, TensorSpec
from corewise.records.jsonable import to_json
from corewise.records.measurement import Measurement
from corewise.records.pipeline import TextPipeline, TokenInput
from corewise.records.ranges import InputRange, ValueRange
from corewise.records.report import Preprocess

__all__ = ["ARTIFACT", "Server", "eventually", "fake_artifact", "image_artifact", "serving", "token_artifact"]

ARTIFACT = GOLDEN / "schema-1"
TIMEOUT_S = 120


def fake_artifact(folder, plan=None, *, call_ms=2.0, elastic=None, **options):
    """An artifact of the fake engine: outputs are a projection of the inputs, calls take ``call_ms``.

    With ``elastic`` its wide layout is measured too, and rows take ``seconds_per_item``, shared by threads.
    """
    plan = plan or Plan(threads_per_instance=1, instances=1, batch=4)
    found = artifact.read(ARTIFACT)
    settings = {"seconds_per_call": call_ms / 1e3, **options}
    build = Build(engine="fake", precision="fp32", options=tuple(sorted(settings.items())))
    payload = folder.with_name(folder.name + ".payload")
    payload.mkdir()
    (payload / "fake.json").write_text(json.dumps({"inputs": 1, "outputs": to_json(found.manifest.outputs)}))
    inputs, _ = found.golden()
    measured = tuple(
        fake_measurement(replace(each, batch=batch), call_ms, options.get("seconds_per_item", 0.0))
        for each in ((plan,) if elastic is None else (elastic.wide, elastic.narrow))
        for batch in sorted({1, each.batch})
    )
    report = found.report
    trials = tuple(
        replace(trial, build=build, measurements=measured) if trial.build == report.choice.winner else trial
        for trial in report.trials
    )
    report = replace(report, cpu=inspect_cpu(), trials=trials, choice=replace(report.choice, winner=build, plan=plan))
    artifact.write(
        folder,
        manifest=lambda files: replace(found.manifest, build=build, plan=plan, files=files, elastic=elastic),
        payload=payload,
        reference=None,
        golden=(inputs, Fake().open(payload, replace(build, options=()), plan).run(inputs)),
        report=report,
        report_text="",
        report_page="",
    )
    return folder


def fake_measurement(plan, call_ms, seconds_per_item):
    """What the fake engine's calls take under a plan."""
    ms = call_ms + 1e3 * seconds_per_item * plan.batch / plan.threads_per_instance
    per_s = 1e3 * plan.batch * plan.instances / ms
    return Measurement(plan=plan, latencies_ms=(ms,), throughput_per_s=per_s, p50_ms=ms, p99_ms=1.2 * ms, spread=0.0)


def write_bulk_job(folder, rows):
    """``words.cw``, a model of tokens, and ``texts.txt``, whose line 8 has a null byte."""
    token_artifact(folder / "words.cw")
    generator = np.random.default_rng(0)
    lines = [" ".join(f"w{k}" for k in generator.integers(0, 99, 1 + number % 20)) for number in range(rows)]
    lines[7] = "w1 \0"
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")


def token_artifact(folder, *, vocabulary=99, positions=41, labels=None, **pipeline):
    """An artifact of OpenVINO that embeds rows of tokens: the mean of what two tables have for tokens and places.

    ``pipeline`` are fields of its ``TextPipeline``; without any it is left to be inferred.
    """
    import openvino as ov
    from openvino import opset13 as ops
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    random = np.random.default_rng(0)
    ids = ops.parameter([-1, -1], np.int64, name="tokens")
    words = ops.gather(random.standard_normal((vocabulary, 8)).astype(np.float32), ids, np.int64(0))
    length = ops.gather(ops.shape_of(ids), np.int64(1), np.int64(0))
    numbers = ops.range(np.int64(0), length, np.int64(1), "i64")
    places = ops.gather(random.standard_normal((positions, 8)).astype(np.float32), numbers, np.int64(0))
    mean = ops.reduce_mean(ops.add(words, places), np.array([1]), keep_dims=False)
    payload = folder.with_name(folder.name + ".payload")
    payload.mkdir()
    ov.save_model(ov.Model([mean], [ids]), str(payload / "model.xml"), compress_to_fp16=False)
    tokenizer = Tokenizer(WordLevel({f"w{k}": k for k in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder.with_name(f"{folder.name}.json")))
    if pipeline:
        digest = hashlib.sha256(folder.with_name(f"{folder.name}.json").read_bytes()).hexdigest()
        token = TokenInput(name="tokens", dtype="int64", role="ids")
        pipeline = TextPipeline(
            tokenizer_sha256=digest, inputs=(token,), max_length=positions, labels=labels or (), **pipeline
        )
    ranges = InputRange(values=(ValueRange(low=0, high=vocabulary - 1),), longest=(None, positions))
    return openvino_artifact(
        folder,
        payload,
        [np.arange(12).reshape(2, 6) % vocabulary],
        inputs=(TensorSpec(name="tokens", dtype="int64", shape=(None, None)),),
        outputs=(TensorSpec(name="scores", dtype="float32", shape=(None, 8)),),
        input_ranges=(ranges,),
        tokenizer=folder.with_name(f"{folder.name}.json"),
        labels=labels,
        pipeline=pipeline or None,
    )


def openvino_artifact(folder, payload, golden_inputs, *, tokenizer, batch=4, call_ms=1.0, **manifest):
    """An artifact of an OpenVINO payload that nothing was searched for; ``manifest`` are fields of its manifest."""
    build, plan = Build(engine="openvino", precision="fp32"), Plan(threads_per_instance=1, instances=1, batch=batch)
    session = OpenVino().open(payload, build, plan)
    golden = (golden_inputs, session.run(golden_inputs))
    session.close()
    found = artifact.read(ARTIFACT)
    measured = Measurement(
        plan=plan,
        latencies_ms=(call_ms,),
        throughput_per_s=1e3 * batch / call_ms,
        p50_ms=call_ms,
        p99_ms=1.2 * call_ms,
        spread=0.0,
    )
    trials = tuple(
        replace(trial, build=build, measurements=(measured,)) if trial.build == found.report.choice.winner else trial
        for trial in found.report.trials
    )
    choice = replace(found.report.choice, winner=build, plan=plan)
    artifact.write(
        folder,
        manifest=lambda files: replace(found.manifest, build=build, plan=plan, needs=(), files=files, **manifest),
        payload=payload,
        reference=None,
        golden=golden,
        tokenizer=tokenizer,
        report=replace(found.report, cpu=inspect_cpu(), trials=trials, choice=choice),
        report_text="",
        report_page="",
    )
    return folder


class Server:
    """A running ``corewise serve``; what it prints is kept."""

    def __init__(
        self,
        *arguments,
        python=sys.executable,
        environment=None,
        most_files=None,
        http="127.0.0.1:0",
        grpc="127.0.0.1:0",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ):
        command = [python, "-m", "corewise.cli", "serve", *map(str, arguments), "--http", http]
        command += ["--grpc", grpc, "--admin", "127.0.0.1:0", "--admin-grpc", "127.0.0.1:0"]
        if most_files is not None:
            command = ["prlimit", f"--nofile={most_files}", *command]
        self.process = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.printed, self.logged = [], []
        self._lines = queue.Queue()
        for stream, kept in ((self.process.stdout, self.printed), (self.process.stderr, self.logged)):
            if stream is None:
                continue
            threading.Thread(target=self._read, args=(stream, kept), daemon=True).start()
        self.ports = {}
        self.client = httpx.Client(limits=httpx.Limits(max_connections=None), timeout=TIMEOUT_S)
        if stdout is not subprocess.PIPE:
            return
        line = self.until("listening:")
        for part in line.removeprefix("listening: ").split(", "):
            name, _, port = part.partition(" on port ")
            if port:
                self.ports[name] = int(port)

    def _read(self, stream, kept):
        with stream:
            for line in stream:
                kept.append(line.rstrip())
                if stream is self.process.stdout:
                    self._lines.put(line.rstrip())
        if stream is self.process.stdout:
            self._lines.put(None)

    def until(self, start):
        """The next printed line that starts so."""
        end = time.monotonic() + TIMEOUT_S
        while True:
            line = self._lines.get(timeout=max(0.1, end - time.monotonic()))
            assert line is not None, f"it ended before {start!r}: {self.logged}"
            if line.startswith(start):
                return line

    @property
    def url(self):
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def admin(self):
        return f"http://127.0.0.1:{self.ports['admin']}"

    @property
    def grpc(self):
        return f"127.0.0.1:{self.ports['grpc']}"

    def get(self, path, **more):
        return self.client.get(self.url + path, **more)

    def post(self, path, **more):
        return self.client.post(self.url + path, **more)

    def engine_pids(self):
        """The processes of its models."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    command = (path / "cmdline").read_bytes()
                except (OSError, IndexError):
                    continue
                if parent == self.process.pid and b"corewise.serving.child" in command:
                    found.append(int(path.name))
        return found

    def stop(self, number=signal.SIGTERM):
        """Stop it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


@contextmanager
def serving(*arguments, wait=True, **options):
    server = Server(*arguments, **options)
    try:
        if wait:
            server.until("ready:")
        yield server
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


def image_artifact(folder):
    """The golden artifact, as if it had been made from images of 12 x 12 pixels."""
    found = artifact.read(ARTIFACT)
    payload = folder.with_name(folder.name + ".payload")
    shutil.copytree(ARTIFACT / "payload", payload)
    artifact.write(
        folder,
        manifest=lambda files: replace(found.manifest, files=files, preprocess=Preprocess(resize=12, crop=12)),
        payload=payload,
        reference=None,
        golden=found.golden(),
        report=found.report,
        report_text="",
        report_page="",
    )
    return folder
