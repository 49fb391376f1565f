"""The training loop: exact resumption, order of events, signals, failures. Pure jax, no model."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.checkpoints import CheckpointConfig, Checkpointer, restore_or_init
from chatyuan.errors import UserError
from chatyuan.metrics import Writer
from chatyuan.train.loop import Interrupted, LoopConfig, TrainingFailed, fit
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.state import init_state
from chatyuan.train.step import make_train_step

TIMING = {"seconds_per_step", "tokens_per_second", "input_wait", "mfu"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The fields of the training state."""

    step: jax.Array
    params: dict
    opt_state: dict
    ema: None = None


def init() -> State:
    w = jax.random.normal(jax.random.key(0), (8, 4))
    return State(jnp.int32(0), {"w": w}, {"momentum": jnp.zeros_like(w)})


@jax.jit
def _step(state: State, batch, bad):
    def loss(params):
        error = (batch["x"] @ params["w"] - batch["y"]) ** 2
        return error.sum(), error.size

    (total, weight), grad = jax.value_and_grad(loss, has_aux=True)(state.params)
    momentum = 0.9 * state.opt_state["momentum"] + grad["w"] / weight
    params = {"w": state.params["w"] - 0.01 * momentum}
    metrics = {
        "loss": (jnp.where(bad, jnp.nan, total), jnp.float32(weight)),
        "learning_rate": (jnp.float32(0.01), jnp.float32(1)),
        "target_tokens": (batch["x"].shape[0] * jnp.float32(1), jnp.float32(1)),
        "nonfinite_steps": (bad.astype(jnp.float32), jnp.float32(1)),
    }
    return State(state.step + 1, params, {"momentum": momentum}), metrics


def train_step(state, batch):
    return _step(state, {k: batch[k] for k in "xy"}, batch["bad"])


def batches(start, bad=(), stop=None):
    step = start
    while step != stop:
        rng = np.random.default_rng([7, step])
        values = {"x": rng.normal(size=(4, 8)), "y": rng.normal(size=(4, 4)), "bad": step in bad}
        yield jax.device_put({k: np.asarray(v, bool if k == "bad" else "f4")
                              for k, v in values.items()})  # fmt: skip
        step += 1


def run(folder, steps=30, *, config=None, checkpoints=None, stream=None, begin=init, **kwargs):
    """What a stage does: restore or begin, then fit. Returns (state, rows, printed text)."""
    stream = stream or io.StringIO()
    loop = LoopConfig(train_steps=steps, log_period=4, eval_period=10)
    with (
        Checkpointer(folder, checkpoints or CheckpointConfig(period=6, keep=2)) as checkpointer,
        Writer(folder, total_steps=steps, stream=stream, tensorboard=False) as writer,
    ):
        state, meta = restore_or_init(checkpointer, jax.eval_shape(begin), begin)
        settings = dict(train_step=train_step, batches=batches) | kwargs
        state = fit(
            dataclasses.replace(loop, **(config or {})),
            state=state,
            resumed=meta,
            writer=writer,
            checkpointer=checkpointer,
            **settings,
        )
    return state, rows(folder), stream.getvalue()


def rows(folder, timing=False):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if timing or k not in TIMING} for row in found]


def distance(state, step):
    return {"eval/distance": float(jnp.abs(state.params["w"]).sum()), "eval/step": step}


def same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be done about it."""


def killing(step):
    """Batches that kill the run when step `step` is to begin."""

    def generate(start):
        yield from batches(start, stop=step)
        raise Killed

    return generate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), evaluate=distance)


def test_reports_evaluations_and_checkpoints_happen_when_due(whole, tmp_path):
    state, found, text = whole
    assert int(state.step) == 30
    steps = [row["step"] for row in found]
    assert steps == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    by_step = {row["step"]: row for row in found}
    assert "loss" not in by_step[10] and by_step[10]["eval/step"] == 10
    assert "loss" in by_step[20] and "eval/distance" in by_step[20]  # one object for both
    assert "loss" in by_step[30] and "eval/distance" in by_step[30]  # the last two steps
    assert by_step[8]["tokens_seen"] == 32 and by_step[30]["tokens_seen"] == 120
    assert by_step[30]["target_tokens"] == 4
    # The reported loss is the mean over the steps of the report, weighted as the step says.
    state, losses = init(), []
    for batch, _ in zip(batches(0), range(8), strict=False):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"][0]))
    assert by_step[8]["loss"] == sum(losses[4:]) / (4 * 16)
    assert "parameters  32" in " ".join(text.split("\n")[1:4]).replace("   ", " ")
    assert "First step: " in text and "step  8/30" in text


@pytest.mark.parametrize("kill_at", [3, 13, 29])
def test_resumed_equals_uninterrupted_bitwise(whole, tmp_path, kill_at):
    with pytest.raises(Killed):
        run(tmp_path, evaluate=distance, batches=killing(kill_at))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "loss": 1.')  # killed in the middle of a line
    state, found, text = run(tmp_path, evaluate=distance)
    same(state, whole[0])
    assert found == whole[1]
    assert ("Continuing from step" in text) == (kill_at > 6)


def test_two_interruptions_and_more_steps_equal_one_long_run(tmp_path, whole):
    for stop in (11, 22):
        with pytest.raises(Killed):
            run(tmp_path, evaluate=distance, batches=killing(stop))
    state, found, _ = run(tmp_path, evaluate=distance)
    same(state, whole[0])
    assert found == whole[1]
    _, again, text = run(tmp_path, evaluate=distance)
    assert "Training is complete: step 30 of 30" in text and again == whole[1]


def test_the_step_is_dispatched_before_the_metrics_of_the_last_are_read(tmp_path):
    events = []

    class Scalar:
        """A device scalar that says when it is read."""

        def __init__(self, step, value):
            self.step, self.value = step, value

        def __array__(self, dtype=None, copy=None):
            events.append(("read", self.step))
            return np.asarray(self.value, np.float32)

        def __float__(self):
            return float(np.asarray(self))

    count = 0

    def spying(state, batch):
        nonlocal count
        count += 1
        events.append(("dispatch", count))
        state, _ = train_step(state, batch)
        return state, {"loss": (Scalar(count, 1.0), 1.0)}

    run(tmp_path, steps=6, train_step=spying, config={"log_period": 6})
    order = [event for i, event in enumerate(events) if i == 0 or event != events[i - 1]]
    assert order[:5] == [
        ("dispatch", 1), ("read", 1), ("dispatch", 2), ("dispatch", 3), ("read", 2),
    ]  # fmt: skip
    assert order[-2:] == [("read", 5), ("read", 6)]


def test_a_transfer_from_the_host_in_the_hot_path_is_an_error(tmp_path):
    def on_host(start):
        yield from (jax.device_get(batch) for batch in batches(start))

    with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
        run(tmp_path, batches=on_host)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_continue(whole, tmp_path, signum):
    before = signal.getsignal(signum)

    def interrupted(start):
        for step, batch in enumerate(batches(start), start):
            if step == 15:
                os.kill(os.getpid(), signum)
            yield batch

    stream = io.StringIO()
    with pytest.raises(Interrupted) as error:
        run(tmp_path, evaluate=distance, batches=interrupted, stream=stream)
    assert error.value.code == (130 if signum == signal.SIGINT else 0)
    text = stream.getvalue()
    assert f"Stopped by {signal.Signals(signum).name} at step 16" in text
    assert f"{tmp_path}/checkpoints/16. Start the same command again to continue." in text
    assert signal.getsignal(signum) is before
    # 16 is a report and no multiple of the checkpoint period; the file goes on as if nothing was.
    state, found, _ = run(tmp_path, evaluate=distance)
    same(state, whole[0])
    assert found == whole[1]


def test_sigterm_from_outside_ends_the_process(tmp_path):
    program = f"""
        import sys, pathlib, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_loop
        def slow(start):
            for batch in test_loop.batches(start):
                time.sleep(.02)
                yield batch
        test_loop.run(pathlib.Path({str(tmp_path)!r}), steps=10**6, stream=sys.stdout, batches=slow)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 25
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Stopped by SIGTERM" in output and "Traceback" not in output
    assert "resumable" in output.splitlines()[-1]
    newest = Checkpointer(tmp_path).latest_step()
    assert f"at step {newest:,}, resumable:" in output


def test_steps_without_finite_gradient(tmp_path):
    def some(start):
        return batches(start, bad={5, 6, 9, 20, 21, 22})

    with pytest.raises(TrainingFailed, match="3 steps in a row up to step 23 .* step 18. Lower"):
        run(tmp_path, batches=some, config={"max_nonfinite_steps": 3})
    found = {row["step"]: row for row in rows(tmp_path)}
    assert found[8]["nonfinite_steps"] == 2 and found[12]["nonfinite_steps"] == 1
    assert found[4]["nonfinite_steps"] == 0
    assert np.isfinite(found[8]["loss"])  # of the two steps that were finite
    # Interrupted in the middle of the row, the count goes on.
    again = tmp_path / "again"
    with pytest.raises(Killed):
        run(again, checkpoints=CheckpointConfig(period=22),
            batches=lambda s: batches_then_kill(s, {20, 21, 22}, 22))  # fmt: skip
    with pytest.raises(TrainingFailed, match="3 steps in a row up to step 23"):
        run(again, batches=some, config={"max_nonfinite_steps": 3})


def batches_then_kill(start, bad, step):
    yield from batches(start, bad=bad, stop=step)
    raise Killed


def test_resume_with_the_real_train_step(tmp_path):
    """Adafactor, moving average, growing batch, one skipped step, interrupted on the way."""
    abstract = {"w": jax.ShapeDtypeStruct((8, 4), "f4")}
    schedule = make_schedule(ScheduleConfig(name="rsqrt", learning_rate=0.1, warmup_steps=3))
    optimizer = make_optimizer(OptimizerConfig(), schedule, abstract, {"w": ("embed", "mlp")})

    def loss(params, batch, key):
        error = batch["x"] @ params["w"] - batch["y"] + 0.1 * jax.random.normal(key, (4,))
        total, weight = (error**2).sum(), jnp.float32(error.size)
        tokens = jnp.float32(batch["x"].shape[0])
        metrics = {"loss": (total, weight), "target_tokens": (tokens, jnp.float32(1))}
        return total, weight, metrics

    def begin():
        w = jax.random.normal(jax.random.key(1), (8, 4))
        return init_state({"w": w}, optimizer, ema=True)

    def stream(start, stop=None):
        for step, batch in enumerate(batches(start, stop=stop), start):
            values = {name: jnp.concatenate([batch[name]] * 2) for name in "xy"}
            values["x"] = values["x"] * (jnp.nan if step in (6, 14, 15) else 1)
            yield values
        raise Killed

    def go(folder, stop=None):
        return run(
            folder,
            steps=20,
            begin=begin,
            train_step=make_train_step(
                loss, optimizer, schedule, microbatches=4, ema_decay=0.9, skip_nonfinite=True
            ),
            batches=lambda start: stream(start, stop),
            active_microbatches=lambda step: 1 + min(step // 4, 3),
            config={"max_nonfinite_steps": 3},
        )

    state, found, _ = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "parts", stop=15)
    again, rows_again, text = go(tmp_path / "parts")
    assert "Continuing from step 12" in text
    same(again, state)
    assert rows_again == found
    by_step = {row["step"]: row for row in found}
    assert [by_step[s]["nonfinite_steps"] for s in (4, 8, 16, 20)] == [0, 1, 2, 0]
    assert [by_step[s]["target_tokens"] for s in (4, 12)] == [2, 6]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in found)
    assert "nonfinite_streak" not in by_step[8]


def test_the_best_evaluation_is_saved_and_kept(tmp_path):
    scores = {5: 3.0, 10: 1.0, 15: 2.0, 20: 4.0}
    config = CheckpointConfig(period=100, keep=1, keep_best_metric="eval/loss")
    run(
        tmp_path,
        steps=20,
        checkpoints=config,
        config={"eval_period": 5},
        evaluate=lambda state, step: {"eval/loss": scores[step]},
    )
    checkpointer = Checkpointer(tmp_path, config)
    assert checkpointer.steps() == [10, 20] and checkpointer.best() == (10, 1.0)
    with pytest.raises(UserError, match="needs an evaluation"):
        run(tmp_path / "b", checkpoints=config)
    with pytest.raises(UserError, match="'eval/loss' is not among .*Did you mean eval/los"):
        run(tmp_path / "c", checkpoints=config, evaluate=lambda *_: {"eval/los": 1.0})


def test_order_at_one_step_and_arguments_passed_on(tmp_path):
    events, active = [], []

    def ramped(state, batch, count):
        active.append(int(count))
        return train_step(state, batch)

    def evaluate(state, step):
        events.append(("evaluate", step, len(rows(tmp_path)) if step > 4 else 0))
        return {"eval/loss": 1.0}

    run(
        tmp_path,
        steps=8,
        config={"eval_period": 4},
        train_step=ramped,
        active_microbatches=lambda step: 1 + step // 4,
        evaluate=evaluate,
        report=lambda step: events.append(("report", step, len(rows(tmp_path)))),
        meta={"seed": 3},
        facts={"tokens per batch": 32768},
    )
    assert active == [1, 1, 1, 1, 2, 2, 2, 2]
    assert events == [("evaluate", 4, 0), ("report", 4, 1), ("evaluate", 8, 1), ("report", 8, 2)]
    _, meta = Checkpointer(tmp_path).restore(jax.eval_shape(init))
    assert meta["seed"] == 3 and meta["data"] == {"step": 8}
    assert meta["metrics"] == {"eval/loss": 1.0}


def test_mfu_is_reported_where_the_peak_is_known(tmp_path, monkeypatch):
    from chatyuan.train import loop

    run(tmp_path / "unknown", steps=8, flops_per_step=1e6)
    assert "mfu" not in rows(tmp_path / "unknown", timing=True)[-1]
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e9)
    run(tmp_path / "known", steps=8, flops_per_step=lambda step: 1e6)
    row = rows(tmp_path / "known", timing=True)[-1]
    expected = 1e6 / row["seconds_per_step"] / (1e9 * jax.device_count())
    assert row["mfu"] == pytest.approx(expected)
    assert row["tokens_per_second"] == pytest.approx(4 / row["seconds_per_step"])


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="the data ended at step 9, TRAIN_STEPS = 30"):
        run(tmp_path, batches=lambda start: batches(start, stop=9))
    with pytest.raises(UserError, match=r"train_steps = 0 must be at least 1: pass --gin.TRAIN_ST"):
        LoopConfig(train_steps=0)


def leaping(at):
    """Batches of which some have targets far away."""

    def generate(start):
        for step, batch in enumerate(batches(start), start):
            yield {**batch, "y": batch["y"] * (100.0 if step in at else 1.0)}

    return generate


GUARD = {"spike_deviations": 20.0, "spike_window": 16, "max_rollbacks": 2, "rollback_skip": 1}


def test_a_spike_goes_back_and_leaves_its_batches_out(tmp_path):
    """As a run that never saw those batches; and the same when it is killed and resumed."""
    seen = []

    def watched(start):
        seen.append(start)
        return leaping({20})(start)

    state, found, text = run(tmp_path / "a", config=GUARD, batches=watched)
    assert "the loss of step 21 leapt to" in text and "back to step 18, leaving out 4" in text
    assert seen == [0, 22]
    assert found[-1]["rollbacks"] == 1 and [row["step"] for row in found][-1] == 30

    def without(start):
        return leaping(())(start if start < 18 else start + 4)

    def cut(start):
        yield from batches(start, stop=18)
        yield from without(18)

    expected, _, _ = run(tmp_path / "b", batches=cut)
    same(state, expected)
    with pytest.raises(Killed):
        run(tmp_path / "c", config=GUARD, batches=lambda s: until(leaping({20})(s), s, 29))
    again, rows_again, _ = run(tmp_path / "c", config=GUARD, batches=leaping({20}))
    same(again, state)
    assert rows_again == found


def until(stream, start, stop):
    for step, batch in enumerate(stream, start):
        if step == stop:
            raise Killed
        yield batch


def test_rollbacks_are_limited_and_can_be_off(tmp_path):
    every = leaping(set(range(20, 60)))
    with pytest.raises(TrainingFailed, match="leapt .* max_rollbacks = 2 are used up"):
        run(tmp_path / "a", config=GUARD, batches=every)
    _, found, text = run(
        tmp_path / "b", config=GUARD | {"max_rollbacks": 0}, batches=leaping({20})
    )
    assert found[-1]["loss_spikes"] >= 1 and found[-1]["rollbacks"] == 0
    assert "the loss of step 21 leapt" in text

    def bad(start):
        return batches(start, bad={20, 21, 22})

    _, found, text = run(
        tmp_path / "c", config={"max_nonfinite_steps": 3, "max_rollbacks": 1}, batches=bad
    )
    assert "3 steps in a row up to step 23" in text and "back to step 18" in text


def test_a_hung_step_ends_the_process_with_the_stacks(tmp_path):
    program = f"""
        import sys, pathlib, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_loop
        def stuck(start):
            for step, batch in enumerate(test_loop.batches(start)):
                if step == 3:
                    time.sleep(60)
                yield batch
        test_loop.run(pathlib.Path({str(tmp_path)!r}), stream=sys.stdout, batches=stuck,
                      config={{"hung_step_seconds": 2.0}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
        timeout=50,
    )  # fmt: skip
    assert done.returncode == 1
    assert "No step has finished for 2 s (LoopConfig.hung_step_seconds)" in done.stderr
    assert "in stuck" in done.stderr and "in _dispatch" in done.stderr
