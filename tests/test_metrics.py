"""metrics.jsonl, the status line, TensorBoard, and repair of the files at a restart."""

import io
import json
import math
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan import metrics
from chatyuan.errors import UserError
from chatyuan.metrics import Writer, duration, peak_flops, quantity, status_line, truncate


def writer(folder, **kwargs) -> Writer:
    settings = {"total_steps": 100, "tensorboard": False, "stream": io.StringIO()} | kwargs
    return Writer(folder, **settings)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_are_strict_json_with_null_for_what_is_not_a_number(tmp_path):
    with writer(tmp_path / "new") as out:
        out.write(1, {"loss": math.nan, "grad_norm": jnp.float32(2.5), "lr": np.float64(math.inf)})
        out.write(2, {"loss": 0.1, "deep": {"x": [-math.inf, 1]}, "count": np.int32(3)})
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(tmp_path / "new") == [
        {"step": 1, "loss": None, "grad_norm": 2.5, "lr": None},
        {"step": 2, "loss": 0.1, "deep": {"x": [None, 1]}, "count": 3},
    ]


def test_restart_cuts_the_files_back_and_repairs_them(tmp_path):
    first = writer(tmp_path)
    for step in (10, 20, 30, 40):
        first.write(step, {"loss": step / 10})
        first.write_samples(step, [{"input": "问", "output": "答\n案"}, {"input": "二"}])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 50, "loss": 1, "text": "半'.encode()[:-1])  # cut inside a character
    second = writer(tmp_path)
    second.start(20)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]
    assert [row["step"] for row in lines(tmp_path, "samples.jsonl")] == [10, 10, 20, 20]
    second.write(30, {"loss": 3.0})
    assert [row["step"] for row in lines(tmp_path)] == [10, 20, 30]
    assert not list(tmp_path.glob("*.tmp"))
    writer(tmp_path).start(0)  # from the beginning: nothing stays
    assert lines(tmp_path) == [] == lines(tmp_path, "samples.jsonl")


def test_a_complete_last_line_without_newline_is_not_joined_with_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    out = writer(tmp_path)
    out.start(5)
    out.write(6, {})
    assert [row["step"] for row in lines(tmp_path)] == [1, 6]


def test_truncate_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n[]\n{"step": "x"}\n{"step": 9}\n')
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            truncate(path, 5)
    assert path.read_bytes() == before
    assert truncate(path, 5) == 4
    assert metrics.read_rows(path) == [{"step": 1}]
    assert truncate(path, 5) == 0 and truncate(tmp_path / "none", 5) == 0
    assert metrics.read_rows(tmp_path / "none") == []


def test_a_disk_without_room_is_one_clear_message(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: No space left .*Make ro"):
        writer(tmp_path).write(1, {"loss": 1.0})


def test_only_the_first_host_writes(tmp_path):
    stream = io.StringIO()
    out = writer(tmp_path / "x", primary=False, stream=stream)
    out.start(0)
    out.say("hello")
    out.facts({"a": 1})
    out.write(1, {"loss": 1.0})
    out.write_samples(1, [{"input": "a"}])
    assert stream.getvalue() == "" and not (tmp_path / "x").exists()


def test_status_line():
    row = {
        "step": 1200, "loss": 3.21039, "learning_rate": 0.01, "grad_norm": 0.5,
        "tokens_per_second": 41230.4, "mfu": 0.382, "seconds_per_step": 0.5, "eval/loss": 2.25,
    }  # fmt: skip
    assert status_line(row, 20000) == (
        "step  1,200/20,000   6.0 % | loss 3.2104 | lr 1.00e-02 | grad 0.5 | 41,230 tok/s"
        " | mfu 38.2% | 0.5 s/step | ETA 2:36:40 | eval/loss 2.25"
    )
    assert status_line({"step": 5, "loss": None, "nonfinite_steps": 2}, 5) == (
        "step 5/5 100.0 % | loss nan | 2 steps skipped (not finite)"
    )


def test_a_pipe_gets_lines_and_a_terminal_one_live_line(tmp_path):
    pipe = io.StringIO()
    with writer(tmp_path, stream=pipe) as out:
        out.say("[not markup]")
        out.facts({"parameters": 22_700_000, "mesh": "data=8"})
        out.write(1, {"loss": 1.0})
        out.write(2, {"loss": 1.0})
    assert pipe.getvalue().splitlines()[:3] == [
        "[not markup]", "  parameters  22.7M", "  mesh        data=8",
    ]  # fmt: skip
    assert len(pipe.getvalue().splitlines()) == 5

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with writer(tmp_path, stream=terminal) as out:
        out.write(3, {"loss": 1.0})
        out.write(4, {"loss": 2.0, "eval/loss": 7.5})
        out.say("[between]")
        out.write(5, {"loss": 2.5})
    shown = terminal.getvalue()
    assert "loss 2.5000" in shown and "eval/loss 7.5" in shown and "[between]" in shown
    assert "\x1b[2K" in shown  # the line was rewritten in place


def test_tensorboard_holds_the_scalars_and_purges_at_a_restart(tmp_path):

    with writer(tmp_path, tensorboard=True) as out:
        out.start(20)
        out.write(30, {"loss": 1.5, "text": "no", "bad": math.nan})
    from tensorboardX.proto.event_pb2 import Event  # after the writer, which keeps torch out

    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the message, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(30, "loss", 1.5)]
    assert any(e.step == 21 and e.session_log.status == 1 for e in events)  # START: drop >= 21


def test_peak_flops_by_device_kind():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert (peak_flops("TPU v4"), peak_flops("TPU v5 lite")) == (275e12, 197e12)
    assert (peak_flops("TPU v5"), peak_flops("TPU v5p"), peak_flops("TPU v6e")) == (
        459e12, 459e12, 918e12,
    )  # fmt: skip
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None and peak_flops("NVIDIA L40") is None


def test_numbers_for_reading():
    assert [quantity(v) for v in (4096, 22_700_000, 1.25e15, 0.5, math.inf)] == [
        "4,096", "22.7M", "1.25P", "0.5", "inf",
    ]  # fmt: skip
    assert [duration(v) for v in (4.4, 61, 3723, 1e5, math.nan)] == [
        "4 s", "1:01", "1:02:03", "1 d 03:46", "unknown",
    ]  # fmt: skip
