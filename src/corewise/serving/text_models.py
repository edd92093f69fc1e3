"""Which of the served models a request with texts is for: the one that it names, or the only one that fits."""

from contextlib import suppress

from corewise.records.pipeline import TextTask
from corewise.serving import texts
from corewise.serving.models import Models
from corewise.serving.protocol import ProtocolError
from corewise.serving.served import Served
from corewise.serving.text import TextInput
from corewise.serving.texts import FieldError

WORDS: dict[TextTask, str] = {
    "vectors": "embeds texts",
    "scores": "ranks texts",
    "classes": "classifies texts",
    "tokens": "finds entities",
}
"""What a model of each task does, for messages."""
CLASSIFY: tuple[TextTask, ...] = ("classes", "tokens")
ANY: tuple[TextTask, ...] = tuple(WORDS)


class TextModels:
    """The models that are served, as the paths for texts choose among them."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def newest(self) -> list[Served]:
        """Each model's newest version."""
        found = []
        for name in sorted({name for name, _ in self._models.names}):
            with suppress(ProtocolError):  # it is not open yet, or was unloaded
                found.append(self._models.find(name))
        return found

    def named(self, model: str) -> Served:
        """The model ``NAME`` or ``NAME@VERSION``. Raises ``FieldError``."""
        with suppress(ProtocolError):  # whose message does not name the field
            return self._models.find(model, None)
        names = {name for name, _ in self._models.names}
        name, _, version = (model, "", "") if model in names else model.partition("@")
        if name not in names:
            known = ", ".join(sorted(names))
            raise FieldError("model", f"there is no model {model[: texts.MOST_ROOM]!r}", f"there is {known}", 404)
        try:
            return self._models.find(name, version or None)
        except ProtocolError as error:
            raise FieldError("model", error.what, error.fix, error.status) from error

    def chosen(self, model: str | None, *tasks: TextTask) -> Served:
        """The model that is named, or the only one of these tasks. Raises ``FieldError``."""
        does = " or ".join(WORDS[task] for task in tasks) if len(tasks) < len(ANY) else "takes texts"
        if model is not None:
            served = self.named(model)
            if served.text is None or task_of(served.text) not in tasks:
                what = "takes tensors" if served.text is None else WORDS[task_of(served.text)]
                raise FieldError("model", f"the model {served.name} {what}, and this path needs one that {does}")
            return served
        fit = [each for each in self.newest() if each.text is not None and task_of(each.text) in tasks]
        if not fit:
            if not self._models.ready:  # one that does may not be open yet
                raise FieldError("model", f"no model that {does} is ready", "try again later", 503)
            raise FieldError("model", f"no model here {does}", status=404)
        if len(fit) > 1:
            names = ", ".join(each.name for each in fit)
            raise FieldError("model", f"several models here fit: {names}", "name one in the field model")
        return fit[0]

    def pairs(self, model: str | None, *tasks: TextTask) -> bool:
        """Whether the chosen model takes pairs of texts."""
        served = self.chosen(model, *tasks)
        return served.text is not None and served.text.pipeline.pairs


def task_of(text: TextInput) -> TextTask:
    """What a model does. Scores of single texts are no ranks: they are those of a classifier with one class."""
    pipeline = text.pipeline
    return "classes" if pipeline.task == "scores" and not pipeline.pairs else pipeline.task


def check_vectors(served: Served, dimensions: int | None = None) -> None:
    """Raise ``FieldError`` unless the model gives one vector for each text, of ``dimensions`` if these are given."""
    shape = served.outputs[0].shape
    if len(shape) != 2:
        raise FieldError(
            "model",
            f"the model {served.name} gives a vector for each token",
            "ask /embed_all for them, or make it again with --pooling mean",
        )
    trained = () if served.text is None else served.text.pipeline.dimensions
    if dimensions is not None and dimensions not in (shape[1], *trained):
        raise FieldError(
            "dimensions",
            f"the model {served.name} gives vectors of {shape[1]} dimensions, and was not trained for {dimensions}",
            f"give one of {', '.join(map(str, trained))}" if trained else "leave dimensions out",
        )


def check_token_vectors(served: Served, dimensions: int | None = None) -> None:
    """Raise ``FieldError`` unless the model gives a vector for each token; of these none can be cut."""
    if len(served.outputs[0].shape) == 2:
        raise FieldError(
            "model",
            f"the model {served.name} gives one vector for each text",
            "ask /embed for it, or make it again with --pooling none",
        )
    if dimensions is not None:
        raise FieldError("dimensions", "the vectors of tokens have no other dimensions", "leave dimensions out")
