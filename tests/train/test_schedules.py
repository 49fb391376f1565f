"""Schedules: equality with T5X's formula and optax, boundaries, and every mistake's message."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chatyuan.errors import UserError
from chatyuan.train.schedules import ScheduleConfig, make_schedule

STEPS = np.arange(0, 131)


def _values(**fields):
    schedule = jax.jit(jax.vmap(make_schedule(ScheduleConfig(**fields))))
    return np.asarray(schedule(jnp.asarray(STEPS)))


def _optax_values(schedule):
    return np.asarray([schedule(int(step)) for step in STEPS])


def test_rsqrt_equals_t5x_factors():
    """'constant * linear_warmup * rsqrt_decay' of t5x.utils.create_learning_rate_scheduler."""
    warmup, base = 40, 0.7
    expected = base * np.minimum(1.0, STEPS / warmup) / np.sqrt(np.maximum(STEPS, warmup))
    actual = _values(name="rsqrt", learning_rate=base / np.sqrt(warmup), warmup_steps=warmup)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_t5_default_is_one_hundredth_at_ten_thousand_steps():
    schedule = make_schedule(ScheduleConfig("rsqrt", learning_rate=0.01, warmup_steps=10_000))
    np.testing.assert_allclose(schedule(10_000), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(1_000_000), 0.001, rtol=1e-6)


def test_linear_equals_optax():
    expected = optax.join_schedules(
        [optax.linear_schedule(0, 0.5, 30), optax.linear_schedule(0.5, 0.05, 70)], [30]
    )
    actual = _values(
        name="linear", learning_rate=0.5, warmup_steps=30, train_steps=100, final_fraction=0.1
    )
    np.testing.assert_allclose(actual, _optax_values(expected), rtol=1e-5, atol=1e-7)


def test_cosine_equals_optax():
    expected = optax.warmup_cosine_decay_schedule(0, 0.5, 30, 100, 0.05)
    actual = _values(name="cosine", learning_rate=0.5, warmup_steps=30, train_steps=100)
    np.testing.assert_allclose(actual, _optax_values(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_wsd_is_flat_then_falls_in_its_shape(shape):
    values = _values(
        name="wsd", learning_rate=2.0, warmup_steps=10, train_steps=100, decay_steps=40,
        decay_shape=shape, final_fraction=0.25,
    )  # fmt: skip
    np.testing.assert_allclose(values[:10], np.arange(10) * 0.2, rtol=1e-6)
    np.testing.assert_allclose(values[10:61], 2.0)
    x = np.arange(41) / 40
    kept = {"linear": 1 - x, "cosine": (1 + np.cos(np.pi * x)) / 2, "sqrt": 1 - np.sqrt(x)}[shape]
    np.testing.assert_allclose(values[60:101], 2.0 * (0.25 + 0.75 * kept), rtol=1e-5)
    np.testing.assert_allclose(values[101:], 0.5, rtol=1e-6)


def test_wsd_decays_over_the_last_fifth_unless_told():
    values = _values(name="wsd", learning_rate=1.0, train_steps=100)
    assert values[80] == 1.0 > values[81]
    assert values[100] == 0.0


def test_constant_without_warmup_starts_at_the_peak():
    np.testing.assert_allclose(_values(name="constant", learning_rate=0.3), 0.3)


def test_rewarm_is_the_same_schedule_shifted():
    fields = {"name": "cosine", "learning_rate": 0.5, "warmup_steps": 20}
    fresh = _values(**fields, train_steps=90)
    again = _values(**fields, train_steps=120, rewarm_from=30)
    np.testing.assert_allclose(again[30:], fresh[:-30], rtol=1e-6, atol=1e-8)
    assert (again[:30] == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "cosin"}, "Did you mean cosine"),
        ({"name": "cosine"}, "train_steps must be set"),
        ({"name": "linear", "train_steps": 5, "warmup_steps": 6}, "less than the 6 steps"),
        ({"name": "wsd", "train_steps": 5, "decay_steps": 6}, "less than the 6 steps"),
        ({"name": "constant", "final_fraction": 0.1}, "not used by the constant schedule"),
        ({"name": "cosine", "train_steps": 5, "decay_steps": 2}, "not used by the cosine"),
        ({"name": "wsd", "train_steps": 5, "decay_shape": "sqr"}, "Did you mean sqrt"),
        ({"name": "wsd", "train_steps": 5, "final_fraction": 1.5}, "outside [0, 1]"),
        ({"learning_rate": -1.0}, "is negative"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError) as error:
        ScheduleConfig(**fields)
    assert message in str(error.value)
