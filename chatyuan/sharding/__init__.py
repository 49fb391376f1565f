"""Where arrays live: the mesh, the rules table, the strategy, and the communication they cost."""

from chatyuan.sharding.batch import (
    abstract_batch,
    batch_sharding,
    check_batch,
    check_lengths,
    process_rows,
    shard_ahead,
    shard_batch,
)
from chatyuan.sharding.communication import Collective, Use, parameter_communication, summed
from chatyuan.sharding.compiled import read_collectives
from chatyuan.sharding.mesh import MESH_AXES, abstract_mesh, describe, make_mesh, mesh_sizes
from chatyuan.sharding.rules import (
    RULES,
    AnyMesh,
    Rules,
    bytes_per_device,
    constrain,
    constrain_activation,
    partition_spec,
    rules_here,
    shardings,
    with_shardings,
)
from chatyuan.sharding.strategy import Placement, ShardingConfig, place, state_shardings

__all__ = [
    "MESH_AXES",
    "RULES",
    "AnyMesh",
    "Collective",
    "Placement",
    "Rules",
    "ShardingConfig",
    "Use",
    "abstract_batch",
    "abstract_mesh",
    "batch_sharding",
    "bytes_per_device",
    "check_batch",
    "check_lengths",
    "constrain",
    "constrain_activation",
    "describe",
    "make_mesh",
    "mesh_sizes",
    "parameter_communication",
    "partition_spec",
    "place",
    "read_collectives",
    "process_rows",
    "rules_here",
    "shard_ahead",
    "shard_batch",
    "shardings",
    "state_shardings",
    "summed",
    "with_shardings",
]
