"""Runs of several processes: the curve of one, the loss of one of them, preemption, mistakes."""

import signal

import jax
import numpy as np
import pytest
from processes import Job
from workshop import arrays, rows, untimed

from chatyuan import sharding

SETTINGS = {"LOG_PERIOD": 1, "EVAL_PERIOD": 3, "CHECKPOINT_PERIOD": 4, "DROPOUT_RATE": 0.1,
            "TRAIN_STEPS": 6, "pretrain__Config__num_samples": 2}  # fmt: skip


def words(shop, name: str, **settings: object) -> list[str]:
    common = {"MODEL_DIR": shop.root / name, "MIXTURE": shop.text, **SETTINGS}
    return shop.words("pretrain", **common | settings)


@pytest.fixture(scope="module")
def one(shop):
    """One process with eight devices."""
    folder = shop.root / "one"
    assert shop.run("pretrain", MODEL_DIR=folder, MIXTURE=shop.text, **SETTINGS) == 0
    return folder


@pytest.fixture(scope="module")
def four(shop):
    """Four processes with two devices each."""
    job = Job(shop.root / "out4", words(shop, "four"), count=4, devices=2)
    assert job.wait(240) == [0, 0, 0, 0], [job.output(index) for index in range(4)]
    # The first process alone speaks.
    assert "step 6/6" in job.output(0)
    assert not any("step" in job.output(index) for index in (1, 2, 3))
    return shop.root / "four"


def assert_same_curve(folder, other) -> None:
    ours, theirs = untimed(folder), untimed(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            # What counts tokens says that the data are the same to the last row.
            exact = name.endswith("tokens") or name in ("step", "tokens_seen")
            assert row[name] == pytest.approx(value, rel=0 if exact else 2e-5), name
    assert rows(folder / "samples.jsonl") == rows(other / "samples.jsonl")
    for name, value in arrays(other, 6).items():
        np.testing.assert_allclose(arrays(folder, 6)[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_four_processes_train_the_curve_of_one(one, four):
    assert_same_curve(four, one)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_resumes_bitwise(shop, four):
    command = words(shop, "lost_process")
    job = Job(shop.root / "out_killed", command, count=4, devices=2)
    job.wait_for("step 5/6", seconds=240)
    job.processes[2].send_signal(signal.SIGKILL)
    statuses = job.wait(120)
    assert statuses[2] == -signal.SIGKILL and 0 not in statuses
    job = Job(shop.root / "out_again", command, count=4, devices=2)
    assert job.wait(240) == [0, 0, 0, 0], job.output(0)
    assert untimed(shop.root / "lost_process") == untimed(four)
    ours, theirs = arrays(shop.root / "lost_process", 6), arrays(four, 6)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


@pytest.mark.slow
def test_two_processes_are_preempted_and_continue_as_one(shop, one, capsys):
    """SIGTERM reaches one of them; all save at one step; another number of processes goes on."""
    job = Job(
        shop.root / "out2", words(shop, "two", TRAIN_STEPS=500, EVAL_PERIOD=1000), count=2,
        devices=4,
    )  # fmt: skip
    job.wait_for("step   2/500", seconds=240)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait(120) == [0, 0], job.output(1)
    assert "resumable" in job.output(0).strip().splitlines()[-1]
    saved = max(int(p.name) for p in (shop.root / "two" / "checkpoints").iterdir())
    assert f"at step {saved}, resumable" in job.output(0)
    losses = {row["step"]: row["loss"] for row in untimed(shop.root / "two")}
    assert max(losses) == saved
    expected = {row["step"]: row["loss"] for row in untimed(one)}
    for step in range(1, min(saved, 6) + 1):
        assert losses[step] == pytest.approx(expected[step], rel=2e-5)
    more = SETTINGS | {"TRAIN_STEPS": saved + 1, "EVAL_PERIOD": 1000}
    assert shop.run("pretrain", MODEL_DIR=shop.root / "two", MIXTURE=shop.text, **more) == 0
    assert f"Continuing from step {saved} to step {saved + 1}" in capsys.readouterr().out


def test_a_mistake_of_one_process_ends_all(shop):
    """Nobody waits for ever in a collective."""
    wrong = words(shop, "wrong", MIXTURE="file:/nowhere")
    job = Job(
        shop.root / "out_wrong", words(shop, "wrong"), count=2, devices=1, commands={0: wrong}
    )  # fmt: skip
    assert job.wait(60) == [2, 2], [job.output(index) for index in range(2)]
    assert job.output(0).startswith("MIXTURE=file:/nowhere is not in the cache")
    assert "Process 0 failed, so all do: MIXTURE=file:/nowhere is not in" in job.output(1)


def test_more_processes_than_rows(shop):
    job = Job(shop.root / "out_rows", words(shop, "rows", BATCH_SIZE=1), count=2, devices=1)
    assert job.wait(60) == [2, 2], [job.output(index) for index in range(2)]
    assert "batch of 1 sequences does not divide over 2 data shards" in job.output(0)
    assert not (shop.root / "rows").exists()


@pytest.mark.slow
def test_eight_four_six_devices_continue_one_run(shop, one, monkeypatch):
    """A checkpoint of any mesh restores on any other; the curve is that of one mesh."""
    def go(name, devices, steps, mesh):
        some = jax.devices()[:devices]
        monkeypatch.setattr(sharding, "make_mesh", lambda shape, _=None: real(shape, some))
        settings = SETTINGS | {"TRAIN_STEPS": steps, "MESH": mesh, "BATCH_SIZE": 24}
        folder = shop.root / name
        assert shop.run("pretrain", MODEL_DIR=folder, MIXTURE=shop.text, **settings) == 0
        return folder

    real = sharding.make_mesh
    whole = go("still", 8, 6, "{'data': -1}")
    go("elastic", 8, 2, "{'data': 4, 'fsdp': 2}")
    go("elastic", 4, 4, "{'data': 2, 'tensor': 2}")
    folder = go("elastic", 6, 6, "{'data': 3, 'fsdp': 2}")
    ours = {row["step"]: row for row in untimed(folder)}
    for row in untimed(whole):
        assert ours[row["step"]]["loss"] == pytest.approx(row["loss"], rel=2e-5)
        assert ours[row["step"]]["target_tokens"] == row["target_tokens"]
        assert ours[row["step"]]["tokens_seen"] == row["tokens_seen"]
    for name, value in arrays(whole, 6).items():
        np.testing.assert_allclose(arrays(folder, 6)[name], value, rtol=1e-3, atol=2e-5)
