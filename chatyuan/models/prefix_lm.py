"""One stack for everything: UniLM's masks, or a causal decoder like LLaMA and Baichuan."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from chatyuan.kernels import AttentionMask
from chatyuan.models.cache import DecodeCache
from chatyuan.models.language_model import Batch, LanguageModel
from chatyuan.ops.matmul import linear

Array = jax.Array


class PrefixLM(LanguageModel):
    """A decoder whose mask is data: bidirectional, causal, right-to-left, prefix, packed."""

    def hidden(
        self, batch: Batch, *, dropout_key: Array | None = None, mesh: Mesh | None = None
    ) -> Array:
        """Returns the output after the final norm, [B, T, D] in the compute dtype.

        Args:
            batch: decoder_input_tokens, decoder_segment_ids; decoder_causal_attention (see
                `AttentionMask.prefix_tokens`) unless the model is causal only; decoder_positions
                where positions are rotary.
            dropout_key: None when not training.
            mesh: over which parameters and batch are split; None = one device.
        """
        tokens, segments = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
        length = tokens.shape[1]
        positions = batch.get("decoder_positions")
        if positions is None:
            counted = jnp.arange(length, dtype=jnp.int32)[None, :]
            positions = jnp.broadcast_to(counted, tokens.shape)
        causal = self.config.causal_only
        mask = AttentionMask(
            causal=causal,
            prefix_tokens=None if causal else batch["decoder_causal_attention"],
            query_segment_ids=segments,
            key_segment_ids=segments,
        )
        shared = self.decoder.inputs(
            mask=mask,
            positions=positions,
            q_len=length,
            kv_len=length,
            dropout_key=dropout_key,
            mesh=mesh,
        )
        return self.decoder(self.token_embedder(tokens, mesh), shared)

    def prefill(
        self,
        tokens: Array,
        lengths: Array,
        max_decode_length: int,
        cache_dtype: str | None = None,
    ) -> tuple[Array, DecodeCache]:
        """Returns the logits after each row's prompt, and the cache that holds the prompts.

        The rows read [0] + prompt, all of it visible to all of it (left to right if causal only).
        They are aligned on the right inside, so that every row continues at the same slot.

        Args:
            tokens: [B, S] int32 prompts, padded on the right.
            lengths: [B] int32 real tokens per row.
            max_decode_length: output tokens the cache has room for.
            cache_dtype: of the self-attention cache; None = the compute dtype.

        Returns:
            logits [B, V] float32, cache with B rows.
        """
        rows, length = tokens.shape
        start = jnp.int32(length) - lengths.astype(jnp.int32)
        slot = jnp.arange(length + 1, dtype=jnp.int32)[None, :]
        positions = slot - start[:, None]
        # Slot `start` holds the start token 0, the prompt follows up to slot `length`.
        prompt = jnp.take_along_axis(tokens, jnp.clip(positions - 1, 0, length - 1), axis=1)
        aligned = jnp.where(positions > 0, prompt, 0)
        end = slot + 1 if self.config.causal_only else jnp.full_like(slot, length + 1)
        mask = AttentionMask(
            key_start=jnp.broadcast_to(start[:, None], aligned.shape),
            key_end=jnp.where(positions >= 0, jnp.broadcast_to(end, aligned.shape), 0),
        )
        cache = self.empty_cache(start, length + max_decode_length, cache_dtype)
        hidden, cache = self.decode(aligned, cache, positions=jnp.maximum(positions, 0), mask=mask)
        return linear(hidden[:, -1], cache.head, "float32"), cache
