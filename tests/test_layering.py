"""Imports go down only, and each heavy or foreign package stays in its room.

Read from the syntax tree, so nothing has to be importable; imports inside functions count as well,
except where a test says "at import time".
"""

import ast
import functools
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Room -> the rooms and top-level modules it may import (itself always, `errors` always).
LOWEST = {"ops", "kernels", "sharding"}
MIDDLE = {"models", "text"}
UPPER = {"align", "train", "decode", "serve", "evaluate", "interop", "data", "cleaning", "planning"}
RECORDS = {"checkpoints", "metrics", "report"}
# How the processes of a run agree: for everyone who computes or writes with others.
AGREEING = {"distributed"}
MAY_IMPORT = {
    "errors": set(),
    **{room: LOWEST for room in ("ops", "kernels", "models")},
    "text": set(),
    **{room: LOWEST | MIDDLE | UPPER | RECORDS for room in UPPER},
    "train": LOWEST | RECORDS | AGREEING,  # it receives its loss as a function and names no model
    "cleaning": {"text"},
    "ranking": {"text"} | RECORDS,
    "stages": LOWEST | MIDDLE | UPPER | {"ranking"} | RECORDS | AGREEING | {"configs"},
    "sharding": set(),
    "distributed": set(),
    "checkpoints": AGREEING,
    "supervisor": {"checkpoints"},  # it tells progress by them; reads no array
    "metrics": set(),
    "report": {"metrics"},
    "configs": set(),
    "main": {"stages", "configs", "distributed", "supervisor"},
}
# A top-level module that outgrew its file goes on in others that belong to it.
PARTS = {
    "gin_files": "configs",
    "gin_types": "configs",
    "gin_check": "configs",
    "checkpoint_arrays": "checkpoints",
    "checkpoint_files": "checkpoints",
    "plots": "report",
}
TENSORFLOW = {"seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text", "t5"}
# Stages that read sources rather than caches; the others must start without TensorFlow.
READ_SOURCES = {"cache", "clean", "tokenizer", "data_check", "quickstart"}


def modules(*folders: str) -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module under the folders."""
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: pathlib.Path, at_import_time: bool) -> Iterator[ast.AST]:
    """Yields all nodes, or those that run when the module is imported."""
    queue: list[ast.AST] = [tree(path)]
    while queue:
        node = queue.pop()
        yield node
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not (at_import_time and (function or checking)):
            queue.extend(ast.iter_child_nodes(node))


def imports(name: str, path: pathlib.Path, at_import_time: bool = False) -> set[str]:
    """The dotted names that a module imports; `from a import b` gives both a and a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes(path, at_import_time):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def room(name: str) -> str:
    parts = name.split(".")
    first = parts[1] if len(parts) > 1 else ""
    return PARTS.get(first, first)


def offences(allowed, folders=("chatyuan",), at_import_time=False) -> list[str]:
    """Every `module imports other` for which `allowed(module, other)` is false."""
    return [
        f"{name} imports {other}"
        for name, path in sorted(modules(*folders).items())
        for other in sorted(imports(name, path, at_import_time))
        if not allowed(name, other)
    ]


def roots(names: set[str]):
    """A predicate: does a dotted name belong to one of these packages?"""
    return lambda name: name.split(".")[0] in names


def test_imports_go_down_only():
    rooms = {room(name) for name in modules("chatyuan")} - {""}
    assert rooms <= set(MAY_IMPORT), "a new room needs a row in MAY_IMPORT"

    def allowed(name: str, other: str) -> bool:
        if not other.startswith("chatyuan.") or room(other) not in rooms:
            return True
        return room(other) in {room(name), "errors", *MAY_IMPORT[room(name)]}

    assert not offences(lambda name, other: room(name) == "" or allowed(name, other))
    assert not [n for n in imports("chatyuan", ROOT / "chatyuan/__init__.py") if "chatyuan" in n]


def test_tasks_are_named_in_gin_only():
    assert not offences(lambda name, other: not roots({"tasks"})(other))


def test_tasks_import_data_text_and_cleaning_only():
    rooms = {"data", "text", "cleaning", "errors"}

    def allowed(name: str, other: str) -> bool:
        return not other.startswith("chatyuan.") or room(other) in rooms

    assert not offences(allowed, folders=("tasks",))


def test_only_configs_imports_gin():
    gin = roots({"gin"})
    assert not offences(lambda name, other: not gin(other) or room(name) == "configs")
    assert not offences(lambda name, other: not gin(other), folders=("tasks",))


def test_seqio_and_tensorflow_stay_with_cache_building():
    def allowed(name: str, other: str) -> bool:
        return not roots(TENSORFLOW)(other) or name.startswith("chatyuan.data.seqio_")

    assert not offences(allowed)


def test_array_rooms_know_no_modules_and_no_configurations():
    def allowed(name: str, other: str) -> bool:
        if room(name) not in ("ops", "kernels"):
            return True
        return not (roots({"flax", "gin"})(other) or other.split(".")[-1] in ("config", "configs"))

    assert not offences(allowed)


def reached(name: str, known: dict[str, pathlib.Path]) -> dict[str, str]:
    """Everything that importing `name` imports -> the module of ours that does so."""
    seen, queue, found = set(), [name], {}
    while queue:
        module = queue.pop()
        if module in seen or module not in known:
            continue
        seen.add(module)
        for other in imports(module, known[module], at_import_time=True):
            found.setdefault(other, module)
            queue += [
                other,
                *(".".join(other.split(".")[:i]) for i in range(1, other.count(".") + 1)),
            ]
    return found


def reaching(names: list[str], packages: set[str]) -> list[str]:
    known = modules("chatyuan", "tasks")
    return [
        f"importing {name} reaches {other} in {where}"
        for name in names
        for other, where in reached(name, known).items()
        if other.split(".")[0] in packages
    ]


def test_text_cleaning_and_reading_need_no_jax():
    names = [name for name in modules("chatyuan") if room(name) in ("text", "cleaning")]
    names += [f"chatyuan.data.{name}" for name in ("objectives", "packing", "cache")]
    assert not reaching(names, {"jax", "jaxlib", "flax", "optax"})


def test_the_command_line_and_the_records_start_without_jax():
    names = ["chatyuan.main", "chatyuan.configs", "chatyuan.errors", "chatyuan.metrics"]
    assert not reaching([*names, "chatyuan.report"], {"jax", "jaxlib", "flax", "optax"})


def test_ranking_serves_without_jax():
    names = [name for name in modules("chatyuan") if room(name) == "ranking"]
    assert not reaching([*names, "chatyuan.stages.rank"], {"jax", "jaxlib", "flax", "optax"})


def test_stages_that_read_a_cache_start_without_tensorflow():
    names = [name for name in modules("chatyuan") if room(name) == "stages"]
    names = [name for name in names if name.split(".")[-1].rstrip("_") not in READ_SOURCES]
    assert not reaching(names, TENSORFLOW | {"tasks"})


def test_gin_is_never_a_package():
    found = list((ROOT / "gin").rglob("__init__.py"))
    assert not found, "it would shadow the gin library: `module 'gin' has no attribute ...`"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b as c", {"a.b"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import b", {"chatyuan.room", "chatyuan.room.b"}),
        ("from ..other import b", {"chatyuan.other", "chatyuan.other.b"}),
        ("def f():\n  import a", {"a"}),
        ("importlib.import_module('tasks.c4')", {"tasks.c4"}),
    ],
)
def test_imports_are_seen(tmp_path, source, expected):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imports("chatyuan.room.module", path) == expected
    later = "def" in source
    assert imports("chatyuan.room.module", path, at_import_time=True) == (
        set() if later else expected
    )
