"""The errors that corewise raises, as a tree.

    CorewiseError            caught by the CLI: one line, exit code 2, no traceback
    ├── InputError           what the user handed over is wrong
    │   ├── SourceError      ... the model
    │   ├── SamplesError     ... the samples or labels
    │   ├── MetricError      ... the metric
    │   └── OutputError      ... the place to write to
    ├── MissingExtra         a package of an optional extra is not installed
    ├── ArtifactError        an artifact is truncated, altered, foreign, or does not fit this CPU
    ├── EngineError          an engine cannot do this build; a trial records it as its reason
    └── NotServed, CallFailed, InstanceDied   a request's answers in ``batching``

Every message says what was wrong and where; ``fix`` says what to do about it.
A candidate that fails is not an exception but a trial with a state and a reason (``records.trial.Trial``).
"""


class CorewiseError(Exception):
    """Base of all errors that corewise raises on purpose.

    ``what`` says what is wrong and where, ``fix`` what to do about it; both are single sentences
    without a final full stop.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}; {fix}" if fix else what)
        self.what = what
        self.fix = fix


class InputError(CorewiseError):
    """An argument, an option or a file is wrong."""


class SourceError(InputError):
    """The model cannot be loaded or is not a model."""


class SamplesError(InputError):
    """The samples or labels cannot be read or do not fit the model."""


class MetricError(InputError):
    """The metric is unknown, raises, or returns something that is not a score."""


class OutputError(InputError):
    """The output path exists, cannot be written, or the disk is full."""


class MissingExtra(CorewiseError):
    """A package that an optional extra installs is missing."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}", f"pip install 'corewise[{extra}]'")
        self.package = package
        self.extra = extra


class ArtifactError(CorewiseError):
    """An artifact is truncated, altered, foreign, or does not fit this CPU."""


class EngineError(CorewiseError):
    """An engine cannot do what a build asks for."""
