"""The folder that a run works in, and the name of every file and folder in it."""

import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from corewise.common.errors import OutputError
from corewise.engines import BuildInputs
from corewise.records.build import Build, TensorSpec
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json, to_json
from corewise.samples import Samples

LONGEST_NAME = 150
"""Characters of a build's label that become a file name; longer labels end in a hash."""


@dataclass(frozen=True)
class Workspace:
    """Names the files of one run. Parents and trial processes agree on them through this class alone."""

    folder: Path

    @classmethod
    def create(cls, folder: str | Path | None = None) -> Self:
        """Make the workspace in ``folder``, or in a temporary folder that is removed with the returned object.

        Raises ``OutputError`` if the folder cannot be written or holds files that no run left there: a run removes
        its workspace at the end.
        """
        folder = None if folder is None else Path(folder)
        workspace = cls(folder or temporary_folder())
        if folder is None:
            weakref.finalize(workspace, shutil.rmtree, workspace.folder, ignore_errors=True)
        try:
            if folder is not None and folder.is_dir() and any(folder.iterdir()) and not workspace.journal.is_file():
                raise OutputError(f"{folder} holds files that are not corewise's", "name a new folder to work in")
            workspace.folder.mkdir(exist_ok=True)
            for part in workspace._parts:
                part.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{workspace.folder} cannot be written: {error.strerror}", "give another place"
            ) from error
        return workspace

    @property
    def program(self) -> Path:
        """The exported fp32 program."""
        return self.folder / "program.pt2"

    @property
    def calibration(self) -> Path:
        """The samples to calibrate with."""
        return self.folder / "calibration.safetensors"

    @property
    def holdout(self) -> Path:
        """The samples that accuracy is judged on."""
        return self.folder / "holdout.safetensors"

    @property
    def journal(self) -> Path:
        """The finished trials."""
        return self.folder / "journal.jsonl"

    @property
    def sample_limits(self) -> Path:
        """How many samples the budget has time for, as it was decided first."""
        return self.folder / "sample-limits.json"

    @property
    def cache(self) -> Path:
        """What several builds share."""
        return self.folder / "cache"

    def payload(self, build: Build) -> Path:
        """The folder of the build's payload."""
        return self.folder / "builds" / _file_name(build)

    def outputs(self, build: Build) -> Path:
        """The build's outputs for the holdout."""
        return self.folder / "outputs" / f"{_file_name(build)}.safetensors"

    def log(self, build: Build) -> Path:
        """What the build's trial processes print."""
        return self.folder / "logs" / f"{_file_name(build)}.log"

    def twin(self, inputs: BuildInputs, calibration: Samples) -> Self:
        """An empty workspace within this one for builds with other calibration samples; all else is the same."""
        twin = self.within("twin")
        twin.program.symlink_to(self.program.resolve())
        twin.holdout.symlink_to(self.holdout.resolve())
        twin.write_build_inputs(replace(inputs, calibration=calibration))
        return twin

    def within(self, name: str) -> Self:
        """An empty workspace within this one."""
        inner = type(self)(self.folder / name)
        shutil.rmtree(inner.folder, ignore_errors=True)
        for part in (inner.folder, *inner._parts):
            part.mkdir()
        return inner

    def kept(self, name: str, key: str) -> Self | None:
        """The workspace within this one as an earlier run filled it, if that run filled it for ``key``."""
        inner = type(self)(self.folder / name)
        try:
            return inner if inner._key.read_text() == key else None
        except OSError:
            return None

    def keep(self, key: str) -> None:
        """Let ``kept`` find this workspace, which now has all that belongs to ``key``."""
        self._key.write_text(key)

    def empty_payload(self, build: Build) -> Path:
        """The build's payload folder, made new and empty."""
        payload = self.payload(build)
        shutil.rmtree(payload, ignore_errors=True)
        payload.mkdir(parents=True)
        return payload

    def write_build_inputs(self, inputs: BuildInputs) -> None:
        """Write the calibration samples and describe ``inputs``, whose program is in the workspace already."""
        inputs.calibration.save(self.calibration)
        about: dict[str, Any] = {
            "inputs": inputs.inputs,
            "outputs": inputs.outputs,
            "operators": inputs.operators,
            "cpu": inputs.cpu,
        }
        self._build_inputs.write_text(json.dumps(to_json(about)))

    def read_build_inputs(self) -> BuildInputs:
        """The inputs of a build, as ``write_build_inputs`` left them."""
        about = json.loads(self._build_inputs.read_text())
        self.cache.mkdir(exist_ok=True)
        return BuildInputs(
            program=self.program,
            inputs=from_json(tuple[TensorSpec, ...], about["inputs"]),
            outputs=from_json(tuple[TensorSpec, ...], about["outputs"]),
            operators=about["operators"],
            calibration=Samples.load(self.calibration),
            cpu=from_json(Cpu, about["cpu"]),
            cache=self.cache,
        )

    def clear(self) -> None:
        """Remove what builds left: payloads, outputs, logs and what they share."""
        for part in self._parts:
            shutil.rmtree(part)
            part.mkdir()

    def remove(self) -> None:
        """Remove the folder: an artifact has what is worth keeping."""
        shutil.rmtree(self.folder)

    @property
    def _build_inputs(self) -> Path:
        return self.folder / "build-inputs.json"

    @property
    def _key(self) -> Path:
        return self.folder / "key"

    @property
    def _parts(self) -> tuple[Path, ...]:
        return (*(self.folder / name for name in ("builds", "outputs", "logs")), self.cache)


def temporary_folder() -> Path:
    """A new temporary folder. Raises ``OutputError`` where there can be none."""
    try:
        return Path(tempfile.mkdtemp(prefix="corewise-"))
    except OSError as error:
        raise OutputError(
            f"there is no place for temporary files: {error.strerror}",
            "free space, or set TMPDIR to a folder that this user may write",
        ) from error


def _file_name(build: Build) -> str:
    """The build's label as a file name; a long label is cut and ends in its hash."""
    name = build.label.replace("/", "_")
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{sha256(name.encode()).hexdigest()[:12]}"
