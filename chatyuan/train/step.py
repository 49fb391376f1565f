"""The training step: the one `jax.jit` of training.

1. Split the batch into microbatches and sum over them the loss, its weight and the gradients.
2. gradient = summed gradient / summed weight, so the split changes nothing but memory.
3. Clip, update, average; where the loss or the gradient is not finite, keep everything as it was.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from chatyuan import sharding
from chatyuan.errors import UserError
from chatyuan.train.schedules import Schedule
from chatyuan.train.state import TrainState, init_state
from chatyuan.train.updates import Optimizer, accepted, global_norm

__all__ = ["LossFn", "Metrics", "TrainStep", "init_state", "make_train_step"]

Tree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Tree, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array, Metrics]]

# Metrics with such names count things of a whole step: their weight is 1, not 1 per microbatch.
COUNT_SUFFIX = "_tokens"


class TrainStep:
    """`train_step(state, batch, active_microbatches=None) -> (state, metrics)`, compiled once.

    The state is donated: do not use it afterwards. Metrics are (sum, weight) pairs on device.
    """

    def __init__(self, function: Callable[..., Any], microbatches: int) -> None:
        """Keeps `function(state, batch, active, mesh)` for the first call to compile."""
        self.microbatches = microbatches
        self._function = function
        self._jitted: dict[Mesh | None, Any] = {}
        self._ahead: Future | None = None
        self._counts: dict[Any, jax.Array] = {}

    def __call__(
        self,
        state: TrainState,
        batch: Mapping[str, jax.Array],
        active_microbatches: int | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Runs one step.

        Args:
          state: of `init_state` or of the step before. The new state lies where the first one lay.
          batch: features [B, ...], B divisible by `microbatches`.
          active_microbatches: how many microbatches to use, for batch ramp-up; any number from 1 to
            `microbatches` runs the same executable. Microbatch i holds the rows from i * B / M to
            (i + 1) * B / M; the rows of the others are not looked at. None = all.
        """
        count = self._count(active_microbatches, state)
        if self._ahead is not None:
            return self._ahead.result()(state, batch, count)
        return self._compiled(state)(state, batch, count)

    def compile_ahead(
        self, state: Tree, batch: Tree, active_microbatches: int | None = None
    ) -> None:
        """Traces the step and starts compiling it in a thread; the first call waits for it.

        Meanwhile weights, checkpoints and libraries can be read. All calls must then be like the
        one announced here.

        Args:
          state: abstract, each leaf with its sharding.
          batch: likewise.
          active_microbatches: any count if calls will give one, None if they will not.
        """
        thread = ThreadPoolExecutor(1, "compile")
        self._ahead = thread.submit(self.lower(state, batch, active_microbatches).compile)
        thread.shutdown(wait=False)

    def wait_compiled(self) -> None:
        """Waits for what `compile_ahead` has started."""
        if self._ahead is not None:
            self._ahead.result()

    def lower(
        self, state: Tree, batch: Tree, active_microbatches: int | None = None
    ) -> jax.stages.Lowered:
        """`jax.jit(...).lower`, for arrays or their abstract shapes: memory, FLOPs, HLO."""
        active = self._count(active_microbatches, state)
        return self._compiled(state).lower(state, batch, active)

    def _compiled(self, state: Tree) -> Any:
        """The jit, which pins the new state to the places of the old one."""
        placement = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), state)
        first = placement.step
        mesh = first.mesh if isinstance(first, NamedSharding) and first.mesh.size > 1 else None
        if mesh not in self._jitted:
            self._jitted[mesh] = jax.jit(
                functools.partial(self._function, mesh=mesh),
                donate_argnums=0,
                **({} if mesh is None else {"out_shardings": (placement, None)}),
            )
        return self._jitted[mesh]

    def _count(
        self, active: int | None, state: Tree
    ) -> jax.Array | jax.ShapeDtypeStruct | None:
        """The count on the devices of the state, transferred once: the loop guards transfers."""
        if active is None or self.microbatches == 1:
            return None
        if not 1 <= active <= self.microbatches:
            raise UserError(
                f"active_microbatches = {active} is outside 1..{self.microbatches} (MICROBATCHES)."
            )
        place = getattr(state.step, "sharding", None)
        if isinstance(state.step, jax.ShapeDtypeStruct):  # its devices need not exist
            return jax.ShapeDtypeStruct((), np.int32, sharding=place)
        if (active, place) not in self._counts:
            self._counts[active, place] = jax.device_put(np.int32(active), place)
        return self._counts[active, place]


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    microbatches: int = 1,
    seed: int = 0,
    ema_decay: float | None = None,
    skip_nonfinite: bool = True,
    detailed_metrics: bool = False,
    placement: sharding.Placement | None = None,
) -> TrainStep:
    """Returns the compiled-once train step.

    Metrics besides those of `loss_fn`: learning_rate, grad_norm (before clipping), nonfinite_steps
    (1 if loss or gradient was not finite) and nonfinite_streak (as in TrainState). A skipped step
    has weight 0 in all other metrics, so that averages stay finite.

    Args:
      loss_fn: (params, batch, dropout_key) -> (loss_sum, weight_sum, metrics); metrics map a name
        to (sum, weight). A metric named `*_tokens` is a count (n, 1), also for a whole step.
      optimizer: of `chatyuan.train.optimizers`.
      schedule: must be the optimizer's own: what is logged is what is applied.
      microbatches: parts that a batch is worked off in; memory is that of one part.
      seed: of the dropout keys, fold_in(fold_in(key(seed), step), microbatch).
      ema_decay: decay per step of the average of parameters; None = off.
      skip_nonfinite: whether a step whose loss or gradient is not finite leaves parameters,
        optimizer state and average unchanged.
      detailed_metrics: also param_norm and update_rms, one more pass over the parameters each.
      placement: where gradients and updates live; None leaves it to XLA.
    """
    assert optimizer.schedule is schedule, "the schedule that is logged must be the one applied"
    if microbatches < 1:
        raise UserError(f"MICROBATCHES = {microbatches} must be at least 1.")
    summed_at = None if placement is None else placement.gradients
    updated_at = None if placement is None else placement.updates

    def train_step(
        state: TrainState,
        batch: Mapping[str, jax.Array],
        active: jax.Array | None,
        mesh: Mesh | None,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss_sum, weight, metrics, gradients = _sum_gradients(
            loss_fn, state.params, _split(batch, microbatches, mesh), key, active, summed_at
        )
        gradients = sharding.constrain(gradients, updated_at)
        # A batch without a single target has gradient 0, not 0 / 0.
        gradient_scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        gradient_norm = global_norm(gradients) * gradient_scale
        finite = jnp.isfinite(loss_sum) & jnp.isfinite(gradient_norm)
        updates, opt_state = optimizer.update(
            gradients,
            state.opt_state,
            state.params,
            step=state.step,
            gradient_scale=gradient_scale,
            gradient_norm=gradient_norm,
            accept=finite if skip_nonfinite else True,
        )
        params = sharding.constrain(optax.apply_updates(state.params, updates), updated_at)
        ema = state.ema
        if ema_decay is not None:
            assert ema is not None, "make the state with init_state(..., ema=True)"
            ema = jax.tree.map(lambda e, p: e + (1.0 - ema_decay) * (p - e), ema, params)
        if skip_nonfinite:
            params, ema = accepted(finite, (params, ema), (state.params, state.ema))
        streak = jnp.where(finite, 0, state.nonfinite_streak + 1)
        metrics["grad_norm"] = (gradient_norm, jnp.ones((), jnp.float32))
        if detailed_metrics:
            metrics |= _detailed_metrics(state.params, updates)
        if skip_nonfinite:
            metrics = jax.tree.map(lambda value: jnp.where(finite, value, 0.0), metrics)
        metrics |= _step_metrics(schedule(state.step), finite, streak)
        return TrainState(state.step + 1, params, opt_state, ema, streak), metrics

    return TrainStep(train_step, microbatches)


def _step_metrics(rate: jax.Array, finite: jax.Array, streak: jax.Array) -> Metrics:
    one = jnp.ones((), jnp.float32)
    return {
        "learning_rate": (jnp.asarray(rate, jnp.float32), one),
        "nonfinite_steps": (1.0 - finite.astype(jnp.float32), one),
        "nonfinite_streak": (streak.astype(jnp.float32), one),
    }


def _detailed_metrics(params: Tree, updates: Tree) -> Metrics:
    one = jnp.ones((), jnp.float32)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "param_norm": (global_norm(params), one),
        "update_rms": (global_norm(updates) / np.sqrt(count).astype(np.float32), one),
    }


def _sum_gradients(
    loss_fn: LossFn,
    params: Tree,
    parts: Mapping[str, jax.Array],
    key: jax.Array,
    active: jax.Array | None,
    places: Tree | None = None,
) -> tuple[jax.Array, jax.Array, Metrics, Tree]:
    """Sums over the first `active` of parts [M, B / M, ...] (None = all).

    Returns (loss, weight, metrics, gradient of the sum of losses), the gradient at its `places`
    from the first microbatch on.
    """
    microbatches = next(iter(parts.values())).shape[0]

    def one(index: jax.typing.ArrayLike) -> tuple:
        part = {
            name: jax.lax.dynamic_index_in_dim(value, index, keepdims=False)
            for name, value in parts.items()
        }

        def loss(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            loss_sum, weight, metrics = loss_fn(params, part, jax.random.fold_in(key, index))
            return loss_sum, (weight, dict(metrics))

        (loss_sum, (weight, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return loss_sum, weight, metrics, sharding.constrain(gradients, places)

    if microbatches == 1:
        return one(0)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, jnp.int32(0))
    )
    zeros = (*zeros[:3], sharding.constrain(zeros[3], places))
    loss_sum, weight, metrics, gradients = jax.lax.fori_loop(
        0,
        microbatches if active is None else active,
        lambda index, sums: jax.tree.map(jnp.add, sums, one(index)),
        zeros,
    )
    for name, (total, count) in metrics.items():
        if name.endswith(COUNT_SUFFIX):
            metrics[name] = (total, jnp.ones_like(count))
    return loss_sum, weight, metrics, gradients


def _split(
    batch: Mapping[str, jax.Array], microbatches: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Features [B, ...] -> [M, B / M, ...], each microbatch spread over all data shards.

    A device holds consecutive rows, so that on several devices the rows move, once a step: they are
    token ids, small beside anything that is computed from them.
    """
    parts = {}
    for name, value in batch.items():
        size = value.shape[0]
        if size % microbatches:
            below = size - size % microbatches
            near = f"{below} or {below + microbatches}" if below else f"{microbatches}"
            raise UserError(
                f"train batch of {size} sequences does not divide into {microbatches} "
                f"microbatches; use {near}: --gin.BATCH_SIZE={below or microbatches}"
            )
        part = value.reshape(microbatches, size // microbatches, *value.shape[1:])
        if mesh is not None and microbatches > 1:
            axes = (None, "batch", "length", *(None,) * part.ndim)[: part.ndim]
            spec = sharding.partition_spec(axes, mesh, shape=part.shape, name=name)
            part = jax.lax.with_sharding_constraint(part, NamedSharding(mesh, spec))
        parts[name] = part
    return parts
