"""The parent that starts a run again: when, how often, which signals, which status."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from chatyuan import supervisor
from chatyuan.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
    import dataclasses, os, pathlib, signal, sys, time
    from chatyuan import supervisor
    folder = pathlib.Path(sys.argv[1])
    supervisor._LONGEST_WAIT = 0.05
    config = type("Config", (), {"model_dir": str(folder)})
    status = supervisor.supervise({"restart_on_failure": sys.argv[2]}, config)
    if status is not None:
        sys.exit(status)
    with (folder / "attempts").open("a") as file:
        file.write("x")
    number = len((folder / "attempts").read_text())
"""


def go(folder, times: int, child: str, **kwargs) -> subprocess.CompletedProcess:
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(child)
    words = [sys.executable, "-c", program, str(folder), str(times)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs)


def attempts(folder) -> int:
    return len((folder / "attempts").read_text())


def test_a_killed_child_starts_again_until_it_is_done(tmp_path):
    done = go(tmp_path, 3, "if number < 3: os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 0 and attempts(tmp_path) == 3
    assert done.stderr.count("was ended by SIGKILL") == 2
    assert "starting again from the beginning (failure 1 of 3" in done.stderr


def test_without_progress_it_gives_up_with_the_last_status(tmp_path):
    done = go(tmp_path, 2, "sys.exit(7)")
    assert done.returncode == 7 and attempts(tmp_path) == 3
    (tmp_path / "attempts").unlink()
    assert go(tmp_path, 1, "os.kill(os.getpid(), signal.SIGKILL)").returncode == 137


def test_a_new_checkpoint_resets_the_count(tmp_path):
    child = """
        (folder / "checkpoints" / str(number)).mkdir(parents=True)
        sys.exit(1 if number < 6 else 0)
    """
    done = go(tmp_path, 1, child)
    assert done.returncode == 0 and attempts(tmp_path) == 6
    assert "starting again from checkpoint 5 (failure 1 of 1" in done.stderr


@pytest.mark.parametrize("status", [0, 2, 130])
def test_what_would_be_the_same_again_is_not_started_again(tmp_path, status):
    done = go(tmp_path, 3, f"sys.exit({status})")
    assert done.returncode == status and attempts(tmp_path) == 1


def test_sigterm_is_passed_on_and_ends_the_watch(tmp_path):
    child = """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        (folder / "ready").touch()
        time.sleep(30)
    """
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(child)
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "3"], cwd=ROOT)
    try:
        end = time.monotonic() + 20
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 5
    finally:
        process.kill()
        process.wait()
    assert attempts(tmp_path) == 1


def test_flags():
    assert supervisor.supervise({}, None) is None
    with pytest.raises(UserError, match="should be a whole number"):
        supervisor.supervise({"restart_on_failure": "often"}, None)
    assert supervisor.newest_step(os.devnull + "/none") == -1
