"""The train step: exact accumulation, ramp-up without recompiling, skipped steps, one rate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_problem as problem
from hypothesis import given, settings
from hypothesis import strategies as st

from chatyuan import sharding
from chatyuan.errors import UserError
from chatyuan.train import step as step_module
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.state import init_state
from chatyuan.train.step import make_train_step


def _fresh(optimizer, ema=False, seed=0):
    return init_state(problem.init_params(seed), optimizer, ema=ema)


def _copy(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def _assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, _copy(actual), _copy(expected))


@pytest.fixture(scope="module")
def parts():
    return problem.make_parts(clip_norm=1.0)


@pytest.fixture(scope="module")
def plain_step(parts):
    schedule, optimizer = parts
    return make_train_step(problem.make_loss(), optimizer, schedule)


@pytest.fixture(scope="module")
def summed():
    """microbatches -> compiled (loss, weight, metrics, gradient) of the sums over a split."""
    loss_fn = problem.make_loss()

    def make(microbatches):
        def total(params, batch):
            split = step_module._split(batch, microbatches, None)
            return step_module._sum_gradients(loss_fn, params, split, jax.random.key(0), None)

        return jax.jit(total)

    return {microbatches: make(microbatches) for microbatches in (1, 2, 4, 8)}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), microbatches=st.sampled_from([2, 4, 8]))
def test_any_split_gives_the_same_gradient(summed, seed, microbatches):
    params, batch = problem.init_params(seed % 7), problem.make_batch(8, seed)
    whole, split = summed[1](params, batch), summed[microbatches](params, batch)
    for index in (0, 1):
        np.testing.assert_allclose(split[index], whole[index], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), split[2], whole[2])
    for name, expected in whole[3].items():
        error = jnp.abs(split[3][name] - expected).max() / jnp.abs(expected).max()
        assert error < 1e-6, (name, error)


def test_gradient_is_that_of_the_mean_over_tokens(plain_step, parts):
    """Not the mean of means: rows of uneven length weigh by their tokens."""
    schedule, optimizer = parts
    batch, params = problem.make_batch(), problem.init_params()

    def mean_loss(params):
        loss, weight, _ = problem.make_loss()(params, batch, jax.random.key(0))
        return loss / weight

    gradients = jax.jit(jax.grad(mean_loss))(params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    state = _fresh(optimizer)
    update = jax.jit(functools.partial(optimizer.update, step=1))
    updates, _ = update(gradients, state.opt_state, params)
    state = dataclasses.replace(state, step=jnp.int32(1))
    state, metrics = plain_step(state, batch)
    np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-5)
    for name, update in updates.items():
        np.testing.assert_allclose(state.params[name], params[name] + update, rtol=1e-5, atol=1e-7)


def test_state_goes_on_and_loss_falls(plain_step, parts):
    state, losses = _fresh(parts[1]), []
    for step in range(30):
        assert int(state.step) == step
        state, metrics = plain_step(state, problem.make_batch())
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.8 * losses[0]


def test_logged_rate_is_the_applied_one(plain_step, parts):
    """T5X logs the trainer's rate while optax applies its own."""
    state = _fresh(parts[1])
    for step in range(4):
        before = _copy(state.params["head"])
        state, metrics = plain_step(state, problem.make_batch())
        rate = float(metrics["learning_rate"][0])
        np.testing.assert_allclose(rate, parts[0](step), rtol=1e-6)
        moved = np.abs(np.asarray(state.params["head"]) - before).max()
        assert (moved == 0) == (rate == 0)


def test_another_schedule_than_the_optimizers_is_refused(parts):
    other = make_schedule(ScheduleConfig("constant"))
    with pytest.raises(AssertionError, match="the one applied"):
        make_train_step(problem.make_loss(), parts[1], other)


def test_active_microbatches_do_not_recompile_and_use_the_first_rows(parts):
    schedule, optimizer = parts
    traces = []
    ramp = make_train_step(problem.make_loss(traces=traces), optimizer, schedule, microbatches=4)
    batch = problem.make_batch()
    results, counts = {}, []
    for active in (1, 2, 3, 4):
        results[active] = ramp(_fresh(optimizer), batch, active)
        counts.append(len(traces))
    assert len(set(counts)) == 1, counts
    for active in (1, 3):
        state, metrics = results[active]
        first = {name: value[: 2 * active] for name, value in batch.items()}
        expected = make_train_step(problem.make_loss(), optimizer, schedule)
        expected_state, expected_metrics = expected(_fresh(optimizer), first)
        assert float(metrics["target_tokens"][1]) == 1
        for name in ("loss", "target_tokens", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            state.params,
            expected_state.params,
        )


def test_all_microbatches_active_is_the_default(parts):
    schedule, optimizer = parts
    step = make_train_step(problem.make_loss(), optimizer, schedule, microbatches=2)
    every, _ = step(_fresh(optimizer), problem.make_batch(), 2)
    default, _ = step(_fresh(optimizer), problem.make_batch())
    _assert_equal(every, default)


@pytest.mark.parametrize("active", [0, 5])
def test_active_microbatches_outside_the_range(parts, active):
    schedule, optimizer = parts
    step = make_train_step(problem.make_loss(), optimizer, schedule, microbatches=4)
    with pytest.raises(UserError, match=f"active_microbatches = {active} is outside 1..4"):
        step(_fresh(optimizer), problem.make_batch(), active)


def test_batch_that_does_not_divide_is_named(parts):
    schedule, optimizer = parts
    step = make_train_step(problem.make_loss(), optimizer, schedule, microbatches=4)
    with pytest.raises(UserError, match="10 sequences .* 4 microbatches; use 8 or 12"):
        step(_fresh(optimizer), problem.make_batch(10))


def test_no_microbatches_is_a_mistake(parts):
    with pytest.raises(UserError, match="MICROBATCHES = 0"):
        make_train_step(problem.make_loss(), parts[1], parts[0], microbatches=0)


def test_dropout_keys_differ_by_step_and_microbatch_and_follow_the_seed(parts):
    seen = []

    def loss_fn(params, batch, key):
        jax.debug.callback(
            lambda data: seen.append(tuple(np.asarray(data))), jax.random.key_data(key)
        )
        return problem.make_loss()(params, batch, key)

    schedule, optimizer = parts
    for _ in range(2):
        state = _fresh(optimizer)
        step = make_train_step(loss_fn, optimizer, schedule, microbatches=2, seed=3)
        for _ in range(2):
            state, _ = step(state, problem.make_batch())
    jax.effects_barrier()
    assert len(seen) == 8 and len(set(seen)) == 4
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1), 1)
    assert tuple(np.asarray(jax.random.key_data(expected))) in seen


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw_rms", "muon"])
def test_nonfinite_steps_change_nothing_and_are_counted(name):
    schedule, optimizer = problem.make_parts(name)

    def loss_fn(params, batch, key):
        loss, weight, metrics = problem.make_loss()(params, batch, key)
        return loss * batch["poison"][0], weight, metrics

    step = make_train_step(loss_fn, optimizer, schedule, ema_decay=0.5)

    def batch(poison):
        return {**problem.make_batch(), "poison": np.full(8, poison, np.float32)}

    state, _ = step(_fresh(optimizer, ema=True), batch(1))
    for streak, poison in enumerate((np.nan, np.inf), start=1):
        before = _copy(state)
        state, metrics = step(state, batch(poison))
        _assert_equal(
            (state.params, state.opt_state, state.ema),
            (before.params, before.opt_state, before.ema),
        )
        assert int(state.step) == int(before.step) + 1
        assert int(state.nonfinite_streak) == int(metrics["nonfinite_streak"][0]) == streak
        assert float(metrics["nonfinite_steps"][0]) == 1
        assert all(np.isfinite(value).all() for value in jax.tree.leaves(metrics))
        assert float(metrics["loss"][1]) == 0
    state, metrics = step(state, batch(1))
    assert int(state.nonfinite_streak) == 0 == float(metrics["nonfinite_steps"][0])
    assert float(metrics["loss"][1]) > 0


def test_without_skipping_a_nonfinite_step_is_applied(parts):
    schedule, optimizer = parts

    def loss_fn(params, batch, key):
        loss, weight, metrics = problem.make_loss()(params, batch, key)
        return loss * jnp.nan, weight, metrics

    step = make_train_step(loss_fn, optimizer, schedule, skip_nonfinite=False)
    state, metrics = step(_fresh(optimizer), problem.make_batch())
    assert np.isnan(np.asarray(state.params["head"])).all()
    assert float(metrics["nonfinite_steps"][0]) == 1
    assert np.isnan(metrics["grad_norm"][0])


def test_batch_without_targets_moves_nothing_but_decay():
    schedule, optimizer = problem.make_parts(weight_decay=0.0)
    step = make_train_step(problem.make_loss(), optimizer, schedule)
    batch = problem.make_batch()
    batch["decoder_loss_weights"] *= 0
    state = _fresh(optimizer)
    before = _copy(state.params)
    state, metrics = step(state, batch)
    _assert_equal(state.params, before)
    assert float(metrics["nonfinite_steps"][0]) == 0


def test_ema_follows_the_parameters(parts):
    schedule, optimizer = parts
    step = make_train_step(problem.make_loss(), optimizer, schedule, ema_decay=0.75)
    state = _fresh(optimizer, ema=True)
    expected = _copy(state.params)
    for _ in range(3):
        state, _ = step(state, problem.make_batch())
        expected = jax.tree.map(
            lambda e, p: 0.75 * e + 0.25 * np.asarray(p), expected, state.params
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.ema, expected)


def test_detailed_metrics(parts):
    schedule, optimizer = parts
    step = make_train_step(problem.make_loss(), optimizer, schedule, detailed_metrics=True)
    state, _ = step(_fresh(optimizer), problem.make_batch())
    before = _copy(state.params)
    state, metrics = step(state, problem.make_batch())
    norm = np.sqrt(sum(np.sum(np.square(p)) for p in jax.tree.leaves(before)))
    np.testing.assert_allclose(metrics["param_norm"][0], norm, rtol=1e-5)
    moved = [
        np.asarray(a) - b
        for a, b in zip(*map(jax.tree.leaves, (state.params, before)), strict=True)
    ]
    rms = np.sqrt(np.mean(np.square(np.concatenate([m.ravel() for m in moved]))))
    np.testing.assert_allclose(metrics["update_rms"][0], rms, rtol=1e-3)


def test_resumed_from_a_copy_equals_uninterrupted(parts):
    """The state is all there is: after a round trip through the host every bit is the same."""
    schedule, optimizer = parts
    loss_fn = problem.make_loss(dropout_rate=0.3)
    step = make_train_step(loss_fn, optimizer, schedule, microbatches=2, ema_decay=0.9)
    state = _fresh(optimizer, ema=True)
    stored = None
    for index in range(4):
        if index == 2:
            stored = _copy(state)
        state, _ = step(state, problem.make_batch(seed=index))
    # A fresh process compiles its own step.
    resumed_step = make_train_step(loss_fn, optimizer, schedule, microbatches=2, ema_decay=0.9)
    resumed = jax.tree.map(jnp.asarray, stored)
    for index in (2, 3):
        resumed, _ = resumed_step(resumed, problem.make_batch(seed=index))
    _assert_equal(resumed, state)


def test_runs_under_a_transfer_guard(parts):
    """The loop forbids implicit transfers: the step must not make any, once warm."""
    schedule, optimizer = parts
    step = make_train_step(problem.make_loss(), optimizer, schedule, microbatches=4)
    batch = jax.device_put(problem.make_batch())
    state, _ = step(_fresh(optimizer), batch, 2)
    with jax.transfer_guard("disallow"):
        for active in (1, 2, 3, 4):
            state, _ = step(state, batch, active)
    assert int(state.step) == 5


@pytest.mark.parametrize("active", [None, 2])
@pytest.mark.parametrize("devices", [1, 8])
def test_compiled_ahead_is_the_same_step(parts, devices, active):
    schedule, optimizer = parts
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    state = _fresh(optimizer)
    placement = sharding.state_shardings(state, problem.AXES, mesh)
    host_batch = problem.make_batch(16)
    ahead, plain = (
        make_train_step(problem.make_loss(), optimizer, schedule, microbatches=2) for _ in "ab"
    )
    abstract = sharding.with_shardings(jax.eval_shape(lambda: state), placement)
    ahead.compile_ahead(abstract, sharding.abstract_batch(host_batch, mesh), active)
    batch = sharding.shard_batch(host_batch, mesh)
    results = []
    for step in (ahead, plain):
        new, metrics = step(jax.device_put(_copy(state), placement), batch, active)
        new, metrics = step(new, batch, active and 1)
        results.append((new, metrics))
    _assert_equal(*results)
    assert not ahead._jitted[mesh if devices > 1 else None]._cache_size()


def test_state_buffers_are_donated(plain_step, parts):
    state = _fresh(parts[1])
    plain_step(state, problem.make_batch())
    assert state.params["head"].is_deleted()
    lowered = plain_step.lower(_fresh(parts[1]), problem.make_batch())
    memory = lowered.compile().memory_analysis()
    bytes_of_state = sum(leaf.nbytes for leaf in jax.tree.leaves(_fresh(parts[1])))
    assert memory.alias_size_in_bytes >= 0.99 * bytes_of_state
