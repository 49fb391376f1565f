"""Attention masks as one key interval per query.

`[key_start, key_end)` expresses padding, causal, prefix-LM, right-to-left, packing, sliding windows
and their combinations, and it is run-time data: one compiled kernel serves every mask.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

# Up to this many keys segments are compared with all of them at once, beyond it in pieces.
_WHOLE, _PIECE = 1024, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query sees; the intersection of everything that is set.

    Attributes:
        causal: queries see keys up to their own index.
        window: queries see keys at most this many indices away.
        prefix_lengths: [B], with `causal`: keys before this index are seen by every query.
        prefix_tokens: [B, T] seqio's `decoder_causal_attention`, with 2 added. 0: the token sees
            keys up to itself; 1: also every token marked 1 in its segment; 2: keys from itself to
            the end of its segment (right to left). Tokens marked 1 open their segment. Implies
            self-attention (query index = key index); replaces `causal`.
        query_segment_ids: [B, T], 0 = padding: sees nothing. Equal ids are contiguous.
        key_segment_ids: [B, S], 0 = padding: seen by nobody. A query sees keys of its own id.
        key_lengths: [B], keys from this index on are padding.
        key_start, key_end: [B, T] the interval itself.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    prefix_lengths: Array | None = None
    prefix_tokens: Array | None = None
    query_segment_ids: Array | None = None
    key_segment_ids: Array | None = None
    key_lengths: Array | None = None
    key_start: Array | None = None
    key_end: Array | None = None

    def intervals(self, batch: int, q_len: int, kv_len: int) -> tuple[Array, Array]:
        """Returns (key_start, key_end), int32 [B, T]; `key_end <= key_start` sees nothing."""
        index_T = jnp.arange(q_len, dtype=jnp.int32)[None, :]
        start = jnp.zeros((batch, q_len), jnp.int32)
        end = jnp.full((batch, q_len), kv_len, jnp.int32)
        if self.query_segment_ids is not None:
            assert self.key_segment_ids is not None, "segment ids are needed on both sides"
            start, end = _matching_interval(self.query_segment_ids, self.key_segment_ids)
        if self.prefix_tokens is not None:
            prefix_end = self._prefix_end(kv_len)
            kind = self.prefix_tokens
            end = jnp.where(kind == 2, end, jnp.minimum(end, jnp.maximum(index_T + 1, prefix_end)))
            start = jnp.where(kind == 2, jnp.maximum(start, index_T), start)
        elif self.causal:
            visible = jnp.broadcast_to(index_T + 1, end.shape)
            if self.prefix_lengths is not None:
                visible = jnp.maximum(visible, self.prefix_lengths[:, None])
            end = jnp.minimum(end, visible)
        if self.window is not None:
            start = jnp.maximum(start, index_T - self.window)
            end = jnp.minimum(end, index_T + self.window + 1)
        if self.key_lengths is not None:
            end = jnp.minimum(end, self.key_lengths[:, None])
        if self.key_start is not None:
            start = jnp.maximum(start, self.key_start)
        if self.key_end is not None:
            end = jnp.minimum(end, self.key_end)
        return start, end

    def _prefix_end(self, kv_len: int) -> Array:
        """Returns [B, T]: where the prefix of each query's segment ends; 0 for causal queries."""
        is_prefix = self.prefix_tokens == 1
        if self.key_segment_ids is None:
            segments = jnp.ones(self.prefix_tokens.shape, jnp.int32)
        else:
            segments = self.key_segment_ids
        assert segments.shape[1] == kv_len == is_prefix.shape[1], "prefix_tokens: T must equal S"
        marked = jnp.where(is_prefix, segments, 0)
        return _matching_interval(marked, marked)[1]


def visible_hull(start: Array, end: Array, q_block: int) -> tuple[Array, Array]:
    """Returns (first, last + 1) key that a query of each block sees, int32 [B, T / bq].

    A block that sees nothing has its last before its first.

    Args:
        start: int32 [B, T], T a multiple of `q_block`.
        end: int32 [B, T].
        q_block: bq.
    """
    blocks = (start.shape[0], -1, q_block)
    sees = end > start
    low = jnp.min(jnp.where(sees, start, jnp.iinfo(jnp.int32).max).reshape(blocks), axis=2)
    return low, jnp.max(jnp.where(sees, end, 0).reshape(blocks), axis=2)


def _matching_interval(query_BT: Array, key_BS: Array) -> tuple[Array, Array]:
    """Returns first and last + 1 index of the keys whose non-zero id equals the query's.

    Long keys are compared piece by piece, so that no value has T * S elements.
    """
    kv_len = key_BS.shape[1]

    def compare(keys: Array, first: Array | int) -> tuple[Array, Array]:
        index = (first + jnp.arange(keys.shape[1], dtype=jnp.int32))[None, None, :]
        same = (query_BT[:, :, None] == keys[:, None, :]) & (query_BT[:, :, None] != 0)
        start = jnp.min(jnp.where(same, index, kv_len), axis=2)
        return start, jnp.max(jnp.where(same, index + 1, 0), axis=2)

    if kv_len <= _WHOLE:
        return compare(key_BS, 0)
    pieces = -(-kv_len // _PIECE)
    padded = jnp.pad(key_BS, ((0, 0), (0, pieces * _PIECE - kv_len)))

    def widen(piece: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        keys = jax.lax.dynamic_slice_in_dim(padded, piece * _PIECE, _PIECE, axis=1)
        start, end = compare(keys, piece * _PIECE)
        return jnp.minimum(found[0], start), jnp.maximum(found[1], end)

    nothing = (jnp.full(query_BT.shape, kv_len, jnp.int32), jnp.zeros(query_BT.shape, jnp.int32))
    return jax.lax.fori_loop(0, pieces, widen, nothing)
