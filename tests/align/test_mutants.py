"""The seeded bugs still fit the code; whether they are killed is told by mutants/run.py."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

SPEC = importlib.util.spec_from_file_location(
    "mutants", pathlib.Path(__file__).parent / "mutants" / "mutants.py"
)
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)
OPS = pathlib.Path(__file__).parents[2] / "chatyuan" / "ops"


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_another_program(mutant):
    text = (OPS / f"{mutant.module}.py").read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1
    compile(text.replace(mutant.before, mutant.after), mutant.module, "exec")
    assert mutant.before != mutant.after


def test_there_are_many_of_every_kind():
    modules = [mutant.module for mutant in mutants.MUTANTS]
    assert len(modules) >= 25
    assert all(modules.count(module) >= 3 for module in set(modules))
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(modules)


def test_the_command_kills():
    """One mutant of all: that the tests do meet the mutated source."""
    program = pathlib.Path(__file__).parent / "mutants" / "run.py"
    command = [sys.executable, str(program), "k2 without its half"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "killed 1/1" in done.stdout, done.stdout + done.stderr
