"""Flash attention on TPU: Mosaic kernels for the output, for the query side and for the key side.

An online softmax over blocks of keys (FlashAttention-2: Dao 2023, arXiv:2307.08691); the backward
pass is written by hand and recomputes the scores of a block from the logarithm of each row's sum.
Particular here:

1. Operands are [B, N, H, T] and scores [bk, bq]: lengths lie on the 128 lanes, so that nothing is
   padded at head_dim 64, and what belongs to a query is a row that broadcasts for free.
2. T5's bias is a stack of Toeplitz tiles (`tiles.py`, turned to [key, query]) that stays in VMEM
   for a whole head, and so does its gradient: heads are the outermost axis of the grid, and every
   block adds its scores' gradient to the tiles that it used, in float32 and in a fixed order. Tiles
   are smaller than blocks, so the stack does not grow with the blocks.
3. Masks are run-time intervals. Bounds by block, prefetched as scalars, say which blocks are
   visited; the grid is as long as the longest of these ranges.
4. Exponents have base 2, as in the hardware: log2(e) is folded into the scale and the bias.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chatyuan.errors import UserError
from chatyuan.kernels.blocked import BlockSizes
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.reference import LEAST_MAXIMUM, MASKED_SCORE
from chatyuan.kernels.relative_bias import AlibiBias, Bias, DenseBias
from chatyuan.kernels.tiles import Tiling

Array = jax.Array
Ref = jax.Array  # a reference inside a kernel: read and written by indexing

_LOG2E = math.log2(math.e)
_LANES = 128
import os
_CHUNK = int(os.environ.get("CHUNK", "256"))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static side of a call.

    Attributes:
        batch: B.
        heads: N.
        kv_heads: K.
        head_dim: H.
        blocks: the [T, S] square in blocks of the grid.
        tiles: the same square in tiles of the bias; None: there is no bias by tiles.
        scale: factor on the scores.
        interpret: run without a TPU.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: Tiling
    tiles: Tiling | None
    scale: float
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    def chunks(self) -> Iterator[slice]:
        """Yields parts of a key block: while one is multiplied, the last one's exponentials run."""
        size = math.gcd(_CHUNK, self.blocks.kv_block)
        for first in range(0, self.blocks.kv_block, size):
            yield slice(first, first + size)


def pallas_tpu_attention(
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
    dtype. No value has T * S elements.

    Args:
        query_BTNH: [B, T, N, H].
        key_BSKH: [B, S, K, H].
        value_BSKH: [B, S, K, H].
        mask: what each query sees; None: every key.
        bias: by distance; an array is refused.
        scale: factor on the scores.
        block_sizes: queries and keys of a block, at most; multiples of 128 on a TPU.
        interpret: run the kernels without a TPU, or `pltpu.InterpretParams`.

    Raises:
        UserError: the bias is an array, or blocks do not suit a TPU.
    """
    batch, q_len, heads, head_dim = query_BTNH.shape
    kv_len, kv_heads = key_BSKH.shape[1:3]
    if isinstance(bias, DenseBias):
        raise UserError("x")
    sizes = block_sizes or BlockSizes(512, 512)
    blocks = Tiling(q_len, kv_len, _even_block(q_len, sizes.query), _even_block(kv_len, sizes.key))
    tiles, values = None, None
    if isinstance(bias, AlibiBias):
        offset = jnp.asarray(bias.query_offset, jnp.float32)
        slopes = jax.lax.stop_gradient(bias.slopes)
        values = jnp.stack([slopes, jnp.broadcast_to(offset, slopes.shape)], axis=1)
    elif bias is not None:
        side = math.gcd(_LANES, blocks.step)
        tiles = Tiling(q_len, kv_len, side, side, bias.constant_beyond())
        values = tiles.expand(bias.by_distance(q_len, kv_len)).swapaxes(2, 3)
    plan = _Plan(batch, heads, kv_heads, head_dim, blocks, tiles, scale, interpret)
    start, end = (AttentionMask() if mask is None else mask).intervals(batch, q_len, kv_len)
    query = _lengths_last(query_BTNH, blocks.padded_q_len)
    key, value = (_lengths_last(x, blocks.padded_kv_len) for x in (key_BSKH, value_BSKH))
    out = _attention(plan, query, key, value, values, start, end)
    return out[..., :q_len].transpose(0, 3, 1, 2)


def _even_block(length: int, largest: int) -> int:
    multiple = min(_LANES, largest)
    blocks = -(-length // largest)
    return -(-length // (blocks * multiple)) * multiple


def _lengths_last(x_BTNH: Array, length: int) -> Array:
    """Returns [B, N, H, T'], padded with zeros to T' = `length`."""
    return _padded(x_BTNH.transpose(0, 2, 3, 1), length)


def _padded(x: Array, length: int) -> Array:
    more = length - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    start: Array,
    end: Array,
) -> Array:
    return _forward(plan, query, key, value, bias, start, end)[0]


def _forward(
    plan: _Plan,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    start: Array,
    end: Array,
) -> tuple[Array, tuple]:
    side = _QuerySide(plan, start, end)
    statistics = jax.ShapeDtypeStruct((*query.shape[:2], 1, query.shape[3]), jnp.float32)
    out, logsum = side.call(
        _forward_kernel,
        _operands(plan, query, key, value, bias, start, end),
        outs=((query, side.query), (statistics, side.row)),
        scratch=((plan.head_dim, plan.blocks.q_block), (1, plan.blocks.q_block), (1, plan.blocks.q_block)),
        semantics="parallel parallel parallel arbitrary",
    )
    return out, (query, key, value, bias, start, end, out, logsum)


def _backward(plan: _Plan, residuals: tuple, d_out: Array) -> tuple:
    query, key, value, bias, start, end, out, logsum = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=2, keepdims=True)
    operands = (
        *_operands(plan, query, key, value, bias, start, end),
        logsum,
        delta,
        d_out,
    )
    side = _QuerySide(plan, start, end)
    d_query, d_bias = side.call(
        _d_query_kernel,
        operands,
        outs=((query, side.query), (bias if plan.tiles else None, side.bias)),
        scratch=((plan.head_dim, plan.blocks.q_block),),
        semantics="parallel arbitrary arbitrary arbitrary",
    )
    side = _KeySide(plan, start, end)
    d_key, d_value = side.call(
        _d_key_kernel,
        operands,
        outs=((key, side.key), (value, side.key)),
        scratch=((plan.head_dim, plan.blocks.kv_block),) * 2,
        semantics="parallel parallel parallel arbitrary arbitrary",
    )
    if bias is not None and not plan.tiles:
        d_bias = jnp.zeros_like(bias)
    return d_query, d_key, d_value, d_bias, None, None


_attention.defvjp(_forward, _backward)


def _operands(plan, query, key, value, bias, start, end):
    """Returns what all kernels read, as they read it."""
    start, end = (_padded(x[:, None], plan.blocks.padded_q_len) for x in (start, end))
    if plan.tiles:
        bias = bias * _LOG2E
    elif bias is not None:
        bias = bias * jnp.asarray([[_LOG2E, 1.0]], jnp.float32)
    return query, key, value, bias, start, end


class _Side:
    """How a kernel walks through the grid: which block of each operand a step sees."""

    def __init__(self, plan: _Plan, bounds: Array, grid: tuple[int, ...], at) -> None:
        self.plan = plan
        first, last = bounds[..., 0], bounds[..., 3]
        count = last - first
        self.scalars = (first.ravel(), count.ravel())
        self.grid = (*grid, jnp.maximum(jnp.max(count), 1))
        blocks = plan.blocks

        def spec(shape, index):
            return pl.BlockSpec(shape, lambda *ids: index(*at(*ids)))

        self.query = spec((None, None, plan.head_dim, blocks.q_block), lambda b, n, k, i, j: (b, n, 0, i))
        self.row = spec((None, None, 1, blocks.q_block), lambda b, n, k, i, j: (b, n, 0, i))
        self.key = spec((None, None, plan.head_dim, blocks.kv_block), lambda b, n, k, i, j: (b, k, 0, j))
        self.interval = spec((None, 1, blocks.q_block), lambda b, n, k, i, j: (b, 0, i))
        if plan.tiles:
            side = plan.tiles.step
            self.bias = spec((None, plan.tiles.tiles, side, side), lambda b, n, k, i, j: (n, 0, 0, 0))
        else:
            self.bias = pl.BlockSpec(memory_space=pltpu.SMEM)

    def call(self, kernel, operands, outs, scratch, semantics):
        query, key, value, bias = operands[:4]
        in_specs = [self.query, self.key, self.key, self.bias, self.interval, self.interval]
        in_specs += [self.row, self.row, self.query][: len(operands) - 6]
        if bias is None:
            in_specs[3] = None
        out_shape = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outs]
        out_specs = [None if x is None else s for x, s in outs]
        return pl.pallas_call(
            functools.partial(kernel, self.plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=self.grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics.split())),
            interpret=self.plan.interpret,
            name="attention" + kernel.__name__.removesuffix("_kernel"),
        )(*self.scalars, *operands)


class _QuerySide(_Side):
    def __init__(self, plan, start, end):
        group = plan.group

        def at(n, b, i, step, first, count):
            x = b * plan.blocks.q_blocks + i
            return b, n, jax.lax.div(n, jnp.int32(group)), i, first[x] + jnp.minimum(step, jnp.maximum(count[x] - 1, 0))

        super().__init__(plan, plan.blocks.query_bounds(start, end), (plan.heads, plan.batch, plan.blocks.q_blocks), at)


class _KeySide(_Side):
    def __init__(self, plan, start, end):
        def at(k, b, j, g, step, first, count):
            x = b * plan.blocks.kv_blocks + j
            return b, k * plan.group + g, k, first[x] + jnp.minimum(step, jnp.maximum(count[x] - 1, 0)), j

        super().__init__(
            plan, plan.blocks.key_bounds(start, end), (plan.kv_heads, plan.batch, plan.blocks.kv_blocks, plan.group), at
        )


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Returns x and y multiplied over one axis each, float32; float32 operands are not rounded."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _scores(plan, n, i, j, rows, query, key, bias, start, end):
    """Returns the scores of a part of a key block in units of log(2), masked, [rows, bq]."""
    scores = _product(key[:, rows], query[...], 0, 0) * (plan.scale * _LOG2E)
    index = j * plan.blocks.kv_block + rows.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    if plan.tiles:
        at = _tiles_at(plan, i, j, rows)
        scores += jnp.concatenate([jnp.concatenate([bias[t] for t in line], axis=1) for line in at], axis=0)
    elif bias is not None:
        q_index = i * plan.blocks.q_block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        distance = (index - q_index).astype(jnp.float32) - bias[n, 1]
        scores -= bias[n, 0] * jnp.abs(distance)
    visible = (index >= start[...]) & (index < end[...])
    return jnp.where(visible, scores, MASKED_SCORE)


def _tiles_at(plan, i, j, rows):
    """Returns the tiles of a part of a key block, line by line."""
    side = plan.tiles.step
    across = plan.blocks.q_block // side
    down = plan.blocks.kv_block // side
    of_diagonal = {}
    lines = []
    for y in range(rows.start // side, rows.stop // side):
        line = []
        for x in range(across):
            if y - x not in of_diagonal:
                of_diagonal[y - x] = plan.tiles.tile(i * across + x, j * down + y)
            line.append(of_diagonal[y - x])
        lines.append(line)
    return lines


def _forward_kernel(
    plan, first, count, query, key, value, bias, start, end, out, logsum, acc, largest, total
):
    n, b, i, step = (pl.program_id(axis) for axis in range(4))
    x = b * plan.blocks.q_blocks + i

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        largest[...] = jnp.full_like(largest, LEAST_MAXIMUM)
        total[...] = jnp.zeros_like(total)

    @pl.when(step < count[x])
    def _():
        for rows in plan.chunks():
            scores = _scores(plan, n, i, first[x] + step, rows, query, key, bias, start, end)
            before = largest[...]
            after = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
            weights = jnp.exp2(scores - after)
            shrink = jnp.exp2(before - after)
            largest[...] = after
            total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            acc[...] = acc[...] * shrink + _product(value[:, rows], weights.astype(value.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        seen = total[...] > 0.0
        safe = jnp.where(seen, total[...], 1.0)
        out[...] = (acc[...] * jnp.where(seen, 1.0 / safe, 0.0)).astype(out.dtype)
        logsum[...] = jnp.where(seen, largest[...] + jnp.log2(safe), 0.0)


def _gradients(plan, n, i, j, rows, query, key, value, bias, start, end, logsum, delta, d_out):
    """Returns the softmax and the gradient of the scores of a part of a key block, [rows, bq]."""
    scores = _scores(plan, n, i, j, rows, query, key, bias, start, end)
    weights = jnp.exp2(scores - logsum[...])
    d_weights = _product(value[:, rows], d_out[...], 0, 0)
    return weights, weights * (d_weights - delta[...])


def _d_query_kernel(plan, first, count, query, key, value, bias, start, end, logsum, delta, d_out, d_query, d_bias, acc):
    n, b, i, step = (pl.program_id(axis) for axis in range(4))
    x = b * plan.blocks.q_blocks + i
    j = first[x] + step

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    if plan.tiles:

        @pl.when((b == 0) & (i == 0) & (step == 0))
        def _():
            d_bias[...] = jnp.zeros_like(d_bias)

    @pl.when(step < count[x])
    def _():
        for rows in plan.chunks():
            _, d_scores = _gradients(
                plan, n, i, j, rows, query, key, value, bias, start, end, logsum, delta, d_out
            )
            if plan.tiles:
                side = plan.tiles.step
                for y, line in enumerate(_tiles_at(plan, i, j, rows)):
                    for x, t in enumerate(line):
                        d_bias[t] += d_scores[y * side : (y + 1) * side, x * side : (x + 1) * side]
            acc[...] += _product(key[:, rows], d_scores.astype(key.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        d_query[...] = (acc[...] * plan.scale).astype(d_query.dtype)


def _d_key_kernel(plan, first, count, query, key, value, bias, start, end, logsum, delta, d_out, d_key, d_value, key_acc, value_acc):
    k, b, j, g, step = (pl.program_id(axis) for axis in range(5))
    x = b * plan.blocks.kv_blocks + j
    n = k * plan.group + g

    @pl.when((g == 0) & (step == 0))
    def _():
        key_acc[...] = jnp.zeros_like(key_acc)
        value_acc[...] = jnp.zeros_like(value_acc)

    @pl.when(step < count[x])
    def _():
        for rows in plan.chunks():
            weights, d_scores = _gradients(
                plan, n, first[x] + step, j, rows, query, key, value, bias, start, end, logsum, delta, d_out
            )
            value_acc[:, rows] += _product(d_out[...], weights.astype(d_out.dtype), 1, 1)
            key_acc[:, rows] += _product(query[...], d_scores.astype(query.dtype), 1, 1)

    @pl.when((g == plan.group - 1) & (step == pl.num_programs(4) - 1))
    def _():
        d_key[...] = (key_acc[...] * plan.scale).astype(d_key.dtype)
        d_value[...] = value_acc[...].astype(d_value.dtype)
