"""How attention multiplies: sums in float32, query heads of a key head as rows of one product."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def rows(x_BKGTX: Array) -> Array:
    """Returns [B, K, G * T, X]."""
    return x_BKGTX.reshape(*x_BKGTX.shape[:2], -1, x_BKGTX.shape[-1])
