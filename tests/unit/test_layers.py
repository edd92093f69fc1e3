"""The map of docs/structure.md as a test: imports go one way, and some things have one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import corewise

SOURCE = Path(corewise.__file__).parent
ROOT = "corewise"
"""The package itself: its public API may name any room, and any room may ask it for the version."""

LAYERS = (
    ("cli", "testing"),
    ("cluster",),
    ("doctor", "serving"),
    ("search",),
    ("artifact",),
    ("runtime",),
    ("report",),
    ("engines",),
    ("quantize",),
    ("source", "accuracy", "pipeline"),
    ("samples", "batching", "machine"),
    ("records",),
    ("common", "_version"),
)
"""Rooms, from top to bottom. A room imports from itself and from lower layers; those of one layer are strangers."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

TORCH = {"torch", "torchao", "torchvision", "transformers", "timm"}
TORCH_ROOMS = {"source", "quantize", "engines", "testing"}
TORCH_WHEN_ASKED = {"doctor", "artifact"}
"""``doctor --torch``, and ``Model`` when the caller gave it tensors: inside functions only."""
WEB = {"starlette", "fastapi", "uvicorn", "grpc", "grpclib", "flask", "aiohttp", "ray"}
ENVIRONMENT = {"environ", "environb", "getenv"}


class Import(NamedTuple):
    """One imported module, and when it is imported: with the file, in a function, or by type checkers only."""

    name: str
    line: int
    when: Literal["at once", "later", "never"]
    members: tuple[str, ...] = ()
    """What ``from name import ...`` takes of it: attributes or submodules."""


class Module(NamedTuple):
    """One file of the package."""

    path: Path
    room: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """The name to import it by; a package's ``__init__`` is the package."""
        parts = self.path.relative_to(SOURCE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """The package whose modules are its siblings."""
        return ".".join(self.path.relative_to(SOURCE.parent).parts[:-1])

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(SOURCE.parent)}:{line}"


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        room = ROOT if parts == ("__init__",) else parts[0]
        found.append(Module(path, room, ast.parse(path.read_text())))
    return tuple(found)


def imports(node: ast.AST, when: Literal["at once", "later", "never"] = "at once") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"line {child.lineno}: write the whole name of the module"
            members = tuple(alias.name for alias in child.names)
            # "from corewise import stats" imports a room, not the package.
            if child.module == ROOT:
                yield from (Import(f"{ROOT}.{member}", child.lineno, when) for member in members)
            else:
                yield Import(str(child.module), child.lineno, when, members)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports(child, "never")
        else:
            yield from imports(child, "later" if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else when)


@cache
def imported_by(module: Module) -> tuple[Import, ...]:
    return tuple(imports(module.tree))


def called(node: ast.AST) -> str:
    """The last part of the name that is called, ``load`` of ``torch.load(file)``; nothing if the node is no call."""
    func = node.func if isinstance(node, ast.Call) else None
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def room_of(name: str) -> str | None:
    """The room an imported name belongs to; ``None`` where it is none of ours."""
    package, _, rest = name.partition(".")
    if package != ROOT:
        return None
    room = rest.partition(".")[0]
    return room if room in {module.room for module in modules()} else ROOT


def assert_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_every_module_has_its_place() -> None:
    rooms = sorted({module.room for module in modules()} - set(LEVEL) - {ROOT})
    assert_none(
        [f"{room} has no layer: add it to LAYERS in {Path(__file__).name} and to docs/structure.md" for room in rooms]
    )


def test_imports_go_one_way() -> None:
    problems = []
    for module in modules():
        for imported in imported_by(module):
            room = room_of(imported.name)
            if room == module.room or room not in LEVEL or module.room not in LEVEL:
                continue
            if LEVEL[module.room] >= LEVEL[room]:
                relation = "beside" if LEVEL[module.room] == LEVEL[room] else "below"
                problems.append(f"{module.at(imported.line)}: {module.room} imports {room}, but stands {relation} it")
    assert_none(problems)


def graph() -> dict[str, set[str]]:
    """The modules that each module imports, also inside functions; imports for type checkers only do not count."""
    names = {module.name for module in modules()}

    def targets(imported: Import) -> set[str]:
        submodules = {f"{imported.name}.{member}" for member in imported.members} & names
        # A package that gives its submodules only is no part of a circle.
        return submodules if len(submodules) == len(imported.members) > 0 else {imported.name, *submodules} & names

    return {
        module.name: set().union(*(targets(imported) for imported in imported_by(module) if imported.when != "never"))
        - {module.name}
        for module in modules()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle in the order of its edges; empty if there is none."""
    finished: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        closed = next(filter(None, (walk(target, [*path, node]) for target in sorted(edges[node]))), [])
        finished.add(node)
        return closed

    return next(filter(None, (walk(node, []) for node in sorted(edges))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not (closed := circle(graph())), " imports ".join(closed)


def test_a_function_does_not_have_the_name_of_its_module_or_of_a_sibling() -> None:
    names = {module.name for module in modules()}
    shared = {
        (module.name.removeprefix(f"{ROOT}."), node.name)
        for module in modules()
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
        if f"{module.package}.{node.name}" in names
    }
    assert_none([f"{module}.{function}: rename the function" for module, function in sorted(shared)])


def test_torch_is_imported_only_where_torch_is_the_work() -> None:
    assert_none(
        [
            f"{module.at(imported.line)}: {module.room} imports {imported.name} {imported.when}"
            for module in modules()
            for imported in imported_by(module)
            if imported.name.partition(".")[0] in TORCH and not _may_import_torch(module, imported)
        ]
    )


def _may_import_torch(module: Module, imported: Import) -> bool:
    if module.room == "engines" and imported.when == "at once":
        return module.path.stem.startswith("torch_")
    return (
        module.room in TORCH_ROOMS
        or imported.when == "never"
        or (imported.when == "later" and module.room in TORCH_WHEN_ASKED)
    )


def test_web_frameworks_and_ray_stay_in_their_rooms() -> None:
    assert_none(
        [
            f"{module.at(imported.line)}: {module.room} imports {imported.name}"
            for module in modules()
            for imported in imported_by(module)
            if imported.name.partition(".")[0] in WEB and module.room not in ("serving", "cluster")
        ]
    )


def test_engines_that_send_usage_data_are_imported_in_one_place() -> None:
    assert_none(
        [
            f"{module.at(imported.line)}: {imported.name}; use engines.libraries, where it sends nothing"
            for module in modules()
            for imported in imported_by(module)
            if imported.name.partition(".")[0] in ("openvino", "nncf", "onnxruntime", "openvino_telemetry")
            and module.name != f"{ROOT}.engines.libraries"
        ]
    )


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert_none(
        [
            f"{module.at(imported.line)}: {imported.name}; write JSON or safetensors"
            for module in modules()
            for imported in imported_by(module)
            if imported.name.partition(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve")
        ]
        + [
            f"{module.at(node.lineno)}: {ast.unparse(node)} may run code of what it reads"
            for module in modules()
            for node in ast.walk(module.tree)
            if called(node) in RUNS_WHAT_IT_READS and _may_run_what_it_reads(node)
        ]
    )


RUNS_WHAT_IT_READS = {"load", "loads", "eval", "exec", "read_pickle"}


def _may_run_what_it_reads(call: ast.Call) -> bool:
    name, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name.endswith("torch.load"):
        return options.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return options.get("allow_pickle", "False") != "False"
    return name in ("eval", "exec", "marshal.load", "marshal.loads", "yaml.load", "pandas.read_pickle")


def test_the_environment_is_read_by_the_cli_and_handed_to_trial_children() -> None:
    assert_none(
        [
            f"{module.at(node.lineno)}: {ast.unparse(node)}; take an argument, and let the cli read the environment"
            for module in modules()
            if module.room not in ("cli", "runtime")
            for node in ast.walk(module.tree)
            if (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) == "os")
            or (isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT & {a.name for a in node.names})
        ]
    )


def test_only_the_cli_prints_and_exits() -> None:
    assert_none(
        [
            f"{module.at(node.lineno)}: {ast.unparse(node.func)}(); return a value or raise, and let the cli speak"
            for module in modules()
            if module.room != "cli"
            for node in ast.walk(module.tree)
            if called(node) in ("print", "exit", "_exit")
            and ast.unparse(node.func) in ("print", "exit", "sys.exit", "os._exit")
        ]
    )


def test_only_trial_children_and_the_server_catch_everything() -> None:
    assert_none(
        [
            f"{module.at(node.lineno)}: catches everything; name the exceptions"
            for module in modules()
            if module.room not in ("runtime", "serving", "batching")
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node)
        ]
    )


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)


def test_every_module_says_what_it_is() -> None:
    assert_none([f"{module.path} has no docstring" for module in modules() if not ast.get_docstring(module.tree)])


LIGHT = (
    "corewise",
    "corewise.cli",
    "corewise.doctor",
    "corewise.artifact",
    "corewise.artifact.model",
    "corewise.engines.openvino",
    "corewise.engines.onnxruntime",
    "corewise.serving.server",
    "corewise.serving.rpc",
    "corewise.serving.child",
)
"""What is imported where there may be no torch."""


def test_torch_waits_until_it_is_needed() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(name)\n"
        f"    if found := {TORCH!r} & set(sys.modules):\n"
        "        sys.exit(f'{name} imports {found}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_rules_can_fail() -> None:
    tree = ast.parse(
        "import torch.nn\nfrom corewise.common import stats\n"
        "def f():\n    import pickle\nif TYPE_CHECKING:\n    import ray"
    )
    assert list(imports(tree)) == [
        Import("torch.nn", 1, "at once"),
        Import("corewise.common", 2, "at once", ("stats",)),
        Import("pickle", 4, "later"),
        Import("ray", 6, "never"),
    ]
    assert (room_of("corewise.engines.base"), room_of("corewise.__version__"), room_of("numpy")) == (
        "engines",
        ROOT,
        None,
    )
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    calls = {
        "torch.load(file)": True,
        "torch.load(file, weights_only=True)": False,
        "np.load(file)": False,
        "np.load(file, allow_pickle=True)": True,
        "eval(text)": True,
        "model.eval()": False,
    }
    for text, may in calls.items():
        (call,) = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
        assert _may_run_what_it_reads(call) == may, text
    handlers = [node for node in ast.walk(ast.parse("try: 1\nexcept (OSError, Exception): 2")) if hasattr(node, "name")]
    assert [_catches_everything(node) for node in handlers] == [True]
