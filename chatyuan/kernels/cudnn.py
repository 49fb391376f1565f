"""cuDNN's attention through jax.nn, only where it computes exactly what was asked."""

import jax
import jax.numpy as jnp

from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.relative_bias import Bias

Array = jax.Array

_DTYPES = ("bfloat16", "float16")
_HEAD_DIM_MULTIPLE, _HEAD_DIM_MOST = 8, 128


def mask_refusal(mask: AttentionMask | None, q_len: int, kv_len: int) -> str | None:
    """Returns why cuDNN has no such mask, None if it has: causal, `key_lengths`, or both.

    Intervals and segment ids are run-time data that could be anything.
    """
    if mask is None:
        return None
    for name in ("window", "prefix_lengths", "prefix_tokens", "query_segment_ids", "key_start",
                 "key_end"):  # fmt: skip
        if getattr(mask, name) is not None:
            return f"its masks are causal and key_lengths, the mask sets {name}"
    if mask.causal and q_len != kv_len:
        return f"its causal mask needs as many queries as keys, here {q_len} and {kv_len}"
    return None


def refusal(
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    dtype: str,
    head_dim: int,
    q_len: int,
    kv_len: int,
) -> str | None:
    """Returns why cuDNN does not express a call, None if it does."""
    if bias is not None:
        return f"it would need the {type(bias).__name__} as an array of {q_len} x {kv_len} a head"
    if dtype not in _DTYPES:
        return f"it computes in {' or '.join(_DTYPES)}, not {dtype}"
    if head_dim % _HEAD_DIM_MULTIPLE or head_dim > _HEAD_DIM_MOST:
        return (
            f"head_dim must be a multiple of {_HEAD_DIM_MULTIPLE} up to {_HEAD_DIM_MOST}, "
            f"not {head_dim}"
        )
    return mask_refusal(mask, q_len, kv_len)


def cudnn_attention(
    query_BTNH: Array,
    key_BSKH: Array,
    value_BSKH: Array,
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    scale: float,
) -> Array:
    """Returns softmax(scale * q k^T) v over the visible keys, [B, T, N, H].

    Args:
        query_BTNH: [B, T, N, H].
        key_BSKH: [B, S, K, H].
        value_BSKH: [B, S, K, H].
        mask: one for which `mask_refusal` gives None.
        bias: None.
        scale: factor on the scores.
    """
    assert bias is None, "see `refusal`"
    mask = AttentionMask() if mask is None else mask
    lengths = mask.key_lengths
    out = jax.nn.dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKH,
        scale=scale,
        is_causal=mask.causal,
        # What cuDNN gives for a row without keys is not documented: such rows get one key, and no
        # say in the output or the gradients.
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
        implementation="cudnn",
    )
    if lengths is None:
        return out
    return jnp.where((lengths > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))
