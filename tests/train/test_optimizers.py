"""Optimizers: equal to optax, stacked layers equal to separate ones, one source of the rate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from chatyuan.errors import UserError
from chatyuan.train.optimizers import (
    OptimizerConfig,
    make_optimizer,
    parameter_layout,
    parameter_layouts,
    resolve,
)
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.updates import Optimizer, global_norm, with_schedule

LAYERS = 3
# The parameters of one layer: name -> (shape, logical axes). 130 and more is factored by default.
LAYER = {
    "query": ((130, 144), ("embed", "heads")),
    "out": ((144, 130), ("heads", "embed")),
    "norm": ((130,), ("embed",)),
    "bias": ((4, 32), ("heads", "relpos_buckets")),
}
OUTER = {
    "embedding": ((140, 130), ("vocab", "embed")),
    "head": ((130, 140), ("embed", "vocab")),
    "final_norm": ((130,), ("embed",)),
}
SHAPES = {f"layers_{n}": ((LAYERS, *s), ("layers", *a)) for n, (s, a) in LAYER.items()} | OUTER
AXES = {name: axes for name, (_, axes) in SHAPES.items()}
NAMES = ["adafactor", "adamw", "adamw_rms", "muon"]
RATE = 0.03


def _random(seed, scale=1.0):
    """Values whose layers differ in size, so that mixing layers up shows."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (shape, axes) in SHAPES.items():
        value = rng.normal(size=shape).astype(np.float32) * scale
        if axes[0] == "layers":
            value *= (10.0 ** np.arange(LAYERS)).reshape(-1, *(1,) * (value.ndim - 1)) / 10
        tree[name] = jnp.asarray(value)
    return tree


def _split(tree):
    """Every layer as a parameter of its own."""
    parts = {}
    for name, value in tree.items():
        if name.startswith("layers_"):
            parts |= {f"{name}/{i}": value[i] for i in range(LAYERS)}
        else:
            parts[name] = value
    return parts


def _split_axes():
    return {
        name: LAYER[name[7:].split("/")[0]][1] if "/" in name else AXES[name]
        for name in _split(_random(0))
    }


def _constant(rate=RATE):
    return make_schedule(ScheduleConfig("constant", learning_rate=rate))


def _update(optimizer, gradients, state, params, step, scale=1.0):
    return _jitted_update(optimizer)(gradients, state, params, step, scale)


@functools.cache
def _jitted_update(optimizer):
    """One compilation instead of one per operation."""
    return jax.jit(
        lambda gradients, state, params, step, scale: optimizer.update(
            gradients, state, params, step=step, gradient_scale=scale
        )
    )


def _run(optimizer, params, gradients, steps=3):
    """Params after some steps with gradients that change."""

    @jax.jit
    def one(params, state, gradients, step):
        updates, state = optimizer.update(gradients, state, params, step=step)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(steps):
        scaled = jax.tree.map(lambda g, step=step: g * (0.7 - 0.5 * step) + 1e-3, gradients)
        params, state = one(params, state, scaled, jnp.int32(step))
    return params


def _run_optax(transformation, params, gradients):
    def update(gradients, state, params, *, step):
        del step
        return transformation.update(gradients, state, params)

    return _run(Optimizer(transformation.init, update, None), params, gradients)


def _assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=atol * scale, err_msg=name)


@functools.cache
def _trained(name, **changes):
    params = _random(1, 0.05)
    config = OptimizerConfig(name, **changes)
    return _run(make_optimizer(config, _constant(), params, AXES), params, _random(2))


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_move_as_separate_ones(name):
    params, gradients = _split(_random(1, 0.05)), _split(_random(2))
    optimizer = make_optimizer(OptimizerConfig(name), _constant(), params, _split_axes())
    separate = _run(optimizer, params, gradients)
    _assert_close(
        _split(_trained(name)), separate, rtol=1e-4, atol=1e-4 if name == "muon" else 2e-6
    )


def test_adafactor_equals_optax_on_every_layer():
    """optax.adafactor is T5X's update for parameters that are no stacks."""
    expected = _run_optax(
        optax.adafactor(RATE, weight_decay_rate=None), _split(_random(1, 0.05)), _split(_random(2))
    )
    _assert_close(_split(_trained("adafactor")), expected)


def test_adafactor_options_equal_optax():
    transformation = optax.adafactor(
        RATE,
        multiply_by_parameter_scale=False,
        clipping_threshold=2.0,
        min_dim_size_to_factor=142,
        decay_rate=0.6,
    )
    expected = _run_optax(transformation, _split(_random(1, 0.05)), _split(_random(2)))
    trained = _trained(
        "adafactor",
        parameter_scale=False,
        clipping_threshold=2.0,
        min_dim_size_to_factor=142,
        decay_exponent=0.6,
    )
    _assert_close(_split(trained), expected)


def test_adafactor_factors_joined_heads():
    """[embed, heads, kv] moves as the matrix [embed, heads * kv]."""
    rng = np.random.default_rng(0)
    cube, flat = (130, 12, 12), (130, 144)
    params = rng.normal(size=flat).astype(np.float32)
    gradients = rng.normal(size=flat).astype(np.float32)
    results = []
    for shape, axes in ((cube, ("embed", "heads", "kv")), (flat, ("embed", "heads"))):
        tree = {"w": jnp.asarray(params.reshape(shape))}
        optimizer = make_optimizer(OptimizerConfig(), _constant(), tree, {"w": axes})
        moved = _run(optimizer, tree, {"w": jnp.asarray(gradients.reshape(shape))})
        results.append({"w": moved["w"].reshape(flat)})
    _assert_close(*results)


def test_adafactor_decay_is_t5x_s():
    """weight_decay is a share of the parameter a step, not multiplied by the learning rate."""
    params = _random(1, 0.05)
    zero = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig("adafactor", weight_decay=0.25)
    optimizer = make_optimizer(config, _constant(), params, AXES)
    updates, _ = _update(optimizer, zero, optimizer.init(params), params, 0)
    for name, layout in parameter_layouts(params, AXES).items():
        share = 0.0 if layout.kind in ("vector", "table") else 0.25
        np.testing.assert_allclose(updates[name], -share * params[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_adamw_equals_optax_with_the_right_mask(decay_embeddings):
    mask = {
        name: not ("norm" in name or "bias" in name or name == "embedding") for name in SHAPES
    } | {"embedding": decay_embeddings}
    transformation = optax.adamw(RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
    expected = _run_optax(transformation, _random(1, 0.05), _random(2))
    _assert_close(_trained("adamw", decay_embeddings=decay_embeddings), expected)


def test_adamw_rms_is_adam_times_the_rms_of_each_matrix():
    params, gradients = _split(_random(1, 0.05)), _split(_random(2))

    def update(gradients, state, params, *, step):
        updates, state = optax.scale_by_adam(0.9, 0.999, 1e-6).update(gradients, state)
        rms = jax.tree.map(lambda p: jnp.maximum(1e-3, jnp.sqrt(jnp.mean(p**2))), params)
        return jax.tree.map(lambda u, r: -RATE * r * u, updates, rms), state

    init = optax.scale_by_adam().init
    expected = _run(Optimizer(init, update, None), params, gradients)
    _assert_close(_split(_trained("adamw_rms")), expected)


def test_muon_equals_optax_muon_on_matrices_and_adamw_elsewhere():
    transformation = optax.contrib.muon(
        RATE,
        beta=0.95,
        weight_decay=0.1,
        consistent_rms=0.2,
        adam_b1=0.9,
        adam_b2=0.95,
        muon_weight_dimension_numbers={
            name: (
                optax.contrib.MuonDimensionNumbers(1, 2)
                if name in ("layers_query", "layers_out")
                else None
            )
            for name in SHAPES
        },
    )
    params, gradients = _random(1, 0.05), _random(2)
    matrices = _run_optax(transformation, params, gradients)
    trained = _trained("muon")
    names = ("layers_query", "layers_out")
    _assert_close({n: trained[n] for n in names}, {n: matrices[n] for n in names})
    adamw = _trained("adamw")
    others = [name for name in SHAPES if name not in names]
    _assert_close({n: trained[n] for n in others}, {n: adamw[n] for n in others})


def test_muon_updates_have_the_matched_rms():
    params, gradients = _random(1, 0.05), _random(2)
    config = OptimizerConfig("muon", weight_decay=0.0)
    optimizer = make_optimizer(config, _constant(1.0), params, AXES)
    updates, _ = _update(optimizer, gradients, optimizer.init(params), params, 0)
    for name in ("layers_query", "layers_out"):
        rms = np.sqrt(np.mean(np.square(updates[name]), axis=(1, 2)))
        # Newton-Schulz leaves singular values between about 0.7 and 1.2.
        assert ((rms > 0.7 * 0.2) & (rms < 1.2 * 0.2)).all(), rms


@pytest.mark.parametrize("name", NAMES)
def test_rate_is_the_schedule_at_the_given_step(name):
    params, gradients = _random(1, 0.05), _random(2)
    schedule = make_schedule(
        ScheduleConfig("linear", learning_rate=0.5, warmup_steps=4, train_steps=10)
    )
    config = OptimizerConfig(name, weight_decay=0.0)
    optimizer = make_optimizer(config, schedule, params, AXES)
    state = optimizer.init(params)
    reference, _ = _update(optimizer, gradients, state, params, 4)
    for step in (0, 2, 7, 10):
        updates, _ = _update(optimizer, gradients, state, params, step)
        share = float(schedule(step)) / 0.5
        expected = jax.tree.map(lambda u, share=share: u * share, reference)
        _assert_close(updates, expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_and_gradient_scale_equal_clipped_gradients(name):
    params, gradients = _random(1, 0.05), _random(2)
    clipped, _ = optax.clip_by_global_norm(0.5).update(
        jax.tree.map(lambda g: g / 7, gradients), optax.EmptyState()
    )
    plain = make_optimizer(OptimizerConfig(name), _constant(), params, AXES)
    clipping = make_optimizer(OptimizerConfig(name, clip_norm=0.5), _constant(), params, AXES)
    # Two steps: the first one of Adam and Adafactor does not depend on the size of the gradient.
    state = clipping.init(params)
    _, state = _update(clipping, params, state, params, 0)
    expected_state = plain.init(params)
    small, _ = optax.clip_by_global_norm(0.5).update(params, optax.EmptyState())
    _, expected_state = _update(plain, small, expected_state, params, 0)
    updates, _ = _update(clipping, gradients, state, params, 1, 1 / 7)
    expected, _ = _update(plain, clipped, expected_state, params, 1)
    _assert_close(updates, expected, rtol=1e-4, atol=1e-4 if name == "muon" else 1e-5)


def test_with_schedule_equals_the_optax_optimizer():
    params, gradients = _random(1, 0.05), _random(2)
    ours = with_schedule(optax.scale_by_adam(), _constant(), weight_decay=0.01)
    expected = _run_optax(optax.adamw(RATE, weight_decay=0.01), params, gradients)
    _assert_close(_run(ours, params, gradients), expected)


def test_global_norm_equals_optax():
    tree = _random(1)
    np.testing.assert_allclose(global_norm(tree), optax.tree.norm(tree), rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "kind", "rows", "columns"),
    [
        (("embed",), "vector", (0,), ()),
        (("layers", "embed"), "vector", (1,), ()),
        (("vocab", "embed"), "embedding", (0,), (1,)),
        (("embed", "vocab"), "head", (0,), (1,)),
        (("layers", "embed", "mlp"), "matrix", (1,), (2,)),
        (("layers", "heads", "kv", "embed"), "matrix", (3,), (1, 2)),
        (("heads", "relpos_buckets"), "table", (0,), (1,)),
        ((), "vector", (), ()),
    ],
)
def test_layouts(axes, kind, rows, columns):
    layout = parameter_layout(axes)
    assert (layout.kind, layout.rows, layout.columns) == (kind, rows, columns)


def test_adafactor_state_is_small():
    params = _random(1)
    state = make_optimizer(OptimizerConfig(), _constant(), params, AXES).init(params)
    sizes = {name: sum(x.size for x in state.moments[name].values()) for name in SHAPES}
    assert sizes["layers_query"] == LAYERS * (130 + 144)
    assert sizes["embedding"] == 130 + 140
    assert sizes["layers_norm"] == LAYERS * 130


def test_no_optimizer_stores_an_array_of_all_parameters():
    """The update is fused: temporaries cost as much memory as parameters, and CPU page faults."""
    for name in ("adafactor", "adamw", "adamw_rms"):
        params = {"embedding": jnp.ones((512, 256)), "head": jnp.ones((256, 512))}
        axes = {"embedding": ("vocab", "embed"), "head": ("embed", "vocab")}
        config = OptimizerConfig(name, clip_norm=1.0)
        optimizer = make_optimizer(config, _constant(), params, axes)

        def one(params, state, gradients, step, optimizer=optimizer):
            accept = jnp.isfinite(step)
            updates, state = optimizer.update(
                gradients, state, params, step=step, gradient_scale=1 / (1.0 + step), accept=accept
            )
            new = optax.apply_updates(params, updates)
            return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, params), state

        jitted = jax.jit(one, donate_argnums=(0, 1))
        compiled = jitted.lower(params, optimizer.init(params), params, jnp.float32(0)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256 * 4 // 4, name


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw_rms", "muon"])
def test_a_step_that_is_not_accepted_leaves_the_state(name):
    params, gradients = _random(1, 0.05), _random(2)
    optimizer = make_optimizer(OptimizerConfig(name), _constant(), params, AXES)
    _, state = _update(optimizer, gradients, optimizer.init(params), params, 0)
    refuse = jax.jit(functools.partial(optimizer.update, step=1, accept=False))
    _, kept = refuse(jax.tree.map(lambda g: g * jnp.nan, gradients), state, params)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    accept = jax.jit(functools.partial(optimizer.update, step=1))
    asked = jax.jit(lambda *a, accept: optimizer.update(*a, step=1, accept=accept))
    for one, other in zip(
        jax.tree.leaves(asked(gradients, state, params, accept=True)),
        jax.tree.leaves(accept(gradients, state, params)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_resolve_fills_in_the_defaults():
    config = resolve(OptimizerConfig("adamw", b2=0.98))
    assert (config.b1, config.b2, config.weight_decay) == (0.9, 0.98, 0.1)
    assert config.decay_exponent is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamv"}, "Did you mean adamw"),
        ({"name": "adafactor", "b2": 0.9}, "not used by adafactor"),
        ({"name": "adamw", "momentum": 0.9}, "not used by adamw"),
        ({"name": "adamw", "b2": 1.0}, "outside [0, 1)"),
        ({"name": "adamw", "weight_decay": -0.1}, "outside [0, inf)"),
        ({"name": "adamw", "clip_norm": 0.0}, "must be positive"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError) as error:
        OptimizerConfig(**fields)
    assert message in str(error.value)
