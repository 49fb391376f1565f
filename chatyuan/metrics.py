"""Where the figures of a run go: the terminal, MODEL_DIR/metrics.jsonl and TensorBoard.

1. metrics.jsonl is the truth: one JSON object per report, at most one per step, appended and
   flushed; NaN and infinities are null. Reports and plots are drawn from it alone.
2. Starting again at step N first cuts metrics.jsonl and samples.jsonl back to the entries up to N,
   so a resumed run leaves the file of an uninterrupted one. A half-written last line goes with it.
3. In a terminal one live line is rewritten in place; in a file or a pipe every report is a line.
4. On a run of many hosts only the first one prints and writes.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from chatyuan.errors import UserError

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"

# Dense bfloat16 FLOP/s of one device as jax counts devices, by the first matching prefix of
# `device_kind`, from the vendors' data sheets. H100/H200 are the SXM parts unless named otherwise.
PEAK_FLOPS = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200", 989.4e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989.4e12),
    ("NVIDIA H800", 989.4e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA A800", 312e12),
    ("NVIDIA L4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of one device, or None where it is not known (CPUs).

    Args:
      device_kind: as in `jax.devices()[0].device_kind`, for example "TPU v5p" or "NVIDIA H200".
    """
    for prefix, flops in PEAK_FLOPS:
        if device_kind == prefix or device_kind.startswith((prefix + " ", prefix + "-")):
            return flops
    return None


class Writer:
    """Writes the figures of one run. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        total_steps: int,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        primary: bool | None = None,
    ) -> None:
        """Writes nothing before `start` or the first report.

        Args:
          model_dir: MODEL_DIR.
          total_steps: the step at which the run ends, for percentages and the time left.
          tensorboard: whether to write MODEL_DIR/tensorboard.
          stream: where lines go; stdout by default.
          primary: whether this process prints and writes; by default the first jax process does.
        """
        self.model_dir = pathlib.Path(model_dir)
        self.total_steps = total_steps
        self._use_tensorboard = tensorboard
        self._stream = stream or sys.stdout
        self._primary = _is_primary() if primary is None else primary
        self._live: Any = None
        self._tensorboard: Any = None
        self._start_step = 0

    def __enter__(self) -> "Writer":
        """Returns self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def start(self, step: int) -> None:
        """Cuts the files of MODEL_DIR back to `step`, the number of steps already trained.

        Raises:
          UserError: the files cannot be written.
        """
        self._start_step = step
        if not self._primary:
            return
        # At step 0 nothing of an earlier attempt remains valid, not even its report of step 0.
        last = step if step > 0 else -1
        for name in (METRICS, SAMPLES):
            truncate(self.model_dir / name, last)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports `metrics` of `step` everywhere. One call per step.

        Raises:
          UserError: the file cannot be written.
        """
        if not self._primary:
            return
        row = {"step": int(step), **{name: _plain(value) for name, value in metrics.items()}}
        self._append(METRICS, [row])
        if self._use_tensorboard:
            self._to_tensorboard(row)
        self._show(row)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends generated texts to samples.jsonl, with their step.

        Args:
          step: the training step they were generated at.
          samples: one mapping each; the report shows the fields input, output, target and task.
        """
        if self._primary:
            self._append(SAMPLES, [{"step": int(step), **sample} for sample in samples])

    def say(self, text: str) -> None:
        """Prints a line that stays, above the live line."""
        if not self._primary:
            return
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Prints derived numbers (parameters, tokens per batch, ...), aligned, one per line."""
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            text = quantity(value) if isinstance(value, int | float) else str(value)
            self.say(f"  {name:<{width}}  {text}")

    def close(self) -> None:
        """Ends the live line and flushes TensorBoard."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        path = self.model_dir / name
        text = "".join(
            json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One write of whole lines: a kill can only cut the last one, which `start` repairs.
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise unwritable(path, error) from error

    def _to_tensorboard(self, row: Mapping[str, Any]) -> None:
        if self._tensorboard is None:
            # purge_step makes TensorBoard drop what an interrupted run wrote after its checkpoint.
            self._tensorboard = _summary_writer_class()(
                str(self.model_dir / TENSORBOARD), purge_step=self._start_step + 1
            )
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        # One event for all: `add_scalar` makes one of each, in 50 microseconds.
        self._tensorboard.file_writer.add_summary(Summary(value=values), row["step"])

    def _show(self, row: Mapping[str, Any]) -> None:
        line = status_line(row, self.total_steps)
        if not self._stream.isatty():
            print(line, file=self._stream, flush=True)
            return
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        if any("/" in name for name in row):  # evaluations stay on the screen
            self.say(line)
        self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)


def status_line(row: Mapping[str, Any], total_steps: int) -> str:
    """Returns one line for a report: step, %, loss, lr, tokens/s, MFU, time per step, time left.

    Names with a slash (evaluation figures such as `eval/loss`) follow at the end.
    """
    step, width = row["step"], len(f"{total_steps:,}")
    parts = [f"step {step:>{width},}/{total_steps:,} {100 * step / max(total_steps, 1):5.1f} %"]
    shown = (
        ("loss", "loss {:.4f}"),
        ("score", "score {:.4g}"),
        ("kl", "KL {:.3g}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad {:.3g}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("mfu", "mfu {:.1%}"),
        ("seconds_per_step", "{:.3g} s/step"),
    )
    for name, form in shown:
        if name in row:
            value = row[name]
            parts.append(form.format(value) if value is not None else f"{name} nan")
    seconds = row.get("seconds_per_step")
    if seconds is not None and step < total_steps:
        parts.append(f"ETA {duration(seconds * (total_steps - step))}")
    if row.get("nonfinite_steps"):
        parts.append(f"{row['nonfinite_steps']:g} steps skipped (not finite)")
    for name, value in row.items():
        if "/" in name and (value is None or isinstance(value, int | float)):
            parts.append(f"{name} " + ("nan" if value is None else f"{value:.4g}"))
    return " | ".join(parts)


def truncate(path: str | os.PathLike[str], last_step: int) -> int:
    """Drops the entries of a JSONL file after `last_step`, and unreadable lines; atomic.

    Returns:
      The number of lines dropped. A file that is not there has none.

    Raises:
      UserError: the file cannot be read or written.
    """
    path = pathlib.Path(path)
    try:
        if not path.exists():
            return 0
        kept, dropped = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            row = _parse(line)
            if row is not None and row["step"] <= last_step and line.endswith(b"\n"):
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            tmp = path.with_name(path.name + ".tmp")
            with tmp.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
    except OSError as error:
        raise unwritable(path, error) from error
    return dropped


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the entries of a metrics.jsonl or samples.jsonl; unreadable lines are left out.

    A file that is not there has none: a run that has not reported yet can be reported on.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    rows = (_parse(line) for line in path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def quantity(value: float) -> str:
    """Returns a number for reading: 22_700_000 -> '22.7M', 1.2e15 -> '1.2P', 4096 -> '4,096'."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1e5:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    raise AssertionError(value)


def duration(seconds: float) -> str:
    """Returns seconds for reading: '42 s', '3:05', '1:02:03', '2 d 03:04'."""
    if not math.isfinite(seconds):
        return "unknown"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plain(value: Any) -> Any:
    """Turns array scalars into numbers, and what JSON cannot hold (NaN, infinities) into None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def unwritable(path: pathlib.Path, error: OSError) -> UserError:
    """Returns the message for a file of MODEL_DIR that cannot be written."""
    return UserError(
        f"{path} cannot be written: {error.strerror or error}. Make room or fix the permissions, "
        "then start the same command again to continue from the newest checkpoint."
    )


def _summary_writer_class() -> Any:
    """Imports tensorboardX without torch, which it would load if installed: 4 s and 200 MB."""
    absent = object()
    before = sys.modules.get("torch", absent)
    if before is absent:
        sys.modules["torch"] = None  # makes `import torch` raise ImportError, which it expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if before is absent:
            del sys.modules["torch"]
    return SummaryWriter


def _is_primary() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0
