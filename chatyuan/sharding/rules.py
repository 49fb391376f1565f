"""One table from logical axis names to mesh axes, and the placements that follow from it.

A model never names a mesh axis and nothing else decides a placement. The same code runs on one CPU,
on 8 fake ones (the tests) and on several hosts: XLA's partitioner inserts the communication.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from chatyuan.errors import UserError
from chatyuan.sharding.mesh import describe

Tree = Any
AnyMesh = Mesh | AbstractMesh
Rules = Mapping[str, tuple[str, ...]]

# Logical axis name -> mesh axes; an empty tuple = never split.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    # Sequence parallelism: between the matrices of a block, `tensor` splits the length too.
    "norm_length": ("sequence", "tensor"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "kv": (),
    "adapter": (),
    "relpos_buckets": (),
    "layers": ("stage",),
    "stack": (),
}


def rules_here() -> Rules:
    """Returns RULES without the mesh axes over which the region being traced is manual already."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return RULES
    return {name: tuple(a for a in axes if a not in manual) for name, axes in RULES.items()}


def partition_spec(
    axes: Sequence[str | None],
    mesh: AnyMesh,
    *,
    shape: Sequence[int] | None = None,
    name: str = "array",
    rules: Rules = RULES,
) -> PartitionSpec:
    """Returns the spec of an array with these logical axes (None = never split).

    Args:
      axes: one name per dimension.
      mesh: of `make_mesh`.
      shape: if given, checked to divide over the mesh.
      name: of the array, for messages.
      rules: logical axis -> mesh axes.

    Raises:
      UserError: a dimension that does not divide, or two dimensions on one mesh axis.
    """
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for dimension, axis in enumerate(axes):
        assert axis is None or axis in rules, f"{name}: logical axis {axis!r} has no rule"
        # A mesh axis of size 1 splits nothing, and so never conflicts.
        mesh_axes = tuple(m for m in (rules[axis] if axis else ()) if mesh.shape[m] > 1)
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise UserError(
                    f"{name}: the axes {taken[mesh_axis]!r} and {axis!r} would both be split over "
                    f"the mesh axis {mesh_axis!r} (MESH {describe(mesh)}); set MESH {mesh_axis} "
                    "to 1."
                )
            taken[mesh_axis] = str(axis)
        parts = math.prod(mesh.shape[m] for m in mesh_axes)
        if shape is not None and shape[dimension] % parts:
            raise UserError(
                f"{name}: its axis {axis!r} of size {shape[dimension]} does not divide over "
                f"{parts} devices (MESH {describe(mesh)}); set MESH {'*'.join(mesh_axes)} to a "
                f"divisor of {shape[dimension]}."
            )
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def shardings(abstract: Tree, logical_axes: Tree, mesh: AnyMesh, *, rules: Rules = RULES) -> Tree:
    """Returns a NamedSharding for every array of a tree.

    Args:
      abstract: tree of arrays or `jax.ShapeDtypeStruct`s.
      logical_axes: the same tree with a tuple of logical axis names per array.
      mesh: of `make_mesh`.
      rules: logical axis -> mesh axes.
    """

    def one(path: tuple, leaf: Any, axes: Sequence[str | None]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert len(axes) == len(leaf.shape), (name, axes, leaf.shape)
        spec = partition_spec(axes, mesh, shape=leaf.shape, name=name, rules=rules)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, abstract, logical_axes)


def with_shardings(abstract: Tree, placement: Tree) -> Tree:
    """Returns a tree of `jax.ShapeDtypeStruct`s that know their sharding."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        placement,
    )


def constrain_activation(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Returns the array, inside `jax.jit`, where the rules table puts its axes; no mesh = as it is.

    Raises:
      UserError: a dimension that does not divide.
    """
    if mesh is None:
        return x
    spec = partition_spec(
        axes,
        mesh,
        shape=x.shape,
        name=f"activation {'x'.join(map(str, x.shape))}",
        rules=rules_here(),
    )
    # Inside a region that is manual over some axes only the mesh of that region may be named.
    outer = jax.sharding.get_abstract_mesh()
    place = NamedSharding(outer if outer.manual_axes else mesh, spec)
    return jax.lax.with_sharding_constraint(x, place)


def bytes_per_device(abstract: Tree, placement: Tree) -> int:
    """Returns the bytes that one device holds of arrays with these shapes and shardings."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        abstract,
        placement,
    )
    return sum(jax.tree.leaves(sizes))


def constrain(tree: Tree, placement: Tree | None) -> Tree:
    """Returns the arrays, inside `jax.jit`, at these places; None leaves it to XLA."""
    return tree if placement is None else jax.lax.with_sharding_constraint(tree, placement)
