"""Activations times a weight matrix, with a backward pass laid out for the platform."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, w: Array, out_dtype: str | None = None) -> Array:
    """Returns `x @ w`, [..., F] from [..., D] and [D, F] of one dtype.

    Same values and gradients as `jnp.matmul`. Only the layout of the weight's gradient differs:
    JAX's own rule transposes the larger operand and leaves the result transposed, which on CPU
    costs up to twice the product itself.

    Args:
        x: [..., D].
        w: [D, F].
        out_dtype: of the sums and the result; None: that of `x`. The gradient comes back in it and
            is rounded to the dtype of `x` before the two backward products.
    """
    return jnp.matmul(x, w, preferred_element_type=out_dtype)


def _forward(x: Array, w: Array, out_dtype: str | None) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, w, preferred_element_type=out_dtype), (x, w)


def _backward(
    out_dtype: str | None, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    dy = dy.astype(x.dtype)
    last = x.ndim - 1
    dx = jax.lax.dot_general(dy, w, (((last,), (1,)), ((), ())))
    return dx, weight_gradient(x, dy)


def weight_gradient(x: Array, dy: Array, out_dtype: str | None = None) -> Array:
    """Returns `x^T dy`, [D, F] from [..., D] and [..., F].

    Args:
        x: [..., D].
        dy: [..., F], of the dtype of `x`.
        out_dtype: of the sums and the result; None: that of `x`.
    """
    product = functools.partial(jax.lax.dot_general, preferred_element_type=out_dtype)
    return jax.lax.platform_dependent(
        x,
        dy,
        cpu=functools.partial(_weight_gradient_cpu, product),
        default=functools.partial(_weight_gradient, product),
    )


def _weight_gradient(product: Callable[..., Array], x: Array, dy: Array) -> Array:
    rows = tuple(range(x.ndim - 1))
    return product(x, dy, ((rows, rows), ((), ())))


def _weight_gradient_cpu(product: Callable[..., Array], x: Array, dy: Array) -> Array:
    """The canonical product x^T dy; the barrier keeps XLA from folding the transpose back in."""
    last = x.ndim - 1
    rows = tuple(range(last))
    transposed = jax.lax.optimization_barrier(jnp.moveaxis(x, last, 0))
    shifted = tuple(axis + 1 for axis in rows)
    return product(transposed, dy, ((shifted, rows), ((), ())))


linear.defvjp(_forward, _backward)
