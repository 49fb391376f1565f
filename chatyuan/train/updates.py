"""From an optax transformation to an Optimizer: learning rate, clipping, decay, refused steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chatyuan.train.schedules import Schedule

Tree = Any


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that carries its learning rate.

    init: params -> state.
    update: (gradients, state, params, *, step, gradient_scale=1.0, gradient_norm=None,
      accept=True) -> (updates to add to params, state). It acts on gradients * gradient_scale
      (taking the scalar apart saves a pass over them), whose global norm may be given where it is
      known. Where `accept` is false the state is the old one, and the updates mean nothing.
    schedule: step -> learning rate, the one that `update` applies.
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]
    schedule: Schedule


def with_schedule(
    transformation: optax.GradientTransformation,
    schedule: Schedule,
    *,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    weight_decay_lr_exponent: float = 1.0,
    decay_mask: Tree | None = None,
) -> Optimizer:
    """Returns an Optimizer from an optax transformation without a learning rate of its own.

    The update is `-lr * u - weight_decay * lr ** weight_decay_lr_exponent * param`, where u is what
    the transformation makes of the clipped gradient (`optax.scale_by_adam()`, for example) and `lr`
    is `schedule(step)`.

    Args:
      transformation: any optax transformation.
      schedule: step -> learning rate.
      clip_norm: largest global norm of the gradient; None = no clipping.
      weight_decay: share of a parameter that decays a step at learning rate 1.
      weight_decay_lr_exponent: power of the learning rate that multiplies it.
      decay_mask: a tree of bools; None = every parameter decays.
    """
    return scheduled(
        scale_first(keeping(transformation)),
        schedule,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
        weight_decay_lr_exponent=weight_decay_lr_exponent,
        decay_mask=decay_mask,
    )


def global_norm(tree: Tree) -> jax.Array:
    """Returns the Euclidean norm of all values of a tree together, float32."""
    squares = [jnp.sum(jnp.square(unshared(leaf, 1))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def scheduled(
    core: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    *,
    clip_norm: float | None,
    weight_decay: float,
    weight_decay_lr_exponent: float,
    decay_mask: Tree | None,
) -> Optimizer:
    """As `with_schedule`, for a core whose update takes `gradient_scale`."""

    def update(
        gradients: Tree,
        state: Tree,
        params: Tree,
        *,
        step: jax.typing.ArrayLike,
        gradient_scale: jax.typing.ArrayLike = 1.0,
        gradient_norm: jax.Array | None = None,
        accept: jax.typing.ArrayLike = True,
    ) -> tuple[Tree, Tree]:
        if clip_norm is not None:
            if gradient_norm is None:
                gradient_norm = global_norm(gradients) * gradient_scale
            gradient_scale = gradient_scale * jnp.minimum(1.0, clip_norm / gradient_norm)
        directions, state = core.update(
            gradients, state, params, gradient_scale=gradient_scale, accept=accept
        )
        rate = schedule(step)
        decay_rate = weight_decay * rate**weight_decay_lr_exponent
        mask = decay_mask
        if mask is None:
            mask = jax.tree.map(lambda _: True, params)

        def one(direction: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
            if decays and weight_decay:
                return -(rate * direction + decay_rate * param)
            return -rate * direction

        return jax.tree.map(one, directions, params, mask), state

    return Optimizer(core.init, update, schedule)


def scale_first(
    transformation: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient by `gradient_scale`, which XLA fuses into elementwise optimizers."""

    def update(
        gradients: Tree,
        state: Tree,
        params: Tree,
        *,
        gradient_scale: jax.typing.ArrayLike,
        accept: jax.typing.ArrayLike,
    ) -> tuple[Tree, Tree]:
        gradients = jax.tree.map(lambda gradient: gradient * gradient_scale, gradients)
        return transformation.update(gradients, state, params, accept=accept)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def keeping(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Any transformation, whose state stays as it was where a step is not accepted."""

    def update(
        gradients: Tree,
        state: Tree,
        params: Tree | None = None,
        *,
        accept: jax.typing.ArrayLike = True,
        **_: Any,
    ) -> tuple[Tree, Tree]:
        directions, new = transformation.update(gradients, state, params)
        return directions, accepted(accept, new, state)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def accepted(accept: jax.typing.ArrayLike, new: Tree, old: Tree) -> Tree:
    """Returns the new arrays where `accept`, a scalar, else the old ones."""
    if accept is True:
        return new
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)


def unshared(x: jax.Array, reader: int) -> jax.Array:
    """`x`, hidden from common subexpression elimination with the other readers of `x`.

    XLA's CPU backend stores an elementwise result that two of its reductions share; an array of the
    size of the parameter costs more to store than to compute again.
    """
    return jax.lax.optimization_barrier((x, np.int32(reader)))[0]
