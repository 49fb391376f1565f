"""Dense attention with its own backward pass: what runs where no kernel does.

Same function as the reference. Autodiff of the reference makes about twice the passes over the
[T, S] squares; here the forward pass keeps exp(scores - max) unnormalised, the backward pass
divides the [T, H] sides instead, and every product is a plain batched matmul.
"""

import jax
import jax.numpy as jnp

from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.products import product, rows
from chatyuan.kernels.reference import MASKED_SCORE
from chatyuan.kernels.relative_bias import Bias

Array = jax.Array


def dense_attention(
    query_BTNH: Array,
    key_BSKH: Array,
    value_BSKH: Array,
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    scale: float,
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the visible keys, [B, T, N, H].

    Sums, softmax and its gradient are float32; the operands of products keep their dtype.
    """
    batch, q_len, heads, head_dim = query_BTNH.shape
    kv_len, kv_heads = key_BSKH.shape[1:3]
    if mask is None:
        mask = AttentionMask()
    start, end = mask.intervals(batch, q_len, kv_len)
    if scale != 1.0:
        query_BTNH = query_BTNH * jnp.asarray(scale, query_BTNH.dtype)
    # Query heads of one key head become rows of one product: G * T rows.
    grouped = query_BTNH.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    query_BKGTH = grouped.transpose(0, 2, 3, 1, 4)
    key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
    dense_bias = None if bias is None else bias.dense(q_len, kv_len)
    out_BKGTH = _attention(query_BKGTH, key_BKSH, value_BKSH, dense_bias, start, end)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, q_len, heads, head_dim)


@jax.custom_vjp
def _attention(
    query: Array, key: Array, value: Array, bias_NTS: Array | None, start: Array, end: Array
) -> Array:
    return _forward(query, key, value, bias_NTS, start, end)[0]


def _forward(
    query: Array, key: Array, value: Array, bias_NTS: Array | None, start: Array, end: Array
) -> tuple[Array, tuple]:
    shape = (*query.shape[:4], key.shape[2])
    scores = product(rows(query), key.swapaxes(2, 3)).reshape(shape)
    if bias_NTS is not None:
        scores = scores + bias_NTS.reshape(1, *shape[1:])
    index = jnp.arange(shape[-1], dtype=jnp.int32)[None, None, :]
    visible = (index >= start[:, :, None]) & (index < end[:, :, None])
    scores = jnp.where(visible[:, None, None], scores, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # A row without keys has equal weights: its factor 0 silences the output and all gradients.
    factor = jnp.where((end > start)[:, None, None, :, None], 1.0 / total, 0.0)
    weights = weights.astype(value.dtype)
    out = product(rows(weights), value).reshape(query.shape) * factor
    return out.astype(value.dtype), (query, key, value, bias_NTS, weights, factor, out)


def _backward(residuals: tuple, d_out: Array) -> tuple:
    query, key, value, bias_NTS, weights, factor, out = residuals
    d_out = d_out.astype(jnp.float32) * factor
    delta = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_out = d_out.astype(value.dtype)
    d_weights = product(rows(d_out), value.swapaxes(2, 3)).reshape(weights.shape)
    d_scores = weights.astype(jnp.float32) * (d_weights - delta)
    d_bias = None if bias_NTS is None else _sum_rows(d_scores).reshape(bias_NTS.shape)
    d_scores = rows(d_scores.astype(query.dtype))
    d_query = product(d_scores, key).reshape(query.shape).astype(query.dtype)
    # The narrow operand is the one to transpose, before and after.
    d_key = product(rows(query).swapaxes(2, 3), d_scores).swapaxes(2, 3).astype(key.dtype)
    d_value = product(rows(d_out).swapaxes(2, 3), rows(weights)).swapaxes(2, 3)
    return d_query, d_key, d_value.astype(value.dtype), d_bias, None, None


_attention.defvjp(_forward, _backward)


def _sum_rows(x: Array) -> Array:
    """Returns the sum over axis 0, by halves: XLA reduces it slowly on CPU."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        x = jnp.concatenate([x, rest]) if rest.shape[0] else x
    return x[0]
