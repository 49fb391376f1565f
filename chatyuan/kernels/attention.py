"""The one door to attention: arguments are checked here, then an implementation is chosen."""

import jax

from chatyuan.errors import UserError, did_you_mean
from chatyuan.kernels.dense import dense_attention
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.reference import reference_attention
from chatyuan.kernels.relative_bias import Bias, DenseBias

Array = jax.Array

_FUNCTIONS = {"reference": reference_attention, "dense": dense_attention}
IMPLEMENTATIONS = tuple(_FUNCTIONS)


def select_implementation(implementation: str | None = None) -> tuple[str, str]:
    """Returns (name, why it was chosen).

    Raises:
        UserError: the named implementation does not exist.
    """
    if implementation is None:
        return "dense", "runs on every platform with every mask and bias"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"Attention implementation {implementation!r} must be one of "
            f"{', '.join(IMPLEMENTATIONS)}, or None to choose by platform."
            + did_you_mean(implementation, IMPLEMENTATIONS)
        )
    return implementation, "named by the caller"


def prepare(
    mask: AttentionMask | None,
    bias: Bias | None,
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    implementation: str | None = None,
) -> tuple[AttentionMask | None, Bias | None]:
    """Returns mask and bias with the work that does not depend on the layer already done.

    Call it once outside the layers: the mask becomes explicit intervals and the bias, which every
    implementation so far materialises, an array.
    """
    select_implementation(implementation)
    if mask is not None:
        start, end = mask.intervals(batch, q_len, kv_len)
        mask = AttentionMask(key_start=start, key_end=end)
    if bias is not None:
        bias = DenseBias(bias.dense(q_len, kv_len))
    return mask, bias


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: AttentionMask | None = None,
    bias: Bias | None = None,
    scale: float,
    implementation: str | None = None,
) -> Array:
    """Returns attention, [B, T, N, H] in the dtype of `value`.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H], K dividing N: each key head serves N / K neighbouring query heads.
        value: [B, S, K, H].
        mask: what each query sees; None: every key. A query that sees nothing gives 0.
        bias: added to the scaled scores.
        scale: factor on the scores; T5 uses 1 and folds head_dim**-0.5 into its initialiser.
        implementation: a name never falls back; None chooses by platform.

    Raises:
        UserError: the named implementation does not exist.
    """
    batch, _, heads, head_dim = query.shape
    assert key.shape == value.shape and key.shape[0] == batch, (query.shape, key.shape, value.shape)
    assert key.shape[3] == head_dim and heads % key.shape[2] == 0, (query.shape, key.shape)
    name, _ = select_implementation(implementation)
    return _FUNCTIONS[name](query, key, value, mask=mask, bias=bias, scale=scale)
