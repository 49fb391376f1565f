"""The reader of compiled programs, on programs of known communication and on text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from chatyuan import sharding
from chatyuan.sharding.communication import Collective
from chatyuan.sharding.compiled import _groups

MESH = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
WRITTEN = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), ("fsdp",), 2 * 128),
    "all-reduce": (lambda x: jax.lax.psum(x, ("data", "tensor")), ("data", "tensor"), 128),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), ("tensor",), 128
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True), ("data",), 128
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), ("fsdp",), 128
    ),
}  # fmt: skip


def compiled(function, loops=None):
    """The collectives of a function of [4, 8] float32 on each device."""

    def local(x):
        if loops is None:
            return function(x)
        return jax.lax.fori_loop(0, loops, lambda _, y: jnp.sin(function(y)), x)

    call = jax.shard_map(
        local, mesh=MESH, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    hlo = jax.jit(call).lower(jnp.ones((4, 8))).compile().as_text()
    return sharding.read_collectives(hlo, MESH)


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_kind_is_read(kind):
    function, axes, payload = WRITTEN[kind]
    [found] = compiled(function)
    assert found == Collective(kind, axes, payload, 4 if len(axes) == 2 else 2)


def test_loops_count_as_often_as_they_run():
    [found] = compiled(lambda x: jax.lax.psum(x, "fsdp"), loops=5)
    assert found == Collective("all-reduce", ("fsdp",), 128, 2, times=5)
    assert sharding.summed([found]) == {"all-reduce": 640}


def test_bytes_on_the_wire():
    sent = lambda kind, devices: Collective(kind, ("data",), 800, devices, 2).wire_bytes  # noqa: E731
    assert sent("all-gather", 8) == sent("reduce-scatter", 8) == sent("all-to-all", 8) == 1400
    assert sent("all-reduce", 8) == 2800
    assert sent("collective-permute", 2) == 1600


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x",
            [[0, 2], [1, 3]],
        ),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("no groups: all", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_spelling(text, expected):
    found = {tuple(sorted(group)) for group in _groups(text, 4)}
    assert found == {tuple(group) for group in expected}


def test_background_collectives_are_counted_once():
    hlo = """HloModule m
ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %d = f32[8]{0} all-gather-done(%s)
}
"""
    assert sharding.read_collectives(hlo, MESH) == [Collective("all-gather", ("tensor",), 32, 2)]


def test_what_a_tpu_writes_around_collectives():
    """Its reduce-scatter is a fusion of an all-reduce; asynchronous ones are computations."""
    hlo = """HloModule m
%all-reduce-scatter.1 (a: f32[8]) -> f32[4] {
  %a = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %c = f32[4]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}

%async (p.1: f32[4]) -> f32[8] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p.1), replica_groups=[4,2]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %s = ((f32[4]{0}), f32[8]{0}, u32[]) async-start(%f), calls=%async
  ROOT %d = f32[8]{0} async-done(%s), calls=%async
}
"""
    assert sharding.read_collectives(hlo, MESH) == [
        Collective("reduce-scatter", ("tensor",), 32, 2),
        Collective("all-gather", ("tensor",), 32, 2),
    ]


def test_a_scattered_sum_costs_what_a_whole_one_does():
    """ZeRO-1 and 2 add no volume to data parallelism; ZeRO-3 adds half."""
    shape = {"w": jax.ShapeDtypeStruct((16, 64), np.float32)}
    axes = {"w": ("embed", "mlp")}

    def sent(mesh, stage):
        mesh = sharding.make_mesh(mesh)
        state = _State(params=shape, opt_state=shape, ema=None)
        placement = sharding.place(state, axes, mesh, sharding.ShardingConfig(stage))
        found = sharding.parameter_communication(shape, placement, mesh)
        return sum(one.wire_bytes for one in found)

    alone = sent({"data": 8}, 0)
    assert sent({"data": 8}, 1) == sent({"data": 8}, 2) == alone
    assert sent({"fsdp": 8}, 0) == 1.5 * alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    params: dict
    opt_state: dict
    ema: None
