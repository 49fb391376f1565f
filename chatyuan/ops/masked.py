"""Sums, means and whitening of the entries that a mask keeps.

What stands under the mask's zeros never matters, not even NaN: padding is replaced before any
arithmetic, so neither values nor gradients see it. Sums run over the whole array: on a mesh, inside
one jit, they are global by themselves.

Shapes: `...` any; masks are boolean, or numbers that are 0 or not.
"""

import jax
import jax.numpy as jnp


def at_least_float32(values: jax.Array) -> jax.Array:
    """Casts bfloat16, float16 and integers to float32; float32 and float64 stay as they are."""
    values = jnp.asarray(values)
    wide = jnp.issubdtype(values.dtype, jnp.floating) and jnp.finfo(values.dtype).bits >= 32
    return values if wide else values.astype(jnp.float32)


def keep(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the values, at least float32, with 0 where the mask is 0; gradients are cut there."""
    values = at_least_float32(values)
    return jnp.where(mask.astype(bool), values, jnp.zeros_like(values))


def masked_sum(
    values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Sum of the kept values over `axis` (all axes by default), at least float32."""
    return jnp.sum(keep(values, mask), axis=axis)


def masked_count(
    values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Number of kept values over `axis`, in the float type that `masked_sum` of them has."""
    return jnp.sum(mask.astype(bool), axis=axis).astype(at_least_float32(values).dtype)


def masked_mean(
    values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Mean of the kept values over `axis`; 0 where nothing is kept."""
    count = masked_count(values, mask, axis)
    return masked_sum(values, mask, axis) / jnp.maximum(count, jnp.ones_like(count))


def masked_variance(values: jax.Array, mask: jax.Array, *, ddof: int = 1) -> jax.Array:
    """Variance of the kept values about their own mean, a scalar.

    Args:
      values: [...].
      mask: [...].
      ddof: subtracted from the count in the denominator; 1 is Bessel's correction, as in TRL's and
        tunix's whitening. The denominator is at least 1, so one value has variance 0.
    """
    values = keep(values, mask)  # before any arithmetic: 0 times NaN would be a NaN in the gradient
    count = masked_count(values, mask)
    squares = masked_sum(jnp.square(values - masked_mean(values, mask)), mask)
    return squares / jnp.maximum(count - ddof, jnp.ones_like(count))


def masked_whiten(
    values: jax.Array, mask: jax.Array, *, shift_mean: bool = True, eps: float = 1e-8
) -> jax.Array:
    """Scales the kept values to variance 1 and, with `shift_mean`, moves them to mean 0.

        whitened = (values - mean) / sqrt(variance + eps)  [+ mean without shift_mean]

    Mean and variance (Bessel) are those of the kept values of the whole array: whiten before a
    batch is cut into minibatches. Advantages are whitened with the shift; rewards without it, since
    a shift of rewards pays or charges each token for existing and so changes the best length
    (openai/lm-human-preferences `utils/core.py`; TRL's `masked_whiten`).

    Args:
      values: [...], any float type.
      mask: [...].
      shift_mean: whether the mean becomes 0 or stays.
      eps: added to the variance.

    Returns:
      [...] at least float32, 0 where the mask is 0.
    """
    mean = masked_mean(values, mask)
    variance = masked_variance(values, mask)
    whitened = (keep(values, mask) - mean) * jax.lax.rsqrt(variance + eps)
    if not shift_mean:
        whitened += mean
    return keep(whitened, mask)
