"""The logits of one chunk of tokens at a time: their statistics per token, and their gradients.

What `chatyuan.ops.linear_cross_entropy` is made of, and the one place that says how large a chunk
is and which device computes what. The chunks are of tokens and never of the vocabulary, so that
each needs one pass of softmax and the three products stay large.

Shapes: `...` any batch dimensions (usually B, T), N tokens, C tokens of a chunk, D model, V
vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from chatyuan.ops.losses import LossTerms, RowStatistics
from chatyuan.ops.matmul import weight_gradient
from chatyuan.ops.platform import target_platform
from chatyuan.sharding import RULES

Array = jax.Array

# Every chunk reads the head twice and adds to its gradient, about 20 bytes of traffic per entry
# beside the 6 C operations of the products. 344 tokens are 1/24 of 8192, which keeps what is
# temporary under 1/20 of the logits; fewer are slower (256: by 2 % of the whole). The accelerator's
# number is an estimate from bandwidth, not a measurement.
_CHUNK_HOST, _CHUNK_ACCELERATOR = 344, 2048
# Logits of this many bytes burden no device: chunks need not be smaller.
_LOGITS_AT_LEAST = 64 * 2**20
# Columns of the head's gradient that a host adds to at once: the product stays in the cache.
_COLUMNS_HOST = 2048
# As `LanguageModel.head_weight`.
_LEAST_NORM = 1e-12


class Head(NamedTuple):
    """What turns hidden states into logits and where it happens; static."""

    soft_cap: float | None
    norm_head: bool
    chunk_tokens: int | None
    mesh: Mesh | AbstractMesh | None


# ------------------------------------------------------------------------------------- the chunks


def statistics_of(
    how: Head, terms: LossTerms | None, hidden: Array, head: Array, targets: Array
) -> RowStatistics:
    """The statistics of all rows, [N] each."""

    def of_logits(logits_CV: Array, targets_C: Array) -> RowStatistics:
        return _row_statistics(how, terms, logits_CV, targets_C)

    return _over_chunks(how, of_logits, hidden, head, targets)


def log_probs_and_entropies(
    how: Head, hidden: Array, head: Array, targets: Array
) -> tuple[Array, Array]:
    """The log-probability of each target and the entropy of its distribution, [N] each."""

    def of_logits(logits_CV: Array, targets_C: Array) -> tuple[Array, Array]:
        statistics = _row_statistics(how, None, logits_CV, targets_C)
        log_probs_CV = logits_CV - statistics.log_z[:, None]
        # A logit of -inf has probability 0 and adds 0, not NaN.
        terms_CV = jnp.where(log_probs_CV > -jnp.inf, jnp.exp(log_probs_CV) * log_probs_CV, 0.0)
        axes = () if how.mesh is None else RULES["vocab"]
        entropies_C = -jax.lax.psum(jnp.sum(terms_CV, axis=1), axes)
        return statistics.target_logit - statistics.log_z, entropies_C

    return _over_chunks(how, of_logits, hidden, head, targets)


def _over_chunks(
    how: Head, of_logits: Callable[..., Any], hidden: Array, head: Array, targets: Array
) -> Any:
    """A tree of float32 arrays [N], from what `of_logits(logits_CV, targets_C)` gives of chunks."""
    x_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chunk, steps = _chunking(how, len(x_ND), head.shape[1])
    w_DV, scale_V = _weight(how, head, hidden.dtype)

    def of_chunk(x_CD: Array, targets_C: Array) -> Any:
        return of_logits(_logits(how, x_CD, w_DV, scale_V), targets_C)

    def step(i: Array, found: Any) -> Any:
        start, parts, _ = _chunk(i, chunk, x_ND, targets_N)
        return _write(found, of_chunk(*parts), start)

    if steps == 1:
        return of_chunk(x_ND, targets_N)
    shapes = jax.eval_shape(of_chunk, x_ND[:chunk], targets_N[:chunk])
    empty = jax.tree.map(lambda _: jnp.zeros(len(x_ND), jnp.float32), shapes)
    return jax.lax.fori_loop(0, steps, step, empty)


def gradients(
    how: Head,
    terms: LossTerms | None,
    hidden: Array,
    head: Array,
    targets: Array,
    per_token: tuple[Array, ...],
    coefficients: Callable[..., RowStatistics],
) -> tuple[RowStatistics, Array, Array]:
    """Returns the statistics [N] and the gradients with respect to `hidden` and `head`.

    Args:
      how: see `Head`.
      terms: None for log-probabilities.
      hidden: [..., D], all of this device, like the other arrays.
      head: [D, V].
      targets: [...].
      per_token: [...] each, further arguments of `coefficients`.
      coefficients: (statistics, *per_token) of a chunk -> cotangents of its statistics, [C] each.
    """
    x_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    per_token = tuple(x.reshape(-1) for x in per_token)
    chunk, steps = _chunking(how, len(x_ND), head.shape[1])
    w_DV, scale_V = _weight(how, head, hidden.dtype)

    # Sums over the vocabulary's devices stay float32 until they are complete.
    dx_dtype = hidden.dtype if how.mesh is None else jnp.float32

    def of_chunk(x_CD: Array, targets_C: Array, *per_token_C: Array) -> tuple:
        logits_CV = _logits(how, x_CD, w_DV, scale_V)
        statistics = _row_statistics(how, terms, logits_CV, targets_C)
        dz_CV = _logit_gradient(
            how, terms, logits_CV, targets_C, statistics, coefficients(statistics, *per_token_C)
        )
        if scale_V is not None:
            dz_CV = dz_CV * scale_V[None]
        dz_CV = dz_CV.astype(x_CD.dtype)
        dx_CD = jax.lax.dot_general(
            dz_CV, w_DV, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return statistics, dx_CD.astype(dx_dtype), dz_CV

    def step(i: Array, carry: tuple) -> tuple:
        found, dx_ND, dw_DV = carry
        start, (x_CD, *others), new_C = _chunk(i, chunk, x_ND, targets_N, *per_token)
        statistics, dx_CD, dz_CV = of_chunk(x_CD, *others)
        # A token that an earlier chunk has counted gets the same dx again and adds no dw.
        once_CD = jnp.where(new_C[:, None], x_CD, jnp.zeros_like(x_CD))
        dw_DV = jax.lax.platform_dependent(
            dw_DV, once_CD, dz_CV, cpu=_add_product_cpu, default=_add_product
        )
        return _write(found, statistics, start), _write(dx_ND, dx_CD, start), dw_DV

    if steps == 1:
        statistics, dx_ND, dz_NV = of_chunk(x_ND, targets_N, *per_token)
        dw_DV = weight_gradient(x_ND, dz_NV, "float32")
    else:
        carry = (
            _empty_statistics(len(x_ND)),
            jnp.zeros(x_ND.shape, dx_dtype),
            jnp.zeros(head.shape, jnp.float32),
        )
        statistics, dx_ND, dw_DV = jax.lax.fori_loop(0, steps, step, carry)
    if how.mesh is not None:
        dx_ND = jax.lax.psum(dx_ND, RULES["vocab"])
        dw_DV = jax.lax.psum(dw_DV, token_axes())
    if scale_V is not None:
        dw_DV = _through_norm(head, scale_V, dw_DV)
    d_hidden = dx_ND.reshape(hidden.shape).astype(hidden.dtype)
    return statistics, d_hidden, dw_DV.astype(head.dtype)


def _chunking(how: Head, tokens: int, columns: int) -> tuple[int, int]:
    """Tokens of a chunk and how many chunks cover all tokens; the last one may overlap another."""
    chunk = chunk_of(tokens, columns, how.chunk_tokens)
    return chunk, math.ceil(tokens / chunk)


def chunk_of(tokens: int, columns: int, most: int | None = None) -> int:
    """Returns the tokens whose logits exist at a time on one device.

    Args:
      tokens: of the device.
      columns: of the vocabulary on the device.
      most: at most so many; None = by platform.
    """
    if most is None:
        few = _CHUNK_HOST if target_platform() == "cpu" else _CHUNK_ACCELERATOR
        most = max(few, _LOGITS_AT_LEAST // (4 * columns))
    assert most > 0 and tokens > 0, (most, tokens)
    even = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(even / 8) * 8, most, tokens)


def _chunk(i: Array, chunk: int, *arrays: Array) -> tuple[Array, list[Array], Array]:
    """Chunk i of arrays [N, ...]: its start, its parts, and which of its tokens are new, [C].

    The last chunk is moved back to end with the last token; padding would copy every array.
    """
    tokens = len(arrays[0])
    start = jnp.minimum(i * chunk, tokens - chunk)
    parts = [jax.lax.dynamic_slice_in_dim(array, start, chunk) for array in arrays]
    return start, parts, start + jnp.arange(chunk, dtype=start.dtype) >= i * chunk


def _write(arrays: Any, parts: Any, start: Array) -> Any:
    """Puts the parts of a chunk, a tree of arrays, where they belong."""
    return jax.tree.map(
        lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, start, 0),
        arrays,
        parts,
    )


def _empty_statistics(tokens: int) -> RowStatistics:
    return RowStatistics(*(jnp.zeros(tokens, jnp.float32) for _ in RowStatistics._fields))


def _add_product(dw_DV: Array, x_CD: Array, dz_CV: Array) -> Array:
    """Returns `dw + x^T dz`."""
    product_DV = jax.lax.dot_general(
        x_CD, dz_CV, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return dw_DV + product_DV


def _add_product_cpu(dw_DV: Array, x_CD: Array, dz_CV: Array) -> Array:
    """The same in place, a block of columns at a time.

    XLA on CPU has no product that adds to its result: whole, it would be a second array like dw.
    As in `ops.matmul`, the barrier keeps the transpose out of the product.
    """
    x_DC = jax.lax.optimization_barrier(x_CD.T)
    vocab_size = dw_DV.shape[1]
    blocks = max(1, round(vocab_size / _COLUMNS_HOST))
    columns = vocab_size // blocks

    def add(start: Array | int, width: int, dw_DV: Array) -> Array:
        part_CV = jax.lax.dynamic_slice_in_dim(dz_CV, start, width, axis=1)
        product_DV = jnp.matmul(x_DC, part_CV, preferred_element_type=jnp.float32)
        old_DV = jax.lax.dynamic_slice_in_dim(dw_DV, start, width, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(dw_DV, old_DV + product_DV, start, 1)

    dw_DV = jax.lax.fori_loop(0, blocks, lambda j, dw_DV: add(j * columns, columns, dw_DV), dw_DV)
    rest = vocab_size - blocks * columns
    return add(blocks * columns, rest, dw_DV) if rest else dw_DV


# ------------------------------------------------------------------------------ logits of a chunk


def _weight(how: Head, head: Array, dtype: Any) -> tuple[Array, Array | None]:
    """The head in the dtype of the product, and what multiplies its columns for `norm_head`.

    The logits are multiplied instead of the head: no second array [D, V].
    """
    if not how.norm_head:
        return head.astype(dtype), None
    norm_V = jnp.sqrt(jnp.sum(jnp.square(head.astype(jnp.float32)), axis=0))
    return head.astype(dtype), 1.0 / jnp.maximum(norm_V, _LEAST_NORM)


def _through_norm(head: Array, scale_V: Array, dw_DV: Array) -> Array:
    """The gradient by `head`, from that by the normalised head times `scale_V`.

    With h = a column, s = 1 / |h|: d(s h) takes g to s g - h s^3 (h . g).
    """
    h_DV = head.astype(jnp.float32)
    along_V = jnp.sum(h_DV * dw_DV, axis=0) * jnp.square(scale_V)
    # A column shorter than the least norm is divided by a constant.
    along_V = jnp.where(scale_V < 1.0 / _LEAST_NORM, along_V, 0.0)
    return dw_DV - h_DV * along_V[None]


def _logits(how: Head, x_CD: Array, w_DV: Array, scale_V: Array | None) -> Array:
    """The float32 logits of a chunk, capped."""
    logits_CV = jnp.matmul(x_CD, w_DV, preferred_element_type=jnp.float32)
    if scale_V is not None:
        logits_CV = logits_CV * scale_V[None]
    if how.soft_cap is None:
        return logits_CV
    return how.soft_cap * jnp.tanh(logits_CV / how.soft_cap)


def _row_statistics(
    how: Head, terms: LossTerms | None, logits_CV: Array, targets_C: Array
) -> RowStatistics:
    """The statistics of a chunk over the whole vocabulary, the same on all its devices."""
    axes = () if how.mesh is None else RULES["vocab"]
    columns = logits_CV.shape[1]
    max_logit = jax.lax.pmax(jnp.max(logits_CV, axis=1), axes)
    exp_sum = jnp.sum(jnp.exp(logits_CV - max_logit[:, None]), axis=1)
    local_C = _local_targets(how, columns, targets_C)
    target_logit = jnp.take_along_axis(
        logits_CV, jnp.clip(local_C, 0, columns - 1)[:, None], axis=1
    )[:, 0]
    target_logit = jnp.where((local_C >= 0) & (local_C < columns), target_logit, 0.0)
    logit_sum = jnp.zeros_like(max_logit)
    if terms is not None and terms.label_smoothing:
        logit_sum = jnp.sum(logits_CV, axis=1)
    exp_sum, target_logit, logit_sum = jax.lax.psum((exp_sum, target_logit, logit_sum), axes)
    known_C = (targets_C >= 0) & (targets_C < vocab_size_of(how, logits_CV))
    return RowStatistics(
        log_z=max_logit + jnp.log(exp_sum),
        max_logit=max_logit,
        target_logit=jnp.where(known_C, target_logit, jnp.nan),
        logit_sum=logit_sum,
    )


def _logit_gradient(
    how: Head,
    terms: LossTerms | None,
    logits_CV: Array,
    targets_C: Array,
    statistics: RowStatistics,
    cotangents: RowStatistics,
) -> Array:
    """The gradient by the logits before the cap, one elementwise pass; float32 [C, V]."""
    g_log_z, g_max, g_target, g_sum = (g[:, None] for g in cotangents)
    gradient_CV = g_log_z * jnp.exp(logits_CV - statistics.log_z[:, None])
    local_C = _local_targets(how, logits_CV.shape[1], targets_C)
    vocab_index = jax.lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1)
    gradient_CV += jnp.where(vocab_index == local_C[:, None], g_target, 0.0)
    if terms is not None and terms.label_smoothing:
        gradient_CV += g_sum
    if terms is not None and terms.max_z_loss:
        # Equal maxima each get the whole gradient, as in `losses`.
        gradient_CV += jnp.where(logits_CV == statistics.max_logit[:, None], g_max, 0.0)
    if how.soft_cap is not None:  # the slope of the cap, from what it has made
        gradient_CV *= 1.0 - jnp.square(logits_CV / how.soft_cap)
    return gradient_CV


# ----------------------------------------------------------------------------------------- devices


def token_axes() -> tuple[str, ...]:
    """The mesh axes over which tokens are split."""
    return RULES["batch"] + RULES["length"]


def vocab_size_of(how: Head, columns: Array) -> int:
    """V of an array [..., V / devices]."""
    parts = 1 if how.mesh is None else math.prod(how.mesh.shape[a] for a in RULES["vocab"])
    return columns.shape[-1] * parts


def _local_targets(how: Head, columns: int, targets_C: Array) -> Array:
    """The targets as indices into this device's columns; outside them for other devices'."""
    if how.mesh is None:
        return targets_C
    return targets_C - jax.lax.axis_index(RULES["vocab"]).astype(targets_C.dtype) * columns


def placed(
    local: Callable[..., Any], how: Head, inputs: tuple[str, ...], outputs: Any
) -> Callable[..., Any]:
    """`local` on every device's part of the arrays, which are described by `tokens D`, `D V`, ``.

    Args:
      local: the function of one device's arrays.
      how: see `Head`; without a mesh, `local` is returned.
      inputs: a description per argument.
      outputs: a tree of descriptions; `` stands for what is the same on all devices.
    """
    if how.mesh is None:
        return local

    def call(*arrays: Array) -> Any:
        tokens = [RULES["batch"], RULES["length"]][: arrays[0].ndim - 1]
        specs = {
            "": PartitionSpec(),
            "tokens": PartitionSpec(*tokens),
            "tokens D": PartitionSpec(*tokens),
            "D V": PartitionSpec(None, RULES["vocab"]),
        }
        return jax.shard_map(
            local,
            mesh=how.mesh,
            in_specs=tuple(specs[name] for name in inputs),
            out_specs=jax.tree.map(specs.get, outputs),
            check_vma=False,  # sums are complete by the explicit psums above
        )(*arrays)

    return call
