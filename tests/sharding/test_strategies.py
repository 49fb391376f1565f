"""Every strategy trains as one device does, and each device holds the part that it should."""

import dataclasses

import jax
import numpy as np
import pytest
from strategies import (
    ARCHITECTURES,
    LENGTH,
    QUICK,
    ROWS,
    STRATEGIES,
    TINY,
    batch,
    run,
    weights,
)

from chatyuan import sharding
from chatyuan.models import build
from chatyuan.models.communication import step_communication
from chatyuan.models.loss import supervised_loss

# By default every strategy with one architecture; the rest of the matrix when there is time.
FIRST = dict.fromkeys(STRATEGIES, "prefix_lm") | dict.fromkeys(
    ("zero3", "sequence"), "encoder_decoder"
)
DEFAULT = {pair for pair in FIRST.items() if pair[0] not in ("hybrid_zero2", "pipeline_context")}
MATRIX = [
    pytest.param(
        name,
        architecture,
        id=f"{name}-{architecture}",
        marks=() if (name, architecture) in DEFAULT else pytest.mark.slow,
    )
    for name in STRATEGIES
    if name not in ("one device", "pipeline_circular")
    for architecture in ARCHITECTURES
]

# Of another depth than the rest: tests/models/test_model_pipeline.py compares it with one device.
CIRCULAR = [
    pytest.param("pipeline_circular", one, marks=pytest.mark.slow) for one in ARCHITECTURES
]


def close(actual, expected, what):
    """Equal to 1e-5 of the largest value of each array."""
    for (path, value), other in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(expected)),
        jax.tree.leaves(jax.device_get(actual)),
        strict=True,
    ):
        limit = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(other, value, rtol=0, atol=limit, err_msg=f"{what} {path}")


def bytes_on_one_device(tree):
    """What really lies on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.parametrize(("name", "architecture"), MATRIX)
def test_eight_devices_equal_one(name, architecture):
    """Loss, gradients and the state after a step, dropout included."""
    got = run(name, architecture)
    alone = run("one device", architecture, got.strategy.microbatches)
    assert got.mesh.size == 8 and alone.mesh.size == 1
    np.testing.assert_allclose(got.loss, alone.loss, rtol=1e-5)
    close(got.gradients, alone.gradients, "gradient")
    close(got.state.params, alone.state.params, "parameter")
    close(got.state.ema, alone.state.ema, "average")


@pytest.mark.parametrize(("name", "architecture"), MATRIX)
def test_each_device_holds_its_share(name, architecture):
    got = run(name, architecture)
    stated = sharding.bytes_per_device(got.state, got.placement.state)
    assert bytes_on_one_device(got.state) == stated, "nothing moves during a step"
    if got.strategy.falls is None:
        return
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(got.state.params))
    parameters, gradients, optimizer = got.strategy.falls
    held = {
        "parameters": (bytes_on_one_device(got.state.params), whole / parameters),
        "gradients": (bytes_on_one_device(got.gradients), whole / gradients),
        # AdamW: two moments and a count.
        "optimizer state": (bytes_on_one_device(got.state.opt_state), 2 * whole / optimizer),
        "average": (bytes_on_one_device(got.state.ema), whole / optimizer),
    }
    for what, (found, expected) in held.items():
        assert found == pytest.approx(expected, rel=0.02), what


def test_the_adaptive_hybrid_uses_the_budget_and_no_more():
    got = run("adaptive", FIRST["adaptive"])
    budget = got.strategy.config.memory_budget * 2**30
    held = bytes_on_one_device(got.state) + bytes_on_one_device(got.gradients)
    # The average is held too; what fits is left whole.
    assert 0.8 * budget < held <= budget
    axes, params = got.model.logical_axes(), got.model.abstract_params()
    splittable = sharding.shardings(params, axes, got.mesh)
    assert 0 < len(got.placement.whole) < len(jax.tree.leaves(splittable))
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(got.state.params),
        jax.tree.leaves(splittable),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not place.is_fully_replicated:
            assert leaf.sharding.is_fully_replicated == (name in got.placement.whole)


def by_kind(collectives, mesh):
    """Payload bytes by (kind, axes), with sums over fsdp and other axes written in one way.

    XLA sums over all of them and cuts, or sums over `fsdp`, cuts, and sums the part over the rest.
    """
    totals = {}
    for one in collectives:
        pieces = [(one.axes, one.payload)]
        if one.kind == "all-reduce" and "fsdp" in one.axes and len(one.axes) > 1:
            rest = tuple(axis for axis in one.axes if axis != "fsdp")
            pieces = [(("fsdp",), one.payload), (rest, one.payload // mesh.shape["fsdp"])]
        for axes, payload in pieces:
            totals[one.kind, axes] = totals.get((one.kind, axes), 0) + payload * one.times
    return totals


@pytest.mark.parametrize(("name", "architecture"), [*MATRIX, *CIRCULAR])
def test_compiled_collectives_are_the_stated_ones(name, architecture):
    """Kind by kind and axis by axis; what is not stated (scalars, ids) is next to nothing."""
    got = run(name, architecture)
    compiled = by_kind(sharding.read_collectives(got.hlo, got.mesh), got.mesh)
    stated = by_kind(
        step_communication(
            got.model,
            got.placement,
            got.mesh,
            rows=ROWS,
            input_length=LENGTH,
            target_length=0 if architecture == "prefix_lm" else LENGTH,
            microbatches=got.strategy.microbatches,
            optimized=False,
        ),
        got.mesh,
    )
    everything = sum(stated.values())
    for key in compiled.keys() | stated.keys():
        found, expected = compiled.get(key, 0), stated.get(key, 0)
        # XLA gathers the head once for all microbatches, since it does not change between them.
        assert found == pytest.approx(expected, rel=0.08, abs=0.01 * everything), key
    assert sum(compiled.values()) == pytest.approx(everything, rel=0.03)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_the_same_on_any_mesh(architecture):
    rows = batch(architecture)

    def loss(rate, shape, devices, **more):
        config = dataclasses.replace(
            TINY, architecture=architecture, dropout_rate=rate, **more,
            num_encoder_layers=1, num_decoder_layers=1,
        )  # fmt: skip
        model, mesh = build(config), sharding.make_mesh(shape, jax.devices()[:devices])
        first = lambda x, like: x[: like.shape[0]]  # noqa: E731
        params = jax.tree.map(first, weights(architecture), model.abstract_params())
        places = sharding.shardings(params, model.logical_axes(), mesh)
        loss_fn = supervised_loss(model, mesh=mesh)
        function = jax.jit(lambda p, b: loss_fn(p, b, jax.random.key(3))[0], compiler_options=QUICK)
        return float(function(jax.device_put(params, places), sharding.shard_batch(rows, mesh)))

    alone = loss(0.3, {"data": 1}, 1)
    mesh = {"data": 2, "tensor": 2, "sequence": 2}
    np.testing.assert_allclose(loss(0.3, mesh, 8, sequence_parallel=True), alone, rtol=1e-5)
    assert abs(loss(0.0, {"data": 1}, 1) / alone - 1) > 1e-3
