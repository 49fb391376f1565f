"""Pipelined on fake devices == not pipelined, and each stage has and does its share."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import PER_LAYER, PREFIX, TINY, encoder_decoder_batch, prefix_batch, random_params

from chatyuan import sharding
from chatyuan.errors import UserError
from chatyuan.models import build
from chatyuan.models.loss import supervised_loss
from chatyuan.models.pipeline import bubble_fraction, check_pipeline, circulate

LAYERS, ROWS = 4, 8
PAIR = dataclasses.replace(TINY, num_encoder_layers=LAYERS, num_decoder_layers=LAYERS)
ONE = dataclasses.replace(PREFIX, num_decoder_layers=LAYERS)
# name -> (model, mesh)
CASES = {
    "t5": (PAIR, {"data": 2, "stage": 4}),
    "t5_circular": (
        dataclasses.replace(PAIR, pipeline_repeats=2, pipeline_microbatches=4, scan_layers=True),
        {"data": 2, "tensor": 2, "stage": 2},
    ),
    "umt5_per_layer_full": (
        dataclasses.replace(PAIR, position=PER_LAYER, remat="full", scan_layers=True),
        {"fsdp": 2, "tensor": 2, "stage": 2},
    ),
    "prefix_rope_circular": (
        dataclasses.replace(ONE, position="rope", pipeline_repeats=2, remat="selective"),
        {"data": 2, "tensor": 2, "stage": 2},
    ),
    "prefix_bias_dots": (
        dataclasses.replace(ONE, scan_layers=True, remat="dots"),
        {"tensor": 2, "stage": 4},
    ),
}


def packed_batch(config):
    """Rows of two or three packed examples, no two rows alike."""
    prefix = config.architecture == "prefix_lm"
    batch = (prefix_batch if prefix else encoder_decoder_batch)(rows=ROWS)
    for name, lengths in batch.items():
        if not name.endswith("_segment_ids"):
            continue
        length = lengths.shape[1]
        # A row's padding must leave something in every row.
        real = np.arange(length) < length - np.arange(ROWS)[:, None] % 3
        cut = 3 + np.arange(ROWS)[:, None] % 3
        batch[name] = np.where(real, 1 + (np.arange(length) >= cut), 0).astype(np.int32)
        side = name.removesuffix("_segment_ids")
        start = np.where(np.arange(length) >= cut, cut, 0)
        batch[f"{side}_positions"] = ((np.arange(length) - start) * real).astype(np.int32)
    if prefix:
        opening = batch["decoder_positions"] < 2
        batch["decoder_causal_attention"] = (opening & (batch["decoder_segment_ids"] > 0)).astype(
            np.int32
        )
    batch["decoder_loss_weights"] = (batch["decoder_segment_ids"] > 0).astype(np.float32)
    return batch


def mean_loss(config, mesh, seed=None):
    loss_fn = supervised_loss(build(config), mesh=mesh)
    key = None if seed is None else jax.random.key(seed)

    def mean(params, batch):
        total, weight, _ = loss_fn(params, batch, key)
        return total / weight

    return mean


def on_mesh(config, shape):
    """(mesh, parameters and batch on it)."""
    count = int(np.prod(list(shape.values())))
    mesh = sharding.make_mesh(shape, jax.devices()[:count])
    places = sharding.shardings(build(config).abstract_params(), build(config).logical_axes(), mesh)
    params = jax.device_put(random_params(config), places)
    return mesh, params, sharding.shard_batch(packed_batch(config), mesh)


@pytest.mark.parametrize("name", CASES)
def test_pipelined_loss_and_gradients_equal_unpipelined(name):
    config, shape = CASES[name]
    expected, gradients = jax.jit(jax.value_and_grad(mean_loss(config, None)))(
        random_params(config), jax.tree.map(jnp.asarray, packed_batch(config))
    )
    mesh, params, batch = on_mesh(config, shape)
    got, got_gradients = jax.jit(jax.value_and_grad(mean_loss(config, mesh)))(params, batch)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for (path, value), gradient in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(got_gradients), strict=True
    ):
        limit = 1e-5 * max(np.abs(value).max(), 1e-2)
        np.testing.assert_allclose(gradient, value, atol=limit, err_msg=str(path))


def test_dropout_does_not_depend_on_the_pipeline():
    config = dataclasses.replace(ONE, dropout_rate=0.3, position="rope", scan_layers=True)
    losses = []
    for shape, repeats in (({"data": 1}, 1), ({"data": 2, "stage": 2}, 2), ({"stage": 4}, 1)):
        model = dataclasses.replace(config, pipeline_repeats=repeats)
        mesh, params, batch = on_mesh(model, shape)
        losses.append(float(jax.jit(mean_loss(model, mesh, seed=1))(params, batch)))
    plain = float(jax.jit(mean_loss(model, mesh))(params, batch))
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-5)
    assert abs(plain - losses[0]) > 1e-3


def test_bfloat16_compiles_and_is_near_float32():
    """The CPU compiler aborts on some bfloat16 sums over stages: none may be left."""
    config = dataclasses.replace(PAIR, num_encoder_layers=2, num_decoder_layers=2, scan_layers=True)
    mesh, params, batch = on_mesh(config, {"data": 2, "stage": 2})
    narrow = dataclasses.replace(config, dtype="bfloat16")
    expected = jax.jit(mean_loss(config, mesh))(params, batch)
    got, gradients = jax.jit(jax.value_and_grad(mean_loss(narrow, mesh)))(params, batch)
    np.testing.assert_allclose(got, expected, rtol=2e-2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_stage_holds_and_computes_its_share():
    """It runs its layers in M R + S - 1 steps on rows / M: a pass of 1 / S, and the bubble."""
    config = dataclasses.replace(
        ONE, embed_dim=64, mlp_dim=256, num_decoder_layers=8, vocab_size=32, position="alibi"
    )
    stages, microbatches = 4, 4
    layer_bytes, flops = {}, {}
    for name, shape in {"replicated": {"data": 1}, "pipelined": {"stage": stages}}.items():
        mesh, params, batch = on_mesh(config, shape)
        for leaf in batch:
            batch[leaf] = batch[leaf] % 32 if leaf.endswith("tokens") else batch[leaf]
        layers = jax.tree.leaves(params["decoder"]["layers"])
        layer_bytes[name] = sum(leaf.addressable_shards[0].data.nbytes for leaf in layers)
        loss = mean_loss(config, mesh)
        compiled = jax.jit(loss).lower(params, batch).compile()
        text = compiled.as_text()
        assert ("collective-permute" in text) == (name == "pipelined")
        # The body of the loop over steps is counted once.
        flops[name] = compiled.cost_analysis()["flops"]
        # No layer is gathered: only groups of one device, of the embedding's other axes.
        assert not re.search(r"all-gather\(.*replica_groups=(?!\{\{0\},|\{\{0\}\})", text)
    assert layer_bytes["replicated"] == stages * layer_bytes["pipelined"]
    # One step is 1 / S of the layers on 1 / M of the rows.
    assert flops["pipelined"] < 1.6 * flops["replicated"] / (stages * microbatches)
    loops = [int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"', text)]
    assert microbatches + stages - 1 in loops, "the steps of the schedule"


def test_circular_groups_are_dealt_in_the_order_of_the_layers():
    """Each layer appends its index to a number: any wrong order gives another one."""
    for stages, repeats, layers in ((2, 2, 8), (4, 2, 8), (2, 3, 6), (4, 3, 12)):
        mesh = sharding.make_mesh({"stage": stages}, jax.devices()[:stages])
        x = jnp.zeros((8, 1, 1))

        def group(params, first, x, rows, common):
            for i in range(params.shape[0]):
                x = jnp.sin(
                    x
                    + params[i] * rows[:, None, None]
                    + jnp.float32(0.1) * jnp.asarray(first + i, jnp.float32)
                )
            return x

        params, rows = jnp.arange(1.0, layers + 1.0), jnp.linspace(0.1, 1.0, 8)
        run = jax.jit(
            lambda params, x, rows, mesh=mesh, repeats=repeats: circulate(
                group, params, x, rows, {}, mesh=mesh, microbatches=4, repeats=repeats
            )
        )
        expected = group(params, 0, x, rows, {})
        np.testing.assert_allclose(run(params, x, rows), expected, rtol=1e-5)


def test_bubble():
    assert bubble_fraction(1, 1) == 0
    assert bubble_fraction(4, 4) == pytest.approx(3 / 7)
    assert bubble_fraction(4, 8, repeats=2) == pytest.approx(3 / 19)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({}, 12, "12 sequences does not divide into 4 pipeline microbatches"),
        ({"num_decoder_layers": 6}, 8, "num_decoder_layers = 6 does not divide over 4 stages"),
        ({"num_decoder_layers": 6}, 8, "set MESH stage to 2, 3 or 6"),
        ({"pipeline_repeats": 2}, 8, "pipeline_repeats to a divisor of 1"),
        (
            {"pipeline_repeats": 2, "num_decoder_layers": 8, "pipeline_microbatches": 2},
            8,
            "or more",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(changes, rows, message):
    config = dataclasses.replace(ONE, **changes)
    mesh = sharding.make_mesh({"data": 2, "stage": 4})
    with pytest.raises(UserError, match=message):
        check_pipeline(config, rows, mesh)


def test_counts_must_be_positive():
    with pytest.raises(UserError, match="pipeline_repeats = 0 must be at least 1"):
        dataclasses.replace(ONE, pipeline_repeats=0)
