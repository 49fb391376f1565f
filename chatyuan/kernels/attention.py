"""The one door to attention: arguments are checked here, then an implementation is chosen."""

import jax

from chatyuan.errors import UserError, did_you_mean
from chatyuan.kernels.blocked import BlockSizes, blocked_attention
from chatyuan.kernels.dense import dense_attention
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.reference import reference_attention
from chatyuan.kernels.relative_bias import Bias, DenseBias

Array = jax.Array

_FUNCTIONS = {
    "reference": reference_attention,
    "dense": dense_attention,
    "xla": blocked_attention,
}
IMPLEMENTATIONS = tuple(_FUNCTIONS)
_MATERIALISING = ("reference", "dense")

# Scores of a head, T * S, up to which dense attention is chosen, per platform; None: any other.
# On CPU at 1024 x 1024 `xla` takes 0.6 of dense's time with a causal mask, 1.1 without a mask (CPU
# time of one core), and a thirtieth of its memory. Elsewhere not measured: the bound is memory's.
_DENSE_UP_TO = {"cpu": 512 * 1024, None: 1024 * 1024}


def select_implementation(
    implementation: str | None = None, *, platform: str = "cpu", q_len: int = 1, kv_len: int = 1
) -> tuple[str, str]:
    """Returns (name, why it was chosen); a pure function of its arguments.

    Args:
        implementation: a name, which is returned, or None to choose.
        platform: of the computation, as jax names it: "cpu", "gpu", "tpu".
        q_len: T.
        kv_len: S.

    Raises:
        UserError: the named implementation does not exist.
    """
    if implementation is None:
        bound = _DENSE_UP_TO.get(platform, _DENSE_UP_TO[None])
        shape = f"{q_len} queries x {kv_len} keys on {platform}"
        if q_len * kv_len <= bound:
            return "dense", f"{shape}: at most {bound} scores a head fit in memory"
        return "xla", f"{shape}: more than {bound} scores a head are computed in blocks"
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

    Call it once outside the layers: the mask becomes explicit intervals and the bias, where the
    implementation materialises it, an array.
    """
    name, _ = select_implementation(
        implementation, platform=jax.default_backend(), q_len=q_len, kv_len=kv_len
    )
    if mask is not None:
        start, end = mask.intervals(batch, q_len, kv_len)
        mask = AttentionMask(key_start=start, key_end=end)
    if bias is not None and name in _MATERIALISING:
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
    block_sizes: BlockSizes | None = None,
) -> Array:
    """Returns attention, [B, T, N, H] in the dtype of `value`.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H], K dividing N: each key head serves N / K neighbouring query heads.
        value: [B, S, K, H].
        mask: what each query sees; None: every key. A query that sees nothing gives 0.
        bias: added to the scaled scores.
        scale: factor on the scores; T5 uses 1 and folds head_dim**-0.5 into its initialiser.
        implementation: a name never falls back; None chooses by platform and lengths.
        block_sizes: of `xla`; None: those of `blocked.BLOCK_SIZES`.

    Raises:
        UserError: the named implementation does not exist or has no blocks.
    """
    batch, q_len, heads, head_dim = query.shape
    assert key.shape == value.shape and key.shape[0] == batch, (query.shape, key.shape, value.shape)
    assert key.shape[3] == head_dim and heads % key.shape[2] == 0, (query.shape, key.shape)
    name, reason = select_implementation(
        implementation, platform=jax.default_backend(), q_len=q_len, kv_len=key.shape[1]
    )
    options = {}
    if block_sizes is not None:
        if name != "xla":
            raise UserError(
                f"block_sizes={block_sizes} was given to attention implementation {name!r} "
                f"({reason}), which has no blocks: name implementation='xla' or leave it out."
            )
        options["block_sizes"] = block_sizes
    return _FUNCTIONS[name](query, key, value, mask=mask, bias=bias, scale=scale, **options)
