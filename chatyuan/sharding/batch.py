"""From the rows that a process has read to the global arrays of a step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from chatyuan.errors import UserError
from chatyuan.sharding.rules import RULES, Rules, partition_spec


def shard_batch(
    host_batch: Mapping[str, np.ndarray], mesh: Mesh, *, rules: Rules = RULES
) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch of which this process holds its own rows.

    Dimension 0 is split over the axes of "batch", dimension 1 over those of "length".

    Args:
      host_batch: [rows of this process, length, ...] per feature: those of `process_rows`.
      mesh: of `make_mesh`.
      rules: logical axis -> mesh axes.

    Raises:
      UserError: rows or lengths that do not divide over the mesh.
    """
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(np.shape(value), mesh, name=name, rules=rules),
            np.asarray(value),
            _global_shape(np.shape(value), mesh, rules),
        )
        for name, value in host_batch.items()
    }


def shard_ahead(
    host_batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yields `shard_batch` of each; a thread makes the next one while the one before is used."""

    def make() -> dict[str, jax.Array] | None:
        batch = next(host_batches, None)
        return None if batch is None else shard_batch(batch, mesh)

    with ThreadPoolExecutor(1, "batches") as thread:
        ahead = thread.submit(make)
        while (ready := ahead.result()) is not None:
            ahead = thread.submit(make)
            yield ready


def process_rows(
    mesh: Mesh, batch_size: int, *, rules: Rules = RULES
) -> tuple[tuple[int, int], ...]:
    """Returns the (start, stop) parts of a global batch that the devices of this process hold.

    Neighbours in a mesh need not be neighbours in a host (on TPUs they follow the wiring), and
    where "tensor" reaches over hosts several of them hold the same rows.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    check_batch(batch_size, mesh, rules=rules)
    place = NamedSharding(mesh, partition_spec(("batch",), mesh, rules=rules))
    held = place.addressable_devices_indices_map((batch_size,)).values()
    parts: list[tuple[int, int]] = []
    for start, stop in sorted({index[0].indices(batch_size)[:2] for index in held}):
        if parts and parts[-1][1] == start:
            start = parts.pop()[0]
        parts.append((start, stop))
    return tuple(parts)


def abstract_batch(
    host_batch: Mapping[str, np.ndarray], mesh: Mesh, *, rules: Rules = RULES
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and places of what `shard_batch` would return."""
    abstract = {}
    for name, value in host_batch.items():
        place = batch_sharding(value.shape, mesh, name=name, rules=rules)
        shape = _global_shape(value.shape, mesh, rules)
        abstract[name] = jax.ShapeDtypeStruct(shape, value.dtype, sharding=place)
    return abstract


def batch_sharding(
    local_shape: Sequence[int], mesh: Mesh, *, name: str = "batch", rules: Rules = RULES
) -> NamedSharding:
    """Returns the sharding of a feature of which each process holds `local_shape`.

    Raises:
      UserError: see `shard_batch`.
    """
    global_shape = _global_shape(local_shape, mesh, rules)
    check_batch(global_shape[0], mesh, rules=rules)
    axes = ("batch", "length", *(None,) * len(local_shape))[: len(local_shape)]
    spec = partition_spec(axes, mesh, shape=global_shape, name=name, rules=rules)
    return NamedSharding(mesh, spec)


def _global_shape(local_shape: Sequence[int], mesh: Mesh, rules: Rules) -> tuple[int, ...]:
    """The shape of a feature of which this process holds `local_shape`, all lengths included."""
    if not mesh.is_multi_process:
        return tuple(local_shape)
    shards = math.prod(mesh.shape[name] for name in rules["batch"])
    held = sum(stop - start for start, stop in process_rows(mesh, shards, rules=rules))
    return (local_shape[0] * shards // held, *local_shape[1:])


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


def check_lengths(
    host_batch: Mapping[str, np.ndarray], mesh: Mesh, *, sequence_parallel: bool = False
) -> None:
    """Checks that the lengths of all features divide over the mesh.

    Args:
      host_batch: [rows of this process, length, ...] per feature.
      mesh: of `make_mesh`.
      sequence_parallel: whether `tensor` splits lengths too.

    Raises:
      UserError: naming the feature whose length does not.
    """
    axis = "norm_length" if sequence_parallel else "length"
    for name, value in host_batch.items():
        partition_spec((None, axis)[: np.ndim(value)], mesh, shape=np.shape(value)[:2], name=name)
