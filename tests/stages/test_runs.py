"""Runs that are stopped, continued, made longer or grown: they learn what one run would have."""

import os
import re
import signal

import numpy as np
import pytest
from workshop import arrays, rows, untimed

from chatyuan.stages import _supervised
from chatyuan.train import step as steps
from chatyuan.train.loop import TrainingFailed

# Odd periods: an interruption falls into a report, and into the time between two checkpoints.
PERIODS = {"LOG_PERIOD": 3, "EVAL_PERIOD": 3, "CHECKPOINT_PERIOD": 4, "DROPOUT_RATE": 0.1,
           "TRAIN_STEPS": 6, "pretrain__Config__num_samples": 2}  # fmt: skip


@pytest.fixture(scope="module")
def whole(shop):
    """Six steps without an interruption."""
    folder = shop.root / "whole"
    assert shop.run("pretrain", MODEL_DIR=folder, MIXTURE=shop.text, **PERIODS) == 0
    return folder


def assert_same_run(folder, other, step) -> None:
    """Weights, optimizer, figures and samples, to the last bit."""
    ours, theirs = arrays(folder, step), arrays(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert value.tobytes() == theirs[name].tobytes(), name
    assert untimed(folder) == untimed(other)
    assert (folder / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


def stop_after(monkeypatch, step: int) -> None:
    """A SIGTERM arrives while step `step` runs, counted from 1 in this process."""
    count = [0]
    real = steps.TrainStep.__call__

    def call(self, *args):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(steps.TrainStep, "__call__", call)


def test_an_interrupted_run_continues_bit_for_bit(shop, whole, monkeypatch, capsys):
    folder = shop.root / "interrupted"
    command = {"MODEL_DIR": folder, "MIXTURE": shop.text, **PERIODS}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit) as stopped:
            shop.run("pretrain", **command)
    assert stopped.value.code == 0  # resumable, not failed
    captured = capsys.readouterr()
    assert "Stopped by SIGTERM at step 2" in captured.out
    assert "Start the same command again" in captured.out
    assert "Traceback" not in captured.err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert shop.run("pretrain", **command) == 0
    assert "Continuing from step 2 to step 6" in capsys.readouterr().out
    assert_same_run(folder, whole, 6)


def test_a_killed_run_repeats_what_came_after_its_checkpoint(shop, whole, monkeypatch):
    folder = shop.root / "killed"
    command = {"MODEL_DIR": folder, "MIXTURE": shop.text, **PERIODS}
    with monkeypatch.context() as patch:
        real = _supervised._Evaluation.__call__

        def die(self, state, step):
            figures = real(self, state, step)
            if step == 6:
                raise KeyboardInterrupt  # after the samples of step 6, before its report
            return figures

        patch.setattr(_supervised._Evaluation, "__call__", die)
        assert shop.run("pretrain", **command) == 130
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [3]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a half-written line
    assert shop.run("pretrain", **command) == 0
    assert_same_run(folder, whole, 6)


def test_a_finished_run_can_be_started_again(shop, whole, capsys):
    before = {name: value for name, value in shop.files().items() if name.startswith("whole/")}
    assert shop.run("pretrain", MODEL_DIR=whole, MIXTURE=shop.text, **PERIODS) == 0
    assert "Training is complete: step 6 of 6." in capsys.readouterr().out
    after = {name: value for name, value in shop.files().items() if name.startswith("whole/")}
    assert after == before


def test_a_finished_run_can_be_made_longer(shop, whole):
    folder = shop.root / "longer"
    command = {"MODEL_DIR": folder, "MIXTURE": shop.text, **PERIODS}
    assert shop.run("pretrain", **command | {"TRAIN_STEPS": 3}) == 0
    assert shop.run("pretrain", **command) == 0
    assert_same_run(folder, whole, 6)


def small(shop, name: str, *more: str, **settings: object) -> list[dict]:
    """A run of two steps without evaluation; returns its metrics."""
    folder = shop.root / name
    common = {
        "MODEL_DIR": folder, "MIXTURE": shop.text, "TRAIN_STEPS": 2, "LOG_PERIOD": 1,
        "pretrain__Config__num_samples": 0, "pretrain__Config__eval_split": "None",
        "pretrain__Config__tensorboard": False,
    }  # fmt: skip
    assert shop.run("pretrain", *more, **common | settings) == 0
    return rows(folder / "metrics.jsonl")


def objective(shop, name: str, *lines: str) -> str:
    path = shop.root / f"{name}.gin"
    head = ["from __gin__ import dynamic_registration", *lines]
    path.write_text("\n".join(head) + "\n", encoding="utf-8")
    return f"--gin_file={path}"


def test_one_stack_learns_unilms_mixture(shop, pretrained, capsys, monkeypatch):
    folder = shop.root / "unilm"
    recipe = objective(
        shop,
        "unilm",
        "include 'gin/data/unilm.gin'",
        "from chatyuan.models import config as model",
        "model.ModelConfig.architecture = 'prefix_lm'",
        "model.ModelConfig.position = 'rope'",
    )
    # Which rows are sequence-to-sequence hangs on the task's name: none of a temporary folder.
    monkeypatch.chdir(shop.root)
    text = "file:text.txt"
    assert shop.run("cache", MIXTURE=text) == 0
    settings = {"MODEL_DIR": folder, "MIXTURE": text, "TRAIN_STEPS": 2, "LOG_PERIOD": 1,
                "pretrain__Config__num_samples": 8}  # fmt: skip
    assert shop.run("pretrain", recipe, "--dry_run", **settings) == 0
    assert "encoder" not in capsys.readouterr().out.split("Two rows")[1]
    assert shop.run("pretrain", recipe, **settings) == 0
    report = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in report] == [1, 2]
    assert 0 < report[-1]["eval/loss"] < report[0]["loss"] < np.log(768) + 1
    samples = rows(folder / "samples.jsonl")
    assert samples and all(row["input"] and row["target"] for row in samples)


def test_ul2s_denoisers_train(shop):
    recipe = objective(shop, "ul2", "include 'gin/data/ul2.gin'")
    report = small(shop, "ul2", recipe)
    assert [row["step"] for row in report] == [1, 2]
    assert all(0 < row["loss"] < np.log(768) + 1 for row in report)


def test_a_growing_batch_learns_what_small_batches_do(shop):
    """Microbatches that are not active are padding: the active ones hold the rows of the step."""
    alone = small(shop, "eight", BATCH_SIZE=8)
    ramp = {"BATCH_SIZE": 16, "MICROBATCHES": 2}
    grown = small(
        shop, "ramp", **ramp, chatyuan__data__loader__DataConfig__batch_ramp="((0, 8), (2, 16))"
    )
    for ours, theirs in zip(grown, alone, strict=True):
        assert ours["target_tokens"] == theirs["target_tokens"]
        assert ours["input_tokens"] == theirs["input_tokens"]
        for name in ("loss", "grad_norm", "accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    ours, theirs = arrays(shop.root / "ramp", 2), arrays(shop.root / "eight", 2)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_strategy_and_a_mesh_change_where_things_are_and_nothing_else(shop, capsys):
    """ZeRO-2 with tensor and sequence parallelism; continued under ZeRO-3."""
    leaves = [f"--gin_file=gin/sharding/{name}.gin" for name in ("zero2", "sequence")]
    mesh = {"MESH": "{'data': 4, 'tensor': 2}", "MICROBATCHES": 2}
    assert shop.run("pretrain", *leaves, "--dry_run", MODEL_DIR=shop.root / "split",
                    MIXTURE=shop.text, TRAIN_STEPS=2, **mesh) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "mesh {'data': 4, 'tensor': 2}" in said
    assert re.search(r"zero_stage +2", said) and re.search(r"sequence_parallel +True", said)
    alone = small(shop, "on_a_mesh", MICROBATCHES=2, MESH="{'data': 4, 'tensor': 2}", TRAIN_STEPS=4)
    settings = {"pretrain__Config__num_samples": 1, "pretrain__Config__eval_split": "'validation'"}
    small(shop, "split", *leaves, **mesh, **settings)
    zero3 = "--gin_file=gin/sharding/zero3.gin"
    settings = {"MICROBATCHES": 2, "MESH": "{'data': 2, 'fsdp': 2, 'tensor': 2}", "TRAIN_STEPS": 4}
    split = small(shop, "split", zero3, **settings)
    assert [row["step"] for row in split] == [1, 2, 3, 4]
    for ours, theirs in zip(split, alone, strict=True):
        for name in ("loss", "grad_norm", "accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_run_that_cannot_go_on_says_so_in_one_line(shop, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise TrainingFailed("10 steps in a row had no finite loss. Lower LEARNING_RATE.")

    monkeypatch.setattr(_supervised, "fit", fail)
    settings = {"MODEL_DIR": shop.root / "diverged", "MIXTURE": shop.text, "TRAIN_STEPS": 9}
    assert shop.run("pretrain", **settings) == 1
    err = capsys.readouterr().err
    assert err == "10 steps in a row had no finite loss. Lower LEARNING_RATE.\n"
