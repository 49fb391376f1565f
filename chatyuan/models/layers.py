"""The small modules: the one owner of weight matrices, norm, embedding, feed-forward, dropout.

Modules hold `nnx.Param`s only; randomness, caches and masks are arguments.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from chatyuan.models.config import ModelConfig
from chatyuan.models.initializers import Initializer, normal, ones, truncated_normal
from chatyuan.ops.embedding import embed
from chatyuan.ops.matmul import linear

Array = jax.Array

# Shardings come from the rules table, never from a mesh that happens to be active at construction.
nnx.use_eager_sharding(False)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    # T5 1.1's "gelu_new" is the tanh approximation.
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def param(shape: tuple[int, ...], axes: tuple[str, ...], initializer: Initializer) -> nnx.Param:
    """Returns an abstract float32 parameter that knows its axes' logical names and its start.

    `Model` makes the values; `Model.bind` puts them in.
    """
    assert len(shape) == len(axes), (shape, axes)
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(abstract, out_sharding=axes, initializer=initializer)


def dropout(x: Array, rate: float, key: Array | None, site: int) -> Array:
    """Returns `x` with features dropped, or `x` itself without a key.

    One draw per (row, feature), shared along the length as in T5 (Mesh TensorFlow's `noise_shape`,
    T5X's `broadcast_dims`): as good a regulariser, and the random bits cost nothing.

    Args:
        x: [B, T, D].
        rate: probability of a drop.
        key: [B], of this layer and step for each row (`row_keys`): what a row draws depends neither
            on the rows beside it nor on where they are.
        site: distinguishes the dropouts of one layer.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, (1, x.shape[2])))(
        fold_in(key, site)
    )
    factor = jnp.where(keep, jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
    return x * factor


def row_keys(key: Array | None, rows: int) -> Array | None:
    """Returns the keys [B] of the rows of a batch, for `dropout`; None stays None."""
    if key is None:
        return None
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows, dtype=jnp.int32))


def fold_in(keys: Array | None, data: jax.typing.ArrayLike) -> Array | None:
    """Returns `jax.random.fold_in` of each of the keys [B]; None stays None."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


class Linear(nnx.Module):
    """A weight matrix: the only module in which activations meet weights.

    With an adapter (LoRA, arXiv:2106.09685) it is kernel + scale * adapter_in @ adapter_out, never
    made as one matrix; adapter_out begins at zero, and so does what is added.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        initializer: Initializer,
        config: ModelConfig | None = None,
    ) -> None:
        """Creates the matrix `kernel`, [in, out]; `config` says whether it has an adapter."""
        self.kernel = param(shape, axes, initializer)
        self.adapter_scale = config.adapter_scale if config is not None else 0.0
        if self.adapter_scale:
            (inputs, outputs), rank = shape, config.adapter_rank
            self.adapter_in = param((inputs, rank), (axes[0], "adapter"), normal(inputs**-0.5))
            self.adapter_out = param((rank, outputs), ("adapter", axes[1]), normal(0.0))

    def __call__(self, x: Array) -> Array:
        """Returns the product in the dtype of `x`."""
        y = linear(x, self.kernel[...].astype(x.dtype))
        if not self.adapter_scale:
            return y
        low = linear(x, self.adapter_in[...].astype(x.dtype))
        return y + self.adapter_scale * linear(low, self.adapter_out[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, features: int, epsilon: float, axis: str = "embed") -> None:
        """Creates the scale, ones."""
        self.epsilon = epsilon
        self.scale = param((features,), (axis,), ones())

    def __call__(self, x: Array) -> Array:
        """Returns the normalised array in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + jnp.float32(self.epsilon))
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * scale).astype(x.dtype)


class Embedder(nnx.Module):
    """The token table; the only owner of a tied head's matrix too."""

    def __init__(self, config: ModelConfig) -> None:
        """Creates the table, unit normals as in T5."""
        self.dtype = config.dtype
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = param(shape, ("vocab", "embed"), normal(1.0))

    def __call__(self, tokens_BT: Array, mesh: Mesh | None = None) -> Array:
        """Returns the rows of the tokens, [B, T, D] in the compute dtype; `mesh` as in `embed`."""
        return embed(self.embedding[...], tokens_BT, mesh).astype(self.dtype)


class Mlp(nnx.Module):
    """wo(product of activation_i(wi_i(x))): plain with one activation, gated with two."""

    def __init__(self, config: ModelConfig) -> None:
        """Creates `wi` (or `wi_0`, `wi_1`, ...) and `wo`."""
        self.activations = config.mlp_activations
        self.dropout_rate = config.dropout_rate
        embed, mlp = config.embed_dim, config.mlp_dim
        for name in self.input_names:
            initializer = truncated_normal(embed**-0.5)
            setattr(self, name, Linear((embed, mlp), ("embed", "mlp"), initializer, config))
        self.wo = Linear((mlp, embed), ("mlp", "embed"), truncated_normal(mlp**-0.5), config)

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
