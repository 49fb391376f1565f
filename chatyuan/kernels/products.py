"""What implementations share: products with float32 sums, heads as rows of one, padding."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def rows(x_BKGTX: Array) -> Array:
    """Returns [B, K, G * T, X]."""
    return x_BKGTX.reshape(*x_BKGTX.shape[:2], -1, x_BKGTX.shape[-1])


def pad(x: Array, axis: int, length: int) -> Array:
    """Returns `x` with zeros up to `length` on one axis."""
    more = length - x.shape[axis]
    if not more:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
