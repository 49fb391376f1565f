"""Where arrays live: the mesh, one table from logical axis names to mesh axes, and what follows.

A model never names a mesh axis and nothing else decides a placement. The same code runs on one CPU,
on 8 fake ones (the tests) and on several hosts: XLA's partitioner inserts the communication.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chatyuan.errors import UserError, did_you_mean

Tree = Any
Rules = Mapping[str, tuple[str, ...]]

# data: copies of the model. fsdp: copies that share its memory (ZeRO-3). tensor: slices of every
# matrix. sequence: slices of every sequence. stage: slices of the stack of layers (memory only).
MESH_AXES = ("data", "fsdp", "tensor", "sequence", "stage")

# Logical axis name -> mesh axes; an empty tuple = never split.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "kv": (),
    "relpos_buckets": (),
    "layers": ("stage",),
    "stack": (),
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a MESH setting, with all of MESH_AXES (those not named have size 1).

    Args:
      shape: mesh axis -> number of parts, such as `{"data": -1, "tensor": 2}`; one of them may be
        -1, all the devices that the others leave.
      devices: default, all devices of all hosts.

    Raises:
      UserError: an axis that does not exist, sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size in shape.items():
        if name not in MESH_AXES:
            raise UserError(
                f"MESH has the axis {name!r}; the axes are {', '.join(MESH_AXES)}."
                f"{did_you_mean(name, MESH_AXES)}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise UserError(
                f"MESH {name} = {size!r} must be a positive number, or -1 for the rest."
            )
    free = [name for name, size in shape.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"MESH has -1 for {' and '.join(free)}; only one axis can take the rest.")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(_wrong_product(shape, fixed, len(devices)))
    sizes = {name: shape.get(name, 1) for name in MESH_AXES}
    if free:
        sizes[free[0]] = len(devices) // fixed
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def _wrong_product(shape: Mapping[str, int], fixed: int, count: int) -> str:
    written = " ".join(f"{name}={size}" for name, size in shape.items())
    others = math.prod(size for name, size in shape.items() if name != "data" and size != -1)
    fitting = {name: size for name, size in shape.items() if name != "data" and size != -1}
    if count % others:
        fitting = {}
    suggestion = {"data": -1, **fitting}
    return (
        f"MESH {written} needs {'a multiple of ' if -1 in shape.values() else ''}{fixed} devices "
        f'but there are {count}; use --gin.MESH="{suggestion}" (-1 = all the rest).'
    )


def partition_spec(
    axes: Sequence[str | None],
    mesh: Mesh,
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
                    f"the mesh axis {mesh_axis!r} (MESH {_describe(mesh)}); set MESH {mesh_axis} "
                    "to 1."
                )
            taken[mesh_axis] = str(axis)
        parts = math.prod(mesh.shape[m] for m in mesh_axes)
        if shape is not None and shape[dimension] % parts:
            raise UserError(
                f"{name}: its axis {axis!r} of size {shape[dimension]} does not divide over "
                f"{parts} devices (MESH {_describe(mesh)}); set MESH {'*'.join(mesh_axes)} to a "
                f"divisor of {shape[dimension]}."
            )
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def shardings(abstract: Tree, logical_axes: Tree, mesh: Mesh, *, rules: Rules = RULES) -> Tree:
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


def state_shardings(
    abstract_state: Any, logical_axes: Tree, mesh: Mesh, *, rules: Rules = RULES
) -> Any:
    """Returns the shardings of a TrainState: all that belongs to a parameter lies where it lies.

    An array belongs to a parameter if its path in the state contains the parameter's path.
    Dimensions that an optimizer has reduced to 1 are not split; everything else (steps, counts) is
    on every device.

    Args:
      abstract_state: arrays or shapes with a field `params`, such as `jax.eval_shape` of
        `chatyuan.train.state.init_state`.
      logical_axes: the tree of parameters with a tuple of logical axis names per parameter.
      mesh: of `make_mesh`.
      rules: logical axis -> mesh axes.
    """
    parameters = {}
    for path, (shape, axes) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda p, axes: (p.shape, axes), abstract_state.params, logical_axes),
        is_leaf=lambda node: isinstance(node, tuple),
    ):
        parameters[tuple(map(str, path))] = (shape, axes)

    def one(path: tuple, leaf: Any) -> NamedSharding:
        keys = tuple(map(str, path))
        windows = (
            keys[start:stop] for start in range(len(keys)) for stop in range(len(keys), start, -1)
        )
        owner = next((window for window in windows if window in parameters), None)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        axes = _kept_axes(leaf.shape, *parameters[owner])
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition_spec(axes, mesh, shape=leaf.shape, name=name, rules=rules)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def _kept_axes(
    shape: Sequence[int], parameter_shape: Sequence[int], axes: Sequence[str | None]
) -> tuple[str | None, ...]:
    """The parameter's axis names where the array has the parameter's size, None elsewhere."""
    if len(shape) != len(parameter_shape):
        return (None,) * len(shape)
    return tuple(
        axis if size == full else None
        for size, full, axis in zip(shape, parameter_shape, axes, strict=True)
    )


def shard_batch(
    host_batch: Mapping[str, np.ndarray], mesh: Mesh, *, rules: Rules = RULES
) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch of which this process holds its own rows.

    Dimension 0 is split over the axes of "batch", dimension 1 over those of "length".

    Args:
      host_batch: [rows of this process, length, ...] per feature; every process has as many rows.
      mesh: of `make_mesh`.
      rules: logical axis -> mesh axes.

    Raises:
      UserError: rows or lengths that do not divide over the mesh.
    """
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(np.shape(value), mesh, name=name, rules=rules), np.asarray(value)
        )
        for name, value in host_batch.items()
    }


def abstract_batch(
    host_batch: Mapping[str, np.ndarray], mesh: Mesh, *, rules: Rules = RULES
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and places of what `shard_batch` would return."""
    abstract = {}
    for name, value in host_batch.items():
        place = batch_sharding(value.shape, mesh, name=name, rules=rules)
        shape = _global_shape(value.shape)
        abstract[name] = jax.ShapeDtypeStruct(shape, value.dtype, sharding=place)
    return abstract


def batch_sharding(
    local_shape: Sequence[int], mesh: Mesh, *, name: str = "batch", rules: Rules = RULES
) -> NamedSharding:
    """Returns the sharding of a feature of which each process holds `local_shape`.

    Raises:
      UserError: see `shard_batch`.
    """
    global_shape = _global_shape(local_shape)
    check_batch(global_shape[0], mesh, rules=rules)
    axes = ("batch", "length", *(None,) * len(local_shape))[: len(local_shape)]
    spec = partition_spec(axes, mesh, shape=global_shape, name=name, rules=rules)
    return NamedSharding(mesh, spec)


def _global_shape(local_shape: Sequence[int]) -> tuple[int, ...]:
    return (local_shape[0] * jax.process_count(), *local_shape[1:])


def check_batch(size: int, mesh: Mesh, microbatches: int = 1, *, rules: Rules = RULES) -> None:
    """Checks that a global batch of `size` sequences divides over the mesh and the microbatches.

    Raises:
      UserError: it does not; the message proposes sizes that do.
    """
    used = [name for name in rules["batch"] if mesh.shape[name] > 1]
    shards = math.prod(mesh.shape[name] for name in used)
    if size % (shards * microbatches) == 0:
        return
    described = " ".join(f"{name}={mesh.shape[name]}" for name in used)
    into = [f"{shards} data shards (mesh {described})"] if shards > 1 else []
    into += [f"{microbatches} microbatches"] if microbatches > 1 else []
    below = size - size % (shards * microbatches)
    above = below + shards * microbatches
    raise UserError(
        f"train batch of {size} sequences does not divide over {' times '.join(into)}; "
        f"use {f'{below} or {above}' if below else above}: --gin.BATCH_SIZE={below or above}"
    )


def with_shardings(abstract: Tree, placement: Tree) -> Tree:
    """Returns a tree of `jax.ShapeDtypeStruct`s that know their sharding."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        placement,
    )


def bytes_per_device(abstract: Tree, placement: Tree) -> int:
    """Returns the bytes that one device holds of arrays with these shapes and shardings."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        abstract,
        placement,
    )
    return sum(jax.tree.leaves(sizes))


def _describe(mesh: Mesh) -> str:
    return " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
