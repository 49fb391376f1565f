"""The bodies of the four kernels of `pallas_gpu`, which says what they compute.

Only what Triton and interpretation share is used: references read and written by index,
`lax.dot_general`, `lax.fori_loop` and elementwise operations. Integers are divided by `lax.div`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from chatyuan.kernels.reference import LEAST_MAXIMUM, MASKED_SCORE
from chatyuan.kernels.tiles import Tiling

Array = jax.Array
Ref = Any

LOG2E = math.log2(math.e)
_LEFT, _NEAR, _RIGHT = range(3)


class Inputs(NamedTuple):
    """What every kernel reads, in whole blocks: arrays, their specifications or their references.

    bounds are those of `Tiling`, tiles [N, tiles, bq, bk] in units of log 2.
    """

    query: Any
    key: Any
    value: Any
    start: Any
    end: Any
    bounds: Any
    tiles: Any


class Residuals(NamedTuple):
    """What the kernels of the backward pass read besides, in the same three roles.

    logsum is that of each row of scores in units of log 2, delta the sum of out * d_out; both are
    [B, N, T].
    """

    d_out: Any
    logsum: Any
    delta: Any


@dataclasses.dataclass(frozen=True)
class Pass:
    """The static side of a pass: blocks, query heads of a key head, how kernels are compiled."""

    tiling: Tiling
    group: int
    scale: float
    warps: int
    stages: int
    interpret: bool

    def dot(self, a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
        """Returns the product over one axis of each, in float32.

        Three products of tensor cores for float32 operands, as exact as one without them, which
        would spill most of its registers to memory; on other devices that is not available.
        """
        precision = jax.lax.Precision.HIGHEST
        if a.dtype == jnp.float32 and not self.interpret:
            precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return jax.lax.dot_general(
            a,
            b,
            (((a_axis,), (b_axis,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def over_blocks(
        self, bounds: Ref, regions: Sequence[int], visit: Callable[..., Any], carry: Any
    ) -> Any:
        """Returns the carry after `visit(region, block, carry)` over the blocks within bounds.

        Args:
            bounds: [4].
            regions: what lies between them, in that order.
            visit: works on one block.
            carry: what it starts from.
        """
        exists = (self.tiling.left_is_constant, True, self.tiling.right_is_constant)
        for position, region in enumerate(regions):
            if exists[region]:
                first, last = bounds[position], bounds[position + 1]
                carry = jax.lax.fori_loop(first, last, functools.partial(visit, region), carry)
        return carry

    def bias(self, tiles: Ref | None, *head: Array | int) -> Callable[..., Array | None]:
        """Returns (region, i, j) -> what block (i, j) adds: a tile, one number if it is far.

        Args:
            tiles: [tiles, ., .], or [heads, tiles, ., .] when a head is given; None: no bias.
            head: index of the head, if there are several.
        """
        if tiles is None:
            return lambda *_: None
        # Read before the loops, which need not read them again.
        ends = {_LEFT: tiles[*head, 0, 0, 0], _RIGHT: tiles[*head, self.tiling.tiles - 1, 0, 0]}
        return lambda region, i, j: (
            tiles[*head, self.tiling.tile(i, j), :, :] if region == _NEAR else ends[region]
        )

    def scores(self, rows: Array, columns: Array, bias: Array | None, visible: Array) -> Array:
        """Returns the scores [rows, columns] in units of log 2, MASKED_SCORE where not visible."""
        scores = self.dot(rows, columns, 1, 1) * (self.scale * LOG2E)
        if bias is not None:
            scores = scores + bias
        return jnp.where(visible, scores, MASKED_SCORE)

    def d_scores(
        self,
        scored: tuple[Array, Array],
        weighed: tuple[Array, Array],
        statistics: tuple[Array, Array],
        bias: Array | None,
        visible: Array,
    ) -> tuple[Array, Array]:
        """Returns the softmax' weights of a block and the gradient of its scores, natural units.

        Args:
            scored: whose product the scores are, query and key or key and query.
            weighed: whose product the weights' gradient is, d_out and value or value and d_out.
            statistics: logsum and delta, along the axis of queries.
            bias: of the block.
            visible: of the block.
        """
        logsum, delta = statistics
        weights = jnp.exp2(self.scores(*scored, bias, visible) - logsum)
        return weights, weights * (self.dot(*weighed, 1, 1) - delta)


def _visible(start: Array, end: Array, first_key: Array, keys: int, axis: int) -> Array:
    """Returns which of `keys` keys from `first_key` on, laid along `axis`, each query sees."""
    shape = (1, keys) if axis == 1 else (keys, 1)
    index = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    start, end = jnp.expand_dims(start, axis), jnp.expand_dims(end, axis)
    return (index >= start) & (index < end)


def forward_kernel(this: Pass, refs: Inputs, out_ref: Ref, logsum_ref: Ref) -> None:
    """A block of queries of one head; grid (query blocks, N, B)."""
    i, kv_block = pl.program_id(0), this.tiling.kv_block
    query, start, end = refs.query[...], refs.start[...], refs.end[...]
    bias = this.bias(refs.tiles)

    def visit(region: int, j: Array, carry: tuple) -> tuple:
        out, largest, total = carry
        keys = pl.ds(j * kv_block, kv_block)
        visible = _visible(start, end, j * kv_block, kv_block, axis=1)
        scores = this.scores(query, refs.key[keys, :], bias(region, i, j), visible)
        after = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - after[:, None])
        shrink = jnp.exp2(largest - after)
        value = refs.value[keys, :]
        out = out * shrink[:, None] + this.dot(weights.astype(value.dtype), value, 1, 0)
        return out, after, total * shrink + jnp.sum(weights, axis=1)

    zero = jnp.zeros(start.shape, jnp.float32)
    carry = (jnp.zeros(query.shape, jnp.float32), zero + LEAST_MAXIMUM, zero)
    carry = this.over_blocks(refs.bounds, (_LEFT, _NEAR, _RIGHT), visit, carry)
    out, largest, total = carry
    # Nothing is visible where the sum is 0: out is 0 there, and exp(score - logsum) will be.
    seen = total > 0.0
    total = jnp.where(seen, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    logsum_ref[...] = jnp.where(seen, largest + jnp.log(total) * LOG2E, 0.0)


def query_kernel(
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
        visible = _visible(start, end, j * kv_block, kv_block, axis=1)
        key, value = refs.key[keys, :], refs.value[keys, :]
        _, d_scores = this.d_scores(
            (query, key), (d_out, value), statistics, bias(region, i, j), visible
        )
        if region != _NEAR:
            far[region // 2] = far[region // 2] + jnp.sum(d_scores, axis=1)
        return d_query + this.dot(d_scores.astype(key.dtype), key, 1, 0), *far

    zero = jnp.zeros(start.shape, jnp.float32)
    carry = (jnp.zeros(query.shape, jnp.float32), zero, zero)
    d_query, left, right = this.over_blocks(refs.bounds, (_LEFT, _NEAR, _RIGHT), visit, carry)
    d_query_ref[...] = (d_query * this.scale).astype(d_query_ref.dtype)
    if far_ref is not None:
        far_ref[0], far_ref[1] = jnp.sum(left), jnp.sum(right)


def key_kernel(
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
            visible = _visible(start, end, j * kv_block, kv_block, axis=0)
            query, d_out = refs.query[queries, n, :], residuals.d_out[queries, n, :]
            statistics = residuals.logsum[n, queries][None], residuals.delta[n, queries][None]
            weights, d_scores = this.d_scores(
                (key, query), (value, d_out), statistics, bias(region, i, j), visible
            )
            d_value = d_value + this.dot(weights.astype(d_out.dtype), d_out, 1, 0)
            return d_key + this.dot(d_scores.astype(query.dtype), query, 1, 0), d_value

        return this.over_blocks(refs.bounds, (_RIGHT, _NEAR, _LEFT), visit, carry)

    carry = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    if this.group == 1:
        d_key, d_value = of_head(0, carry)
    else:
        d_key, d_value = jax.lax.fori_loop(0, this.group, of_head, carry)
    d_key_ref[...] = (d_key * this.scale).astype(d_key_ref.dtype)
    d_value_ref[...] = d_value.astype(d_value_ref.dtype)


def tile_kernel(
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
        visible = _visible(start, end, first_key, tiling.kv_block, axis=1)
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
