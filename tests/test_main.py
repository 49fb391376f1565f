"""The command line: exit statuses, one message per mistake, nothing imported too early."""

import errno
import pathlib
import resource
import subprocess
import sys

import pytest

from chatyuan import errors, main, stages
from chatyuan.main import main as run

pytest_plugins = ["fake_stage"]

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOOD = ["fake", "--gin.TRAIN_STEPS=10"]


def command(repository, *more) -> list[str]:
    return [*GOOD, f"--gin.MODEL_DIR={repository.root / 'run'}", *more]


def test_a_good_command_runs(repository, capsys):
    assert run(command(repository)) == 0
    assert capsys.readouterr().out == "ran 10\n"
    assert {"run/config.gin", "run/config.json"} <= repository.files()
    assert run(command(repository, "--gin.TRAIN_STEPS=10")) == 0


def test_files_arguments_and_flags_reach_the_stage(repository, capsys):
    recipe = repository.recipe("LEARNING_RATE = 2.0\n")
    words = ["a.txt", "--gin_file", recipe, "b.txt", "--precompile", "--restart_on_failure=3"]
    assert run(command(repository, *words, "--gin_search_paths=x,y")) == 0
    saved = (repository.root / "run/config.gin").read_text()
    for line in (
        "fake.Config.arguments = ('a.txt', 'b.txt')",
        "fake.Config.precompile = True",
        "fake.Config.restart_on_failure = 3",
        "LEARNING_RATE = 2.0",
    ):
        assert line in saved


def test_dry_run_prints_and_writes_nothing(repository, capsys):
    before = repository.files()
    assert run(command(repository, "--dry_run")) == 0
    out = capsys.readouterr().out
    assert "train_steps         10 steps" in out
    assert out.endswith("would run 10\n")
    assert repository.files() == before


def test_lists_stages_and_helps(repository, capsys):
    assert run([]) == 0
    out = capsys.readouterr().out
    assert "\n  fake" in out
    assert "Trains a fake model.\n" in out
    assert run(["--help"]) == 0
    assert capsys.readouterr().out == out
    assert run(["fake", "--help"]) == 0
    assert "--restart_on_failure  how often to try again" in capsys.readouterr().out
    assert run(["-h", "fake"]) == 0


MISTAKES = {
    "fakee --gin.TRAIN_STEPS=1": "There is no stage fakee. Did you mean fake?",
    "--gin.TRAIN_STEPS=1": "Which stage?",
    "--run_mode=train --gin_file=x": "T5X's --run_mode=train is a stage here: python run.py pre",
    "fake --run_mode eval": "T5X's --run_mode=eval is a stage here: python run.py evaluate",
    "fake --run_mode=tarin": "--run_mode=tarin is unknown; T5X's modes are stages here (train is",
    "fake --gin_fiel=x": "fake has no flag --gin_fiel. Did you mean --gin_file?",
    "fake --precompil": "fake has no flag --precompil. Did you mean --precompile?",
    "fake --TRAIN_STEPS=3": "--TRAIN_STEPS is unknown; settings are written --gin.TRAIN_STEPS=",
    "fake -dry_run": "-dry_run is unknown; flags have two dashes: --dry_run.",
    "fake --gin_file": "--gin_file has no value; write --gin_file=VALUE.",
    "fake --dry_run=5": "--dry_run=5 should be --dry_run, without a value.",
    "fake --gin.BATCH_SIZE=3": "  - --gin.BATCH_SIZE  BATCH_SIZE is set but nothing uses it.",
    "fake --gin_file=nowhere.gin": "--gin_file=nowhere.gin  file nowhere.gin not found",
    "fake --restart_on_failure=x": "--restart_on_failure  chatyuan.stages.fake.Config.restart_on",
    "fake --restart_on_failure={": "--restart_on_failure={  ",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(repository, capsys, line):
    before = repository.files()
    assert run(line.split()) == 2
    captured = capsys.readouterr()
    assert MISTAKES[line] in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert repository.files() == before


def test_debug_shows_the_traceback(repository, capsys):
    assert run(["fakee", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_words_after_two_dashes_are_arguments():
    command = main.parse(["fake", "-", "--dry_run", "--", "--odd", "-name"])
    assert command.arguments == ["-", "--odd", "-name"]
    assert command.switches == {"dry_run"}


def test_debug_can_be_switched_off_as_absl_flags_are(repository):
    assert main.parse(["fake", "--dry_run=false", "--debug=True"]).switches == {"debug"}


FAILURES = {
    "UserError('batch of 130')": (2, "batch of 130\n", False),
    "errors.RunFailed('10 steps in a row')": (1, "10 steps in a row\n", False),
    "RuntimeError('boom\\nmore')": (1, "fake failed: RuntimeError: boom\n", True),
    "KeyError()": (1, "fake failed: KeyError\n", True),
    "KeyboardInterrupt()": (130, "Interrupted.", False),
    f"OSError({errno.ENOSPC}, 'No space', 'weights.bin')": (
        2,
        "The disk is full while writing weights.bin.",
        False,
    ),
    "ValueError('tensorstore: No space left on device')": (2, "The disk is full.", False),
    "ModuleNotFoundError('x', name='seqio.dataset')": (2, "pip install -e '.[data]'", False),
    "ModuleNotFoundError('x', name='somewhere')": (2, "pip install somewhere", False),
    "ModuleNotFoundError('x', name='chatyuan.gone')": (1, "this is a bug", True),
    "RuntimeError('RESOURCE_EXHAUSTED: 3 GiB')": (1, "raise --gin.MICROBATCHES", True),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_of_a_run(repository, capsys, monkeypatch, failure):
    status, message, traceback = FAILURES[failure]
    monkeypatch.setenv("FAKE_FAILURE", failure)
    assert run(command(repository)) == status
    err = capsys.readouterr().err
    assert message in err
    assert ("Traceback" in err) == traceback


def test_a_full_disk_is_recognised_behind_another_exception():
    error = RuntimeError("checkpoint failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "weights.bin")
    status, message = main._failed(error, [])
    assert status == 2 and "The disk is full while writing weights.bin." in message


def test_every_stage_has_a_summary_and_flags_with_fields():
    for name, summary in main.stages().items():
        assert summary.endswith("."), f"{name}: its docstring's first line should be a sentence"
        assert all(isinstance(text, str) for text in main.stage_flags(name).values())


def test_missing_packages_name_their_extra():
    assert "[quickstart]" in errors.missing_package(ModuleNotFoundError(name="snownlp"))
    assert errors.missing_package(ModuleNotFoundError(name="tasks.reviews")) is None
    damaged = errors.missing_package(ModuleNotFoundError(name="jax.experimental.other"))
    assert "has no module jax.experimental.other" in damaged and "not installed" not in damaged


def script(*words) -> subprocess.CompletedProcess:
    """Runs a command that must not reach jax, TensorFlow or seqio, and says so on stdout."""
    code = (
        "import sys; from chatyuan.main import main; status = main(sys.argv[1:]); "
        "print([m for m in ('jax', 'numpy', 'tensorflow', 'seqio') if m in sys.modules]); "
        "sys.exit(status)"
    )
    words = [sys.executable, "-c", code, *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_listing_the_stages_is_instant_and_imports_nothing_heavy():
    script()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, so that other work on the machine does not matter.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert done.returncode == 0
    assert done.stdout.endswith("[]\n")
    for name in main.stages():
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("words", [["pretrian"], ["--run_mode=train"], ["--gin.X=1"]])
def test_refusing_a_command_imports_nothing_heavy(words):
    done = script(*words)
    assert done.returncode == 2
    assert done.stdout == "[]\n"


def test_run_py_is_the_command():
    done = subprocess.run(
        [sys.executable, "run.py", "no_such_stage"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("There is no stage no_such_stage.")
    assert stages.__doc__
