"""Attention on a mesh: every device works off its own rows, heads and queries.

XLA's partitioner cannot look into a kernel, so the call is placed by `jax.shard_map`. Rows, heads
and queries need nothing of each other. Keys and values of a split sequence are gathered
(context parallelism as in Llama 3, arXiv:2407.21783, section 3.3.2): [S, K, H] of a row is small
beside what it is multiplied by, and masks stay intervals of global key indices. The backward pass
is the transpose: gradients of keys and values are summed over the devices that shared them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from chatyuan.errors import UserError
from chatyuan.kernels.attention import dot_product_attention
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.relative_bias import AlibiBias, Bias, DenseBias, RelativePositionBias
from chatyuan.sharding import RULES, describe, rules_here

Array = jax.Array


def sharded_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    mask: AttentionMask | None = None,
    bias: Bias | None = None,
    **options: Any,
) -> Array:
    """Returns `dot_product_attention` of arrays that are split over a mesh as its `RULES` say.

    Args:
        query: [B, T, N, H], B split over data and fsdp, T over sequence, N over tensor.
        key: [B, S, K, H], likewise. Key heads that do not divide over tensor are repeated first.
        value: [B, S, K, H].
        mesh: of `sharding.make_mesh`; B, T, S and N must divide over their axes.
        mask: of the whole arrays, as without a mesh.
        bias: likewise.
        **options: of `dot_product_attention`: scale, implementation, ...

    Raises:
        UserError: N does not divide.
    """
    batch, q_len, heads, _ = query.shape
    kv_len, kv_heads = key.shape[1:3]
    parts = _parts(mesh, "heads")
    if heads % parts:
        raise UserError(
            f"attention has {heads} heads, which do not divide over {parts} devices (MESH "
            f"{describe(mesh)}); set MESH tensor to a divisor of {heads}."
        )
    start, end = (mask or AttentionMask()).intervals(batch, q_len, kv_len)
    if kv_heads % parts:
        key, value = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (key, value))

    rules = rules_here()
    rows, length, heads_axis = rules["batch"], rules["length"], rules["heads"]
    query_spec = PartitionSpec(rows, length, heads_axis)
    key_spec = PartitionSpec(rows, None, heads_axis)
    interval = PartitionSpec(rows, length)
    # [N, T, S] of a DenseBias, [N, buckets] of a table or [N] of slopes.
    field = _array_field(bias)
    array = None if field is None else getattr(bias, field)
    bias_spec = PartitionSpec(heads_axis, *((length,) if field == "values" else ()))

    def local(query: Array, key: Array, value: Array, *rest: Array | None) -> Array:
        start, end, array = rest
        here = None if field is None else dataclasses.replace(bias, **{field: array})
        if field in ("table", "slopes") and _parts(mesh, "length") > 1:
            # Every device has all keys; its queries begin where those of the one before it end.
            first = jax.lax.axis_index(length) * query.shape[1]
            here = dataclasses.replace(here, query_offset=here.query_offset + first)
        mask = AttentionMask(key_start=start, key_end=end)
        return dot_product_attention(query, key, value, mask=mask, bias=here, **options)

    # Inside a region that is manual already, as over stages, it is entered over the other axes.
    outer = jax.sharding.get_abstract_mesh()
    nested = bool(outer.manual_axes)
    return jax.shard_map(
        local,
        mesh=None if nested else mesh,
        axis_names=set(mesh.axis_names) - set(outer.manual_axes),
        in_specs=(query_spec, key_spec, key_spec, interval, interval, bias_spec),
        out_specs=query_spec,
        check_vma=False,  # kernels do not say over which axes their results differ
    )(query, key, value, start, end, array)


def attention_on(mesh: Mesh | None) -> Callable[..., Array]:
    """Returns `dot_product_attention` for arrays of that mesh; None = of one device."""
    if mesh is None:
        return dot_product_attention
    return functools.partial(sharded_attention, mesh=mesh)


def _parts(mesh: Mesh, axis: str) -> int:
    return math.prod(mesh.shape[name] for name in RULES[axis])


def _array_field(bias: Bias | None) -> str | None:
    """The name of the array that a bias holds."""
    names = {RelativePositionBias: "table", AlibiBias: "slopes", DenseBias: "values"}
    return None if bias is None else names[type(bias)]
