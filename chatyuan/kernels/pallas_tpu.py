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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chatyuan.errors import UserError
from chatyuan.kernels.block_sizes import BlockSizes, block_sizes_of
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.products import pad
from chatyuan.kernels.reference import LEAST_MAXIMUM, MASKED_SCORE
from chatyuan.kernels.relative_bias import AlibiBias, Bias
from chatyuan.kernels.tiles import TPU_TILE, Tiling

Array = jax.Array
Ref = Any  # inside a kernel: read and written by indexing

_LOG2E = math.log2(math.e)
_LANES = TPU_TILE
# Keys that are multiplied at once: while one part of a block is multiplied, the exponentials of the
# one before can run.
_PART = 256


def pallas_tpu_attention(
    query_BTNH: Array,
    key_BSKH: Array,
    value_BSKH: Array,
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    scale: float,
    block_sizes: BlockSizes | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the visible keys, [B, T, N, H].

    Sums, softmax and gradients are accumulated in float32; the operands of products keep their
    dtype, which is the same for all three. No value has T * S elements.

    Args:
        query_BTNH: [B, T, N, H].
        key_BSKH: [B, S, K, H].
        value_BSKH: [B, S, K, H].
        mask: what each query sees; None: every key.
        bias: None, or one by distance whose tiles fit (see `attention`, which checks the call).
        scale: factor on the scores.
        block_sizes: multiples of 128; interpreted, also less. None: those of `BLOCK_SIZES`.
        interpret: run the kernels without a TPU.

    Raises:
        UserError: the blocks do not suit a TPU.
    """
    batch, q_len, heads, head_dim = query_BTNH.shape
    kv_len, kv_heads = key_BSKH.shape[1:3]
    if block_sizes is None:
        block_sizes = block_sizes_of("pallas_tpu", query_BTNH)

    def a_pass(sizes: BlockSizes) -> _Pass:
        q_block, kv_block = (
            _even_block(length, largest, bool(interpret))
            for length, largest in ((q_len, sizes.query), (kv_len, sizes.key))
        )
        tiles = None
        if bias is not None and not isinstance(bias, AlibiBias):
            side = math.gcd(_LANES, q_block, kv_block)
            tiles = Tiling(q_len, kv_len, side, side, bias.constant_beyond())
        blocks = Tiling(q_len, kv_len, q_block, kv_block)
        return _Pass(blocks, tiles, heads // kv_heads, scale, interpret)

    values = None
    if isinstance(bias, AlibiBias):
        slopes = jax.lax.stop_gradient(bias.slopes.astype(jnp.float32))
        values = jnp.stack([slopes, jnp.full_like(slopes, bias.query_offset)], axis=1)
    elif bias is not None:
        values = bias.by_distance(q_len, kv_len)
    start, end = (AttentionMask() if mask is None else mask).intervals(batch, q_len, kv_len)
    operands = _Operands(
        *(x.transpose(0, 2, 3, 1) for x in (query_BTNH, key_BSKH, value_BSKH)), values, start, end
    )
    out = _attention(a_pass(block_sizes), a_pass(block_sizes.backward or block_sizes), operands)
    return out.transpose(0, 3, 1, 2)


def _even_block(length: int, largest: int, interpret: bool) -> int:
    """Returns the size of blocks that pad `length` little, at most `largest`.

    Raises:
        UserError: the largest size does not fill lanes.
    """
    if largest % _LANES and not (interpret and largest < _LANES):
        raise UserError(
            f"A block of {largest} queries or keys was asked of attention implementation "
            f"'pallas_tpu', but must be a multiple of {_LANES}, the lanes of a TPU: choose other "
            "block_sizes or leave them out."
        )
    multiple = min(_LANES, largest)
    blocks = -(-length // largest)
    return -(-length // (blocks * multiple)) * multiple


class _Operands(NamedTuple):
    """Arrays of a call.

    [B, N, H, T], twice [B, K, H, S], twice [B, T]; the bias by distance, [N, T + S - 1], or ALiBi's
    slope and offset, [N, 2], or None.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None
    start: Array
    end: Array


class _Inputs(NamedTuple):
    """What the kernels read, in whole blocks: arrays, their specifications or their references.

    query and d_out are [B, N, H, T], key and value [B, K, H, S], start and end [B, 1, T], logsum
    (base 2) and delta [B, N, 1, T]; bias [N, tiles, side, side], [N, 2] for ALiBi, or None. The
    last three are there in the backward pass only.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    start: Any
    end: Any
    logsum: Any = None
    delta: Any = None
    d_out: Any = None


class _Step(NamedTuple):
    """Where a step of a grid is: batch row, head, key head, query block and key block."""

    b: Array
    n: Array
    k: Array
    i: Array
    j: Array


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The static side of a pass, forward or backward.

    Attributes:
        blocks: the [T, S] square in blocks of the grid.
        tiles: the same square in tiles of the bias; None: there is no bias by tiles.
        group: query heads of a key head.
        scale: factor on the scores.
        interpret: run without a TPU.
    """

    blocks: Tiling
    tiles: Tiling | None
    group: int
    scale: float
    interpret: bool | pltpu.InterpretParams

    def inputs(self, operands: _Operands) -> _Inputs:
        """Returns what all kernels read, the bias in units of log 2."""
        q_len, kv_len = self.blocks.padded_q_len, self.blocks.padded_kv_len
        bias = operands.bias
        if self.tiles is not None:
            bias = self.stack(bias) * _LOG2E
        elif bias is not None:
            bias = bias * jnp.asarray([[_LOG2E, 1.0]], jnp.float32)
        return _Inputs(
            query=pad(operands.query, 3, q_len),
            key=pad(operands.key, 3, kv_len),
            value=pad(operands.value, 3, kv_len),
            bias=bias,
            start=pad(operands.start[:, None], 2, q_len),
            end=pad(operands.end[:, None], 2, q_len),
        )

    def stack(self, values_NL: Array) -> Array:
        """Returns the tiles of a bias by distance, [N, tiles, keys, queries]."""
        return self.tiles.expand(values_NL).swapaxes(2, 3)

    def parts(self) -> Iterator[slice]:
        """Yields the parts of a key block that are multiplied at once."""
        size = math.gcd(_PART, self.blocks.kv_block)
        for first in range(0, self.blocks.kv_block, size):
            yield slice(first, first + size)

    def tiles_of(self, at: _Step, part: slice) -> list[list[Array]]:
        """Returns which tiles a part of a key block adds, a list for each line of tiles."""
        side = self.tiles.q_block
        across, down = self.blocks.q_block // side, self.blocks.kv_block // side
        tile = functools.cache(lambda d: self.tiles.tile(at.i * across, at.j * down + d))
        lines = range(part.start // side, part.stop // side)
        return [[tile(line - column) for column in range(across)] for line in lines]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(forward: _Pass, backward: _Pass, operands: _Operands) -> Array:
    """Returns [B, N, H, T]."""
    return _forward(forward, backward, operands)[0]


def _forward(forward: _Pass, backward: _Pass, operands: _Operands) -> tuple[Array, tuple]:
    query = operands.query
    inputs = forward.inputs(operands)
    walk = _by_query(forward, operands, inputs)
    row = jax.ShapeDtypeStruct((*query.shape[:2], 1, inputs.query.shape[3]), jnp.float32)
    q_block = forward.blocks.q_block
    out, logsum = walk.call(
        _forward_kernel,
        inputs,
        outs=[(inputs.query, walk.specs.query), (row, walk.specs.logsum)],
        scratch=[(query.shape[2], q_block), (1, q_block), (1, q_block)],
        semantics=["parallel", "parallel", "parallel", "arbitrary"],
    )
    out, logsum = (x[..., : query.shape[3]] for x in (out, logsum))
    return out, (operands, out, logsum)


def _backward(forward: _Pass, backward: _Pass, residuals: tuple, d_out: Array) -> tuple[_Operands]:
    operands, out, logsum = residuals
    q_len, kv_len = d_out.shape[3], operands.key.shape[3]
    head_dim = d_out.shape[2]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=2, keepdims=True)
    logsum, delta, d_out = (pad(x, 3, backward.blocks.padded_q_len) for x in (logsum, delta, d_out))
    inputs = backward.inputs(operands)._replace(logsum=logsum, delta=delta, d_out=d_out)
    walk = _by_query(backward, operands, inputs)
    d_query, *d_stack = walk.call(
        _d_query_kernel,
        inputs,
        outs=[(inputs.query, walk.specs.query)]
        + [(inputs.bias, walk.specs.bias)] * (backward.tiles is not None),
        scratch=[(head_dim, backward.blocks.q_block)],
        # The gradient of a head's tiles is summed over everything but heads.
        semantics=["parallel", "arbitrary", "arbitrary", "arbitrary"],
    )
    walk = _by_key(backward, operands, inputs)
    d_key, d_value = walk.call(
        _d_key_kernel,
        inputs,
        outs=[(inputs.key, walk.specs.key), (inputs.value, walk.specs.value)],
        scratch=[(head_dim, backward.blocks.kv_block)] * 2,
        semantics=["parallel", "parallel", "parallel", "arbitrary", "arbitrary"],
    )
    d_bias = None
    if d_stack:
        d_bias = jax.linear_transpose(backward.stack, operands.bias)(d_stack[0])[0]
    elif operands.bias is not None:
        d_bias = jnp.zeros_like(operands.bias)
    gradients = _Operands(
        d_query[..., :q_len], d_key[..., :kv_len], d_value[..., :kv_len], d_bias, None, None
    )
    return (gradients,)


_attention.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------- grids


class _Walk:
    """How a kernel goes through the square: its grid, and the blocks that each step sees."""

    def __init__(
        self,
        plan: _Pass,
        inputs: _Inputs,
        bounds: Array,
        grid: Sequence[int],
        locate: Callable[..., _Step],
    ) -> None:
        """Lays out a grid of `grid` and of the blocks between the bounds of the row or column.

        Args:
            plan: of the pass.
            inputs: arrays.
            bounds: [B, X, 4] of `Tiling`.
            grid: all axes but the last.
            locate: (index on each axis, first, count) -> the step.
        """
        first, last = bounds[..., 0].ravel(), bounds[..., 3].ravel()
        self._plan = plan
        self._scalars = (first, last - first)
        self._grid = (*grid, jnp.maximum(jnp.max(last - first), 1))
        head_dim = inputs.query.shape[2]
        q_block, kv_block = plan.blocks.q_block, plan.blocks.kv_block

        def spec(shape: Sequence[int | None], index: Callable[[_Step], tuple]) -> pl.BlockSpec:
            return pl.BlockSpec(tuple(shape), lambda *ids: index(locate(*ids)))

        query = spec((None, None, head_dim, q_block), lambda at: (at.b, at.n, 0, at.i))
        key = spec((None, None, head_dim, kv_block), lambda at: (at.b, at.k, 0, at.j))
        row = spec((None, None, 1, q_block), lambda at: (at.b, at.n, 0, at.i))
        interval = spec((None, 1, q_block), lambda at: (at.b, 0, at.i))
        bias = None
        if plan.tiles is not None:
            bias = spec((None, *inputs.bias.shape[1:]), lambda at: (at.n, 0, 0, 0))
        elif inputs.bias is not None:
            bias = pl.BlockSpec(memory_space=pltpu.SMEM)
        self.specs = _Inputs(query, key, key, bias, interval, interval, row, row, query)

    def call(
        self,
        kernel: Callable[..., None],
        inputs: _Inputs,
        *,
        outs: Sequence[tuple[Any, pl.BlockSpec]],
        scratch: Sequence[tuple[int, int]],
        semantics: Sequence[str],
    ) -> list[Array]:
        """Runs kernel(plan, first, count, inputs, *outs, *scratch).

        Args:
            kernel: one of those below.
            inputs: arrays.
            outs: what has the shape and dtype of each result, and the result's blocks.
            scratch: shapes of float32 sums that stay over steps.
            semantics: of the axes of the grid; steps along "parallel" ones share nothing.
        """
        given = (None if x is None else s for x, s in zip(inputs, self.specs, strict=True))
        return pl.pallas_call(
            functools.partial(kernel, self._plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self._scalars),
                grid=self._grid,
                in_specs=[_Inputs(*given)],
                out_specs=[spec for _, spec in outs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics)),
            interpret=self._plan.interpret,
            name="attention" + kernel.__name__.removesuffix("_kernel"),
        )(*self._scalars, inputs)


def _by_query(plan: _Pass, operands: _Operands, inputs: _Inputs) -> _Walk:
    """Returns the walk over heads, batch rows, query blocks and the key blocks that each visits."""
    bounds = plan.blocks.query_bounds(operands.start, operands.end)
    grid = (operands.query.shape[1], bounds.shape[0], plan.blocks.q_blocks)
    return _Walk(plan, inputs, bounds, grid, functools.partial(_query_step, plan))


def _by_key(plan: _Pass, operands: _Operands, inputs: _Inputs) -> _Walk:
    """Returns the walk over key heads, batch rows, key blocks, heads of the group, query blocks."""
    bounds = plan.blocks.key_bounds(operands.start, operands.end)
    grid = (operands.key.shape[1], bounds.shape[0], plan.blocks.kv_blocks, plan.group)
    return _Walk(plan, inputs, bounds, grid, functools.partial(_key_step, plan))


def _query_step(
    plan: _Pass, n: Array, b: Array, i: Array, step: Array, first: Ref, count: Ref
) -> _Step:
    # `//` would ask which TPU there is, even where none is.
    k = jax.lax.div(n, jnp.int32(plan.group))
    return _Step(b, n, k, i, _visited(b * plan.blocks.q_blocks + i, step, first, count))


def _key_step(
    plan: _Pass, k: Array, b: Array, j: Array, g: Array, step: Array, first: Ref, count: Ref
) -> _Step:
    i = _visited(b * plan.blocks.kv_blocks + j, step, first, count)
    return _Step(b, k * plan.group + g, k, i, j)


def _visited(x: Array, step: Array, first: Ref, count: Ref) -> Array:
    """Returns the block of a step; past the range of row x its last one, which need not move."""
    return first[x] + jnp.clip(step, 0, jnp.maximum(count[x] - 1, 0))


# ----------------------------------------------------------------------------------------- kernels


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


def _scores(plan: _Pass, at: _Step, part: slice, refs: _Inputs) -> Array:
    """Returns the scores of a part of a key block in units of log 2, masked, [keys, bq]."""
    scores = _product(refs.key[:, part], refs.query[...], 0, 0) * (plan.scale * _LOG2E)
    index = at.j * plan.blocks.kv_block + part.start
    index += jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    if plan.tiles is not None:
        lines = [[refs.bias[t] for t in line] for line in plan.tiles_of(at, part)]
        scores += jnp.concatenate([jnp.concatenate(line, axis=1) for line in lines], axis=0)
    elif refs.bias is not None:
        q_index = at.i * plan.blocks.q_block
        q_index += jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        distance = (index - q_index).astype(jnp.float32) - refs.bias[at.n, 1]
        scores -= refs.bias[at.n, 0] * jnp.abs(distance)
    visible = (index >= refs.start[...]) & (index < refs.end[...])
    return jnp.where(visible, scores, MASKED_SCORE)


def _gradients(plan: _Pass, at: _Step, part: slice, refs: _Inputs) -> tuple[Array, Array]:
    """Returns the softmax and the gradient of the scores of a part of a key block, [keys, bq]."""
    weights = jnp.exp2(_scores(plan, at, part, refs) - refs.logsum[...])
    d_weights = _product(refs.value[:, part], refs.d_out[...], 0, 0)
    return weights, weights * (d_weights - refs.delta[...])


def _forward_kernel(
    plan: _Pass,
    first: Ref,
    count: Ref,
    refs: _Inputs,
    out: Ref,
    logsum: Ref,
    acc: Ref,
    largest: Ref,
    total: Ref,
) -> None:
    n, b, i, step = (pl.program_id(axis) for axis in range(4))
    at = _query_step(plan, n, b, i, step, first, count)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        largest[...] = jnp.full_like(largest, LEAST_MAXIMUM)
        total[...] = jnp.zeros_like(total)

    @pl.when(step < count[b * plan.blocks.q_blocks + i])
    def _() -> None:
        for part in plan.parts():
            scores = _scores(plan, at, part, refs)
            before = largest[...]
            after = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
            weights, shrink = jnp.exp2(scores - after), jnp.exp2(before - after)
            largest[...] = after
            total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            values = _product(refs.value[:, part], weights.astype(refs.value.dtype), 1, 0)
            acc[...] = acc[...] * shrink + values

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        # A query that sees nothing has summed nothing: its output is 0, and so are its gradients.
        seen = total[...] > 0.0
        safe = jnp.where(seen, total[...], 1.0)
        out[...] = (acc[...] / safe).astype(out.dtype)
        logsum[...] = jnp.where(seen, largest[...] + jnp.log2(safe), 0.0)


def _d_query_kernel(
    plan: _Pass,
    first: Ref,
    count: Ref,
    refs: _Inputs,
    d_query: Ref,
    *d_bias_and_acc: Ref,
) -> None:
    *d_bias, acc = d_bias_and_acc
    n, b, i, step = (pl.program_id(axis) for axis in range(4))
    at = _query_step(plan, n, b, i, step, first, count)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    for stack in d_bias:

        @pl.when((b == 0) & (i == 0) & (step == 0))
        def _(stack: Ref = stack) -> None:
            stack[...] = jnp.zeros_like(stack)

    @pl.when(step < count[b * plan.blocks.q_blocks + i])
    def _() -> None:
        for part in plan.parts():
            _, d_scores = _gradients(plan, at, part, refs)
            for stack in d_bias:
                side = stack.shape[-1]
                for y, line in enumerate(plan.tiles_of(at, part)):
                    for x, tile in enumerate(line):
                        stack[tile] += d_scores[y * side :, x * side :][:side, :side]
            acc[...] += _product(refs.key[:, part], d_scores.astype(refs.key.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        d_query[...] = (acc[...] * plan.scale).astype(d_query.dtype)


def _d_key_kernel(
    plan: _Pass,
    first: Ref,
    count: Ref,
    refs: _Inputs,
    d_key: Ref,
    d_value: Ref,
    key_acc: Ref,
    value_acc: Ref,
) -> None:
    k, b, j, g, step = (pl.program_id(axis) for axis in range(5))
    at = _key_step(plan, k, b, j, g, step, first, count)

    @pl.when((g == 0) & (step == 0))
    def _() -> None:
        key_acc[...] = jnp.zeros_like(key_acc)
        value_acc[...] = jnp.zeros_like(value_acc)

    @pl.when(step < count[b * plan.blocks.kv_blocks + j])
    def _() -> None:
        d_out, query = refs.d_out[...], refs.query[...]
        for part in plan.parts():
            weights, d_scores = _gradients(plan, at, part, refs)
            value_acc[:, part] += _product(d_out, weights.astype(d_out.dtype), 1, 1)
            key_acc[:, part] += _product(query, d_scores.astype(query.dtype), 1, 1)

    @pl.when((g == plan.group - 1) & (step == pl.num_programs(4) - 1))
    def _() -> None:
        d_key[...] = (key_acc[...] * plan.scale).astype(d_key.dtype)
        d_value[...] = value_acc[...].astype(d_value.dtype)
