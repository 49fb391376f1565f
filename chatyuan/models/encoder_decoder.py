"""T5: an encoder that sees everything, a causal decoder that also attends to it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from chatyuan.kernels import AttentionMask, prepare
from chatyuan.models.cache import DecodeCache
from chatyuan.models.config import ModelConfig
from chatyuan.models.language_model import Batch, LanguageModel, to_cache
from chatyuan.models.stack import Block, Stack

Array = jax.Array


class EncoderDecoder(LanguageModel):
    """T5 1.0, T5 1.1, mT5, umT5 and ChatYuan."""

    def __init__(self, config: ModelConfig) -> None:
        """Creates what `LanguageModel` has, and the encoder."""
        super().__init__(config)
        self.encoder = Stack(config, config.num_encoder_layers, cross=False, bidirectional=True)

    def encode(
        self,
        tokens_BS: Array,
        segment_ids_BS: Array,
        positions_BS: Array | None = None,
        dropout_key: Array | None = None,
        mesh: Mesh | None = None,
    ) -> Array:
        """Returns the encoder's output [B, S, D].

        Args:
            tokens_BS: int32.
            segment_ids_BS: 0 = padding; tokens see their own segment.
            positions_BS: for rotary embedding; None counts from 0 in each row.
            dropout_key: None when not training.
            mesh: see `hidden`.
        """
        length = tokens_BS.shape[1]
        shared = self.encoder.inputs(
            mask=AttentionMask(query_segment_ids=segment_ids_BS, key_segment_ids=segment_ids_BS),
            positions=_counted(tokens_BS) if positions_BS is None else positions_BS,
            q_len=length,
            kv_len=length,
            dropout_key=dropout_key,
            mesh=mesh,
        )
        return self.encoder(self.token_embedder(tokens_BS, mesh), shared)

    def hidden(
        self, batch: Batch, *, dropout_key: Array | None = None, mesh: Mesh | None = None
    ) -> Array:
        """Returns the decoder's output after its final norm, [B, T, D] in the compute dtype.

        Args:
            batch: encoder_input_tokens, encoder_segment_ids, decoder_input_tokens and
                decoder_segment_ids; encoder_positions and decoder_positions where positions are
                rotary. With B prompts the decoder may have B * G rows, those of a prompt adjacent:
                the encoder runs once a prompt, and its G answers share the cross keys and values.
            dropout_key: None when not training.
            mesh: over which parameters and batch are split; None = one device.
        """
        encoder_key, decoder_key = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        encoder_segments = batch["encoder_segment_ids"]
        encoded = self.encode(
            batch["encoder_input_tokens"],
            encoder_segments,
            batch.get("encoder_positions"),
            encoder_key,
            mesh,
        )
        tokens, segments = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
        length = tokens.shape[1]
        positions = batch.get("decoder_positions")
        shared = self.decoder.inputs(
            mask=AttentionMask(causal=True, query_segment_ids=segments, key_segment_ids=segments),
            positions=_counted(tokens) if positions is None else positions,
            q_len=length,
            kv_len=length,
            dropout_key=decoder_key,
            mesh=mesh,
        )
        prompts = encoded.shape[0]
        queries = segments.reshape(prompts, -1)
        cross_mask, _ = prepare(
            AttentionMask(query_segment_ids=queries, key_segment_ids=encoder_segments),
            None,
            batch=prompts,
            q_len=queries.shape[1],
            kv_len=encoded.shape[1],
        )
        shared = dataclasses.replace(shared, cross_mask=cross_mask)
        return self.decoder(self.token_embedder(tokens, mesh), shared, encoded)

    def prefill(
        self,
        tokens: Array,
        lengths: Array,
        max_decode_length: int,
        cache_dtype: str | None = None,
    ) -> tuple[Array, DecodeCache]:
        """Returns the logits of the first output token, and the cache: the encoder runs once.

        Args:
            tokens: [B, S] int32 encoder input, padded on the right.
            lengths: [B] int32 real tokens per row.
            max_decode_length: output tokens the cache has room for.
            cache_dtype: of the self-attention cache; None = the compute dtype.

        Returns:
            logits [B, V] float32 after the decoder's start token (0), cache with B rows.
        """
        rows, length = tokens.shape
        live = jnp.arange(length, dtype=jnp.int32)[None, :] < lengths[:, None]
        encoded = self.encode(tokens, live.astype(jnp.int32))

        def cross(block: Block, carry: None, _: Array, __: None) -> tuple[None, tuple]:
            key, value = block.encoder_decoder_attention.keys_values(encoded, None)
            return carry, to_cache(key, value)

        cache = self.empty_cache(jnp.zeros(rows, jnp.int32), max_decode_length, cache_dtype)
        _, per_layer = self.decoder.run(cross, None, unroll=True, layer_params=cache.weights)
        keys, values = zip(*per_layer, strict=True)
        cache = dataclasses.replace(
            cache,
            cross_keys=keys,
            cross_values=values,
            cross_lengths=lengths.astype(jnp.int32),
        )
        return self.step(jnp.zeros(rows, jnp.int32), cache)


def _counted(tokens_BT: Array) -> Array:
    """Returns positions 0, 1, ... for every row."""
    return jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape
    )
