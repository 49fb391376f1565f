"""Dense attention: every feature, no tricks. What the other implementations are tested against."""

import jax
import jax.numpy as jnp

from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.relative_bias import Bias

Array = jax.Array

# Finite, so that a row without keys gives a uniform softmax that can be zeroed instead of NaN.
MASKED_SCORE = -1e30
# Where an online softmax starts: above MASKED_SCORE, below any score, so that exp(masked - this) is
# 0 also in rows without keys.
LEAST_MAXIMUM = 1e-5 * MASKED_SCORE


def reference_attention(
    query_BTNH: Array,
    key_BSKH: Array,
    value_BSKH: Array,
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    scale: float,
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the visible keys, [B, T, N, H].

    Scores and softmax are float32 [B, N, T, S] whatever the inputs are. Queries that see no key
    give 0.
    """
    batch, q_len, heads, head_dim = query_BTNH.shape
    kv_len, kv_heads = key_BSKH.shape[1:3]
    group = heads // kv_heads
    if scale != 1.0:
        query_BTNH = query_BTNH * jnp.asarray(scale, query_BTNH.dtype)
    query = query_BTNH.reshape(batch, q_len, kv_heads, group, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key_BSKH, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.dense(q_len, kv_len).reshape(1, kv_heads, group, q_len, kv_len)
    visible = None
    if mask is not None:
        start, end = mask.intervals(batch, q_len, kv_len)
        index = jnp.arange(kv_len, dtype=jnp.int32)[None, None, :]
        visible = (index >= start[:, :, None]) & (index < end[:, :, None])
        scores = jnp.where(visible[:, None, None], scores, MASKED_SCORE)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value_BSKH.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probabilities, value_BSKH)
    out = out.reshape(batch, q_len, heads, head_dim)
    if mask is not None:
        out = jnp.where((end > start)[:, :, None, None], out, jnp.zeros((), out.dtype))
    return out
