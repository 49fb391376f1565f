"""Everything that a training step reads and replaces."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from chatyuan.train.updates import Optimizer

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "ema", "nonfinite_streak"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """The state of a run; with the seed and the data it determines everything that follows.

    step: int32, the number of finished steps, skipped ones included (so it is the data position).
    params: tree of float32 arrays.
    opt_state: what `Optimizer.init` returned, updated.
    ema: exponential moving average of params, or None.
    nonfinite_streak: int32, how many steps in a row were skipped for a non-finite loss or gradient.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    ema: Tree | None
    nonfinite_streak: jax.Array


def init_state(params: Tree, optimizer: Optimizer, ema: bool = False) -> TrainState:
    """Returns the state before the first step.

    The train step donates the state, so `params` are gone after it. Run it inside `jax.jit` with
    `out_shardings=sharding.state_shardings(...)` to make the state on several devices at once, or
    through `jax.eval_shape` to get its shapes.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        nonfinite_streak=jnp.zeros((), jnp.int32),
    )
