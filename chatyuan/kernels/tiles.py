"""How a kernel cuts the [T, S] square: blocks, their bias tiles, and which of them are visited.

A bias by distance is the same on every block of a block diagonal, so a kernel needs one [bq, bk]
tile per diagonal. Block (i, j) starts at distance `key - query = j * bk - i * bq`: diagonal
`tau = j * (bk / g) - i * (bq / g)` in steps of g = gcd(bq, bk). T5's buckets saturate, hence all
diagonals beyond `max_distance` share a constant tile at each end, and the stack has the same few
tiles whatever the lengths are; any other bias has one tile for each diagonal. The stack is made by
XLA from the values by distance, and XLA's transpose of that gives the gradient of the table.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from chatyuan.kernels.masks import visible_hull
from chatyuan.kernels.relative_bias import toeplitz

Array = jax.Array

# Side of a TPU's tiles, and how many fit into the 16 MiB of VMEM that a kernel gets, where tiles
# and their gradient are both held twice.
TPU_TILE, TPU_MOST_TILES = 128, 32


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A [T, S] square in blocks of [bq, bk]; hashable, all of it static.

    Attributes:
        q_len: T.
        kv_len: S.
        q_block: bq.
        kv_block: bk.
        constant: (a, b): the bias is constant over distances <= a and over distances >= b (see
            `constant_beyond` of the biases); None: it nowhere is, or there is none.
    """

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    constant: tuple[int, int] | None = None

    @property
    def q_blocks(self) -> int:
        """Blocks of queries, the last one padded."""
        return -(-self.q_len // self.q_block)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys, the last one padded."""
        return -(-self.kv_len // self.kv_block)

    @property
    def padded_q_len(self) -> int:
        """T in whole blocks."""
        return self.q_blocks * self.q_block

    @property
    def padded_kv_len(self) -> int:
        """S in whole blocks."""
        return self.kv_blocks * self.kv_block

    @property
    def step(self) -> int:
        """Distance from one diagonal to the next, g."""
        return math.gcd(self.q_block, self.kv_block)

    @property
    def first(self) -> int:
        """The diagonal of tile 0; those before it add the same tile."""
        lowest = -(self.q_blocks - 1) * (self.q_block // self.step)
        return max(lowest, min(self._far_left, self._highest))

    @property
    def last(self) -> int:
        """The diagonal of the last tile; those after it add the same tile."""
        return max(self.first, min(self._far_right, self._highest))

    @property
    def tiles(self) -> int:
        """Tiles in the stack."""
        return self.last - self.first + 1

    @property
    def left_is_constant(self) -> bool:
        """Tile 0 holds one value per head: blocks on it or before it need no tile."""
        return self.first <= self._far_left

    @property
    def right_is_constant(self) -> bool:
        """The last of several tiles holds one value per head."""
        return self.last >= self._far_right and self.last > self.first

    @property
    def _highest(self) -> int:
        return (self.kv_blocks - 1) * (self.kv_block // self.step)

    @property
    def _far_left(self) -> int:
        """The last diagonal whose distances are all <= a."""
        if self.constant is None:
            return -self.padded_q_len
        return (self.constant[0] - self.kv_block + 1) // self.step

    @property
    def _far_right(self) -> int:
        """The first diagonal whose distances are all >= b."""
        if self.constant is None:
            return self.padded_kv_len
        return -(-(self.constant[1] + self.q_block - 1) // self.step)

    def tile(self, i: Array | int, j: Array | int) -> Array:
        """Returns which tile block (i, j) adds; products and a clamp only, for use in kernels."""
        diagonal = j * (self.kv_block // self.step) - i * (self.q_block // self.step)
        return jnp.clip(diagonal, self.first, self.last) - self.first

    def expand(self, values_NL: Array) -> Array:
        """Returns the stack, float32 [N, tiles, bq, bk].

        Args:
            values_NL: [N, T + S - 1] of a bias' `by_distance(T, S)`.
        """
        # Padding repeats the ends, so that constant tiles are constant there as well.
        more = (self.padded_q_len - self.q_len, self.padded_kv_len - self.kv_len)
        if any(more):
            values_NL = jnp.pad(values_NL, ((0, 0), more), mode="edge")
        # Tile t needs a window of bq + bk - 1 values (here one more) from t * g on: windows are
        # joined from pieces of g values, (bq + bk) / g slices however many tiles there are.
        step, heads = self.step, values_NL.shape[0]
        pieces = (self.q_block + self.kv_block) // step
        begin = self.first * step - (self.q_block - 1) + (self.padded_q_len - 1)
        length = (self.tiles + pieces - 1) * step
        values_NL = jnp.pad(values_NL, ((0, 0), (0, 1)))[:, begin : begin + length]
        cut = values_NL.reshape(heads, -1, step)
        windows = jnp.concatenate([cut[:, p : p + self.tiles] for p in range(pieces)], axis=2)
        windows = windows[:, :, : self.q_block + self.kv_block - 1]
        stack = toeplitz(windows.reshape(heads * self.tiles, -1), self.q_block, self.kv_block)
        return stack.reshape(heads, self.tiles, self.q_block, self.kv_block)

    def query_bounds(self, start: Array, end: Array) -> Array:
        """Returns int32 [B, blocks of queries, 4]: which key blocks a query block visits.

        Key blocks [x0, x1) are far to the left (their tile is the constant first one), [x1, x2)
        near, [x2, x3) far to the right; no key is visible to the query block outside [x0, x3).

        Args:
            start: int32 [B, T], first visible key of each query.
            end: int32 [B, T], last visible key + 1.
        """
        more = ((0, 0), (0, self.padded_q_len - self.q_len))
        low, high = visible_hull(jnp.pad(start, more), jnp.pad(end, more), self.q_block)
        low, high = low // self.kv_block, -(-high // self.kv_block)
        i = jnp.arange(self.q_blocks, dtype=jnp.int32)[None] * (self.q_block // self.step)
        step = self.kv_block // self.step
        left, right = low, high
        if self.left_is_constant:
            left = (self.first + i) // step + 1
        if self.right_is_constant:
            right = -(-(self.last + i) // step)
        return _ordered(low, left, right, high)

    def key_bounds(self, start: Array, end: Array) -> Array:
        """Returns int32 [B, blocks of keys, 4]: which query blocks a key block visits.

        As in `query_bounds`, but the blocks [x0, x1) are those for which the keys are far to the
        right, [x2, x3) those for which they are far to the left.
        """
        bounds = self.query_bounds(start, end)
        j = jnp.arange(self.kv_blocks, dtype=jnp.int32)[None]
        meets = (bounds[:, :, None, 0] <= j[None]) & (j[None] < bounds[:, :, None, 3])
        index = jnp.arange(self.q_blocks, dtype=jnp.int32)[None, :, None]
        low = jnp.min(jnp.where(meets, index, self.q_blocks), axis=1)
        high = jnp.max(jnp.where(meets, index + 1, 0), axis=1)
        j, step = j * (self.kv_block // self.step), self.q_block // self.step
        right, left = low, high
        if self.right_is_constant:
            right = (j - self.last) // step + 1
        if self.left_is_constant:
            left = -(-(j - self.first) // step)
        return _ordered(low, right, left, high)


def _ordered(low: Array, one: Array, two: Array, high: Array) -> Array:
    """Returns [B, X, 4] rising bounds; equal ones where nothing is visible."""
    low = jnp.minimum(low, high)
    one = jnp.clip(one, low, high)
    two = jnp.clip(two, one, high)
    return jnp.stack([low, one, two, high], axis=2)
