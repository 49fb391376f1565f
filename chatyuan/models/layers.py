"""The small modules: the one owner of weight matrices, norm, embedding, feed-forward, dropout.

Modules hold `nnx.Param`s only; randomness, caches and masks are arguments.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from chatyuan.models.config import ModelConfig
from chatyuan.ops.matmul import linear

Array = jax.Array
Initializer = Callable[[Array, tuple[int, ...]], Array]

# Shardings come from the rules table, never from a mesh that happens to be active at construction.
nnx.use_eager_sharding(False)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    # T5 1.1's "gelu_new" is the tanh approximation.
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def normal(standard_deviation: float) -> Initializer:
    """Returns an initialiser drawing float32 normals."""
    return lambda key, shape: standard_deviation * jax.random.normal(key, shape, jnp.float32)


def truncated_normal(standard_deviation: float) -> Initializer:
    """Returns an initialiser drawing float32 normals cut at twice their deviation, rescaled."""
    # 0.8796 is the deviation of a unit normal cut at +-2.
    scale = standard_deviation / 0.87962566103423978
    return lambda key, shape: (
        scale * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    )


def param(
    key: Array, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer
) -> nnx.Param:
    """Returns a float32 parameter that knows the logical name of each axis."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(key, shape), out_sharding=axes)


def dropout(x: Array, rate: float, key: Array | None, site: int) -> Array:
    """Returns `x` with features dropped, or `x` itself without a key.

    One draw per (row, feature), shared along the length as in T5 (Mesh TensorFlow's `noise_shape`,
    T5X's `broadcast_dims`): as good a regulariser, and the random bits cost nothing.

    Args:
        x: [B, T, D].
        rate: probability of a drop.
        key: key of this layer and step.
        site: distinguishes the dropouts of one layer.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(
        jax.random.fold_in(key, site), 1.0 - rate, (x.shape[0], 1, x.shape[2])
    )
    factor = jnp.where(keep, jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
    return x * factor


class Linear(nnx.Module):
    """A weight matrix: the only module in which activations meet weights."""

    def __init__(
        self,
        key: Array,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        init: Initializer,
    ) -> None:
        """Creates the matrix `kernel`, [in, out]."""
        self.kernel = param(key, shape, axes, init)

    def __call__(self, x: Array) -> Array:
        """Returns the product in the dtype of `x`."""
        return linear(x, self.kernel[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, key: Array, features: int, epsilon: float, axis: str = "embed") -> None:
        """Creates the scale, ones."""
        self.epsilon = epsilon
        self.scale = param(key, (features,), (axis,), lambda _, shape: jnp.ones(shape, jnp.float32))

    def __call__(self, x: Array) -> Array:
        """Returns the normalised array in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + jnp.float32(self.epsilon))
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * scale).astype(x.dtype)


class Embedder(nnx.Module):
    """The token table; the only owner of a tied head's matrix too."""

    def __init__(self, key: Array, config: ModelConfig) -> None:
        """Creates the table, unit normals as in T5."""
        self.dtype = config.dtype
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = param(key, shape, ("vocab", "embed"), normal(1.0))

    def __call__(self, tokens_BT: Array) -> Array:
        """Returns the rows of the tokens, [B, T, D] in the compute dtype."""
        # "clip" would hide ids that are out of range; "fill" turns them into NaN, which is noticed.
        rows = jnp.take(self.embedding[...], tokens_BT, axis=0, mode="fill")
        return rows.astype(self.dtype)


class Mlp(nnx.Module):
    """wo(product of activation_i(wi_i(x))): plain with one activation, gated with two."""

    def __init__(self, key: Array, config: ModelConfig) -> None:
        """Creates `wi` (or `wi_0`, `wi_1`, ...) and `wo`."""
        count = len(config.mlp_activations)
        self.activations = config.mlp_activations
        self.dropout_rate = config.dropout_rate
        keys = jax.random.split(key, count + 1)
        embed, mlp = config.embed_dim, config.mlp_dim
        for i, name in enumerate(self.input_names):
            init = truncated_normal(embed**-0.5)
            setattr(self, name, Linear(keys[i], (embed, mlp), ("embed", "mlp"), init))
        init = truncated_normal(mlp**-0.5)
        self.wo = Linear(keys[count], (mlp, embed), ("mlp", "embed"), init)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The attribute names of the input matrices, T5X's."""
        count = len(self.activations)
        return ("wi",) if count == 1 else tuple(f"wi_{i}" for i in range(count))

    def __call__(self, x_BTD: Array, dropout_key: Array | None) -> Array:
        """Returns [B, T, D]."""
        branches = [
            ACTIVATIONS[activation](getattr(self, name)(x_BTD))
            for name, activation in zip(self.input_names, self.activations, strict=True)
        ]
        hidden = math.prod(branches[1:], start=branches[0])
        return self.wo(dropout(hidden, self.dropout_rate, dropout_key, 0))
