"""The one door to attention: arguments are checked here, then an implementation is chosen."""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from chatyuan.errors import UserError, did_you_mean
from chatyuan.kernels import cudnn
from chatyuan.kernels.block_sizes import BlockSizes
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.relative_bias import Bias, DenseBias, RelativePositionBias
from chatyuan.kernels.tiles import TPU_MOST_TILES, TPU_TILE, Tiling
from chatyuan.ops.platform import target_platform

Array = jax.Array

# Name -> where its function is; imported when called, because Pallas takes time to import.
_FUNCTIONS = {
    "reference": "chatyuan.kernels.reference:reference_attention",
    "dense": "chatyuan.kernels.dense:dense_attention",
    "xla": "chatyuan.kernels.blocked:blocked_attention",
    "pallas_gpu": "chatyuan.kernels.pallas_gpu:pallas_gpu_attention",
    "pallas_tpu": "chatyuan.kernels.pallas_tpu:pallas_tpu_attention",
    "cudnn": "chatyuan.kernels.cudnn:cudnn_attention",
}
IMPLEMENTATIONS = tuple(_FUNCTIONS)
_MATERIALISING = ("reference", "dense")
_PALLAS = ("pallas_gpu", "pallas_tpu")
_WITH_BLOCKS = ("xla", *_PALLAS)
_PLATFORM = {"pallas_gpu": "gpu", "cudnn": "gpu", "pallas_tpu": "tpu"}
_KERNEL_DTYPES = ("float32", "bfloat16", "float16")
# Wider heads do not fit beside a block of scores.
_KERNEL_HEAD_DIM = 256
# What is tried in this order on each platform.
_KERNELS = {"gpu": ("cudnn", "pallas_gpu"), "tpu": ("pallas_tpu",)}

# Scores of a head, T * S, up to which dense attention is chosen instead of `xla`, per platform;
# None: any other. On CPU at 1024 x 1024 `xla` takes 0.6 of dense's time with a causal mask, 1.1
# without a mask (CPU time of one core), and a thirtieth of its memory. Elsewhere not measured: the
# bound is memory's.
_DENSE_UP_TO = {"cpu": 512 * 1024, None: 1024 * 1024}
# Up to here a kernel has one block of a head to work on, which XLA does as well. Not measured.
_NO_KERNEL_UP_TO = 128 * 128


def select_implementation(
    implementation: str | None = None,
    *,
    platform: str = "cpu",
    q_len: int = 1,
    kv_len: int = 1,
    head_dim: int = 64,
    dtype: str = "float32",
    mask: AttentionMask | None = None,
    bias: Bias | None = None,
    placed: bool = True,
) -> tuple[str, str]:
    """Returns (name, why it was chosen); a pure function of its arguments.

    Args:
        implementation: a name, which is returned whether it can do the call or not, or None to
            choose.
        platform: of the computation, as jax names it: "cpu", "gpu", "tpu".
        q_len: T.
        kv_len: S.
        head_dim: H.
        dtype: of query, key and value, by name.
        mask: its kind counts, not its arrays.
        bias: likewise.
        placed: whether the call is one device's, by itself or by `sharded_attention`. Otherwise
            arrays may be split, and XLA's partitioner cannot look into a kernel.

    Raises:
        UserError: the named implementation does not exist.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"Attention implementation {implementation!r} must be one of "
                f"{', '.join(IMPLEMENTATIONS)}, or None to choose by platform."
                + did_you_mean(implementation, IMPLEMENTATIONS)
            )
        return implementation, "named by the caller"
    shape, scores = f"{q_len} queries x {kv_len} keys on {platform}", q_len * kv_len
    if q_len > 1 and scores > _NO_KERNEL_UP_TO:
        refused = ""
        for name in _KERNELS.get(platform, ()):
            reason = _refusal(
                name,
                platform=platform,
                q_len=q_len,
                kv_len=kv_len,
                head_dim=head_dim,
                dtype=dtype,
                mask=mask,
                bias=bias,
            )
            if reason is None and name in _PALLAS and not placed:
                reason = "arrays may be split over devices, and no mesh says how"
            if reason is None:
                return name, f"{shape}{refused}"
            refused += f"; not {name}: {reason}"
        shape += refused
    bound = _DENSE_UP_TO.get(platform, _DENSE_UP_TO[None])
    if scores <= bound:
        return "dense", f"{shape}: at most {bound} scores a head fit in memory"
    return "xla", f"{shape}: more than {bound} scores a head are computed in blocks"


def _refusal(
    name: str,
    *,
    platform: str,
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: str,
    mask: AttentionMask | None,
    bias: Bias | None,
) -> str | None:
    """Returns why an implementation cannot do a call, None if it can."""
    needed = _PLATFORM.get(name, platform)
    if platform != needed:
        return f"it needs a {needed}, this is a {platform}"
    if name == "cudnn":
        return cudnn.refusal(
            mask=mask, bias=bias, dtype=dtype, head_dim=head_dim, q_len=q_len, kv_len=kv_len
        )
    if name in _PALLAS:
        if isinstance(bias, DenseBias):
            return "it adds a bias by distance, and a DenseBias is an array"
        if dtype not in _KERNEL_DTYPES:
            return f"query, key and value must all be {', '.join(_KERNEL_DTYPES)}, not {dtype}"
        if head_dim > _KERNEL_HEAD_DIM:
            return f"head_dim must be at most {_KERNEL_HEAD_DIM}, not {head_dim}"
    if name == "pallas_tpu" and isinstance(bias, RelativePositionBias):
        needed = Tiling(q_len, kv_len, TPU_TILE, TPU_TILE, bias.constant_beyond()).tiles
        if needed > TPU_MOST_TILES:
            return (
                f"it holds {TPU_MOST_TILES} tiles of {TPU_TILE} x {TPU_TILE} distances, and the "
                f"bias needs {needed}: its max_distance is large, or its query_offset is traced"
            )
    return None


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

    Call it once outside the layers: the mask becomes explicit intervals, unless it is one of the
    plain ones that cuDNN knows by name, and the bias, where the implementation materialises it, an
    array.
    """
    name, _ = select_implementation(
        implementation,
        platform=target_platform(),
        q_len=q_len,
        kv_len=kv_len,
        mask=mask,
        bias=bias,
    )
    if cudnn.mask_refusal(mask, q_len, kv_len) is not None:
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
    interpret: bool = False,
) -> Array:
    """Returns attention, [B, T, N, H] in the dtype of `value`.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H], K dividing N: each key head serves N / K neighbouring query heads.
        value: [B, S, K, H].
        mask: what each query sees; None: every key. A query that sees nothing gives 0.
        bias: added to the scaled scores.
        scale: factor on the scores; T5 uses 1 and folds head_dim**-0.5 into its initialiser.
        implementation: a name never falls back; None chooses by platform, lengths, mask and bias.
        block_sizes: of `xla` and the Pallas kernels; None: those of `block_sizes.BLOCK_SIZES`.
        interpret: run a named Pallas kernel as ordinary operations on any platform, for tests.

    Raises:
        UserError: the named implementation does not exist, cannot do this call, has no blocks or
            cannot be interpreted.
    """
    batch, q_len, heads, head_dim = query.shape
    assert key.shape == value.shape and key.shape[0] == batch, (query.shape, key.shape, value.shape)
    assert key.shape[3] == head_dim and heads % key.shape[2] == 0, (query.shape, key.shape)
    call = {
        "platform": target_platform(),
        "q_len": q_len,
        "kv_len": key.shape[1],
        "head_dim": head_dim,
        "dtype": " and ".join(sorted({x.dtype.name for x in (query, key, value)})),
        "mask": mask,
        "bias": bias,
    }
    name, reason = select_implementation(implementation, placed=_is_placed(), **call)
    options: dict[str, Any] = {}
    if block_sizes is not None:
        if name not in _WITH_BLOCKS:
            raise UserError(
                f"block_sizes={block_sizes} was given to attention implementation {name!r} "
                f"({reason}), which has no blocks: name one of {', '.join(_WITH_BLOCKS)} or leave "
                "it out."
            )
        options["block_sizes"] = block_sizes
    if interpret:
        if name not in _PALLAS:
            raise UserError(
                f"interpret=True was given to attention implementation {name!r} ({reason}), which "
                f"is no Pallas kernel: name one of {', '.join(_PALLAS)} or leave it out."
            )
        options["interpret"] = True
        call["platform"] = _PLATFORM[name]
    refused = _refusal(name, **call)
    if refused is not None:
        raise UserError(
            f"Attention implementation {name!r} cannot do this call: {refused}. Leave "
            "implementation=None to choose by platform, or name 'xla', which runs everywhere."
        )
    return _function(name)(query, key, value, mask=mask, bias=bias, scale=scale, **options)


def _is_placed() -> bool:
    """Whether the call being traced is one device's."""
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def _function(name: str) -> Callable[..., Array]:
    module, function = _FUNCTIONS[name].split(":")
    return getattr(importlib.import_module(module), function)
