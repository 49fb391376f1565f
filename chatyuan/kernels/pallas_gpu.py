"""Flash attention for NVIDIA GPUs in Pallas, lowered by Triton; T5's bias and its exact gradient.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): an online softmax over blocks of keys, one program
per block of queries; the backward pass recomputes the scores from query, key and the logarithm of
each row's sum, once by rows (d_query) and once by columns (d_key, d_value). What differs:

1. Masks are run-time intervals of keys per query; blocks that no interval meets are not visited.
2. The bias is a stack of tiles (see `tiles`). Blocks beyond T5's `max_distance` add one number.
3. The gradient of the tiles needs no atomics, so two runs agree in every bit. Far blocks only need
   their sum, which the d_query pass has at hand; for the near diagonals a kernel of its own walks
   along each of them, over all rows of the batch, and keeps one [bq, bk] sum.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from chatyuan.errors import UserError
from chatyuan.kernels.block_sizes import BlockSizes, block_sizes_of
from chatyuan.kernels.gpu_blocks import (
    LEFT,
    LOG2E,
    NEAR,
    RIGHT,
    Inputs,
    Operands,
    Pass,
    Ref,
    Residuals,
    dot,
    visible_keys,
)
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.products import pad
from chatyuan.kernels.reference import LEAST_MAXIMUM
from chatyuan.kernels.relative_bias import Bias, DenseBias
from chatyuan.kernels.tiles import Tiling

Array = jax.Array

# Triton multiplies matrices of at least 16 x 16 x 16.
_LEAST = 16
# Programs that sum the bias' gradient, at most: several for each processor of a large GPU, and
# 8 MiB of partial sums at 64 x 64.
_SUMMING = 512


def pallas_gpu_attention(
    query_BTNH: Array,
    key_BSKH: Array,
    value_BSKH: Array,
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    scale: float,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the visible keys, [B, T, N, H].

    Sums, softmax and gradients are accumulated in float32; the operands of products keep their
    dtype, which is the same for all three. No value has T * S elements.

    Args:
        query_BTNH: [B, T, N, H].
        key_BSKH: [B, S, K, H].
        value_BSKH: [B, S, K, H].
        mask: None: every key.
        bias: None, or one by distance; a `DenseBias` has no tiles.
        scale: factor on the scores.
        block_sizes: powers of two from 16 on; None: those of `block_sizes.BLOCK_SIZES`.
        interpret: run the kernels as ordinary operations, on any device.

    Raises:
        UserError: the bias is an array, or a block is not a power of two.
    """
    if isinstance(bias, DenseBias):
        raise UserError(
            f"pallas_gpu adds a bias by distance; a DenseBias of shape {bias.values.shape} is an "
            "array: give the RelativePositionBias or AlibiBias itself, or use implementation='xla'."
        )
    batch, q_len, heads, head_dim = query_BTNH.shape
    kv_len, kv_heads = key_BSKH.shape[1:3]
    if block_sizes is None:
        block_sizes = block_sizes_of("pallas_gpu", query_BTNH)

    def a_pass(sizes: BlockSizes) -> Pass:
        for size in (sizes.query, sizes.key):
            if size < _LEAST or size != pl.next_power_of_2(size):
                raise UserError(
                    f"Blocks of pallas_gpu are {sizes.query} x {sizes.key}: each side must be a "
                    f"power of two from {_LEAST} on, as Triton multiplies; use 64, for example."
                )
        blocks = (
            min(largest, max(_LEAST, pl.next_power_of_2(length)))
            for largest, length in ((sizes.query, q_len), (sizes.key, kv_len))
        )
        constant = None if bias is None else bias.constant_beyond()
        params = pltriton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages)
        tiling = Tiling(q_len, kv_len, *blocks, constant)
        return Pass(tiling, heads // kv_heads, scale, params, interpret)

    start, end = (AttentionMask() if mask is None else mask).intervals(batch, q_len, kv_len)
    width = max(_LEAST, pl.next_power_of_2(head_dim))
    operands = Operands(
        *(pad(x, 3, width) for x in (query_BTNH, key_BSKH, value_BSKH)),
        bias=None if bias is None else bias.by_distance(q_len, kv_len),
        start=start,
        end=end,
    )
    out = _attention(a_pass(block_sizes), a_pass(block_sizes.backward or block_sizes), operands)
    return out[..., :head_dim]


def _row_specs(this: Pass, inputs: Inputs) -> tuple[Inputs, pl.BlockSpec]:
    """Returns specifications for programs (query block, head, row), and that of [B, N, T]."""
    tiling, group, width = this.tiling, this.group, inputs.query.shape[3]
    keys = pl.BlockSpec(
        (None, tiling.padded_kv_len, None, width),
        lambda i, n, b: (b, 0, jax.lax.div(n, group), 0),
    )
    interval = pl.BlockSpec((None, tiling.q_block), lambda i, n, b: (b, i))
    tiles = pl.BlockSpec(
        (None, tiling.tiles, tiling.q_block, tiling.kv_block), lambda i, n, b: (n, 0, 0, 0)
    )
    specs = Inputs(
        query=pl.BlockSpec((None, tiling.q_block, None, width), lambda i, n, b: (b, i, n, 0)),
        key=keys,
        value=keys,
        start=interval,
        end=interval,
        bounds=pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0)),
        tiles=None if inputs.tiles is None else tiles,
    )
    return specs, pl.BlockSpec((None, None, tiling.q_block), lambda i, n, b: (b, n, i))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(forward: Pass, backward: Pass, operands: Operands) -> Array:
    return _forward(forward, backward, operands)[0]


# ----------------------------------------------------------------------------------------- forward


def _forward(this: Pass, _: Pass, operands: Operands) -> tuple[Array, tuple]:
    tiling, inputs = this.tiling, this.inputs(operands)
    batch, _, heads, _ = operands.query.shape
    specs, statistic = _row_specs(this, inputs)
    out, logsum = this.run(
        _forward_kernel,
        (tiling.q_blocks, heads, batch),
        [(inputs, specs)],
        [
            (inputs.query.shape, operands.value.dtype, specs.query),
            ((batch, heads, tiling.padded_q_len), jnp.float32, statistic),
        ],
    )
    out = out[:, : tiling.q_len]
    return out, (operands, out, logsum[:, :, : tiling.q_len])


def _forward_kernel(this: Pass, refs: Inputs, out_ref: Ref, logsum_ref: Ref) -> None:
    """A block of queries of one head; grid (query blocks, N, B)."""
    i, kv_block = pl.program_id(0), this.tiling.kv_block
    query, start, end = refs.query[...], refs.start[...], refs.end[...]
    bias = this.bias(refs.tiles)

    def visit(region: int, j: Array, carry: tuple) -> tuple:
        out, largest, total = carry
        keys = pl.ds(j * kv_block, kv_block)
        visible = visible_keys(start, end, j * kv_block, kv_block, axis=1)
        scores = this.scores(query, refs.key[keys, :], bias(region, i, j), visible)
        after = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - after[:, None])
        shrink = jnp.exp2(largest - after)
        value = refs.value[keys, :]
        out = out * shrink[:, None] + dot(weights.astype(value.dtype), value, 1, 0)
        return out, after, total * shrink + jnp.sum(weights, axis=1)

    zero = jnp.zeros(start.shape, jnp.float32)
    carry = (jnp.zeros(query.shape, jnp.float32), zero + LEAST_MAXIMUM, zero)
    carry = this.over_blocks(refs.bounds, (LEFT, NEAR, RIGHT), visit, carry)
    out, largest, total = carry
    # Nothing is visible where the sum is 0: out is 0 there, and exp(score - logsum) will be.
    seen = total > 0.0
    total = jnp.where(seen, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    logsum_ref[...] = jnp.where(seen, largest + jnp.log(total) * LOG2E, 0.0)


# ---------------------------------------------------------------------------------------- backward


def _backward(_: Pass, this: Pass, saved: tuple, d_out: Array) -> tuple[Operands]:
    operands, out, logsum = saved
    tiling, inputs = this.tiling, this.inputs(operands)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    residuals = Residuals(
        d_out=pad(d_out, 1, tiling.padded_q_len),
        logsum=pad(logsum, 2, tiling.padded_q_len),
        delta=pad(delta, 2, tiling.padded_q_len),
    )
    d_query, far = _query_gradient(this, inputs, residuals)
    d_key, d_value = _key_gradients(this, inputs, residuals, operands)
    d_bias = None
    if operands.bias is not None:
        d_tiles = _tile_gradients(this, inputs, residuals, far)
        (d_bias,) = jax.linear_transpose(tiling.expand, operands.bias)(d_tiles)
    return (
        Operands(
            query=d_query[:, : tiling.q_len],
            key=d_key[:, : tiling.kv_len],
            value=d_value[:, : tiling.kv_len],
            bias=d_bias,
            start=None,
            end=None,
        ),
    )


_attention.defvjp(_forward, _backward)


def _query_gradient(this: Pass, inputs: Inputs, residuals: Residuals) -> tuple[Array, Array | None]:
    """Returns d_query and, with a bias, the sums [B, N, query blocks, 2] over far blocks."""
    batch, _, heads, _ = inputs.query.shape
    (specs, statistic), q_blocks = _row_specs(this, inputs), this.tiling.q_blocks
    outputs = [(inputs.query.shape, inputs.query.dtype, specs.query)]
    if inputs.tiles is not None:
        spec = pl.BlockSpec((None, None, None, 2), lambda i, n, b: (b, n, i, 0))
        outputs.append(((batch, heads, q_blocks, 2), jnp.float32, spec))
    d_query, *far = this.run(
        _query_kernel,
        (q_blocks, heads, batch),
        [(inputs, specs), (residuals, Residuals(specs.query, statistic, statistic))],
        outputs,
    )
    return d_query, far[0] if far else None


def _query_kernel(
    this: Pass, refs: Inputs, residuals: Residuals, d_query_ref: Ref, far_ref: Ref | None = None
) -> None:
    """A block of queries of one head; grid (query blocks, N, B)."""
    i, kv_block = pl.program_id(0), this.tiling.kv_block
    query, start, end = refs.query[...], refs.start[...], refs.end[...]
    d_out = residuals.d_out[...]
    statistics = residuals.logsum[...][:, None], residuals.delta[...][:, None]
    bias = this.bias(refs.tiles)

    def visit(region: int, j: Array, carry: tuple) -> tuple:
        d_query, *far = carry
        keys = pl.ds(j * kv_block, kv_block)
        visible = visible_keys(start, end, j * kv_block, kv_block, axis=1)
        key, value = refs.key[keys, :], refs.value[keys, :]
        _, d_scores = this.d_scores(
            (query, key), (d_out, value), statistics, bias(region, i, j), visible
        )
        if region != NEAR:
            far[region // 2] = far[region // 2] + jnp.sum(d_scores, axis=1)
        return d_query + dot(d_scores.astype(key.dtype), key, 1, 0), *far

    zero = jnp.zeros(start.shape, jnp.float32)
    carry = (jnp.zeros(query.shape, jnp.float32), zero, zero)
    d_query, left, right = this.over_blocks(refs.bounds, (LEFT, NEAR, RIGHT), visit, carry)
    d_query_ref[...] = (d_query * this.scale).astype(d_query_ref.dtype)
    if far_ref is not None:
        far_ref[0], far_ref[1] = jnp.sum(left), jnp.sum(right)


def _key_gradients(
    this: Pass, inputs: Inputs, residuals: Residuals, operands: Operands
) -> Sequence[Array]:
    """Returns d_key and d_value; the query heads of a key head are summed in the kernel."""
    tiling, group = this.tiling, this.group
    batch, _, heads, width = inputs.query.shape
    # Keys are the rows here, so that no product has to transpose a square.
    inputs = inputs._replace(
        bounds=tiling.key_bounds(operands.start, operands.end),
        tiles=None if inputs.tiles is None else inputs.tiles.swapaxes(2, 3),
    )
    queries = pl.BlockSpec((None, tiling.padded_q_len, group, width), lambda j, k, b: (b, 0, k, 0))
    keys = pl.BlockSpec((None, tiling.kv_block, None, width), lambda j, k, b: (b, j, k, 0))
    interval = pl.BlockSpec((None, tiling.padded_q_len), lambda j, k, b: (b, 0))
    statistic = pl.BlockSpec((None, group, tiling.padded_q_len), lambda j, k, b: (b, k, 0))
    tiles = pl.BlockSpec(
        (group, tiling.tiles, tiling.kv_block, tiling.q_block), lambda j, k, b: (k, 0, 0, 0)
    )
    specs = Inputs(
        query=queries,
        key=keys,
        value=keys,
        start=interval,
        end=interval,
        bounds=pl.BlockSpec((None, None, 4), lambda j, k, b: (b, j, 0)),
        tiles=None if inputs.tiles is None else tiles,
    )
    return this.run(
        _key_kernel,
        (tiling.kv_blocks, heads // group, batch),
        [(inputs, specs), (residuals, Residuals(queries, statistic, statistic))],
        [(x.shape, x.dtype, keys) for x in (inputs.key, inputs.value)],
    )


def _key_kernel(
    this: Pass, refs: Inputs, residuals: Residuals, d_key_ref: Ref, d_value_ref: Ref
) -> None:
    """A block of keys of one key head; grid (key blocks, K, B)."""
    j, q_block, kv_block = pl.program_id(0), this.tiling.q_block, this.tiling.kv_block
    key, value = refs.key[...], refs.value[...]

    def of_head(n: Array | int, carry: tuple) -> tuple:
        bias = this.bias(refs.tiles, n)

        def visit(region: int, i: Array, carry: tuple) -> tuple:
            d_key, d_value = carry
            queries = pl.ds(i * q_block, q_block)
            start, end = refs.start[queries], refs.end[queries]
            visible = visible_keys(start, end, j * kv_block, kv_block, axis=0)
            query, d_out = refs.query[queries, n, :], residuals.d_out[queries, n, :]
            statistics = residuals.logsum[n, queries][None], residuals.delta[n, queries][None]
            weights, d_scores = this.d_scores(
                (key, query), (value, d_out), statistics, bias(region, i, j), visible
            )
            d_value = d_value + dot(weights.astype(d_out.dtype), d_out, 1, 0)
            return d_key + dot(d_scores.astype(query.dtype), query, 1, 0), d_value

        return this.over_blocks(refs.bounds, (RIGHT, NEAR, LEFT), visit, carry)

    carry = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    if this.group == 1:
        d_key, d_value = of_head(0, carry)
    else:
        d_key, d_value = jax.lax.fori_loop(0, this.group, of_head, carry)
    d_key_ref[...] = (d_key * this.scale).astype(d_key_ref.dtype)
    d_value_ref[...] = d_value.astype(d_value_ref.dtype)


def _tile_gradients(this: Pass, inputs: Inputs, residuals: Residuals, far: Array) -> Array:
    """Returns the gradient of the tiles, [N, tiles, bq, bk].

    A constant tile's is put into one of its elements: all of them are the same bucket.
    """
    tiling = this.tiling
    corner = ((0, 0), (0, tiling.q_block - 1), (0, tiling.kv_block - 1))
    left, right = (
        jnp.pad(total[:, None, None], corner)[:, None] for total in jnp.sum(far, axis=(0, 2)).T
    )
    parts = [
        *([left] if tiling.left_is_constant else []),
        _near_tile_gradients(this, inputs, residuals),
        *([right] if tiling.right_is_constant else []),
    ]
    return jnp.concatenate(parts, axis=1)


def _near_tile_gradients(this: Pass, inputs: Inputs, residuals: Residuals) -> Array:
    """Returns the gradient of the tiles between constant ones, [N, near tiles, bq, bk]."""
    tiling, group = this.tiling, this.group
    batch, q_len, heads, width = inputs.query.shape
    first = int(tiling.left_is_constant)
    near = tiling.tiles - first - int(tiling.right_is_constant)
    square = (tiling.q_block, tiling.kv_block)
    if not near:
        return jnp.zeros((heads, 0, *square), jnp.float32)
    pairs, counts = _diagonals(tiling, inputs.bounds, tiling.first + first, near)
    splits = max(1, min(_SUMMING // (heads * near), pairs.shape[1]))
    limits = counts[:, None] * jnp.arange(splits + 1, dtype=jnp.int32)[None] // splits
    queries = pl.BlockSpec((batch, q_len, None, width), lambda x, t, n: (0, 0, n, 0))
    keys = pl.BlockSpec(
        (batch, tiling.padded_kv_len, None, width), lambda x, t, n: (0, 0, jax.lax.div(n, group), 0)
    )
    interval = pl.BlockSpec((batch, q_len), lambda x, t, n: (0, 0))
    statistic = pl.BlockSpec((batch, None, q_len), lambda x, t, n: (0, n, 0))
    specs = Inputs(
        query=queries,
        key=keys,
        value=keys,
        start=interval,
        end=interval,
        bounds=pl.BlockSpec((None, splits + 1), lambda x, t, n: (t, 0)),
        tiles=pl.BlockSpec((None, None, *square), lambda x, t, n: (n, first + t, 0, 0)),
    )
    (partial,) = this.run(
        _tile_kernel,
        (splits, near, heads),
        [
            (inputs._replace(bounds=limits), specs),
            (residuals, Residuals(queries, statistic, statistic)),
            (pairs, pl.BlockSpec((None, pairs.shape[1]), lambda x, t, n: (t, 0))),
        ],
        [
            (
                (heads, near, splits, *square),
                jnp.float32,
                pl.BlockSpec((None, None, None, *square), lambda x, t, n: (n, t, x, 0, 0)),
            )
        ],
    )
    return jnp.sum(partial, axis=2)


def _diagonals(tiling: Tiling, bounds: Array, first: int, count: int) -> tuple[Array, Array]:
    """Returns int32 [diagonals, B * query blocks], what to visit on each, and how many of them.

    A visit is `row * query blocks + query block`; a diagonal's are moved to the front.
    """
    blocks = tiling.q_blocks
    diagonal = first + jnp.arange(count, dtype=jnp.int32)[:, None]
    key = diagonal * tiling.step + jnp.arange(blocks, dtype=jnp.int32)[None] * tiling.q_block
    block, whole = key[:, None] // tiling.kv_block, key % tiling.kv_block == 0
    within = (bounds[None, ..., 0] <= block) & (block < bounds[None, ..., 3])
    visited = (within & whole[:, None]).reshape(count, -1)
    order = jnp.argsort(~visited, axis=1, stable=True)
    return order.astype(jnp.int32), jnp.sum(visited, axis=1, dtype=jnp.int32)


def _tile_kernel(
    this: Pass, refs: Inputs, residuals: Residuals, pairs: Ref, d_tile_ref: Ref
) -> None:
    """A share of the blocks on one diagonal, of one head; grid (shares, near tiles, N)."""
    tiling, share = this.tiling, pl.program_id(0)
    diagonal = tiling.first + int(tiling.left_is_constant) + pl.program_id(1)
    tile = refs.tiles[...]

    def visit(index: Array, total: Array) -> Array:
        pair = pairs[index]
        row = jax.lax.div(pair, tiling.q_blocks)
        first_query = (pair - row * tiling.q_blocks) * tiling.q_block
        first_key = first_query + diagonal * tiling.step
        queries, keys = pl.ds(first_query, tiling.q_block), pl.ds(first_key, tiling.kv_block)
        start, end = refs.start[row, queries], refs.end[row, queries]
        visible = visible_keys(start, end, first_key, tiling.kv_block, axis=1)
        _, d_scores = this.d_scores(
            (refs.query[row, queries, :], refs.key[row, keys, :]),
            (residuals.d_out[row, queries, :], refs.value[row, keys, :]),
            (residuals.logsum[row, queries][:, None], residuals.delta[row, queries][:, None]),
            tile,
            visible,
        )
        return total + d_scores

    zero = jnp.zeros(d_tile_ref.shape, jnp.float32)
    d_tile_ref[...] = jax.lax.fori_loop(refs.bounds[share], refs.bounds[share + 1], visit, zero)
