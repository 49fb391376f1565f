"""The loss of a vocabulary head, and the log-probabilities of given tokens, without the logits.

The logits [tokens, V] are the largest array of a training step: 1.6 GB of float32 for 8192 tokens
and 50,000 pieces. Here they exist for one chunk of tokens at a time. The chunks are of tokens and
never of the vocabulary, so that each needs one pass of softmax and the three products stay large.

The gradients of the loss are made in the forward pass, while the logits of the chunk are at hand:
all of them are proportional to the one number that the loss is multiplied by later. That is three
products per chunk, as many as autodiff needs with the logits in memory, and none is repeated. A
log-probability per token has a cotangent per token that only the backward pass knows, so there the
logits are computed again.

Shapes: `...` any batch dimensions (usually B, T), N tokens, C tokens of a chunk, D model, V
vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from chatyuan.ops.losses import LossSums, LossTerms, RowStatistics, token_losses
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


class _Head(NamedTuple):
    """What turns hidden states into logits and where it happens; static."""

    soft_cap: float | None
    norm_head: bool
    chunk_tokens: int | None
    mesh: Mesh | AbstractMesh | None


def linear_cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    norm_head: bool = False,
    chunk_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> LossSums:
    """Returns `losses.cross_entropy(hidden @ head, ...)`; no array [tokens, V] ever exists.

    Only `total` carries a gradient, to `hidden`, `head` and `weights`; the other sums are metrics
    under `stop_gradient`. Where `total` is differentiated, its gradients are computed with it and
    wait for the backward pass as arrays like `hidden` and `head`; where it is not, no gradient is
    computed. There are no second derivatives and no forward mode.

    Args:
      hidden: [..., D], float32 or bfloat16. The products read this dtype (`head` and the gradient
        of the logits are rounded to it) and sum in float32.
      head: [D, V], any float dtype. Its gradient is summed in float32 and rounded once.
      targets: [...] int32 in [0, V). A target outside gives a loss of NaN.
      weights: [...] float32, 0 for padding.
      z_loss: as in `losses.cross_entropy`, like the next two.
      max_z_loss: as there.
      label_smoothing: as there.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2, arXiv:2408.00118).
      norm_head: divide each column of `head` by its length (Baichuan 2, arXiv:2309.10305).
      chunk_tokens: tokens whose logits exist at a time, at most; None = 344 on CPU, else 2048, or
        as many as make 64 MiB of logits.
      mesh: of `sharding.make_mesh`, where `hidden` and `head` are split as its `RULES` say: tokens
        over data, fsdp and sequence, the vocabulary over tensor. Each device then works off its
        own tokens and columns; gradients are added up once, after the last chunk. None = one
        device; arrays that are split must come with their mesh.
    """
    how = _Head(soft_cap, norm_head, chunk_tokens, mesh)
    terms = LossTerms(z_loss, max_z_loss, label_smoothing)
    sums = _loss(how, terms, hidden, head, targets, weights)
    metrics = jax.tree.map(jax.lax.stop_gradient, sums)
    return metrics._replace(total=sums.total)


def token_log_probs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    soft_cap: float | None = None,
    norm_head: bool = False,
    chunk_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Array:
    """Returns `log_softmax(hidden @ head)[target]` of every token, float32 [...], in nats.

    Teacher-forced scores for RL and DPO: differentiable in `hidden` and `head` with a cotangent of
    its own for each token. The backward pass computes the logits of each chunk again.

    Args:
      hidden: [..., D]; this and all other arguments as in `linear_cross_entropy`.
      head: [D, V].
      targets: [...] int32 in [0, V). A target outside gives NaN.
      soft_cap: see there.
      norm_head: see there.
      chunk_tokens: see there.
      mesh: see there.
    """
    return _log_probs(_Head(soft_cap, norm_head, chunk_tokens, mesh), hidden, head, targets)


# ------------------------------------------------------------------------------------ derivatives


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    how: _Head, terms: LossTerms, hidden: Array, head: Array, targets: Array, weights: Array
) -> LossSums:
    """The primal: statistics chunk by chunk, and no gradient."""

    def local(hidden: Array, head: Array, targets: Array, weights: Array) -> LossSums:
        statistics = _statistics(how, terms, hidden, head, targets)
        return _sum_up(token_losses(terms, statistics, _vocab_size(how, head)), weights, how)

    return _placed(local, how, ("tokens D", "D V", "tokens", "tokens"), "")(
        hidden, head, targets, weights
    )


def _loss_forward(
    how: _Head, terms: LossTerms, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[LossSums, tuple[Array, Array, Array]]:
    def local(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple:
        vocab_size = _vocab_size(how, head)

        def coefficients(statistics: RowStatistics, weights_C: Array) -> RowStatistics:
            return _cotangents(terms, statistics, weights_C, vocab_size)

        statistics, d_hidden, d_head = _gradients(
            how, terms, hidden, head, targets, weights, coefficients
        )
        losses = token_losses(terms, statistics, vocab_size)
        per_token = losses.total.reshape(targets.shape)
        return _sum_up(losses, weights, how), (d_hidden, d_head, per_token)

    return _placed(
        local, how, ("tokens D", "D V", "tokens", "tokens"), ("", ("tokens D", "D V", "tokens"))
    )(hidden, head, targets, weights)


def _loss_backward(
    how: _Head, terms: LossTerms, residuals: tuple[Array, Array, Array], cotangents: LossSums
) -> tuple[Array, Array, None, Array]:
    """Scales what the forward pass has computed."""
    d_hidden, d_head, d_weights = (_scaled(x, cotangents.total) for x in residuals)
    return d_hidden, d_head, None, d_weights


def _scaled(x: Array, factor: Array) -> Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(how: _Head, hidden: Array, head: Array, targets: Array) -> Array:
    def local(hidden: Array, head: Array, targets: Array) -> Array:
        statistics = _statistics(how, None, hidden, head, targets)
        return (statistics.target_logit - statistics.log_z).reshape(targets.shape)

    return _placed(local, how, ("tokens D", "D V", "tokens"), "tokens")(hidden, head, targets)


def _log_probs_forward(
    how: _Head, hidden: Array, head: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _log_probs(how, hidden, head, targets), (hidden, head, targets)


def _log_probs_backward(
    how: _Head, residuals: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    def coefficients(statistics: RowStatistics, cotangent_C: Array) -> RowStatistics:
        zeros = jnp.zeros_like(cotangent_C)
        return RowStatistics(-cotangent_C, zeros, cotangent_C, zeros)

    def local(hidden: Array, head: Array, targets: Array, cotangent: Array) -> tuple:
        return _gradients(how, None, hidden, head, targets, cotangent, coefficients)[1:]

    inputs = ("tokens D", "D V", "tokens", "tokens")
    d_hidden, d_head = _placed(local, how, inputs, ("tokens D", "D V"))(*residuals, cotangent)
    return d_hidden, d_head, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


# -------------------------------------------------------------------------------------- the terms


def _cotangents(
    terms: LossTerms, statistics: RowStatistics, weights_C: Array, vocab_size: int
) -> RowStatistics:
    """The derivatives of the weighted `total` by the statistics, [C] each."""
    on, off = terms.smoothed(vocab_size)
    return RowStatistics(
        log_z=weights_C * (1.0 + 2.0 * terms.z_loss * statistics.log_z),
        max_logit=weights_C * (2.0 * terms.max_z_loss * statistics.max_logit),
        target_logit=weights_C * -(on - off),
        logit_sum=weights_C * -off,
    )


def _sum_up(losses: LossSums, weights: Array, how: _Head) -> LossSums:
    """The weighted sums over the tokens of all devices."""
    weights_N = weights.reshape(-1)
    sums = jax.tree.map(lambda per_token_N: jnp.sum(per_token_N * weights_N), losses)
    return sums if how.mesh is None else jax.lax.psum(sums, _token_axes())


# ------------------------------------------------------------------------------------- the chunks


def _statistics(
    how: _Head, terms: LossTerms | None, hidden: Array, head: Array, targets: Array
) -> RowStatistics:
    """The statistics of all rows, [N] each."""
    x_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chunk, steps = _chunking(how, len(x_ND), head.shape[1])
    w_DV, scale_V = _weight(how, head, hidden.dtype)

    def of_chunk(x_CD: Array, targets_C: Array) -> RowStatistics:
        return _row_statistics(how, terms, _logits(how, x_CD, w_DV, scale_V), targets_C)

    def step(i: Array, found: RowStatistics) -> RowStatistics:
        start, parts, _ = _chunk(i, chunk, x_ND, targets_N)
        return _write(found, of_chunk(*parts), start)

    if steps == 1:
        return of_chunk(x_ND, targets_N)
    return jax.lax.fori_loop(0, steps, step, _empty_statistics(len(x_ND)))


def _gradients(
    how: _Head,
    terms: LossTerms | None,
    hidden: Array,
    head: Array,
    targets: Array,
    per_token: Array,
    coefficients: Callable[[RowStatistics, Array], RowStatistics],
) -> tuple[RowStatistics, Array, Array]:
    """Returns the statistics [N] and the gradients with respect to `hidden` and `head`.

    Args:
      how: see `_Head`.
      terms: None for log-probabilities.
      hidden: [..., D], all of this device, like the other arrays.
      head: [D, V].
      targets: [...].
      per_token: [...], second argument of `coefficients`.
      coefficients: (statistics, per_token) of a chunk -> cotangents of its statistics, [C] each.
    """
    x_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    per_token_N = per_token.reshape(-1)
    chunk, steps = _chunking(how, len(x_ND), head.shape[1])
    w_DV, scale_V = _weight(how, head, hidden.dtype)

    # Sums over the vocabulary's devices stay float32 until they are complete.
    dx_dtype = hidden.dtype if how.mesh is None else jnp.float32

    def of_chunk(x_CD: Array, targets_C: Array, per_token_C: Array) -> tuple:
        logits_CV = _logits(how, x_CD, w_DV, scale_V)
        statistics = _row_statistics(how, terms, logits_CV, targets_C)
        dz_CV = _logit_gradient(
            how, terms, logits_CV, targets_C, statistics, coefficients(statistics, per_token_C)
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
        start, (x_CD, *others), new_C = _chunk(i, chunk, x_ND, targets_N, per_token_N)
        statistics, dx_CD, dz_CV = of_chunk(x_CD, *others)
        # A token that an earlier chunk has counted gets the same dx again and adds no dw.
        once_CD = jnp.where(new_C[:, None], x_CD, jnp.zeros_like(x_CD))
        dw_DV = jax.lax.platform_dependent(
            dw_DV, once_CD, dz_CV, cpu=_add_product_cpu, default=_add_product
        )
        return _write(found, statistics, start), _write(dx_ND, dx_CD, start), dw_DV

    if steps == 1:
        statistics, dx_ND, dz_NV = of_chunk(x_ND, targets_N, per_token_N)
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
        dw_DV = jax.lax.psum(dw_DV, _token_axes())
    if scale_V is not None:
        dw_DV = _through_norm(head, scale_V, dw_DV)
    d_hidden = dx_ND.reshape(hidden.shape).astype(hidden.dtype)
    return statistics, d_hidden, dw_DV.astype(head.dtype)


def _chunking(how: _Head, tokens: int, columns: int) -> tuple[int, int]:
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


def _weight(how: _Head, head: Array, dtype: Any) -> tuple[Array, Array | None]:
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


def _logits(how: _Head, x_CD: Array, w_DV: Array, scale_V: Array | None) -> Array:
    """The float32 logits of a chunk, capped."""
    logits_CV = jnp.matmul(x_CD, w_DV, preferred_element_type=jnp.float32)
    if scale_V is not None:
        logits_CV = logits_CV * scale_V[None]
    if how.soft_cap is None:
        return logits_CV
    return how.soft_cap * jnp.tanh(logits_CV / how.soft_cap)


def _row_statistics(
    how: _Head, terms: LossTerms | None, logits_CV: Array, targets_C: Array
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
    known_C = (targets_C >= 0) & (targets_C < _vocab_size(how, logits_CV))
    return RowStatistics(
        log_z=max_logit + jnp.log(exp_sum),
        max_logit=max_logit,
        target_logit=jnp.where(known_C, target_logit, jnp.nan),
        logit_sum=logit_sum,
    )


def _logit_gradient(
    how: _Head,
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


def _token_axes() -> tuple[str, ...]:
    return RULES["batch"] + RULES["length"]


def _vocab_size(how: _Head, columns: Array) -> int:
    """V of an array [..., V / devices]."""
    parts = 1 if how.mesh is None else math.prod(how.mesh.shape[a] for a in RULES["vocab"])
    return columns.shape[-1] * parts


def _local_targets(how: _Head, columns: int, targets_C: Array) -> Array:
    """The targets as indices into this device's columns; outside them for other devices'."""
    if how.mesh is None:
        return targets_C
    return targets_C - jax.lax.axis_index(RULES["vocab"]).astype(targets_C.dtype) * columns


def _placed(
    local: Callable[..., Any], how: _Head, inputs: tuple[str, ...], outputs: Any
) -> Callable[..., Any]:
    """`local` on every device's part of the arrays, which are described by `tokens D`, `D V`, ``.

    Args:
      local: the function of one device's arrays.
      how: see `_Head`; without a mesh, `local` is returned.
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
