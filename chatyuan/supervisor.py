"""`--restart_on_failure=N`: a parent process that starts the run again when it dies.

1. The parent imports everything once, what a stage leaves for later too, and forks a child for each
   attempt, so that starting again costs no imports. It never starts JAX: it forks one thread, and
   those of OpenBLAS, which end before a fork and begin again when needed.
2. Not started again: a run that is done or was asked to stop (status 0, 130) and a mistake in the
   command (2), which would be the same mistake again.
3. N counts failures in a row without a newer checkpoint. The first attempt after a failure starts
   at once, those that follow wait 1, 2, 4, ... seconds, a minute at most.
4. SIGTERM, SIGINT and SIGUSR1 go on to the child, which saves; it is not started again after one.
5. The parent's status is that of the last child, 128 + N for one that signal N has killed.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from chatyuan.checkpoint_files import FOLDER, committed_steps
from chatyuan.errors import UserError

FLAGS = {
    "restart_on_failure": "start again after a failure, N times in a row without a new checkpoint"
}
FINAL = (0, 2, 130)  # statuses after which there is nothing to try again
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LONGEST_WAIT = 60.0  # seconds
# Imported by stages and their libraries (scipy: by numba) where they are needed.
_LATER = ("grain", "orbax.checkpoint", "scipy.linalg")
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def supervise(flags: Mapping[str, str | None], config: Any) -> int | None:
    """Watches over the run until it is done; returns its exit status.

    Returns None in the child, and where `restart_on_failure` is not among the flags: who gets None
    is to do the work.

    Args:
      flags: of the command line, as text.
      config: of the stage; progress is told by the checkpoints in its `model_dir`.

    Raises:
      UserError: a count that is none.
    """
    if "restart_on_failure" not in flags:
        return None
    text = flags["restart_on_failure"] or ""
    if not text.isdecimal():
        raise UserError(f"--restart_on_failure={text} should be a whole number, such as 3.")
    _import_later()
    return _Parent(int(text), lambda: newest_step(config.model_dir)).run()


def newest_step(model_dir: str) -> int:
    """Returns the newest committed checkpoint of a run, -1 if there is none."""
    return max(committed_steps(pathlib.Path(model_dir) / FOLDER), default=-1)


def _import_later() -> None:
    """Imports what every attempt will need; what is missing is told by the stage that needs it."""
    for name in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        import numba

        numba.njit(lambda: None)()  # fills the tables that it needs for compiled functions on disk
    gc.freeze()  # a collection in a child would copy the pages that it shares with this process


class _Parent:
    """The loop of the parent, and what it knows of its child."""

    def __init__(self, times: int, progress: Callable[[], int]) -> None:
        self.times, self.progress = times, progress
        self.child: int | None = None
        self.stopping = False

    def run(self) -> int | None:
        """Forks, waits and forks again; returns None in each child."""
        before = {signum: signal.signal(signum, self._pass_on) for signum in _PASSED_ON}
        failures, reached = 0, self.progress()
        while True:
            begin = time.monotonic()
            status = self._attempt(before)
            if status is None:
                return None
            newest = self.progress()
            if newest > reached:
                failures, reached = 0, newest
            failures += 1
            if self.stopping or status in FINAL or failures > self.times:
                if failures > self.times and status not in FINAL and not self.stopping:
                    _say(f"The run {_how(status)} again; no more of {self.times} attempts is left.")
                return status
            wait = min(2.0 ** (failures - 2), _LONGEST_WAIT) if failures > 1 else 0.0
            since = f"from checkpoint {newest}" if newest >= 0 else "from the beginning"
            _say(
                f"The run {_how(status)} after {time.monotonic() - begin:.0f} s; starting again "
                f"{since}{f' in {wait:.0f} s' if wait else ''} (failure {failures} of {self.times} "
                "without a new checkpoint)."
            )
            self._sleep(wait)
            if self.stopping:
                return status

    def _attempt(self, before: Mapping[int, Any]) -> int | None:
        """Runs one child; returns its status as a shell would give it, or None in the child."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # none may fall in between
        self.child = os.fork()
        if self.child == 0:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
            _end_with(parent)
            return None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        _, code = os.waitpid(self.child, 0)
        self.child = None
        status = os.waitstatus_to_exitcode(code)
        return status if status >= 0 else 128 - status

    def _pass_on(self, signum: int, _frame: object) -> None:
        self.stopping = True
        if self.child:
            os.kill(self.child, signum)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            time.sleep(min(0.2, max(end - time.monotonic(), 0.0)))


def _end_with(parent: int) -> None:
    """Asks Linux to send SIGTERM when the parent dies: nobody else would restart or end the run."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _how(status: int) -> str:
    if status > 128:
        names = {int(s): s.name for s in signal.Signals}
        return f"was ended by {names.get(status - 128, f'signal {status - 128}')}"
    return f"failed with status {status}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
