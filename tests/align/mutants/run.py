"""Puts each seeded bug of `mutants.py` into its module and runs that module's ordinary unit tests.

    python tests/align/mutants/run.py             prints killed n/n; exit status 1 if one survives
    python tests/align/mutants/run.py TEXT        only mutants whose name or module contains TEXT

All in one process, with jax's compiled operations shared: the mutated source is what the import
system is given, nothing on disk changes.
"""

import importlib.machinery
import importlib.util
import io
import pathlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from types import CodeType, ModuleType

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]

import pytest  # noqa: E402
from mutants import MUTANTS, Mutant  # noqa: E402


def source_of(mutant: Mutant) -> pathlib.Path:
    """The file that a mutant changes."""
    return ROOT / "chatyuan" / "ops" / f"{mutant.module}.py"


def tests_of(mutant: Mutant) -> str:
    """The ordinary unit tests of that file."""
    return str(ROOT / "tests" / "ops" / f"test_{mutant.module}.py")


def mutated(mutant: Mutant) -> str:
    """The module's text with the bug.

    Raises:
      ValueError: the snippet is not there exactly once.
    """
    text = source_of(mutant).read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(
            f"Mutant {mutant.name!r}: its snippet occurs {text.count(mutant.before)} times in "
            f"{source_of(mutant).name}, not once; rewrite it after the code."
        )
    return text.replace(mutant.before, mutant.after)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles another text than the file's; no bytecode is read or written."""

    text = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec")


class _Finder:
    """Answers for the mutated module alone."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"chatyuan.ops.{mutant.module}"
        self.path, self.text = str(source_of(mutant)), mutated(mutant)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        loader = _Loader(name, self.path)
        loader.text = self.text
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def _forget() -> None:
    """The next import of the arrays' rooms and of their tests reads them anew."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.startswith("chatyuan.ops") or file.startswith(str(ROOT / "tests" / "ops")):
            del sys.modules[name]
    if "chatyuan" in sys.modules:
        vars(sys.modules["chatyuan"]).pop("ops", None)


def outcome(tests: str, mutant: Mutant | None = None) -> tuple[int, str]:
    """pytest's exit status (1: a test failed) and what it printed."""
    finder = None if mutant is None else _Finder(mutant)
    _forget()
    if finder is not None:
        sys.meta_path.insert(0, finder)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            options = ["-q", "-x", "--no-header", "--tb=line", "--durations=0", "--assert=plain"]
            # Workers of pytest-xdist would import the source as it is.
            status = pytest.main([*options, "-n", "0", "-p", "no:cacheprovider", tests])
    finally:
        if finder is not None:
            sys.meta_path.remove(finder)
        _forget()
    return int(status), printed.getvalue()


def main(argv: Sequence[str]) -> int:
    """Runs the mutants and returns the exit status."""
    wanted = argv[0] if argv else ""
    chosen = [m for m in MUTANTS if wanted in m.name or wanted in m.module]
    for tests in sorted({tests_of(mutant) for mutant in chosen}):
        status, printed = outcome(tests)
        if status:
            print(f"{printed}\n{tests} fails without any mutant: nothing to learn.")
            return 2
    survivors = []
    for mutant in chosen:
        status, printed = outcome(tests_of(mutant), mutant)
        if status not in (0, 1):  # not a failing test: the mutant could not even be imported
            print(f"{printed}\nMutant {mutant.name!r} does not run: it proves nothing.")
            return 2
        survivors += [] if status else [mutant]
        print(f"{'killed  ' if status else 'SURVIVED'} {mutant.module}: {mutant.name}", flush=True)
    print(f"killed {len(chosen) - len(survivors)}/{len(chosen)}")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
