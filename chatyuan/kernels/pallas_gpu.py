"""Flash attention for NVIDIA GPUs in Pallas, lowered by Triton; T5's bias and its exact gradient.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): an online softmax over blocks of keys, one program
per block of queries; the backward pass recomputes the scores from query, key and the logarithm of
each row's sum, once by rows (d_query) and once by columns (d_key, d_value). What differs:

1. Masks are run-time intervals of keys per query; blocks that no interval meets are not visited.
2. The bias is a stack of tiles (see `tiles`). Blocks beyond T5's `max_distance` add one number.
3. The gradient of the tiles needs no atomics, so two runs agree in every bit. Far blocks only need
   their sum, which the d_query pass has at hand; for the near diagonals a kernel of its own walks
   along each of them, over all rows of the batch, and keeps one [bq, bk] sum.

Scores are kept in units of log 2, because the hardware's exponential has base 2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from chatyuan.errors import UserError
from chatyuan.kernels.block_sizes import BlockSizes, block_sizes_of
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.pallas_gpu_kernels import (
    LOG2E,
    Inputs,
    Pass,
    Residuals,
    forward_kernel,
    key_kernel,
    query_kernel,
    tile_kernel,
)
from chatyuan.kernels.products import pad
from chatyuan.kernels.relative_bias import Bias
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
        bias: None, or one by distance; `attention` refuses a `DenseBias`, which has no tiles.
        scale: factor on the scores.
        block_sizes: powers of two from 16 on; None: those of `block_sizes.BLOCK_SIZES`.
        interpret: run the kernels as ordinary operations, on any device.

    Raises:
        UserError: a block is not a power of two.
    """
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
        return Pass(
            Tiling(q_len, kv_len, *blocks, constant),
            group=heads // kv_heads,
            scale=scale,
            warps=sizes.warps,
            stages=sizes.stages,
            interpret=interpret,
        )

    start, end = (AttentionMask() if mask is None else mask).intervals(batch, q_len, kv_len)
    width = max(_LEAST, pl.next_power_of_2(head_dim))
    operands = _Operands(
        *(pad(x, 3, width) for x in (query_BTNH, key_BSKH, value_BSKH)),
        bias=None if bias is None else bias.by_distance(q_len, kv_len),
        start=start,
        end=end,
    )
    forward, backward = block_sizes, block_sizes.backward or block_sizes
    if bias is not None:
        forward = block_sizes.biased or block_sizes
    return _attention(a_pass(forward), a_pass(backward), operands)[..., :head_dim]


class _Operands(NamedTuple):
    """Arrays of a call: [B, T, N, H], twice [B, S, K, H], [N, T + S - 1] or None, twice [B, T]."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    start: Array
    end: Array


def _inputs(this: Pass, operands: _Operands) -> Inputs:
    """Returns the operands in whole blocks, with the bounds of query blocks."""
    tiling, (query, key, value, bias, start, end) = this.tiling, operands
    return Inputs(
        query=pad(query, 1, tiling.padded_q_len),
        key=pad(key, 1, tiling.padded_kv_len),
        value=pad(value, 1, tiling.padded_kv_len),
        start=pad(start, 1, tiling.padded_q_len),
        end=pad(end, 1, tiling.padded_q_len),
        bounds=tiling.query_bounds(start, end),
        tiles=None if bias is None else tiling.expand(bias) * LOG2E,
    )


def _run(
    this: Pass,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[tuple[Any, Any]],
    outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
) -> Sequence[Array]:
    """Returns the outputs of `kernel(this, *input refs, *output refs)`.

    Args:
        this: the pass.
        kernel: the body.
        grid: programs.
        inputs: each a pytree of arrays and the same tree of specifications.
        outputs: each a shape, a dtype and a specification.
    """
    return pl.pallas_call(
        functools.partial(kernel, this),
        grid=grid,
        in_specs=[specs for _, specs in inputs],
        out_specs=[spec for _, _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        compiler_params=pltriton.CompilerParams(num_warps=this.warps, num_stages=this.stages),
        interpret=this.interpret,
        name=f"attention_{kernel.__name__}",
    )(*(arrays for arrays, _ in inputs))


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
def _attention(forward: Pass, backward: Pass, operands: _Operands) -> Array:
    return _forward(forward, backward, operands)[0]


# ----------------------------------------------------------------------------------------- forward


def _forward(this: Pass, _: Pass, operands: _Operands) -> tuple[Array, tuple]:
    tiling, inputs = this.tiling, _inputs(this, operands)
    batch, _, heads, _ = operands.query.shape
    specs, statistic = _row_specs(this, inputs)
    out, logsum = _run(
        this,
        forward_kernel,
        (tiling.q_blocks, heads, batch),
        [(inputs, specs)],
        [
            (inputs.query.shape, operands.value.dtype, specs.query),
            ((batch, heads, tiling.padded_q_len), jnp.float32, statistic),
        ],
    )
    out = out[:, : tiling.q_len]
    return out, (operands, out, logsum[:, :, : tiling.q_len])


# ---------------------------------------------------------------------------------------- backward


def _backward(_: Pass, this: Pass, saved: tuple, d_out: Array) -> tuple[_Operands]:
    operands, out, logsum = saved
    tiling, inputs = this.tiling, _inputs(this, operands)
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
        _Operands(
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
    d_query, *far = _run(
        this,
        query_kernel,
        (q_blocks, heads, batch),
        [(inputs, specs), (residuals, Residuals(specs.query, statistic, statistic))],
        outputs,
    )
    return d_query, far[0] if far else None


def _key_gradients(
    this: Pass, inputs: Inputs, residuals: Residuals, operands: _Operands
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
    return _run(
        this,
        key_kernel,
        (tiling.kv_blocks, heads // group, batch),
        [(inputs, specs), (residuals, Residuals(queries, statistic, statistic))],
        [(x.shape, x.dtype, keys) for x in (inputs.key, inputs.value)],
    )


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
    (partial,) = _run(
        this,
        tile_kernel,
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
    # [diagonals, B, query blocks]: the first key of the block where a diagonal meets the queries.
    diagonal = first + jnp.arange(count, dtype=jnp.int32)[:, None, None]
    queries = jnp.arange(tiling.q_blocks, dtype=jnp.int32)[None, None] * tiling.q_block
    key = diagonal * tiling.step + queries
    block, whole = key // tiling.kv_block, key % tiling.kv_block == 0
    within = (bounds[None, ..., 0] <= block) & (block < bounds[None, ..., 3])
    visited = (within & whole).reshape(count, -1)
    order = jnp.argsort(~visited, axis=1, stable=True)
    return order.astype(jnp.int32), jnp.sum(visited, axis=1, dtype=jnp.int32)
