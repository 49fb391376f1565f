"""What the Pallas kernels for NVIDIA GPUs share: operands, loops over blocks, scores of a block.

Scores are kept in units of log 2, because the hardware's exponential has base 2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from chatyuan.kernels.products import pad
from chatyuan.kernels.reference import MASKED_SCORE
from chatyuan.kernels.tiles import Tiling

Array = jax.Array
Ref = Any

LOG2E = math.log2(math.e)
LEFT, NEAR, RIGHT = range(3)


class Operands(NamedTuple):
    """Arrays of a call: [B, T, N, H], twice [B, S, K, H], [N, T + S - 1] or None, twice [B, T]."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    start: Array
    end: Array


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
    params: pltriton.CompilerParams
    interpret: bool

    def inputs(self, operands: Operands) -> Inputs:
        """Returns the operands in whole blocks, with the bounds of query blocks."""
        tiling, (query, key, value, bias, start, end) = self.tiling, operands
        return Inputs(
            query=pad(query, 1, tiling.padded_q_len),
            key=pad(key, 1, tiling.padded_kv_len),
            value=pad(value, 1, tiling.padded_kv_len),
            start=pad(start, 1, tiling.padded_q_len),
            end=pad(end, 1, tiling.padded_q_len),
            bounds=tiling.query_bounds(start, end),
            tiles=None if bias is None else tiling.expand(bias) * LOG2E,
        )

    def run(
        self,
        kernel: Callable[..., None],
        grid: tuple[int, ...],
        inputs: Sequence[tuple[Any, Any]],
        outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    ) -> Sequence[Array]:
        """Returns the outputs of `kernel(self, *input refs, *output refs)`.

        Args:
            kernel: the body.
            grid: programs.
            inputs: each a pytree of arrays and the same tree of specifications.
            outputs: each a shape, a dtype and a specification.
        """
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=grid,
            in_specs=[specs for _, specs in inputs],
            out_specs=[spec for _, _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
            compiler_params=self.params,
            interpret=self.interpret,
            name=kernel.__name__.strip("_"),
        )(*(arrays for arrays, _ in inputs))

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
        ends = {LEFT: tiles[*head, 0, 0, 0], RIGHT: tiles[*head, self.tiling.tiles - 1, 0, 0]}
        return lambda region, i, j: (
            tiles[*head, self.tiling.tile(i, j), :, :] if region == NEAR else ends[region]
        )

    def scores(self, rows: Array, columns: Array, bias: Array | None, visible: Array) -> Array:
        """Returns the scores [rows, columns] in units of log 2, MASKED_SCORE where not visible."""
        scores = dot(rows, columns, 1, 1) * (self.scale * LOG2E)
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
        return weights, weights * (dot(*weighed, 1, 1) - delta)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Returns the product over one axis of each, in float32; float32 operands are not rounded."""
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def visible_keys(start: Array, end: Array, first_key: Array, keys: int, axis: int) -> Array:
    """Returns which of `keys` keys from `first_key` on, laid along `axis`, each query sees."""
    shape = (1, keys) if axis == 1 else (keys, 1)
    index = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    start, end = jnp.expand_dims(start, axis), jnp.expand_dims(end, axis)
    return (index >= start) & (index < end)
