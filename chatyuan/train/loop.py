"""The training loop of every stage that trains: pretrain, sft, reward, dpo, ppo.

1. Step n is dispatched before the metrics of step n-1 are read, so the device never waits for the
   host and the host never runs further ahead than one step. (Not so the first step, whose end is
   told at once; nor on CPU, where a program runs in the thread that calls it.)
2. A run that is stopped and started again leaves the same parameters and the same metrics.jsonl as
   one that was not: batches are a function of the step, and the sums of the report that a
   checkpoint falls into are stored with it (as float64, which JSON holds exactly).
3. At one step the order is: read its metrics, evaluate, write the report, save the checkpoint. The
   file therefore never lacks what a checkpoint has seen.
4. Times leave out the first step (compilation), evaluations and checkpoints.
"""

import contextlib
import dataclasses
import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from chatyuan import distributed
from chatyuan.checkpoints import Checkpointer
from chatyuan.errors import RunFailed, UserError
from chatyuan.metrics import Writer, duration, peak_flops
from chatyuan.train.faults import Signals, SpikeGuard, Watchdog

PyTree = Any
Batch = Mapping[str, Any]
FIRST = ("loss", "learning_rate", "grad_norm")  # of a report, for those who read the file
TOKENS = "_tokens"  # how the names of token counts end (input_tokens, target_tokens, ...)


class TrainingFailed(RunFailed):
    """The run cannot go on; the message says why and what to try. Exit status 1."""


class Interrupted(SystemExit):
    """A signal ended the run after its state was saved.

    Exit status 0: nothing failed, and the last line says that the run can be resumed. After Ctrl-C
    it is 130, so that scripts stop as they do for every program, and 128 + signal where nothing was
    saved because the run keeps no checkpoints.
    """

    def __init__(self, message: str, signum: int, saved: bool = True) -> None:
        """`message` has been printed already; `signum` is the signal's number."""
        super().__init__(0 if saved and signum != signal.SIGINT else 128 + signum)
        self.message = message


class _Leap(Exception):
    """The run should go back: a loss leapt, or too many steps had no finite gradient."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to report and evaluate."""

    train_steps: int = dataclasses.field(
        metadata={"help": "train until this step, counted from the start", "unit": "steps"}
    )
    log_period: int = dataclasses.field(
        default=100, metadata={"help": "report every so many steps", "unit": "steps"}
    )
    eval_period: int = dataclasses.field(
        default=1000,
        metadata={"help": "evaluate every so many steps and at the end; 0: only at the end",
                  "unit": "steps"},
    )  # fmt: skip
    max_nonfinite_steps: int = dataclasses.field(
        default=10,
        metadata={"help": "stop after so many steps in a row without a finite gradient",
                  "unit": "steps"},
    )  # fmt: skip
    hung_step_seconds: float = dataclasses.field(
        default=3600.0,
        metadata={"help": "end with the stacks of all threads after so long without a finished "
                  "step, evaluation or checkpoint; 0: never", "unit": "seconds"},
    )  # fmt: skip
    spike_deviations: float = dataclasses.field(
        default=0.0,
        metadata={"help": "a loss so many robust deviations (1.4826 MAD) above the median of the "
                  "last spike_window steps is a spike, 10 say; 0: nothing is",
                  "unit": "deviations"},
    )  # fmt: skip
    spike_window: int = dataclasses.field(
        default=128, metadata={"help": "how many losses say what is usual", "unit": "steps"}
    )
    max_rollbacks: int = dataclasses.field(
        default=0,
        metadata={"help": "go back to the newest checkpoint after a spike, or after "
                  "max_nonfinite_steps, at most so often; 0: spikes are counted only",
                  "unit": "rollbacks"},
    )  # fmt: skip
    rollback_skip: int = dataclasses.field(
        default=0,
        metadata={"help": "batches left out after a rollback, beyond those that led to it",
                  "unit": "batches"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises UserError for counts that make no sense."""
        least = {"train_steps": 1, "log_period": 1, "eval_period": 0, "max_nonfinite_steps": 1,
                 "hung_step_seconds": 0, "spike_deviations": 0, "spike_window": 8,
                 "max_rollbacks": 0, "rollback_skip": 0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                macro = name in ("train_steps", "log_period", "eval_period")
                remedy = f": pass --gin.{name.upper()}=... ." if macro else "."
                raise UserError(f"LoopConfig.{name} = {value} must be at least {minimum}{remedy}")


def fit(
    config: LoopConfig,
    *,
    state: PyTree,
    train_step: Callable[..., tuple[PyTree, Mapping[str, tuple[Any, Any]]]],
    batches: Callable[[int], Iterator[Batch]],
    writer: Writer,
    checkpointer: Checkpointer | None = None,
    evaluate: Callable[[PyTree, int], Mapping[str, Any]] | None = None,
    evaluate_first: bool = False,
    report: Callable[[int], None] | None = None,
    meta: Mapping[str, Any] | None = None,
    resumed: Mapping[str, Any] | None = None,
    flops_per_step: float | Callable[[int], float] | None = None,
    active_microbatches: Callable[[int], int] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> PyTree:
    """Trains from `state.step` to `config.train_steps` and returns the final state.

    Args:
      config: see LoopConfig.
      state: has `step` and `params`; its buffers are donated to `train_step`.
      train_step: `(state, batch[, active_microbatches]) -> (state, {name: (sum, weight)})`, whose
        metrics stay on the device. It raises UserError or RunFailed before it has touched the
        state, which is then saved. `nonfinite_steps` above 0 marks a step without finite gradient,
        names ending in `_tokens` count tokens.
      batches: `start_step -> iterator` over device-ready batches, the first being the one of step
        `start_step` (counted from 0). Its `close` is called at the end if it has one.
      writer: gets one report every `log_period` steps and at each evaluation.
      checkpointer: saves every `config.period` steps, at new best evaluations, and at the end.
      evaluate: `(state, step) -> figures`; must not keep the state. Names go into metrics.jsonl as
        they are (`eval/loss`, ...).
      evaluate_first: also before the first step, as step 0: what the run starts from.
      report: called with the step after an evaluation has been written (writes report.md).
      meta: facts stored in every checkpoint (seeds, vocabulary hash, model configuration, ...).
      resumed: the meta returned by the restore that gave `state`; {} or None for a fresh start.
      flops_per_step: floating point operations of one optimizer step, for the MFU; a function of
        the step when the batch grows.
      active_microbatches: `step -> count`, passed to `train_step` for a growing batch.
      facts: derived numbers printed once at the start.

    Raises:
      TrainingFailed: `max_nonfinite_steps` steps in a row had no finite gradient, or the loss
        leapt again after `max_rollbacks`.
      Interrupted: SIGTERM, SIGUSR1 or SIGINT came; the state is saved.
      UserError: the data ended early, or the disk is full.
    """
    run = _Run(config, train_step, writer, checkpointer, evaluate, report, flops_per_step)
    run.meta = dict(meta or {})
    run.active_microbatches = active_microbatches
    run.evaluate_first = evaluate_first
    return run.train(state, batches, resumed or {}, facts or {})


class _Window:
    """Sums of the steps since the last report, and of the whole run."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.sums: dict[str, list[float]] = {k: list(v) for k, v in stored.get("sums", {}).items()}
        self.tokens_seen: float = stored.get("tokens_seen", 0)
        self.nonfinite = stored.get("nonfinite", 0)
        self.nonfinite_in_a_row = stored.get("nonfinite_in_a_row", 0)
        self.loss = math.nan  # of the step read last
        self.reset_times()

    def reset_times(self) -> None:
        """Forgets what was measured; times are of this process alone and never stored."""
        self.seconds = self.input_seconds = self.timed_tokens = 0.0
        self.timed_steps = 0

    def stored(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {
            "sums": self.sums,
            "tokens_seen": self.tokens_seen,
            "nonfinite": self.nonfinite,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> float:
        """Adds one step's (sum, weight) pairs; returns its non-padding tokens."""
        values = {name: (float(s), float(w)) for name, (s, w) in metrics.items()}
        finite = all(math.isfinite(total) for total, _ in values.values())
        bad = values.pop("nonfinite_steps", (float(not finite), 1))[0] > 0
        self.nonfinite += bad
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad else 0
        # A train step that counts them itself knows better: its count travels with the state.
        streak = values.pop("nonfinite_streak", None)
        if streak is not None:
            self.nonfinite_in_a_row = int(streak[0])
        total, weight = values.get("loss", (math.nan, 0.0))
        self.loss = total / weight if weight and not bad else math.nan
        for name, (total, weight) in values.items():
            # One infinite gradient must not hide the figures of the other steps; it is counted.
            if math.isfinite(total) and math.isfinite(weight):
                entry = self.sums.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += weight
            else:
                self.sums.setdefault(name, [0.0, 0.0])
        tokens = sum(total for name, (total, _) in values.items() if name.endswith(TOKENS))
        self.tokens_seen += tokens
        return tokens

    def means(self) -> dict[str, float]:
        """Returns the figures of the report and starts the next one."""
        figures = {
            name: total / weight if weight else math.nan
            for name, (total, weight) in self.sums.items()
        }
        figures["tokens_seen"] = self.tokens_seen
        figures["nonfinite_steps"] = self.nonfinite
        self.sums, self.nonfinite = {}, 0
        return figures


class _Run:
    """The state of one call of `fit` on the host."""

    def __init__(
        self,
        config: LoopConfig,
        train_step: Callable[..., Any],
        writer: Writer,
        checkpointer: Checkpointer | None,
        evaluate: Callable[[PyTree, int], Mapping[str, Any]] | None,
        report: Callable[[int], None] | None,
        flops_per_step: float | Callable[[int], float] | None,
    ) -> None:
        self.config, self.writer, self.checkpointer = config, writer, checkpointer
        self.train_step, self.evaluate, self.report = train_step, evaluate, report
        self.flops_per_step = flops_per_step
        self.active_microbatches: Callable[[int], int] | None = None
        self.evaluate_first = False
        self.meta: dict[str, Any] = {}
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.pending: Any = None  # metrics of the step dispatched last, still on the device
        self.done_at = 0.0  # when the step before was finished
        self.first = True
        self.watchdog = Watchdog(config.hung_step_seconds)

    # -- the loop

    def train(
        self,
        state: PyTree,
        batches: Callable[[int], Iterator[Batch]],
        resumed: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> PyTree:
        """Runs all steps; see `fit`."""
        step, last = int(jax.device_get(state.step)), self.config.train_steps
        saver = self.checkpointer
        if saver is not None and saver.config.keep_best_metric and self.evaluate is None:
            raise UserError(
                f"CheckpointConfig.keep_best_metric = {saver.config.keep_best_metric!r} needs an "
                "evaluation, and this run has none; leave it unset."
            )
        if resumed and resumed.get("step") != step:
            raise AssertionError(f"state of step {step} with the meta of {resumed.get('step')}")
        self._remember(resumed)
        self.writer.start(step)
        self._introduce(step, state, facts)
        if step >= last:
            self.writer.say(f"Training is complete: step {step:,} of {last:,}.")
            return state
        abstract = _abstract(state)  # its arrays are gone after the first step
        with Signals() as signals, self.watchdog, _no_garbage_collection():
            if step == 0 and self.evaluate_first and self.evaluate is not None:
                figures = {k: float(v) for k, v in self.evaluate(state, 0).items()}
                if figures:
                    self.writer.write(0, figures)
                self.watchdog.alive()
            while step < last:
                try:
                    state = self._steps(state, batches, step, signals)
                    step = last
                except _Leap as leap:
                    state, step = self._go_back(abstract, leap)
        if saver is not None:
            saver.wait()
        return state

    def _remember(self, resumed: Mapping[str, Any]) -> None:
        """Continues from the sums and losses that a checkpoint has stored."""
        stored = resumed.get("loop", {})
        self.window = _Window(stored)
        config = self.config
        self.guard = SpikeGuard(
            config.spike_deviations, config.spike_window, stored.get("guard", {})
        )

    def _steps(
        self,
        state: PyTree,
        batches: Callable[[int], Iterator[Batch]],
        step: int,
        signals: Signals,
    ) -> PyTree:
        """Runs from `step` to the end. Raises _Leap when the run should go back."""
        stream = batches(step + self.guard.skipped)
        try:
            while step < self.config.train_steps:
                state = self._dispatch(state, stream, step)
                step += 1
                signum = signals.stop_at(step)
                state = self._after_step(state, step, stop=signum is not None)
                self.watchdog.alive()
                if signum is not None:
                    self._interrupt(signum, step)
        finally:
            if hasattr(stream, "close"):
                stream.close()
        return state

    def _go_back(self, abstract: PyTree, leap: _Leap) -> tuple[PyTree, int]:
        """Restores the newest checkpoint, to go on behind the batches that led to `leap`."""
        self.pending = None
        self.checkpointer.wait()
        rollbacks, skipped = self.guard.rollbacks + 1, self.guard.skipped
        state, meta = self.checkpointer.restore(abstract)
        step = int(meta["step"])
        self._remember(meta)
        self.guard.rollbacks = rollbacks
        self.guard.skipped = skipped + leap.step - step + self.config.rollback_skip
        self.writer.start(step)
        self.writer.say(
            f"{leap}: back to step {step:,}, leaving out {self.guard.skipped - skipped:,} batches "
            f"(rollback {rollbacks} of {self.config.max_rollbacks})."
        )
        self.watchdog.alive()
        return state, step

    def _dispatch(self, state: PyTree, stream: Iterator[Batch], step: int) -> PyTree:
        """Starts one step, then reads the metrics of the one before."""
        waited = time.perf_counter()
        try:
            batch = next(stream)
        except StopIteration:
            raise UserError(
                f"the data ended at step {step:,}, TRAIN_STEPS = {self.config.train_steps:,}; "
                f"pass --gin.TRAIN_STEPS={step} or a MIXTURE that repeats."
            ) from None
        start = time.perf_counter()
        self.window.input_seconds += start - waited
        if self.pending is None:
            self.done_at = start  # nothing is running: after the start, a save or an evaluation
        extra = ()
        if self.active_microbatches is not None:
            extra = (self.active_microbatches(step + self.guard.skipped),)
        # Once compiled, a step that moves anything from the host by accident is an error.
        guard = contextlib.nullcontext() if self.first else _no_transfers()
        try:
            with guard:
                state, metrics = self.train_step(state, batch, *extra)
        except (UserError, RunFailed):  # refused before anything was done: the state is whole
            self._rescue(state, step)
            raise
        before, self.pending = self.pending, metrics
        if before is not None:
            self._read(before, step)
        return state

    def _after_step(self, state: PyTree, step: int, stop: bool) -> PyTree:
        """Does what is due once `step` steps are dispatched. Returns the state."""
        config, saver = self.config, self.checkpointer
        end = step == config.train_steps
        evaluating = self.evaluate is not None and not (stop and not end) and (
            end or (config.eval_period > 0 and step % config.eval_period == 0)
        )  # fmt: skip
        reporting = end or step % config.log_period == 0
        saving = saver is not None and (end or stop or step % saver.config.period == 0)
        if self.first:  # tell at once how long compilation took
            self._drain(step)
        if not (evaluating or reporting or saving):
            return state
        self._drain(step)
        row: dict[str, Any] = self._figures(step) if reporting else {}
        figures: dict[str, Any] = {}
        if evaluating:
            gc.collect()
            figures = {k: float(v) for k, v in self.evaluate(state, step).items()}
            if saver is not None:
                saving = self._all_agree(saver.is_best(figures)) or saving
        if row or figures:
            self.writer.write(step, {**row, **figures})
        if evaluating and self.report is not None:
            self.report(step)
        if saving:
            self._save(state, step, figures)
        return state

    def _drain(self, step: int) -> None:
        """Reads the metrics of the step dispatched last."""
        if self.pending is not None:
            metrics, self.pending = self.pending, None
            self._read(metrics, step)

    def _read(self, metrics: Mapping[str, tuple[Any, Any]], step: int) -> None:
        """Waits for a step and adds its metrics. Raises TrainingFailed."""
        tokens = self.window.add(jax.device_get(dict(metrics)))
        finished = time.perf_counter()
        if self.first:
            self.first = False
            seconds = finished - self.done_at
            self.writer.say(f"First step: {duration(seconds)} ({seconds:.2f} s with compilation).")
            self.window.reset_times()
        else:
            self.window.seconds += finished - self.done_at
            self.window.timed_steps += 1
            self.window.timed_tokens += tokens
        self.done_at = finished
        self._check(step)

    def _check(self, step: int) -> None:
        """Raises _Leap or TrainingFailed when the step read last was one too many."""
        streak, loss = self.window.nonfinite_in_a_row, self.window.loss
        limit = self.guard.limit()
        config = self.config
        if streak >= config.max_nonfinite_steps:
            reason = (
                f"{streak} steps in a row up to step {step:,} had no finite loss or gradient "
                f"(max_nonfinite_steps = {config.max_nonfinite_steps})"
            )
        elif self.guard.is_spike(loss):
            reason = f"the loss of step {step:,} leapt to {loss:.4g}, usual is up to {limit:.4g}"
            if config.max_rollbacks == 0:
                self.writer.say(f"{reason}.")
                return
        else:
            return
        saver = self.checkpointer
        if saver is not None:
            saver.wait()
        newest = None if saver is None else saver.latest_step()
        if newest is not None and self.guard.rollbacks < config.max_rollbacks:
            raise _Leap(step, reason)
        left = "there is no checkpoint"
        if newest is not None:
            left = f"the newest checkpoint is step {newest:,}"
        if self.guard.rollbacks:
            left += f", and max_rollbacks = {config.max_rollbacks} are used up"
        raise TrainingFailed(
            f"{reason}; {left}. Lower LEARNING_RATE, lengthen WARMUP_STEPS, or use DTYPE=float32, "
            "then start again."
        )

    # -- what is reported

    def _figures(self, step: int) -> dict[str, Any]:
        """Returns the report of the steps since the last one."""
        window = self.window
        means = window.means()
        row = {name: means.pop(name) for name in FIRST if name in means}
        if window.timed_steps:
            seconds = window.seconds / window.timed_steps
            row["seconds_per_step"] = seconds
            row["tokens_per_second"] = window.timed_tokens / window.seconds
            row["input_wait"] = window.input_seconds / window.seconds
            if self.peak and self.flops_per_step is not None:
                row["mfu"] = self._flops(step) / seconds / self.peak
        window.reset_times()
        gc.collect(1)
        if self.config.spike_deviations > 0 or self.guard.rollbacks:
            means |= {"loss_spikes": self.guard.spikes, "rollbacks": self.guard.rollbacks}
        return {**row, **means}

    def _flops(self, step: int) -> float:
        flops = self.flops_per_step
        return flops(step) if callable(flops) else flops

    def _introduce(self, step: int, state: PyTree, facts: Mapping[str, Any]) -> None:
        """Prints the derived numbers once."""
        leaves = jax.tree.leaves(state)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        device = jax.devices()[0]
        known = {
            "devices": f"{jax.device_count()} x {device.device_kind}",
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "state": f"{held / 2**20:,.1f} MiB (parameters, optimizer; one checkpoint)",
            **facts,
        }
        if self.flops_per_step is not None:
            known["FLOPs per step"] = float(self._flops(step))
        if self.peak:
            known["peak FLOP/s"] = self.peak
        begin = f"Continuing from step {step:,}" if step else "Training"
        self.writer.say(f"{begin} to step {self.config.train_steps:,}:")
        self.writer.facts(known)

    # -- how it ends

    def _save(self, state: PyTree, step: int, figures: Mapping[str, float]) -> None:
        loop = {**self.window.stored(), "guard": self.guard.stored()}
        meta = {**self.meta, "data": {"step": step + self.guard.skipped}, "loop": loop}
        self.checkpointer.save(step, state, meta, figures)

    def _rescue(self, state: PyTree, step: int) -> None:
        """Saves the state of a run that cannot do its next step, unless it is saved already."""
        self._drain(step)
        saver = self.checkpointer
        if saver is None or step == 0:
            return
        saver.wait()
        if saver.latest_step() != step:
            self._save(state, step, {})
            saver.wait()
        self.writer.say(f"The state of step {step:,} is saved in {saver.directory / str(step)}.")

    def _interrupt(self, signum: int, step: int) -> None:
        """Waits for the checkpoint of `step` and raises Interrupted."""
        name = signal.Signals(signum).name
        if self.checkpointer is None:
            message = f"Stopped by {name} at step {step:,}; this run keeps no checkpoints."
        else:
            self.checkpointer.wait()
            folder = self.checkpointer.directory / str(step)
            message = (
                f"Stopped by {name} at step {step:,}, resumable: the state is saved in {folder}. "
                "Start the same command again to continue."
            )
        self.writer.say(message)
        raise Interrupted(message, signum, saved=self.checkpointer is not None)

    def _all_agree(self, decision: bool) -> bool:
        """Returns the first host's decision: only it knows which checkpoints are committed."""
        return bool(int(distributed.exchange(str(int(decision)))[0]))


def _abstract(state: PyTree) -> PyTree:
    """Shapes and places of a state."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _no_transfers() -> contextlib.AbstractContextManager:
    return jax.transfer_guard_host_to_device("disallow")


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects at reports and evaluations only: a collection takes 0.1 s with a compiler loaded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
