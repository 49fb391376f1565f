"""Blocked attention in plain JAX: memory grows with T + S, not T * S, forward and backward.

The forward pass is an online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al.
2022, arXiv:2205.14135); the backward pass is written by hand and recomputes the scores of a block
from query, key and the logarithm of each row's sum. Three things differ from the usual loops:

1. The loop runs over a list of the (query block, key block) pairs whose intervals meet: run-time
   data, so that one compiled program skips what any mask hides.
2. Pairs are visited diagonal by diagonal. T5's bias and ALiBi depend on `key - query` alone, so all
   blocks of a block diagonal add the same [bq, bk] tile: it is expanded once per head from one
   value per distance, and its gradient is summed as a tile, then along the tile's diagonals, in
   float32 and in a fixed order. Buckets are a product with one-hot columns, outside.
3. On CPU one step is one batch row and one key head, because XLA multiplies plain matrices at twice
   the rate of batched ones there; elsewhere one step takes all of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan.kernels.block_sizes import BlockSizes, block_sizes_of
from chatyuan.kernels.masks import AttentionMask, visible_hull
from chatyuan.kernels.products import pad, product, rows
from chatyuan.kernels.reference import LEAST_MAXIMUM, MASKED_SCORE
from chatyuan.kernels.relative_bias import Bias, DenseBias, toeplitz, toeplitz_sum
from chatyuan.kernels.tiles import Tiling

Array = jax.Array

_MULTIPLE = 16


def blocked_attention(
    query_BTNH: Array,
    key_BSKH: Array,
    value_BSKH: Array,
    *,
    mask: AttentionMask | None,
    bias: Bias | None,
    scale: float,
    block_sizes: BlockSizes | None = None,
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the visible keys, [B, T, N, H].

    Sums, softmax and gradients are accumulated in float32; the operands of products keep their
    dtype. No value has T * S elements, except a `DenseBias` and its gradient.
    """
    batch, q_len, heads, head_dim = query_BTNH.shape
    kv_len, kv_heads = key_BSKH.shape[1:3]
    if block_sizes is None:
        block_sizes = block_sizes_of("xla", query_BTNH)
    group = heads // kv_heads
    plan = _Plan(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        q_len=q_len,
        kv_len=kv_len,
        q_block=_even_block(q_len, max(_MULTIPLE, block_sizes.query // group)),
        kv_block=_even_block(kv_len, block_sizes.key),
        together=block_sizes.together,
        bias="none" if bias is None else "dense" if isinstance(bias, DenseBias) else "diagonals",
    )
    if scale != 1.0:
        query_BTNH = query_BTNH * jnp.asarray(scale, query_BTNH.dtype)
    values = None
    if plan.bias == "dense":
        values = bias.dense(q_len, kv_len)
    elif plan.bias == "diagonals":
        values = bias.by_distance(q_len, kv_len)
    start, end = (AttentionMask() if mask is None else mask).intervals(batch, q_len, kv_len)
    return _attention(plan, query_BTNH, key_BSKH, value_BSKH, values, start, end)


def _even_block(length: int, largest: int) -> int:
    """Returns the smallest block that covers `length` in as few blocks as `largest` does."""
    blocks = -(-length // largest)
    return -(-length // (blocks * _MULTIPLE)) * _MULTIPLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan(Tiling):
    """The static side of a call: shapes, blocks and the order in which blocks are visited."""

    batch: int
    kv_heads: int
    group: int
    together: bool
    bias: str

    @property
    def rows(self) -> int:
        """Batch rows of a step."""
        return self.batch if self.together else 1

    @property
    def kv_heads_of_step(self) -> int:
        return self.kv_heads if self.together else 1

    @property
    def heads_of_step(self) -> int:
        return self.kv_heads_of_step * self.group

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns [M, 3] (row, query block, key block), the end of each diagonal among them, and
        each diagonal's `key - query` at the corner of its blocks.
        """
        counts = (self.batch // self.rows, self.q_blocks, self.kv_blocks)
        pairs = np.stack([axis.ravel() for axis in np.indices(counts)], 1).astype(np.int32)
        corner = pairs[:, 2] * self.kv_block - pairs[:, 1] * self.q_block
        if self.bias != "diagonals":
            corner = np.zeros_like(corner)
        order = np.argsort(corner, kind="stable")
        corners, sizes = np.unique(corner, return_counts=True)
        return pairs[order], np.cumsum(sizes), corners.astype(np.int32)

    def visits(self, start: Array, end: Array) -> tuple[Array, Array]:
        """Returns the pairs in the order of visiting, [M, 3], and where each diagonal's visits
        begin and end, [diagonals + 1]; the pairs that nobody sees come last and are not visited.

        Args:
            start: [B, T'] padded to blocks.
            end: [B, T'].
        """
        pairs, ends, _ = self.pairs()
        low, high = visible_hull(start, end, self.q_block)
        shape = (self.batch // self.rows, self.rows, self.q_blocks)
        low = jnp.min(low.reshape(shape), axis=1)[pairs[:, 0], pairs[:, 1]]
        high = jnp.max(high.reshape(shape), axis=1)[pairs[:, 0], pairs[:, 1]]
        first_key = jnp.asarray(pairs[:, 2] * self.kv_block)
        meets = (low < first_key + self.kv_block) & (high > first_key)
        order = jnp.argsort(~meets, stable=True)
        bounds = jnp.cumsum(meets.astype(jnp.int32))[ends - 1]
        return jnp.asarray(pairs)[order], jnp.pad(bounds, (1, 0))


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
    operands = _Operands.padded(plan, query, key, value, bias, start, end)
    heads = plan.kv_heads * plan.group
    statistics = (plan.batch, heads, plan.padded_q_len)
    carry = (
        jnp.zeros(operands.query.shape, jnp.float32),
        jnp.full(statistics, LEAST_MAXIMUM, jnp.float32),
        jnp.zeros(statistics, jnp.float32),
    )

    def step(at: _At, tile: Array | None, carry: tuple) -> tuple[tuple, None]:
        out, largest, total = carry
        scores = product(at.query(operands.query), at.key(operands.key).swapaxes(2, 3))
        scores = at.masked(at.split(scores), tile, operands)
        before = at.statistic(largest)
        after = jnp.maximum(before, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - after[..., None])
        shrink = jnp.exp(before - after)
        sums = at.statistic(total) * shrink + jnp.sum(weights, axis=-1)
        new = product(rows(weights).astype(value.dtype), at.key(operands.value))
        out = at.put_query(out, at.query(out) * rows(shrink[..., None]) + new)
        return (out, at.put_statistic(largest, after), at.put_statistic(total, sums)), None

    (out, largest, total), _ = _run(plan, operands, step, carry, turned=False)
    seen = total > 0.0
    factor = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    out = out * factor.swapaxes(1, 2)[..., None]
    out = out[:, : plan.q_len].astype(value.dtype)
    # exp(score - logsum) is the softmax; nothing is visible where the sum is 0.
    logsum = jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
    return out, (query, key, value, bias, start, end, out, logsum)


def _backward(plan: _Plan, residuals: tuple, d_out: Array) -> tuple:
    query, key, value, bias, start, end, out, logsum = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    operands = _Operands.padded(plan, query, key, value, bias, start, end)
    d_out = pad(d_out.astype(value.dtype), 1, plan.padded_q_len)
    delta = pad(delta, 2, plan.padded_q_len)
    carry = (
        jnp.zeros(operands.query.shape, jnp.float32),
        jnp.zeros(operands.key.shape, jnp.float32),
        jnp.zeros(operands.value.shape, jnp.float32),
        jnp.zeros(operands.bias.shape, jnp.float32) if plan.bias == "dense" else None,
    )

    # Keys are rows here, [bk, bq]: then only the narrow product of d_query has to be transposed.
    def step(at: _At, tile: Array | None, carry: tuple) -> tuple[tuple, Array | None]:
        d_query, d_key, d_value, d_bias = carry
        queries, keys, d_outs = at.query(operands.query), at.key(operands.key), at.query(d_out)
        scores = at.split_turned(product(keys, queries.swapaxes(2, 3)))
        scores = at.masked_turned(scores, tile, operands)
        weights = jnp.exp(scores - at.statistic(logsum)[:, :, None])
        d_weights = at.split_turned(product(at.key(operands.value), d_outs.swapaxes(2, 3)))
        d_scores = weights * (d_weights - at.statistic(delta)[:, :, None])
        d_tile = None if plan.bias == "none" else at.summed(d_scores)
        if plan.bias == "dense":
            d_bias = at.add_square(d_bias, d_tile.swapaxes(1, 2))
        d_scores = _merge_turned(d_scores).astype(query.dtype)
        weights = _merge_turned(weights).astype(value.dtype)
        narrow = product(keys.swapaxes(2, 3), d_scores)
        d_query = at.add_query(d_query, narrow.swapaxes(2, 3))
        d_key = at.add_key(d_key, product(d_scores, queries))
        d_value = at.add_key(d_value, product(weights, d_outs))
        return (d_query, d_key, d_value, d_bias), d_tile

    (d_query, d_key, d_value, d_bias), d_values = _run(plan, operands, step, carry, turned=True)
    if plan.bias == "dense":
        d_bias = d_bias[:, : plan.q_len, : plan.kv_len].astype(bias.dtype)
    elif plan.bias == "diagonals":
        before = plan.padded_q_len - plan.q_len
        d_bias = d_values[:, before : before + bias.shape[1]]
    return (
        d_query[:, : plan.q_len].astype(query.dtype),
        d_key[:, : plan.kv_len].astype(key.dtype),
        d_value[:, : plan.kv_len].astype(value.dtype),
        d_bias,
        None,
        None,
    )


_attention.defvjp(_forward, _backward)


def _run(
    plan: _Plan, operands: "_Operands", step: Callable, carry: Any, *, turned: bool
) -> tuple[Any, Array | None]:
    """Returns the carry after `step(at, tile, carry) -> (carry, d_tile)` over all visited blocks.

    With `turned` and a bias by distance, also the sum of the d_tiles along diagonals, float32
    [N, T' + S' - 1].
    """
    visits, bounds = plan.visits(operands.start, operands.end)
    by_distance = plan.bias == "diagonals"
    q_block, kv_block, heads = plan.q_block, plan.kv_block, plan.heads_of_step
    corners = jnp.asarray(plan.pairs()[2])
    shape = (heads, kv_block, q_block)

    def of_diagonal(step_index: Array, state: tuple) -> tuple:
        carry, d_values = state
        head, diagonal = step_index // corners.size, step_index % corners.size
        tile = d_tile = None
        if by_distance:
            first = corners[diagonal] - (q_block - 1) + (plan.padded_q_len - 1)
            at_values = (head * heads, first)
            length = (heads, q_block + kv_block - 1)
            values = jax.lax.dynamic_slice(operands.bias, at_values, length)
            if turned:
                tile = toeplitz(values[:, ::-1], kv_block, q_block)
                d_tile = jnp.zeros(shape, jnp.float32)
            else:
                tile = toeplitz(values, q_block, kv_block)

        def of_block(index: Array, state: tuple) -> tuple:
            carry, d_tile = state
            row, q_index, kv_index = visits[index]
            carry, more = step(_At(plan, row, head, q_index, kv_index), tile, carry)
            return carry, None if d_tile is None else d_tile + more

        begin, end = bounds[diagonal], bounds[diagonal + 1]
        carry, d_tile = jax.lax.fori_loop(begin, end, of_block, (carry, d_tile))
        if d_values is not None:
            values = jax.lax.dynamic_slice(d_values, at_values, length)
            values = values + toeplitz_sum(d_tile)[:, ::-1]
            d_values = jax.lax.dynamic_update_slice(d_values, values, at_values)
        return carry, d_values

    d_values = jnp.zeros(operands.bias.shape, jnp.float32) if turned and by_distance else None
    steps = corners.size * (plan.kv_heads // plan.kv_heads_of_step)
    return jax.lax.fori_loop(0, steps, of_diagonal, (carry, d_values))


@dataclasses.dataclass(frozen=True)
class _Operands:
    """What blocks are cut from, padded to whole blocks; padding is seen by nobody."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    start: Array
    end: Array

    @classmethod
    def padded(
        cls,
        plan: _Plan,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        start: Array,
        end: Array,
    ) -> "_Operands":
        q_len, kv_len = plan.padded_q_len, plan.padded_kv_len
        if plan.bias == "dense":
            bias = pad(pad(bias, 1, q_len), 2, kv_len)
        elif plan.bias == "diagonals":
            more = (q_len - plan.q_len, kv_len - plan.kv_len)
            bias = jnp.pad(bias, ((0, 0), more)) if any(more) else bias
        return cls(
            pad(query, 1, q_len),
            pad(key, 1, kv_len),
            pad(value, 1, kv_len),
            bias,
            pad(start, 1, q_len),
            pad(end, 1, q_len),
        )


@dataclasses.dataclass(frozen=True)
class _At:
    """One block: cuts its part out of arrays, and puts parts back.

    Below, B and K are the rows and key heads of a step, G the query heads of a key head.
    """

    plan: _Plan
    row: Array
    head: Array
    q_index: Array
    kv_index: Array

    def query(self, x: Array) -> Array:
        """[B, T', N, H] -> [B, K, G * bq, H]."""
        plan = self.plan
        sizes = (plan.rows, plan.q_block, plan.heads_of_step, x.shape[3])
        part = jax.lax.dynamic_slice(x, self._query_start(), sizes)
        part = part.reshape(*sizes[:2], plan.kv_heads_of_step, plan.group, sizes[3])
        return part.transpose(0, 2, 3, 1, 4).reshape(plan.rows, plan.kv_heads_of_step, -1, sizes[3])

    def put_query(self, x: Array, part: Array) -> Array:
        """The inverse of `query`: `x` with the part replaced."""
        part = self._to_layout(part)
        return jax.lax.dynamic_update_slice(x, part, self._query_start())

    def add_query(self, x: Array, part: Array) -> Array:
        """`x` with [B, K, G * bq, H] added to its part."""
        return self.put_query(x, self.query(x) + part)

    def key(self, x: Array) -> Array:
        """[B, S', K', H] -> [B, K, bk, H]."""
        plan = self.plan
        sizes = (plan.rows, plan.kv_block, plan.kv_heads_of_step, x.shape[3])
        return jax.lax.dynamic_slice(x, self._key_start(), sizes).swapaxes(1, 2)

    def add_key(self, x: Array, part: Array) -> Array:
        """`x` with [B, K, bk, H] added to its part."""
        part = (self.key(x) + part).swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(x, part, self._key_start())

    def statistic(self, x: Array) -> Array:
        """[B, N, T'] -> [B, K, G, bq]."""
        plan = self.plan
        sizes = (plan.rows, plan.heads_of_step, plan.q_block)
        part = jax.lax.dynamic_slice(x, self._statistic_start(), sizes)
        return part.reshape(plan.rows, plan.kv_heads_of_step, plan.group, plan.q_block)

    def put_statistic(self, x: Array, part: Array) -> Array:
        """The inverse of `statistic`."""
        part = part.reshape(self.plan.rows, self.plan.heads_of_step, self.plan.q_block)
        return jax.lax.dynamic_update_slice(x, part, self._statistic_start())

    def masked(self, scores: Array, tile: Array | None, operands: _Operands) -> Array:
        """Scores [B, K, G, bq, bk] with bias and mask."""
        plan = self.plan
        if plan.bias == "dense":
            tile = self._square(operands.bias)
        if tile is not None:
            scores = scores + tile.reshape(
                1, plan.kv_heads_of_step, plan.group, plan.q_block, plan.kv_block
            )
        first, last = self._interval(operands.start), self._interval(operands.end)
        index = self._key_indices()[None, None, None, None, :]
        visible = (index >= first[..., None]) & (index < last[..., None])
        return jnp.where(visible, scores, MASKED_SCORE)

    def masked_turned(self, scores: Array, tile: Array | None, operands: _Operands) -> Array:
        """Scores [B, K, bk, G, bq] with bias and mask."""
        plan = self.plan
        if plan.bias == "dense":
            tile = self._square(operands.bias).swapaxes(1, 2)
        if tile is not None:
            tile = tile.reshape(plan.kv_heads_of_step, plan.group, plan.kv_block, plan.q_block)
            scores = scores + tile.swapaxes(1, 2)[None]
        first, last = self._interval(operands.start), self._interval(operands.end)
        index = self._key_indices()[None, None, :, None, None]
        visible = (index >= first[:, :, None]) & (index < last[:, :, None])
        return jnp.where(visible, scores, MASKED_SCORE)

    def split(self, scores: Array) -> Array:
        """[B, K, G * bq, bk] -> [B, K, G, bq, bk]."""
        return scores.reshape(*scores.shape[:2], self.plan.group, -1, scores.shape[-1])

    def split_turned(self, scores: Array) -> Array:
        """[B, K, bk, G * bq] -> [B, K, bk, G, bq]."""
        return scores.reshape(*scores.shape[:3], self.plan.group, -1)

    def summed(self, d_scores: Array) -> Array:
        """[B, K, bk, G, bq] -> [K * G, bk, bq]."""
        total = jnp.sum(d_scores, axis=0) if self.plan.rows > 1 else d_scores[0]
        return total.swapaxes(1, 2).reshape(-1, self.plan.kv_block, self.plan.q_block)

    def add_square(self, x: Array, part: Array) -> Array:
        """[N, T', S'] with [K * G, bq, bk] added to its part."""
        return jax.lax.dynamic_update_slice(x, self._square(x) + part, self._square_start())

    def _square(self, x: Array) -> Array:
        sizes = (self.plan.heads_of_step, self.plan.q_block, self.plan.kv_block)
        return jax.lax.dynamic_slice(x, self._square_start(), sizes)

    def _square_start(self) -> tuple:
        plan = self.plan
        first_head = self.head * plan.heads_of_step
        return first_head, self.q_index * plan.q_block, self.kv_index * plan.kv_block

    def _interval(self, x: Array) -> Array:
        """[B, T'] -> [B, 1, 1, bq]."""
        start = (self.row * self.plan.rows, self.q_index * self.plan.q_block)
        part = jax.lax.dynamic_slice(x, start, (self.plan.rows, self.plan.q_block))
        return part[:, None, None, :]

    def _key_indices(self) -> Array:
        return self.kv_index * self.plan.kv_block + jnp.arange(self.plan.kv_block, dtype=jnp.int32)

    def _to_layout(self, part: Array) -> Array:
        """[B, K, G * bq, H] -> [B, bq, K * G, H]."""
        plan = self.plan
        part = part.reshape(*part.shape[:2], plan.group, plan.q_block, part.shape[3])
        return part.transpose(0, 3, 1, 2, 4).reshape(plan.rows, plan.q_block, -1, part.shape[4])

    def _query_start(self) -> tuple:
        plan = self.plan
        row, head = self.row * plan.rows, self.head * plan.heads_of_step
        return row, self.q_index * plan.q_block, head, _zero()

    def _key_start(self) -> tuple:
        plan = self.plan
        row, head = self.row * plan.rows, self.head * plan.kv_heads_of_step
        return row, self.kv_index * plan.kv_block, head, _zero()

    def _statistic_start(self) -> tuple:
        plan = self.plan
        row, head = self.row * plan.rows, self.head * plan.heads_of_step
        return row, head, self.q_index * plan.q_block


def _zero() -> Array:
    return jnp.int32(0)


def _merge_turned(x: Array) -> Array:
    """[B, K, bk, G, bq] -> [B, K, bk, G * bq]."""
    return x.reshape(*x.shape[:3], -1)
