"""A run that is killed again and again: what is left of its time, and of its curve.

    python benchmarks/survive.py [--check]
    python benchmarks/survive.py --every 15 --kills 2 --no_record    # in a minute

`python run.py pretrain --restart_on_failure=3` trains the 22.7M T5 1.1 on real text (that of
`startup.py`), and its child gets SIGKILL every minute; at the end the parent gets SIGTERM. Then the
same is trained without disturbance, without supervisor and without checkpoints, up to the step that
was reached. The compilation cache is warm, as it is whenever a run starts again.

1. Goodput is the time of the steps that were kept, as the run has measured them, over the time from
   the start of the process to the last step: start-up, recovery, steps taken twice, saves and
   reports all count against it. Beside it stands the stricter figure that takes the median step of
   the undisturbed run, which no save slows down.
2. Recovery is the time from the kill to the next finished step. What a kill costs is the time from
   the last step before it to the first one that is new, less one step.
3. The figure for one kill every five minutes is derived: the share of the time between kills that
   is steps, times 1 - (mean cost of a kill) / 300 s.
4. Every figure of metrics.jsonl but times, and every array of the last checkpoint, is compared with
   those of the undisturbed run bit by bit.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time

import common
import startup

GOODPUT, RECOVERY, SELDOM_GOODPUT = 90.0, 5.0, 97.0  # %, s, %
SELDOM = 300.0  # seconds from kill to kill
NEVER = 1_000_000  # steps
TIMES = ("seconds_per_step", "tokens_per_second", "input_wait")
STEP = re.compile(r"step\s+([\d,]+)/")
FIRST, CONTINUING = startup.FIRST_STEP, re.compile(r"Continuing from step ([\d,]+)")
COLUMNS = (
    "date", "device", "versions", "commit", "kills", "every", "save every", "steps", "goodput",
    "beside undisturbed", "recovery", "cost of a kill", "at a kill in 5 min", "differences",
)  # fmt: skip


class Run:
    """`run.py pretrain` and what it prints, each line with the time it came."""

    def __init__(
        self, arguments: argparse.Namespace, flags: list[str], model_dir: pathlib.Path, steps: int,
        period: int, cache: pathlib.Path, *more: str,
    ) -> None:  # fmt: skip
        """Starts it; `flags` name vocabulary and data, `more` is put at the end."""
        self.begin = time.perf_counter()
        self.model_dir = model_dir
        self.lines: list[tuple[float, str]] = []
        self.process = startup.stage(
            startup.STAGE, f"--gin_file={arguments.model}",
            "--gin_file=gin/data/span_corruption.gin", "--gin_file=gin/optimizers/adamw_rms.gin",
            *startup.SHAPE, *flags, f"--gin.MODEL_DIR={model_dir}", f"--gin.TRAIN_STEPS={steps}",
            f"--gin.CHECKPOINT_PERIOD={period}", "--gin.LOG_PERIOD=1",
            f"--gin.{startup.STAGE}.Config.eval_split=None", *more,
            JAX_COMPILATION_CACHE_DIR=str(cache),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.perf_counter(), line.rstrip()))

    def kill_child(self) -> float:
        """Sends SIGKILL to the process that trains; returns when."""
        pid = self.process.pid
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        now = time.perf_counter()
        os.kill(int(children[0]), signal.SIGKILL)
        return now

    def wait(self) -> None:
        """Waits for its end; a status other than 0 ends the benchmark with its last lines."""
        status = self.process.wait()
        self._reader.join()
        if status:
            last = "\n".join(line for _, line in self.lines[-20:])
            raise SystemExit(f"run.py {startup.STAGE} ended with status {status}:\n{last}")

    def finished(self) -> list[tuple[float, int]]:
        """(time, step) of every finished step, those taken twice included."""
        found = ((when, STEP.match(line)) for when, line in self.lines)
        return [(when, number(match)) for when, match in found if match]

    def rows(self) -> list[dict]:
        """metrics.jsonl."""
        text = (self.model_dir / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def step_seconds(self) -> list[float]:
        """The time of every kept step; the first one of a process is not measured, hence median."""
        measured = [row.get("seconds_per_step") for row in self.rows()]
        usual = statistics.median(s for s in measured if s is not None)
        return [usual if s is None else s for s in measured]


def number(match: re.Match) -> int:
    """The step in a line of the run."""
    return int(match.group(1).replace(",", ""))


@dataclasses.dataclass
class Kill:
    """One kill and what followed."""

    recovery: float  # seconds
    cost: float  # seconds
    repeated: int  # steps taken again
    half_written: bool  # whether a checkpoint was being written


def disturb(run: Run, every: float, kills: int) -> list[tuple[float, bool]]:
    """Kills the child every so often and ends the run; returns when, and whether amid a save."""
    done = []
    for turn in range(1, kills + 1):
        time.sleep(max(run.begin + turn * every - time.perf_counter(), 0))
        when = run.kill_child()
        half = any((run.model_dir / "checkpoints").glob("*.tmp"))
        done.append((when, half))
        print(f"  kill {turn} at {when - run.begin:.1f} s", flush=True)
    time.sleep(max(run.begin + (kills + 1) * every - time.perf_counter(), 0))
    run.process.send_signal(signal.SIGTERM)
    run.wait()
    return done


def account(run: Run, kills: list[tuple[float, bool]]) -> list[Kill]:
    """What each kill cost."""
    finished, found = run.finished(), []
    usual = statistics.median(run.step_seconds())
    for when, half in kills:
        before, reached = max(item for item in finished if item[0] <= when)
        new = min(at for at, step in finished if step > reached)
        first = min(at for at, line in run.lines if at > when and FIRST.search(line))
        start = next(
            number(match)
            for at, line in run.lines
            if at > when and (match := CONTINUING.search(line))
        )
        found.append(Kill(first - when, new - before - usual, reached - start, half))
    return found


def differences(left: Run, right: Run) -> tuple[list[str], list[str]]:
    """Steps whose figures differ, and arrays of the last checkpoint that differ."""
    rows = [
        {row["step"]: {n: v for n, v in row.items() if n not in TIMES} for row in run.rows()}
        for run in (left, right)
    ]
    steps = [str(s) for s in sorted({*rows[0], *rows[1]}) if rows[0].get(s) != rows[1].get(s)]

    import jax
    import numpy as np

    from chatyuan.checkpoint_arrays import read_arrays
    from chatyuan.checkpoints import read_meta

    arrays = []
    for run in (left, right):
        meta = read_meta(run.model_dir)
        wanted = {
            name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
            for name, (shape, dtype) in meta["arrays"].items()
        }
        values = read_arrays(pathlib.Path(meta["path"]), wanted)
        arrays.append({name: np.asarray(value).tobytes() for name, value in values.items()})
    names = sorted({*arrays[0], *arrays[1]})
    return steps, [n for n in names if arrays[0].get(n) != arrays[1].get(n)]


def timeline(run: Run, when: float) -> None:
    """Prints what the run said from a kill to its next step."""
    for at, line in run.lines:
        if at >= when:
            print(f"  {at - when:6.2f} {line[:110]}")
            if FIRST.search(line):
                return


def report(
    arguments: argparse.Namespace, run: Run, undisturbed: Run, when: list[tuple[float, bool]]
) -> tuple[list[common.Check], list[str]]:
    """Prints the figures; returns the checks and the last cells of the row."""
    kills = account(run, when)
    wall = run.finished()[-1][0] - run.begin
    start = run.finished()[0][0] - run.begin
    kept = run.step_seconds()
    pure = statistics.median(undisturbed.step_seconds())
    goodput, beside = 100 * sum(kept) / wall, 100 * len(kept) * pure / wall
    lost = [kill.cost for kill in kills]
    between = sum(kept) / (wall - start - sum(lost))
    seldom = 100 * between * (1 - statistics.mean(lost) / SELDOM)
    recovery = [kill.recovery for kill in kills]
    steps, arrays = differences(run, undisturbed)
    print("from the last kill to the next step:")
    timeline(run, when[-1][0])
    print(
        f"{len(kept)} steps in {wall:.1f} s, {sum(kept):.1f} s of them kept: {goodput:.1f} %, "
        f"{beside:.1f} % by the undisturbed run's step of {pure:.3f} s; first step at {start:.2f} s"
    )
    print(
        f"recovery {common.spread(recovery)}; a kill costs {common.spread(lost)} with "
        f"{statistics.mean(kill.repeated for kill in kills):.1f} steps taken again on average; "
        f"{sum(kill.half_written for kill in kills)} of {len(kills)} came amid a save"
    )
    print(f"between kills {100 * between:.1f} % of the time is steps")
    differ = f"{len(steps)} of {len(kept)} steps, {len(arrays)} arrays"
    print(f"different from the undisturbed run: {differ} {[*steps, *arrays][:8] or ''}")
    checks = [
        common.Check("goodput", goodput, GOODPUT, unit=" %"),
        common.Check("recovery", statistics.median(recovery), RECOVERY, at_most=True, unit=" s"),
        common.Check("goodput at a kill in 5 min (derived)", seldom, SELDOM_GOODPUT, unit=" %"),
        common.Check("steps and arrays that differ", len(steps) + len(arrays), 0, at_most=True),
    ]
    cells = [
        arguments.kills, f"{arguments.every:g} s", f"{arguments.period} steps", len(kept),
        f"{goodput:.1f} %", f"{beside:.1f} %", common.spread(recovery), common.spread(lost),
        f"{seldom:.1f} %", differ,
    ]  # fmt: skip
    return checks, cells


def main() -> int:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from kill to kill")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--period", type=int, default=6, help="steps between checkpoints")
    parser.add_argument("--model", default="gin/models/t5_1_1/tiny.gin", help="gin file")
    parser.add_argument("--folder", help="where to write; its disk is measured too")
    arguments = parser.parse_args()
    names, device = common.versions("jax", "orbax-checkpoint"), common.cpu_name()
    common.print_configuration(
        "kill -9 of a run under --restart_on_failure",
        {"device": device, "versions": names, "commit": common.commit(), "model": arguments.model,
         "shape": " ".join(startup.SHAPE), "kills": arguments.kills,
         "every": f"{arguments.every:g} s", "checkpoints": f"every {arguments.period} steps"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        folder = pathlib.Path(root)
        flags, cache = startup.prepare(folder), folder / "compiled"
        Run(arguments, flags, folder / "warm", 2, NEVER, cache).wait()
        shutil.rmtree(folder / "warm")
        run = Run(
            arguments, flags, folder / "killed", NEVER, arguments.period, cache,
            "--restart_on_failure=3",
        )  # fmt: skip
        try:
            when = disturb(run, arguments.every, arguments.kills)
        finally:
            run.process.kill()  # its child gets SIGTERM then
        reached = run.finished()[-1][1]
        print(f"undisturbed, to step {reached}", flush=True)
        undisturbed = Run(arguments, flags, folder / "undisturbed", reached, NEVER, cache)
        undisturbed.wait()
        checks, cells = report(arguments, run, undisturbed, when)
    if not arguments.no_record:
        row = [common.today(), device, names, common.commit(), *cells]
        common.append_rows("Kills", COLUMNS, [row])
    return common.finish(checks, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
