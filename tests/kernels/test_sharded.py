"""Attention on 8 devices is attention on one: rows, heads and queries split, keys gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chatyuan.errors import UserError
from chatyuan.kernels import (
    AlibiBias,
    AttentionMask,
    BlockSizes,
    DenseBias,
    RelativePositionBias,
    dot_product_attention,
    select_implementation,
    sharded_attention,
)
from chatyuan.kernels.attention import _is_placed
from chatyuan.sharding import make_mesh

B, N, H = 4, 8, 4
MESHES = {
    "rows_heads_queries": {"data": 2, "tensor": 2, "sequence": 2},
    "context_parallel": {"sequence": 8},
    "more_devices_than_key_heads": {"tensor": 8},
    "fsdp_context": {"fsdp": 4, "sequence": 2},
}
BIASES = {
    "two_sided": lambda table, _: RelativePositionBias(table, True, max_distance=12),
    "one_sided": lambda table, _: RelativePositionBias(table, False, max_distance=12),
    "alibi": lambda table, _: AlibiBias(jnp.abs(table[:, 0])),
    "array": lambda _, array: DenseBias(array),
    "none": lambda *_: None,
}


def operands(q_len, kv_len, kv_heads):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    query, key, value = (
        draw(B, q_len, N, H),
        draw(B, kv_len, kv_heads, H),
        draw(B, kv_len, kv_heads, H),
    )
    queries = np.sort(rng.integers(1, 4, (B, q_len)), axis=1)
    queries = np.where(np.arange(q_len) >= np.array([[q_len - 3]] * B), 0, queries)
    keys = queries if q_len == kv_len else np.sort(rng.integers(1, 4, (B, kv_len)), axis=1)
    segments = [jnp.asarray(x, jnp.int32) for x in (queries, keys)]
    return (query, key, value, draw(N, 8), draw(N, q_len, kv_len)), segments


def run(attend, kind, causal, arrays, segments):
    """Output, and the gradient of its square by every operand."""

    def loss(arrays, segments):
        query, key, value, table, array = arrays
        mask = AttentionMask(
            causal=causal, query_segment_ids=segments[0], key_segment_ids=segments[1]
        )
        out = attend(query, key, value, mask=mask, bias=BIASES[kind](table, array), scale=0.6)
        return jnp.sum(out**2), out

    return jax.jit(jax.grad(loss, has_aux=True))(arrays, segments)


def compare(mesh, implementation, kind, causal, lengths, kv_heads, **options):
    arrays, segments = operands(*lengths, kv_heads)
    alone = functools.partial(dot_product_attention, implementation="reference")
    together = functools.partial(
        sharded_attention, mesh=mesh, implementation=implementation, **options
    )
    expected = run(alone, kind, causal, arrays, segments)
    got = run(together, kind, causal, arrays, segments)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        limit = 1e-5 * max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, atol=limit)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["two_sided", "alibi", "none"])
def test_eight_devices_equal_one(mesh, kind):
    compare(make_mesh(MESHES[mesh]), "xla", kind, kind != "two_sided", (32, 32), 2)


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("kind", ["one_sided", "array"])
def test_context_parallel_with_every_bias(implementation, kind):
    compare(make_mesh({"sequence": 8}), implementation, kind, True, (32, 32), 4)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("mesh", ["rows_heads_queries", "fsdp_context"])
def test_kernels_run_on_every_device(implementation, mesh):
    blocks = {"interpret": True, "block_sizes": BlockSizes(16, 16)}
    compare(make_mesh(MESHES[mesh]), implementation, "two_sided", True, (32, 32), 2, **blocks)


def test_cross_attention_with_queries_split():
    mesh = make_mesh(MESHES["rows_heads_queries"])
    compare(mesh, "xla", "none", False, (16, 40), 4)


def test_heads_that_do_not_divide():
    x = jnp.zeros((B, 8, 6, H))
    with pytest.raises(UserError, match="6 heads, which do not divide over 4 devices .MESH data=2"):
        sharded_attention(x, x, x, mesh=make_mesh({"data": 2, "tensor": 4}))


def test_without_a_mesh_no_kernel_is_chosen_for_several_devices():
    """Generation from split parameters, for one: XLA cannot partition a kernel."""
    call = {"platform": "tpu", "q_len": 512, "kv_len": 512}
    assert select_implementation(**call)[0] == "pallas_tpu"
    name, reason = select_implementation(**call, placed=False)
    assert name == "dense" and "not pallas_tpu: arrays may be split" in reason
    assert not _is_placed()
    seen = []
    mesh = make_mesh({"data": 8})
    spec = PartitionSpec("data")
    inside = jax.shard_map(
        lambda x: seen.append(_is_placed()) or x, mesh=mesh, in_specs=spec, out_specs=spec
    )
    jax.jit(inside)(jnp.zeros(8))
    assert seen and all(seen)


def test_results_stay_where_their_queries_are_and_scores_are_never_whole():
    mesh = make_mesh({"data": 2, "tensor": 2, "sequence": 2})
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence", "tensor"))
    length = 64
    x = jax.device_put(jnp.ones((B, length, N, H)), place)
    table = jnp.ones((N, 8))

    def loss(x, table):
        bias = RelativePositionBias(table, True, max_distance=12)
        attend = functools.partial(sharded_attention, mesh=mesh, scale=1.0, bias=bias)
        return jnp.sum(attend(x, x, x, implementation="dense") ** 2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert step(x, table)[0].sharding.is_equivalent_to(place, 4)
    text = step.lower(x, table).compile().as_text()
    # A device multiplies its 2 rows, 4 heads and 32 queries by all 64 keys.
    assert "f32[2,4,32,64]" in text
    assert ",64,64]" not in text and "all-to-all" not in text
