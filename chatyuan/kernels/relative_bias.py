"""T5's bucketed relative bias and ALiBi: specifications that a kernel need not materialise."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the bucket of each `key index - query index`, int32.

    Half of the buckets are exact distances, the other half logarithmic up to `max_distance`; all
    farther keys share the last one. Raffel et al. 2020, section 2.1. Computed in NumPy float32 with
    the epsilon of T5X, once for every implementation, because a bucket that flips near a power of
    two is a silent difference.
    """
    distance = -np.asarray(relative_position, np.int32)
    offset = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance < 0).astype(np.int32) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
    steps = np.log(ratio) / math.log(max_distance / exact) * (num_buckets - exact)
    far = np.minimum(exact + steps.astype(np.int32), num_buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativePositionBias:
    """T5's bias: `table[head, bucket(key index - query index)]` is added to the scores.

    Attributes:
        table: [N, buckets] float32.
        bidirectional: half of the buckets are for keys after the query.
        max_distance: where the buckets saturate, in tokens.
        query_offset: key index of query 0: a Python int, or an int32 scalar when a cache decides.
            A traced offset must keep the queries inside the keys (offset + T <= S).
    """

    table: Array
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})
    query_offset: Array | int = 0

    def dense(self, q_len: int, kv_len: int) -> Array:
        """Returns the bias, float32 [N, T, S]."""
        return toeplitz(self.by_distance(q_len, kv_len), q_len, kv_len)

    def by_distance(self, q_len: int, kv_len: int) -> Array:
        """Returns [N, T + S - 1]: the bias of `key - query` rising from `-(T - 1)`."""
        first, length = _distances(self.query_offset, q_len, kv_len)
        # Where the buckets saturate the ends are repeated: they need no products.
        last = first + length - 1
        low, high = (min(max(end, first), last) for end in self._saturation)
        bucket = relative_position_bucket(
            np.arange(low, high + 1, dtype=np.int32),
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[1],
            max_distance=self.max_distance,
        )
        # A product with one-hot columns: exact, and its gradient is a product too, not a scatter.
        one_hot = jax.nn.one_hot(bucket, self.table.shape[1], axis=0, dtype=jnp.float32)
        values = jnp.dot(
            self.table.astype(jnp.float32), one_hot, precision=jax.lax.Precision.HIGHEST
        )
        if high - low < last - first:
            values = jnp.pad(values, ((0, 0), (low - first, last - high)), mode="edge")
        return _window(values, self.query_offset, q_len, kv_len)

    def constant_beyond(self) -> tuple[int, int] | None:
        """Returns (a, b) if the bias is constant over `key - query` <= a, and over >= b."""
        if not isinstance(self.query_offset, int):
            return None
        low, high = self._saturation
        return self.query_offset + low, self.query_offset + high

    @property
    def _saturation(self) -> tuple[int, int]:
        """The distances from which on all farther ones share a bucket, on both sides."""
        return -self.max_distance, self.max_distance if self.bidirectional else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlibiBias:
    """ALiBi: `-slope[head] * |key index - query index|` (Press et al. 2022, arXiv:2108.12409).

    Attributes:
        slopes: [N] float32; a constant, it gets no gradient.
        query_offset: as in `RelativePositionBias`.
    """

    slopes: Array
    query_offset: Array | int = 0

    def dense(self, q_len: int, kv_len: int) -> Array:
        """Returns the bias, float32 [N, T, S]."""
        return toeplitz(self.by_distance(q_len, kv_len), q_len, kv_len)

    def by_distance(self, q_len: int, kv_len: int) -> Array:
        """Returns [N, T + S - 1]: the bias of `key - query` rising from `-(T - 1)`."""
        rising = jnp.arange(q_len + kv_len - 1, dtype=jnp.int32) - (q_len - 1)
        distance = jnp.abs(rising - jnp.asarray(self.query_offset, jnp.int32)).astype(jnp.float32)
        return -jax.lax.stop_gradient(self.slopes)[:, None] * distance[None]

    def constant_beyond(self) -> tuple[int, int] | None:
        """Returns None: the bias goes on falling."""
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseBias:
    """A bias that already is an array: float32 [N, T, S]."""

    values: Array

    def dense(self, q_len: int, kv_len: int) -> Array:
        """Returns the array."""
        assert self.values.shape[1:] == (q_len, kv_len), (self.values.shape, q_len, kv_len)
        return self.values


Bias = RelativePositionBias | AlibiBias | DenseBias


def _distances(query_offset: Array | int, q_len: int, kv_len: int) -> tuple[int, int]:
    """Returns the first distance needed and how many: all of them when the offset is traced."""
    if isinstance(query_offset, int):
        return -(q_len - 1) - query_offset, q_len + kv_len - 1
    return -(kv_len - 1), 2 * kv_len - 1


def _window(values_NL: Array, query_offset: Array | int, q_len: int, kv_len: int) -> Array:
    """Returns the [N, T + S - 1] part of all distances that a traced offset selects."""
    if isinstance(query_offset, int):
        return values_NL
    first = kv_len - q_len - jnp.asarray(query_offset, jnp.int32)
    return jax.lax.dynamic_slice_in_dim(values_NL, first, q_len + kv_len - 1, axis=1)


def toeplitz(values_NL: Array, q_len: int, kv_len: int) -> Array:
    """Returns [N, T, S] with element (t, s) = values[:, T - 1 - t + s].

    Rows of period L + 1 read at stride L shift by one: pads and reshapes only, so that the gradient
    is a plain sum as well.
    """
    heads, length = values_NL.shape
    rows = jnp.broadcast_to(
        jnp.pad(values_NL, ((0, 0), (0, 1)))[:, None, :], (heads, q_len, length + 1)
    )
    skewed = rows.reshape(heads, q_len * (length + 1))[:, : q_len * length]
    return skewed.reshape(heads, q_len, length)[:, :, q_len - 1 :][:, :, :kv_len]


def toeplitz_sum(squares_NTS: Array) -> Array:
    """Returns [N, T + S - 1]: the sums along diagonals, the transpose of `toeplitz`.

    The skewed rows are added by a product with ones, which XLA does at the speed of memory.
    """
    heads, q_len, kv_len = squares_NTS.shape
    length = q_len + kv_len - 1
    flat = jnp.pad(squares_NTS, ((0, 0), (0, 0), (q_len - 1, 0))).reshape(heads, -1)
    rows = jnp.pad(flat, ((0, 0), (0, q_len))).reshape(heads, q_len, length + 1)
    ones = jnp.ones((1, q_len), rows.dtype)
    sums = jnp.matmul(ones[None], rows, precision=jax.lax.Precision.HIGHEST)
    return sums[:, 0, :length]
