"""Finds what makes a model's answers depend on more than their own row, by running it a few times.

A benchmark of such a model, and a gate that compares its answers, would mean nothing: random numbers, state that
changes from call to call, and rows of a batch that are mixed.
"""

import ast
import copy
import inspect
import linecache
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence
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

DEPENDS_DB = 60.0
"""Less agreement than this is no rounding: sums in another order keep fp32 answers within 90 dB and more."""
ROWS = 3
CONSTANTS = (type(None), bool, int, float, str)


class NotRepeatable(SourceError):
    """The model answers the same input differently from call to call, because of ``reason``."""

    def __init__(self, reason: StateChange | RandomOperation) -> None:
        origin = reason.origin
        at = f" ({origin.where}: {origin.code})" if origin and origin.where else ""
        if isinstance(reason, RandomOperation):
            what = f"the model is random: {origin.operation if origin else 'an operation'} draws numbers in forward{at}"
            fix = "make it deterministic, as dropout with training=self.training, or take the noise as an input"
        else:
            kept = f": {reason.name} changes with each call" if reason.name else ""
            what = f"the model answers the same input differently each time{kept}{at}"
            fix = "take the state as an input and return the new one, or leave it out in eval mode"
        super().__init__(what, fix)
        self.reason = reason


def state_change(flat: Flat, batch: Batch) -> StateChange | None:
    """What one call changes in the model without changing the next call's answers; ``None`` where nothing.

    The model is left as it was. Raises ``NotRepeatable`` where the answers do change, and where they are random.
    """
    kept = _kept(flat.model)
    with torch.random.fork_rng(devices=[]):
        first = _answers(flat, batch, seed=0)
        second = _answers(flat, batch, seed=0)
        changed = _changed(kept, _kept(flat.model))
        _restore(flat.model, kept)
        decibels = worst_row_db(first, second)
        if decibels < DEPENDS_DB:
            raise NotRepeatable(_state(flat.model, changed, decibels, changes_answers=True))
        with _RandomCalls() as random:
            other = _answers(flat, batch, seed=1)
        _restore(flat.model, kept)
    decibels = worst_row_db(first, other)
    if decibels < DEPENDS_DB:
        raise NotRepeatable(RandomOperation(decibels=decibels, origin=next(iter(random.origins), None)))
    buffers = [name for name in changed if name in dict(flat.model.named_buffers())]
    return _state(flat.model, buffers, EQUAL_DB, changes_answers=False) if buffers else None


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
        ordered = batch.rows([row, *(other for other in rows if other != row)])
        alone, together = (_Values(module).of(part.tensors) for part in (ordered.rows([0]), ordered))
        changed += [node for node, value in alone.items() if not _holds_row(value, together[node], len(rows))][:1]
    if not changed:
        return None
    first = min(changed, key=lambda node: place[node])
    return Origin(operation=str(first.target).removesuffix(".default"), **_line(first.meta.get("stack_trace")))


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
    with guard(SourceError, what, "make forward independent of earlier calls"), torch.no_grad():
        # A copy, because the output may be a buffer that the next call changes.
        return [leaf.clone().numpy() for leaf in flat(*batch.tensors)]


def _kept(module: nn.Module) -> dict[str, Any]:
    """What a module keeps between calls: buffers and attributes that are tensors, constants or containers."""
    kept: dict[str, Any] = {}
    for path, part in module.named_modules():
        attributes = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        for name, value in {**part._buffers, **attributes}.items():
            full = f"{path}.{name}" if path else name
            if isinstance(value, Tensor):
                kept[full] = value.detach().clone()
            elif type(value) in CONSTANTS:
                kept[full] = value
            elif isinstance(value, list | dict | set):
                kept[full] = _Length(len(value))
    return kept


class _Length(int):
    """Stands for a container, of which only the length is compared."""


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, buffers and tensors first."""
    names = [name for name in after if name not in before or not _equal(before[name], after[name])]
    return sorted(names, key=lambda name: not isinstance(after[name], Tensor))


def _equal(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        same_kind = before.shape == after.shape and before.dtype == after.dtype
        return same_kind and bool(((before == after) | ((before != before) & (after != after))).all())
    return type(before) is type(after) and before == after


def _restore(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """Put back what a call changed; the length of a container stays as it is."""
    for name, value in _kept(module).items():
        path, _, attribute = name.rpartition(".")
        part = module.get_submodule(path)
        before = kept.get(name)
        if name not in kept or isinstance(before, _Length) or _equal(before, value):
            continue
        current = getattr(part, attribute)
        if isinstance(before, Tensor) and isinstance(current, Tensor) and before.shape == current.shape:
            with torch.no_grad():
                current.copy_(before)
        else:
            setattr(part, attribute, before)


def _state(module: nn.Module, names: Sequence[str], decibels: float, *, changes_answers: bool) -> StateChange:
    name = names[0] if names else ""
    return StateChange(
        name=name,
        changes_answers=changes_answers,
        decibels=decibels,
        origin=_assignment(module, name) if name else None,
    )


def _assignment(module: nn.Module, name: str) -> Origin | None:
    """The line of a module's own methods, other than ``__init__``, that changes ``self.<name>``."""
    path, _, attribute = name.rpartition(".")
    for owner in type(module.get_submodule(path)).__mro__:
        for method in vars(owner).values():
            if inspect.isfunction(method) and method.__name__ != "__init__":
                number = _line_that_changes(method, attribute)
                if number:
                    file = method.__code__.co_filename
                    return Origin(operation="", where=f"{file}:{number}", code=linecache.getline(file, number).strip())
    return None


def _line_that_changes(method: Any, attribute: str) -> int:
    """The number of the first line of a method that changes ``self.<attribute>``; 0 where none does."""
    try:
        lines, start = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return 0
    statements = [part for part in ast.walk(tree) if isinstance(part, ast.stmt) and _changes(part, attribute)]
    return min((start + statement.lineno - 1 for statement in statements), default=0)


def _changes(statement: ast.stmt, attribute: str) -> bool:
    """Whether a simple statement stores to ``self.<attribute>``, or calls one of its methods that change it."""
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = statement.targets
    elif isinstance(statement, ast.AugAssign | ast.AnnAssign):
        targets = [statement.target]
    else:
        targets = []
    if any(_is_own(part, attribute) for target in targets for part in ast.walk(target)):
        return True
    if not isinstance(statement, ast.Expr | ast.Assign):
        return False
    calls = (part for part in ast.walk(statement) if isinstance(part, ast.Call))
    changing = (call.func for call in calls if isinstance(call.func, ast.Attribute) and _is_changing(call.func.attr))
    return any(_is_own(part, attribute) for function in changing for part in ast.walk(function.value))


def _is_own(part: ast.AST, attribute: str) -> bool:
    is_self = isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self"
    return is_self and part.attr == attribute  # type: ignore[attr-defined]


def _is_changing(method: str) -> bool:
    is_in_place = method.endswith("_") and not method.startswith("_")
    return is_in_place or method in ("append", "extend", "add", "update", "pop")


class _RandomCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that draw random numbers, with the user's line."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins: list[Origin] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            frames = traceback.extract_stack()[:-1]
            frame = own_frame(frames)
            # What the user's line calls: dropout, where torch sees bernoulli.
            after = frames[frames.index(frame) + 1 :] if frame else []
            name = after[0].name if after and "torch" in after[0].filename else func.__name__.partition(".")[0]
            self.origins.append(Origin(operation=name, where=_where(frame), code=(frame.line or "") if frame else ""))
        return func(*args, **(kwargs or {}))


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
    doubles = Batch(tensors=tensors, samples=batch.samples)
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


def _holds_row(alone: Any, together: Any, rows: int) -> bool:
    """Whether the value of a whole batch begins with what its first row has alone; also where that cannot be seen."""
    if not isinstance(alone, Tensor) or not isinstance(together, Tensor) or alone.dim() != together.dim():
        return True
    longer = [dim for dim in range(alone.dim()) if alone.shape[dim] != together.shape[dim]]
    if len(longer) > 1 or any(together.shape[dim] != rows * alone.shape[dim] for dim in longer):
        return True
    for dim in longer:
        together = together.narrow(dim, 0, alone.shape[dim])
    return worst_row_db([alone[None].numpy()], [together[None].numpy()]) >= DEPENDS_DB


def _line(stack_trace: str | None) -> dict[str, str]:
    """Place and text of the user's own line in the stack that torch.export noted for a node."""
    places = re.findall(r'File "(.+?)", line (\d+)', stack_trace or "")
    frame = own_frame([traceback.FrameSummary(file, int(line), "") for file, line in places])
    return {"where": _where(frame), "code": (frame.line or "") if frame else ""}
