"""What decoding remembers: keys and values per layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """Keys and values of R decoder rows that belong to B prompts, R = B * G, prompt-major.

    All rows write at the same slot; prompts of different lengths are aligned on the right, so that
    a row's live keys are the interval [start, index). Layers are separate arrays because XLA then
    updates each in place.

    Attributes:
        self_keys, self_values: per layer [R, K, H, S] and [R, K, S, H]: what the two products of
            attention read without a transpose.
        start: [R] int32, the first live slot of each row.
        index: int32 scalar, the next slot to write.
        head: [D, V] in the compute dtype, `head_weight` made once.
        weights: per layer the decoder's parameters, or () to slice the stacked ones at every step:
            XLA fuses the slice into the product on GPU and TPU, but copies it on CPU.
        cross_keys, cross_values: per layer [B, K, H, S_in] and [B, K, S_in, H], shared by the G
            rows of a prompt; empty tuples without an encoder.
        cross_lengths: [B] int32 live encoder positions, or None.
    """

    self_keys: tuple[Array, ...]
    self_values: tuple[Array, ...]
    start: Array
    index: Array
    head: Array
    weights: tuple[Any, ...] = ()
    cross_keys: tuple[Array, ...] = ()
    cross_values: tuple[Array, ...] = ()
    cross_lengths: Array | None = None

    def expand(self, count: int) -> "DecodeCache":
        """Returns the cache with every row repeated `count` times, copies of a row adjacent."""
        return self._map_rows(lambda x: jnp.repeat(x, count, axis=0))

    def take(self, rows: Array) -> "DecodeCache":
        """Returns the cache whose row r is this one's `rows[r]`; rows must stay with their prompt.

        Args:
            rows: [R'] int32; R' must still be a multiple of the number of prompts.
        """
        # "clip" only because the default would compare every row to mark those out of range.
        return self._map_rows(lambda x: jnp.take(x, rows, axis=0, mode="clip"))

    def _map_rows(self, function: Callable[[Array], Array]) -> "DecodeCache":
        return dataclasses.replace(
            self,
            self_keys=tuple(map(function, self.self_keys)),
            self_values=tuple(map(function, self.self_values)),
            start=function(self.start),
        )
