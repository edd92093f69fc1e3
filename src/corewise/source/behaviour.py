"""Finds what makes a model's answers depend on more than their own row, by running it a few times.

A benchmark of such a model, and a gate that compares its answers, would mean nothing: random numbers, state that
changes from call to call, and rows of a batch that are mixed.
"""

import copy
import inspect
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from tokenize import TokenError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode

from corewise.common.agreement import EQUAL_DB, worst_row_db
from corewise.common.errors import SourceError
from corewise.common.references import guard, own_frame
from corewise.records.behaviour import BatchMixing, Origin, RandomOperation, StateChange
from corewise.source.examples import Batch
from corewise.source.exported import Flat
from corewise.source.state import State, changed_names, changing_line, find_line, kept_state, restore_state

DEPENDS_DB = 60.0
"""Less agreement than this is no rounding: sums in another order keep fp32 answers within 90 dB and more."""
ROWS = 3
SEEDS = range(1, 9)
"""Random numbers need not change an answer each time, as where one call in five leaves a layer out."""
LATER_CALLS = 16
LATER_S = 1.0
RANDOM_IF = ("train", "training", "p", "dropout", "dropout_p")
"""Arguments of torch's operations that draw numbers; where one is 0 or ``False``, none are drawn."""
NAMED_AFTER = re.compile(r"torch/(?:nn/functional\.py|distributions/\w+\.py)$")
"""Files of torch whose functions people know by name."""
FOREIGN_RANDOM = re.compile(
    r"\b(?:np|numpy)\.random\.(?!default_rng|Generator|RandomState|seed)\w+"
    r"|(?<![\w.])random\.(?!Random|SystemRandom|seed)\w+"
)
"""Calls that draw numbers, and none that make a generator."""


class NotRepeatable(SourceError):
    """The model answers the same input differently from call to call, because of ``reason``."""

    def __init__(self, reason: StateChange | RandomOperation, *, first: bool = False) -> None:
        """``first``: it keeps something of the first call alone."""
        origin = reason.origin
        at = f" ({origin.where}: {origin.code})" if origin and origin.where else ""
        if isinstance(reason, RandomOperation):
            what = f"the model is random: {origin.operation if origin else 'an operation'} draws numbers in forward{at}"
            fix = "make it deterministic, as dropout with training=self.training, or take the noise as an input"
        else:
            kept = f": {reason.name} changes with each call" if reason.name else ""
            what = f"the model answers the same input differently each time{kept}{at}"
            fix = "take the state as an input and return the new one, or leave it out in eval mode"
            if first:
                what = f"the model's answers depend on the first input that it sees, which {reason.name} keeps{at}"
                fix = "run it once, on an input of your choice, where it is made"
            elif not reason.name:
                fix = "make forward depend on its inputs and its weights alone"
        super().__init__(what, fix)
        self.reason = reason


def state_change(flat: Flat, batch: Batch, other: Batch, new: State) -> StateChange | None:
    """What calls change in the model without changing its answers; ``None`` where nothing.

    Args:
        flat: The model, which is left as it was.
        batch: What is answered several times.
        other: Other inputs that are answered in between: a model may keep what it saw last.
        new: What the model kept before its first call: it may go on with what it saw first.

    Raises:
        NotRepeatable: ``batch`` is answered differently when it comes again, or the answers are random.
    """
    kept = kept_state(flat.model)
    with torch.random.fork_rng(devices=[]), ExitStack() as at_last:
        at_last.callback(restore_state, flat.model, kept)
        first = _answers(flat, batch, seed=0)
        with _RandomCalls() as random:
            again = _answers(flat, batch, seed=0)
        with suppress(SourceError):  # a model may refuse what no sample looks like
            _answers(flat, other, seed=0)
        changed = changed_names(kept, kept_state(flat.model))
        last = _answers(flat, batch, seed=0)
        decibels = min(worst_row_db(first, again), worst_row_db(first, last))
        if decibels >= DEPENDS_DB and changed:
            decibels = _later_db(flat, batch, first)
        restore_state(flat.model, kept)
        if decibels < DEPENDS_DB:
            raise NotRepeatable(_why_not_repeatable(flat, batch, kept, changed, random.origins, decibels))
        origins = random.origins or _foreign_random(flat.model)
        if origins:
            decibels = min(worst_row_db(first, _answers(flat, batch, seed)) for seed in SEEDS)
        restore_state(flat.model, kept)
        if begun := changed_names(new, kept):
            _check_beginning(flat, batch, other, new, begun, first)
    if decibels < DEPENDS_DB:
        raise NotRepeatable(RandomOperation(decibels=decibels, origin=origins[0]))
    return _state(flat.model, changed, EQUAL_DB, changes_answers=False) if changed else None


def _check_beginning(
    flat: Flat, batch: Batch, other: Batch, new: State, begun: Sequence[str], expected: list[Any]
) -> None:
    """Raise ``NotRepeatable`` if a model that is new answers ``batch`` differently where ``other`` came first."""
    restore_state(flat.model, new)
    try:
        _answers(flat, other, seed=0)
        decibels = worst_row_db(expected, _answers(flat, batch, seed=0))
    except SourceError:  # a model may refuse what no sample looks like
        return
    if decibels < DEPENDS_DB:
        raise NotRepeatable(_state(flat.model, begun, decibels, changes_answers=True), first=True)


def _why_not_repeatable(
    flat: Flat, batch: Batch, kept: State, changed: Sequence[str], random: Sequence[Origin], decibels: float
) -> StateChange | RandomOperation:
    """What changes the answers, with torch's random numbers the same: what the model keeps, or other random numbers."""
    answers = []
    for _ in range(2):
        answers.append(_answers(flat, batch, seed=0))
        restore_state(flat.model, kept)
    if worst_row_db(*answers) < DEPENDS_DB:
        origins = random or _foreign_random(flat.model)
        if origins:
            return RandomOperation(decibels=decibels, origin=origins[0])
        # Changed weights are not put back; anything else that was seen to change is not the cause.
        changed = [name for name in changed if name in dict(flat.model.named_parameters())]
    state = _state(flat.model, changed, decibels, changes_answers=True)
    return state if state.origin else replace(state, origin=_first_difference(flat, batch))


def _first_difference(flat: Flat, batch: Batch) -> Origin | None:
    """The user's line from which two calls differ, for what no attribute shows: a global, a hook, a clock."""
    before: list[tuple[Any, Origin]] = []
    end_s = time.monotonic() + LATER_S
    for _ in range(LATER_CALLS):
        now = _Steps()
        with now:
            _answers(flat, batch, seed=0)
        for (value, _), (other, origin) in zip(before, now.steps, strict=False):
            if value != other:
                return origin
        if before and time.monotonic() > end_s:
            break
        before = now.steps
    return None


def random_operation(program: ExportedProgram) -> Origin | None:
    """The first operation of a program that draws random numbers."""
    for node in program.graph.nodes:
        if node.op == "call_function" and _draws(node.target, node.args, node.kwargs):
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            return Origin(operation=name, **_line(node.meta.get("stack_trace")))
    return None


def _draws(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers; not dropout, attention or an LSTM without dropout, or in eval mode."""
    if torch.Tag.nondeterministic_seeded not in getattr(operation, "tags", ()):
        return False
    given = {argument.name: argument.default_value for argument in operation._schema.arguments}
    given |= {**dict(zip(given, args, strict=False)), **kwargs}
    return not any(isinstance(given.get(name), bool | int | float) and not given[name] for name in RANDOM_IF)


def batch_mixing(flat: Flat, batch: Batch) -> BatchMixing | None:
    """How the rows of ``batch`` change each other's answers; ``None`` where each is answered as it is alone.

    Where fp32 disagrees, float64 decides: a row whose nearly equal scores change places by rounding is mixed with
    nothing.
    """
    alone_db, moved_db = _independence(flat, batch)
    decibels = min(alone_db, moved_db)
    if decibels >= DEPENDS_DB or not _is_mixed_in_float64(flat, batch):
        return None
    kind: Literal["neighbours", "position"] = "neighbours" if moved_db >= DEPENDS_DB else "position"
    return BatchMixing(kind=kind, decibels=decibels, origin=None)


def mixing_origin(program: ExportedProgram, batch: Batch) -> Origin | None:
    """The first operation of the program whose value for a row of ``batch`` changes with the rows beside it."""
    module: Any = program.module()
    place = {node: number for number, node in enumerate(module.graph.nodes)}
    rows = range(len(batch))
    changed = []
    for row in rows:
        others = [other for other in rows if other != row]
        alone = _Values(module).of(batch.rows([row]).tensors)
        for order, is_first in (([row, *others], True), ([*others, row], False)):
            together = _Values(module).of(batch.rows(order).tensors)
            changed += [
                node
                for node in alone
                if node.op == "call_function" and not _holds_row(alone[node], together[node], len(rows), is_first)
            ][:1]
    if not changed:
        return None
    first = min(changed, key=lambda node: place[node])
    return Origin(operation=str(first.target).removesuffix(".default"), **_line(first.meta.get("stack_trace")))


def reads_buffer(program: ExportedProgram, name: str) -> bool:
    """Whether a program, ``without_updates``, still uses the buffer of that name."""
    buffers = program.graph_signature.inputs_to_buffers
    return any(
        node.users and buffers[node.name] == f"model.{name}" for node in program.graph.nodes if node.name in buffers
    )


def without_updates(program: ExportedProgram) -> None:
    """Take out of a program what only changes its buffers, where the answers do not depend on that."""
    buffers = program.graph_signature.inputs_to_buffers
    for node in reversed(list(program.graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        is_update = _is_in_place(node) and _changed_by(node).name in buffers
        if is_update or not (_is_in_place(node) or node.is_impure()):
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _is_in_place(node: Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _changed_by(node: Node) -> Node:
    """What an operation changes: the value of which its first argument is a view."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _answers(flat: Flat, batch: Batch, seed: int | None = None) -> list[Any]:
    if seed is not None:
        torch.manual_seed(seed)
    what = "the model fails when it is called again"
    # torch.cond compiles its branches, which no mode that looks at operations can watch.
    eager = torch.compiler.set_stance("force_eager")
    with guard(SourceError, what, "make forward independent of earlier calls"), torch.no_grad(), eager:
        # A copy, because the output may be a buffer that the next call changes.
        return [leaf.detach().clone().numpy() for leaf in flat(*batch.tensors)]


def _later_db(flat: Flat, batch: Batch, first: list[Any]) -> float:
    """How far the answers to later calls are from the first, where something in the model changes with each call."""
    end_s = time.monotonic() + LATER_S
    worst = EQUAL_DB
    for _ in range(LATER_CALLS):
        if time.monotonic() > end_s:
            break
        worst = min(worst, worst_row_db(first, _answers(flat, batch, seed=0)))
    return worst


def _foreign_random(module: nn.Module) -> list[Origin]:
    """Lines of the model's own methods that draw from Python's or NumPy's random numbers."""
    found = []
    for part in {type(part): part for part in module.modules()}.values():
        origin = find_line(part, _line_that_draws)
        if origin is not None:
            name = FOREIGN_RANDOM.search(origin.code)
            found.append(replace(origin, operation=name[0] if name else ""))
    return found


def _line_that_draws(method: Any) -> int:
    try:
        lines, start = inspect.getsourcelines(method)
    except (OSError, SyntaxError, TokenError):  # no source, or one that changed since it was imported
        return 0
    return next((start + k for k, line in enumerate(lines) if FOREIGN_RANDOM.search(line)), 0)


def _state(module: nn.Module, names: Sequence[str], decibels: float, *, changes_answers: bool) -> StateChange:
    name = names[0] if names else ""
    origin = changing_line(module, name) if name else None
    return StateChange(name=name, changes_answers=changes_answers, decibels=decibels, origin=origin)


class _RandomCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that draw random numbers, with the user's line."""

    supports_higher_order_operators = True  # such as torch.cond

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins: list[Origin] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        if _draws(func, args, kwargs or {}):
            frames = traceback.extract_stack()[:-1]
            frame = own_frame(frames)
            # What the user's line calls: dropout, where torch sees bernoulli.
            after = frames[frames.index(frame) + 1 :] if frame else []
            called = (part.name for part in after if NAMED_AFTER.search(part.filename))
            name = next(called, func.__name__.partition(".")[0])
            self.origins.append(Origin(operation=name, where=_where(frame), code=(frame.line or "") if frame else ""))
        return func(*args, **(kwargs or {}))


class _Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes of each operation what it made, in short, and the user's line."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Origin]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        made = func(*args, **(kwargs or {}))
        frame = own_frame(traceback.extract_stack()[:-1])
        origin = Origin(operation=func.__name__, where=_where(frame), code=(frame.line or "") if frame else "")
        self.steps.append(
            ((func.__name__, *map(_in_short, made if isinstance(made, tuple | list) else [made])), origin)
        )
        return made


def _in_short(value: Any) -> Any:
    """Equal for equal tensors; NaN equals NaN."""
    if not isinstance(value, Tensor) or value.is_complex() or value.is_quantized or value.layout != torch.strided:
        return type(value).__name__
    numbers = value.detach().double()
    return tuple(value.shape), repr(numbers.sum().item()), repr(numbers.square().sum().item())


def _where(frame: traceback.FrameSummary | None) -> str:
    return f"{frame.filename}:{frame.lineno}" if frame else ""


def _independence(flat: Flat, batch: Batch) -> tuple[float, float]:
    """How far a batch answers its rows as each alone does, and as the same rows in another order, in decibels."""
    together = _answers(flat, batch)
    rows = [_answers(flat, batch.rows([row])) for row in range(len(batch))]
    alone_db = min(
        worst_row_db(row, [output[number : number + 1] for output in together]) for number, row in enumerate(rows)
    )
    order = [*range(1, len(batch)), 0]
    moved = _answers(flat, batch.rows(order))
    moved_db = worst_row_db([output[order] for output in together], moved)
    return alone_db, moved_db


def _is_mixed_in_float64(flat: Flat, batch: Batch) -> bool:
    """Whether rows change each other in float64 too; also where the model does not run in it."""
    tensors = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch.tensors)
    doubles = replace(batch, tensors=tensors)
    try:
        return min(_independence(copy.deepcopy(flat).double(), doubles)) < DEPENDS_DB
    except (SourceError, RuntimeError, TypeError, ValueError):
        return True


class _Values(Interpreter):
    """Runs a graph and keeps the value of each node."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._values: dict[Node, Any] = {}

    def of(self, tensors: Sequence[Tensor]) -> dict[Node, Any]:
        """The values, in the order of the graph."""
        with torch.no_grad():
            self.run(*tensors)
        return self._values

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        # A copy, because a later operation may change it in place.
        self._values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _holds_row(alone: Any, together: Any, rows: int, is_first: bool) -> bool:
    """Whether the value of a batch begins (or ends) with what that row has alone; also where that cannot be seen."""
    if not isinstance(alone, Tensor) or not isinstance(together, Tensor) or alone.dim() != together.dim():
        return True
    longer = [dim for dim in range(alone.dim()) if alone.shape[dim] != together.shape[dim]]
    if len(longer) > 1 or any(together.shape[dim] != rows * alone.shape[dim] for dim in longer):
        return True
    for dim in longer:
        size = alone.shape[dim]
        together = together.narrow(dim, 0 if is_first else together.shape[dim] - size, size)
    return worst_row_db([alone[None].numpy()], [together[None].numpy()]) >= DEPENDS_DB


def _line(stack_trace: str | None) -> dict[str, str]:
    """Place and text of the user's own line in the stack that torch.export noted for a node."""
    places = re.findall(r'File "(.+?)", line (\d+)', stack_trace or "")
    frame = own_frame([traceback.FrameSummary(file, int(line), "") for file, line in places])
    return {"where": _where(frame), "code": (frame.line or "") if frame else ""}
