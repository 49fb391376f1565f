"""Rotary position embedding and ALiBi's slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rope(x_BTNH: Array, positions_BT: Array, theta: float = 10000.0) -> Array:
    """Returns `x` with feature pairs (i, i + H/2) rotated by position * theta**(-2i/H).

    Su et al. 2021 (arXiv:2104.09864), in the half-split layout of LLaMA checkpoints. Angles are
    float32; the result has the dtype of `x`.
    """
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-np.arange(half, dtype=np.float32) / half)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns ALiBi's slope per head, float32 [N].

    Geometric from 2**(-8/n) for a power of two n; other head counts take the extra slopes from
    every second one of the next power, as the authors' code does (Press et al. 2022,
    arXiv:2108.12409).
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(power)
    if power < num_heads:
        slopes += geometric(2 * power)[0::2][: num_heads - power]
    return np.asarray(slopes, np.float32)
