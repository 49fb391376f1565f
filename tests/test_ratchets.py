"""Sizes and habits that may only get better: files, functions, docstrings, annotations."""

import ast
import functools
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("chatyuan", "tasks")
FILE_LINES = 600
FUNCTION_LINES = 80
FUNCTION_LINES_P95 = 50
PUBLIC_DOCSTRINGS = 0.90

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def files() -> dict[str, ast.Module]:
    """Path -> syntax tree of every module."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def functions() -> Iterator[tuple[str, Function]]:
    for path, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def public(path: str, node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yields the module, and its public classes, functions and methods."""
    yield f"{path} {owner}".strip(), node
    for child in node.body:
        named = isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_")
        if named and not isinstance(node, Function):
            yield from public(path, child, f"{owner}.{child.name}".lstrip("."))


def test_files_are_short():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in files()}
    long = {path: length for path, length in lengths.items() if length > FILE_LINES}
    assert not long, f"longer than {FILE_LINES} lines: {long}"


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    long = {name: length for name, length in lengths.items() if length > FUNCTION_LINES}
    assert not long, f"longer than {FUNCTION_LINES} lines: {long}"
    ordered = sorted(lengths.values())
    assert ordered[int(0.95 * len(ordered))] <= FUNCTION_LINES_P95


def test_public_things_have_docstrings():
    things = [thing for path, tree in files().items() for thing in public(path, tree)]
    silent = [name for name, node in things if not ast.get_docstring(node)]
    share = 1 - len(silent) / len(things)
    assert share >= PUBLIC_DOCSTRINGS, f"{share:.0%} have docstrings; these have none: {silent}"


def test_every_argument_is_annotated():
    bare = []
    for name, node in functions():
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a]
        bare += [
            f"{name}({argument.arg})"
            for i, argument in enumerate(every)
            if argument.annotation is None and not (i == 0 and argument.arg in ("self", "cls"))
        ]
    assert not bare


def test_nothing_private_to_the_makers_is_named():
    """Paths of one machine do not belong into a repository that others clone."""
    tree = [path for folder in (*FOLDERS, "gin", "tests") for path in (ROOT / folder).rglob("*.*")]
    named = "/wo" + "rk/"
    texts = [path for path in tree if path.suffix in (".py", ".gin", ".md", ".toml")]
    assert not [str(p) for p in texts if named in p.read_text(encoding="utf-8", errors="ignore")]
