"""What a training loop does about the world: signals, hung steps, losses that leap.

1. SIGTERM (schedulers, preemption notices), SIGUSR1 (Slurm's --signal) and SIGINT become a flag
   that the loop reads after each step. Of several processes any one may get it: JAX then agrees on
   the step at which all of them save.
2. A step that does not end for too long ends the process with the stack of every thread, so that a
   supervisor or scheduler can start it again.
3. A loss far above those before it is a spike. The loop may go back to the newest checkpoint and
   leave out the batches that led there (as PaLM did, arXiv:2204.02311, section 5.1). All that
   decides is stored in checkpoints, so a resumed run decides as an uninterrupted one.
"""

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from chatyuan import distributed

_TOGETHER = 2.0  # seconds in which the same request may come several times
_GRACE = 10.0  # seconds after which the C library dumps the stacks that Python could not
_LEAST = 8  # losses to know what is usual
_FLOOR = 1e-3  # of the median: the least deviation, where losses hardly differ


class Signals:
    """Turns the first SIGTERM, SIGUSR1 or SIGINT into a flag; a later one acts at once, as usual.

    A terminal or a scheduler tells the whole family of processes and a supervisor passes it on:
    what comes within two seconds is the same request.
    """

    def __init__(self) -> None:
        """Changes nothing before `with`."""
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Sets the handlers; returns self."""
        # Only the main thread may set handlers; elsewhere whoever started the thread decides.
        if threading.current_thread() is threading.main_thread():
            alone = distributed.process_count() == 1
            # With others, SIGTERM belongs to JAX, which tells them.
            for signum in (signal.SIGINT, signal.SIGUSR1, *((signal.SIGTERM,) if alone else ())):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the handlers back."""
        self._restore()

    def stop_at(self, step: int) -> int | None:
        """Returns the signal for which to save and stop at `step`, the same on every process."""
        if distributed.process_count() == 1:
            return self.received
        return (self.received or signal.SIGTERM) if distributed.preempted(step) else None

    def _handle(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signum, now
            if distributed.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        elif now - self._at > _TOGETHER:
            self._restore()
            os.kill(os.getpid(), signum)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


class Watchdog:
    """Ends the process, stacks first, when nothing has been done for too long."""

    def __init__(self, seconds: float) -> None:
        """`seconds` without `alive` are too long; 0 = for ever is fine."""
        self.seconds = seconds
        self._deadline = math.inf
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        """Starts to watch; returns self."""
        if self.seconds > 0:
            self.alive()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the watch."""
        self._closed.set()
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Says that something has just been done."""
        if self.seconds > 0:
            self._deadline = time.monotonic() + self.seconds

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            left = self._deadline - time.monotonic()
            if left <= 0:
                print(
                    f"No step has finished for {self.seconds:g} s (LoopConfig.hung_step_seconds): "
                    "this process ends with status 1. Its threads:",
                    file=sys.__stderr__,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                os._exit(1)
            # Where a library holds Python's lock this thread does not run, and this remains.
            faulthandler.dump_traceback_later(left + _GRACE, exit=True, file=sys.__stderr__)


class SpikeGuard:
    """Knows the usual loss, and how often the loop went back."""

    def __init__(self, deviations: float, window: int, stored: Mapping[str, Any]) -> None:
        """Continues from what a checkpoint has `stored`; `deviations` 0 = nothing is a spike."""
        self.deviations = deviations
        self.losses: deque[float] = deque(stored.get("losses", ()), maxlen=window)
        self.rollbacks: int = stored.get("rollbacks", 0)
        self.skipped: int = stored.get("skipped", 0)  # batches left out so far
        self.spikes: int = stored.get("spikes", 0)

    def stored(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {
            "losses": list(self.losses),
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def limit(self) -> float:
        """The loss above which the next one is a spike: median + deviations * 1.4826 * MAD."""
        if self.deviations <= 0 or len(self.losses) < min(_LEAST, self.losses.maxlen or _LEAST):
            return math.inf
        middle = statistics.median(self.losses)
        spread = statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + self.deviations * max(1.4826 * spread, _FLOOR * abs(middle))

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is a spike; one that is not becomes part of what is usual."""
        if self.deviations <= 0 or not math.isfinite(loss):
            return False
        if loss > self.limit():
            self.spikes += 1
            return True
        self.losses.append(loss)
        return False
