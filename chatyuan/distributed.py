"""Several processes as one run: connecting them, agreeing, and ending together.

1. JAX does the work: `jax.distributed` connects the processes, GSPMD computes over their devices.
   TPU pods, Slurm and Open MPI are found by JAX's own detection; elsewhere flags say where.
2. Every process runs the same program. The first one (index 0) alone prints reports and writes
   configuration, metrics, samples and reports; checkpoints are written by all.
3. A process that fails leaves its message with the coordinator. The others, who may wait for it in
   a collective for ever, find it there, print it and end with the same status.
"""

import atexit
import contextlib
import glob
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from chatyuan.errors import RunFailed, UserError

# T5X's names. `chatyuan.main` accepts them for every stage that trains.
FLAGS = {
    "coordinator_address": "HOST:PORT of process 0, where the processes meet (T5X)",
    "process_count": "how many processes form the run; 1 = this one alone, whatever is found (T5X)",
    "process_index": "which of them this is, counted from 0 (T5X)",
    "initialization_timeout": "seconds to wait for the others; 300 if not given (T5X)",
    "multiprocess_gpu": "insist on several processes, as in T5X; those above say which",
}
SWITCHES = ("multiprocess_gpu",)
_TIMEOUT = 300  # seconds, JAX's and T5X's
# A process without sign of life for so long ends the run. JAX's default, 100 s, is nearly as long
# as it takes to start again.
_HEARTBEAT = 30
_FAILURE, _HEARD, _MEETING = "chatyuan/failure", "chatyuan/heard", "chatyuan/meeting"
_PATIENCE = 5.0  # seconds that a failing process waits for the others to have read its message

_meetings = 0
_closing = threading.Event()


# -- connecting


def connect(flags: Mapping[str, str | None]) -> None:
    """Connects the processes of the run; to be called before JAX is used. One process: nothing.

    A coordinator that does not answer ends the process with status 1 and one message.

    Args:
      flags: those of FLAGS that were given, as text.

    Raises:
      UserError: flags that contradict each other or are not all there.
    """
    settings = _settings(flags)
    if settings is None:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = settings["initialization_timeout"]
    # JAX aborts the process with a stack trace after its time is up; ours is a little earlier.
    late = threading.Timer(seconds, _nobody_there, (settings,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **{**settings, "initialization_timeout": seconds + 30},
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except Exception as error:
        raise RunFailed(f"{_meeting_place(settings)}: {error}") from error
    finally:
        late.cancel()
    if process_count() > 1:
        listener = threading.Thread(target=_listen, name="failures of others", daemon=True)
        listener.start()
        atexit.register(_close, listener)


def _settings(flags: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, or None for a run of one process."""
    address = flags.get("coordinator_address")
    if "coordinator_address" in flags and (not address or ":" not in address):
        raise UserError(
            f"--coordinator_address={address or ''} should be HOST:PORT, such as 10.0.0.1:1234."
        )
    count, index = _number(flags, "process_count", 1), _number(flags, "process_index", 0)
    settings: dict[str, Any] = {
        "initialization_timeout": _number(flags, "initialization_timeout", 1) or _TIMEOUT
    }
    if count == 1:
        return None
    if address is not None or index is not None or count is not None:
        given = {"coordinator_address": address, "process_count": count, "process_index": index}
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise UserError(
                f"--{next(n for n, v in given.items() if v is not None)} alone connects nothing: "
                f"give --{' and --'.join(missing)} too (TPU pods, Slurm and Open MPI need none of "
                "them)."
            )
        if index >= count:
            raise UserError(
                f"--process_index={index} must be less than --process_count={count}: indices are "
                "counted from 0."
            )
        return {
            **settings,
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    found = _detected()
    if found is not None:
        return {**settings, "cluster_detection_method": found or None}
    if "multiprocess_gpu" in flags:
        raise UserError(
            "--multiprocess_gpu: neither Slurm nor Open MPI started this process, so say where the "
            "others are: --coordinator_address=HOST:PORT --process_count=N --process_index=I."
        )
    return None


def _number(flags: Mapping[str, str | None], name: str, least: int) -> int | None:
    if name not in flags:
        return None
    text = flags[name] or ""
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"--{name}={text} should be a whole number of at least {least}.")
    return int(text)


def _detected() -> str | None:
    """Which of JAX's detections is to be asked ("" = it decides), None for one process alone.

    JAX is asked only where something says that there are several processes: a single one needs no
    coordinator, and in a container JAX would go on to ask Kubernetes.
    """
    environ = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and all(name in environ for name in slurm):
        return "slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5 has another launcher
            raise UserError(
                "Open MPI 5 does not tell its processes where they meet; pass "
                "--coordinator_address=HOST:PORT --process_count=$OMPI_COMM_WORLD_SIZE "
                "--process_index=$OMPI_COMM_WORLD_RANK (through `bash -c`, so that each process "
                "reads its own)."
            )
        return "ompi"
    platforms = environ.get("JAX_PLATFORMS", "")
    tpu = importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or _vfio())
    return "" if tpu and (not platforms or "tpu" in platforms) else None


def _vfio() -> list[str]:
    return glob.glob("/dev/vfio/[0-9]*")


def _meeting_place(settings: Mapping[str, Any]) -> str:
    if "coordinator_address" not in settings:
        return f"the processes found by {settings['cluster_detection_method'] or 'JAX'}"
    return (
        f"process {settings['process_id']} of {settings['num_processes']} at the coordinator "
        f"{settings['coordinator_address']}"
    )


def _nobody_there(settings: Mapping[str, Any]) -> None:
    """Ends a process that waits in vain; nothing can be raised out of JAX's wait."""
    waited = settings["initialization_timeout"]
    if settings.get("process_id") == 0:
        reason = "not all of the others have come; start them with the same address and count"
    else:
        reason = (
            "it does not answer, or not all processes have come: is process 0 running, is the "
            "address right and the port open between the hosts"
        )
    print(
        f"{_meeting_place(settings)}: {reason}. Waited {waited} s (--initialization_timeout).",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


# -- what the rest of the program asks


def process_index() -> int:
    """This process's number, 0 where JAX has not been imported."""
    jax = sys.modules.get("jax")
    return 0 if jax is None else jax.process_index()


def process_count() -> int:
    """How many processes form the run, without starting JAX."""
    if _client() is None:
        return 1
    return sys.modules["jax._src.distributed"].global_state.num_processes


def exchange(text: str = "") -> list[str]:
    """Gives every process the texts of all, in order. All must call it, in the same order.

    It goes through the coordinator rather than the devices, so nothing is compiled for it.
    """
    global _meetings
    client = _client()
    if client is None or process_count() == 1:
        return [text]
    _meetings += 1
    folder = f"{_MEETING}/{_meetings}"
    client.key_value_set(f"{folder}/{process_index():06}", f"={text}")
    client.wait_at_barrier(folder, _TIMEOUT * 1000)
    found = sorted(client.key_value_dir_get(folder))
    if process_index() == 0 and _meetings > 1:  # everyone has read what the meeting before said
        client.key_value_delete(f"{_MEETING}/{_meetings - 1}")
    return [value[1:] for _, value in found]


def first_word(text: str) -> str:
    """Returns the first text of any process that is not empty, the same everywhere."""
    return next((word for word in exchange(text) if word), "")


def preempted(step: int) -> bool:
    """Whether all processes are to save at `step` because one was told to go (SIGTERM).

    JAX agrees on the step in the background; every process must ask at every step.
    """
    if process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def _client() -> Any:
    """The connection to the coordinator, for which JAX has no public name."""
    module = sys.modules.get("jax._src.distributed")
    return None if module is None else module.global_state.client


# -- ending together


def finish(status: int, message: str) -> None:
    """Hands the failure of this process to all others and ends it; they end too.

    Returns where there are no others, or nothing has failed. JAX's own farewell would wait for the
    others, who wait for this one.
    """
    client, begin, others = _client(), time.monotonic(), process_count() - 1
    if status == 0 or others == 0:
        return
    with contextlib.suppress(Exception):  # another one may have failed before
        client.key_value_set(_FAILURE, f"{status} {process_index()} {message}")
    # The coordinator lives in process 0; with it the message goes.
    while process_index() == 0 and time.monotonic() - begin < _PATIENCE:
        with contextlib.suppress(Exception):
            if len(client.key_value_dir_get(_HEARD)) >= others:
                break
        time.sleep(0.1)
    _exit(status)


def _listen() -> None:
    """Thread: ends this process when another one says that it has failed."""
    client, period = _client(), max(0.5, process_count() / 200)  # the coordinator serves them all
    while not _closing.wait(period):
        try:
            told = client.key_value_try_get(_FAILURE)
        except Exception:  # noqa: BLE001 - nobody has failed
            continue
        status, index, message = told.split(" ", 2)
        if int(index) == process_index():
            return
        print(f"Process {index} failed, so all do: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            client.key_value_set(f"{_HEARD}/{process_index()}", "")
        _exit(int(status))


def _close(listener: threading.Thread) -> None:
    """Ends the thread before Python does, and before JAX closes what it asks."""
    _closing.set()
    listener.join(5.0)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
