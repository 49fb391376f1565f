"""What both kinds of model share: embedding, head, cached decoder steps."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from chatyuan.kernels import AttentionMask
from chatyuan.models.attention import Attention
from chatyuan.models.cache import DecodeCache
from chatyuan.models.config import ModelConfig
from chatyuan.models.initializers import truncated_normal
from chatyuan.models.layers import Embedder, Linear
from chatyuan.models.stack import Block, Stack
from chatyuan.ops.matmul import linear

Array = jax.Array
Batch = dict[str, Array]


class LanguageModel(nnx.Module):
    """A token table, a decoder and a head."""

    def __init__(self, config: ModelConfig) -> None:
        """Creates `token_embedder`, `decoder` and, unless tied, `logits_dense`."""
        cross = config.architecture == "encoder_decoder"
        self.config = config
        self.token_embedder = Embedder(config)
        # A prefix-LM sees both sides inside its prefix; a causal decoder only the past.
        bidirectional = not cross and not config.causal_only
        self.decoder = Stack(
            config, config.num_decoder_layers, cross=cross, bidirectional=bidirectional
        )
        if not config.tie_embeddings:
            shape = (config.embed_dim, config.vocab_size)
            initializer = truncated_normal(config.embed_dim**-0.5)
            self.logits_dense = Linear(shape, ("embed", "vocab"), initializer)

    def head_kernel(self) -> Array:
        """Returns the matrix [D, V] of the head as it is trained, float32."""
        if self.config.tie_embeddings:
            return self.token_embedder.embedding[...].T
        return self.logits_dense.kernel[...]

    def head_inputs(self, hidden: Array) -> Array:
        """Returns what `head_kernel` is multiplied by, normed if so configured: scaled [..., D]."""
        if self.config.tie_embeddings and self.config.scale_tied_logits:
            return hidden * jnp.asarray(self.config.embed_dim**-0.5, hidden.dtype)
        return hidden

    def head_weight(self) -> Array:
        """Returns the matrix [D, V], float32, for which logits = hidden @ head_weight."""
        config, weight = self.config, self.head_kernel()
        if config.norm_head:
            norm = jnp.sqrt(jnp.sum(jnp.square(weight), axis=0, keepdims=True))
            weight = weight / jnp.maximum(norm, 1e-12)
        if config.tie_embeddings and config.scale_tied_logits:
            weight = weight * config.embed_dim**-0.5
        return weight

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits [..., V] of `hidden` [..., D]."""
        return linear(hidden, self.head_weight().astype(hidden.dtype), "float32")

    def step(self, tokens: Array, cache: DecodeCache) -> tuple[Array, DecodeCache]:
        """Returns the logits after one more token per row, and the cache that holds it.

        Args:
            tokens: [R] int32, R = rows of the cache.
            cache: from `prefill` or an earlier step; its slots must not be used up.

        Returns:
            logits [R, V] float32, cache.
        """
        index = cache.index
        hidden, cache = self.decode(
            tokens[:, None],
            cache,
            positions=(index - cache.start)[:, None],
            mask=AttentionMask(
                key_start=cache.start[:, None],
                key_end=jnp.broadcast_to(index + 1, (tokens.shape[0], 1)),
            ),
        )
        return linear(hidden[:, 0], cache.head, "float32"), cache

    def decode(
        self, tokens_RT: Array, cache: DecodeCache, *, positions: Array, mask: AttentionMask
    ) -> tuple[Array, DecodeCache]:
        """Returns [R, T, D] for T more tokens per row, and the cache that holds them.

        Args:
            tokens_RT: int32 [R, T].
            cache: T slots must be left.
            positions: [R, T] of the tokens in their text.
            mask: over the slots of the cache.
        """
        rows, length = tokens_RT.shape
        slots = cache.self_values[0].shape[2]
        shared = self.decoder.inputs(
            mask=mask, positions=positions, q_len=length, kv_len=slots, query_offset=cache.index
        )
        if cache.cross_keys:
            prompts = cache.cross_lengths.shape[0]
            queries = rows * length // prompts
            end = jnp.broadcast_to(cache.cross_lengths[:, None], (prompts, queries))
            cross_mask = AttentionMask(key_start=jnp.zeros_like(end), key_end=end)
            shared = dataclasses.replace(shared, cross_mask=cross_mask)

        def body(
            block: Block, x: Array, _: Array, layer: tuple[Array, ...]
        ) -> tuple[Array, tuple[Array, Array]]:
            written = ()

            def update(key_RTKH: Array, value_RTKH: Array) -> tuple[Array, Array]:
                nonlocal written
                kept, dtype = layer[0].dtype, key_RTKH.dtype
                new_key, new_value = to_cache(key_RTKH.astype(kept), value_RTKH.astype(kept))
                written = (
                    jax.lax.dynamic_update_slice_in_dim(layer[0], new_key, cache.index, axis=3),
                    jax.lax.dynamic_update_slice_in_dim(layer[1], new_value, cache.index, axis=2),
                )
                key, value = from_cache(*written)
                return key.astype(dtype), value.astype(dtype)

            def cross(_: Attention) -> tuple[Array, Array]:
                return from_cache(layer[2], layer[3])

            x = block(
                x,
                shared,
                None,
                update_cache=update,
                cross_keys_values=cross if cache.cross_keys else None,
            )
            return x, written

        layers = (cache.self_keys, cache.self_values, cache.cross_keys, cache.cross_values)
        per_layer = list(zip(*(part for part in layers if part), strict=True))
        x, written = self.decoder.run(
            body,
            self.token_embedder(tokens_RT),
            per_layer,
            unroll=True,
            layer_params=cache.weights,
        )
        keys, values = zip(*written, strict=True)
        new = dataclasses.replace(
            cache, self_keys=keys, self_values=values, index=cache.index + jnp.int32(length)
        )
        return self.decoder.final_norm(x), new

    def empty_cache(self, start: Array, slots: int, dtype: str | None = None) -> DecodeCache:
        """Returns the cache of rows with these first slots [R], nothing written yet.

        Args:
            start: [R] int32.
            slots: S.
            dtype: of the keys and values; None = the compute dtype.
        """
        config = self.config
        dtype = dtype or config.dtype
        rows, kv_heads, head_dim = start.shape[0], config.kv_heads, config.head_dim
        layers = range(config.num_decoder_layers)
        on_cpu = jax.default_backend() == "cpu"
        return DecodeCache(
            tuple(jnp.zeros((rows, kv_heads, head_dim, slots), dtype) for _ in layers),
            tuple(jnp.zeros((rows, kv_heads, slots, head_dim), dtype) for _ in layers),
            start=start,
            index=jnp.int32(0),
            head=self.head_weight().astype(config.dtype),
            weights=self.decoder.layer_params() if on_cpu else (),
        )


def to_cache(key_RTKH: Array, value_RTKH: Array) -> tuple[Array, Array]:
    """Returns keys and values in the layouts of `DecodeCache`."""
    return key_RTKH.transpose(0, 2, 3, 1), value_RTKH.transpose(0, 2, 1, 3)


def from_cache(key_RKHS: Array, value_RKSH: Array) -> tuple[Array, Array]:
    """Returns keys and values [R, S, K, H]; XLA cancels the transposes."""
    return key_RKHS.transpose(0, 3, 1, 2), value_RKSH.transpose(0, 2, 1, 3)
