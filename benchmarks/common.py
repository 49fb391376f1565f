"""What the benchmarks share: workers in processes of their own, statistics, results, checks.

Each system runs in its own process, because two of them in one process share an allocator, a thread
pool and a compilation cache. All processes of a benchmark are started and warmed first and then
take turns, so that a slow minute of the machine falls on every side alike. Only ratios of one run
are compared; absolute seconds belong to the machine named beside them.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The clone beside this file is what is measured, not a copy that may be installed.
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
_MARK = "@@benchmark "
MIN_RUNS = 5
PAUSE = 0.5  # seconds


# ---------------------------------------------------------------------------------------- figures


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the warmed runs of one system, in the order in which they were taken."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses a sample too small to have a meaningful median."""
        if len(self.seconds) < MIN_RUNS:
            raise ValueError(f"{len(self.seconds)} runs were timed; at least {MIN_RUNS} are needed")

    @property
    def median(self) -> float:
        """The median in seconds, the figure that ratios are made of."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """`median s (min-max)`, as the results table shows it."""
        return spread(self.seconds)


def spread(values: Sequence[float]) -> str:
    """`median s (min-max)` of any number of seconds, which may be negative where they differ."""
    return f"{statistics.median(values):.3f} s ({min(values):.3f}-{max(values):.3f})"


def peak_rss_mib() -> float:
    """The largest resident size that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def time_calls(call: Callable[[], Any], *, runs: int, warmup: int = 2) -> Timing:
    """Times `call`, which must itself wait for its result, `runs` times after `warmup` calls."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


# ---------------------------------------------------------------------------------- configuration


def commit() -> str:
    """The short hash of the commit measured, with `+` where the tree differs from it."""
    try:
        run = ["git", "-C", str(ROOT)]
        name = subprocess.check_output([*run, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output(
            [*run, "status", "--porcelain", "--", "chatyuan", "benchmarks", "gin"], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.strip() else "")


def versions(*packages: str) -> str:
    """`jax 0.10.2, flax 0.12.8`: the installed version of each package that is installed."""
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def cpu_name() -> str:
    """The processor's model name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def device_name() -> str:
    """The accelerator jax would use, or the processor; starts jax's backend."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return cpu_name()
    return f"{len(jax.devices())} x {device.device_kind}"


def print_configuration(title: str, settings: Mapping[str, Any]) -> None:
    """Prints what is about to be measured, one setting a line."""
    print(f"# {title}")
    for name, value in settings.items():
        print(f"  {name}: {value}")
    sys.stdout.flush()


def today() -> str:
    """The date of the run, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


# ---------------------------------------------------------------------------------- results table


def append_rows(section: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Appends rows to the table under `## section` of RESULTS.md, making section and table if new.

    The file is replaced whole by renaming, so an interrupted run leaves the old table.
    """
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Results\n"
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    lines = "".join("| " + " | ".join(str(cell) for cell in row) + " |\n" for row in rows)
    title = f"## {section}\n"
    if title not in text:
        text = text.rstrip("\n") + f"\n\n{title}\n{head}"
    before, after = text.split(title, 1)
    body, mark, rest = after.partition("\n## ")
    if head not in body:
        body = body.rstrip("\n") + f"\n\n{head}"
    text = before + title + body.rstrip("\n") + "\n" + lines + (mark and "\n## ") + rest
    partial = RESULTS.with_suffix(".md.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, RESULTS)


# ----------------------------------------------------------------------------------------- checks


@dataclasses.dataclass(frozen=True)
class Check:
    """One figure beside the floor below which it is a defect and the goal that it aims for."""

    name: str
    value: float
    goal: float
    floor: float | None = None
    at_most: bool = False
    unit: str = ""

    def _holds(self, bound: float) -> bool:
        return self.value <= bound if self.at_most else self.value >= bound

    def met(self, level: str) -> bool:
        """Whether the figure reaches `level`, 'goal' or 'floor' (the goal if no floor is set)."""
        if level == "floor" and self.floor is not None:
            return self._holds(self.floor)
        return self._holds(self.goal)

    def __str__(self) -> str:
        """Figure, goal, floor and verdict in one clause."""
        sign = "<=" if self.at_most else ">="
        floor = "" if self.floor is None else f", floor {sign} {self.floor:g}{self.unit}"
        if self.met("goal"):
            verdict = "met"
        elif self.floor is not None and self.met("floor"):
            verdict = "floor met, goal missed"
        else:
            verdict = "MISSED"
        figure = f"{self.value:.3g}{self.unit}"
        return f"{self.name} {figure} (goal {sign} {self.goal:g}{self.unit}{floor}): {verdict}"


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """`--check`, `--runs` and `--no_record`, which every benchmark has."""
    parser.add_argument(
        "--check", nargs="?", const="goal", choices=("goal", "floor"), default=None,
        help="exit 1 where a goal (or, with --check=floor, a floor) is missed",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each system, at least 5")
    parser.add_argument(
        "--no_record", action="store_true", help="leave benchmarks/RESULTS.md as it is"
    )


def finish(checks: Sequence[Check], level: str | None) -> int:
    """Prints the verdict as the last line and returns the exit status that `--check` asks for."""
    print("; ".join(str(check) for check in checks) if checks else "nothing to check")
    return int(level is not None and not all(check.met(level) for check in checks))


# ---------------------------------------------------------------------------------------- workers


class Worker:
    """A system under test in a process of its own that answers one JSON object per command.

    Its standard output may carry other lines (libraries print); only marked lines are answers.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None):
        """Starts `command`; `env` is laid over this process's environment."""
        self.name = name
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})}, cwd=ROOT,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """Waits for the next answer; a worker that ends without one raises RuntimeError."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line[len(_MARK) :])
        status = self._process.wait()
        raise RuntimeError(
            f"the {self.name} worker ended with status {status}; see its messages above"
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command with its arguments and returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends the process, at once if it does not end by itself."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def reply(**answer: Any) -> None:
    """Called in a worker: sends one answer to the benchmark."""
    print(_MARK + json.dumps(answer), flush=True)


def commands() -> Iterator[dict[str, Any]]:
    """Called in a worker: the commands of the benchmark until it closes the pipe."""
    for line in sys.stdin:
        yield json.loads(line)


def take_turns(workers: Sequence[Worker], *, runs: int, command: str = "run") -> dict[str, Timing]:
    """Runs every worker once per round, each round in the reverse order of the last.

    A worker answers `command` with {"seconds": [...]}; the others wait meanwhile. OpenMP threads go
    on spinning for a fifth of a second after their last work, hence the pause between turns.
    """
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(runs):
        for worker in workers if turn % 2 == 0 else list(reversed(workers)):
            time.sleep(PAUSE)
            seconds[worker.name] += worker.ask(command)["seconds"]
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
