"""Rows of a table that is split over a mesh; the table is never gathered."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from chatyuan.sharding import RULES

Array = jax.Array


def embed(table_VD: Array, tokens_BT: Array, mesh: Mesh | None = None) -> Array:
    """Returns the rows of the tokens, [B, T, D]; NaN for ids outside [0, V), which is noticed.

    On a mesh (vocabulary-parallel as in Megatron-LM, arXiv:1909.08053, section 3):
    1. Each device has rows of the vocabulary (`tensor`) and some features of them (`fsdp`). It
       looks up the tokens of all devices with other features, zero where the row is another's.
    2. The sum over the vocabulary's devices completes the rows.
    3. An all-to-all exchanges features of many tokens for all features of the device's own.
    The backward pass goes the same way back, and each part of the table gets its own gradient. That
    is an activation's bytes each way; gathering the table would be V * D, summing its gradient too.

    Args:
        table_VD: split as the axes "vocab" and "embed" of `RULES`.
        tokens_BT: int32, split as "batch" and "length".
        mesh: of `sharding.make_mesh`; None = one device.
    """
    if mesh is None:
        return jnp.take(table_VD, tokens_BT, axis=0, mode="fill")
    rows, length, vocab, features = (RULES[a] for a in ("batch", "length", "vocab", "embed"))

    def local(table: Array, tokens: Array) -> Array:
        every = jax.lax.all_gather(tokens, features, axis=0, tiled=True)
        first = jax.lax.axis_index(vocab).astype(every.dtype) * table.shape[0]
        here = every - first
        mine = (here >= 0) & (here < table.shape[0])
        found = jnp.take(table, jnp.where(mine, here, 0), axis=0, mode="clip")
        found = jax.lax.psum(jnp.where(mine[..., None], found, 0), vocab)
        found = jax.lax.all_to_all(found, features, split_axis=0, concat_axis=2, tiled=True)
        known = (tokens >= 0) & (tokens < table_VD.shape[0])
        return jnp.where(known[..., None], found, jnp.nan)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(vocab, features), PartitionSpec(rows, length)),
        out_specs=PartitionSpec(rows, length, None),
    )(table_VD, tokens_BT)
