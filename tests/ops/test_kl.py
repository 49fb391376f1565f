"""KL estimators: golden values, expectations by enumeration, gradients; the adaptive controller."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.ops.kl import ESTIMATORS, adapt_kl_coefficient, kl_estimate, log_ratio, sequence_kl

GOLDEN = pathlib.Path(__file__).parent / "golden"
P, Q = np.log([0.5, 0.2, 0.1]), np.log([0.4, 0.3, 0.1])
VALUES = {
    "k1": [0.223144, -0.405465, 0.0],
    "k2": [0.024897, 0.082201, 0.0],
    "k3": [0.023144, 0.094535, 0.0],
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_golden_values(estimator):
    values = kl_estimate(jnp.asarray(P), jnp.asarray(Q), estimator)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, VALUES[estimator.removesuffix("+")], rtol=0, atol=6e-7)


def test_tunix_agrees():
    golden = json.loads((GOLDEN / "tunix.json").read_text())["kl"]
    policy, reference = (jnp.asarray(golden[name], jnp.float32) for name in ("policy", "reference"))
    for estimator in ("k1", "k2", "k3"):
        ours = kl_estimate(policy, reference, estimator)
        np.testing.assert_allclose(ours, golden[estimator], rtol=1e-5, atol=5e-7)


def distributions(seed=0, vocabulary=7):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=vocabulary)), jnp.asarray(rng.normal(size=vocabulary))
    return logits[0], jax.nn.log_softmax(logits[1])


def expected(estimator, logits, reference, frozen):
    """sum_v p(v) estimate(v), the draw itself fixed at p: what many samples tend to."""
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(frozen) * kl_estimate(log_p, reference, estimator))


def test_the_means_of_k1_and_k3_are_the_kl_and_that_of_k2_is_not():
    with jax.enable_x64(True):
        logits, reference = distributions()
        log_p = jax.nn.log_softmax(logits)
        kl = float(jnp.sum(jnp.exp(log_p) * (log_p - reference)))
        means = {name: float(expected(name, logits, reference, log_p)) for name in ESTIMATORS}
    for name in ("k1", "k3", "k1+", "k3+"):
        np.testing.assert_allclose(means[name], kl, rtol=1e-12)
    assert abs(means["k2"] - kl) > 0.01 * kl


def test_sampled_means_tend_to_the_kl():
    """Monte Carlo: within four standard errors, and k3 with the smaller one."""
    log_p = jax.nn.log_softmax(jnp.asarray([0.3, 0.0, -0.2, 0.1]))
    log_q = jax.nn.log_softmax(jnp.asarray([0.0, 0.2, 0.0, 0.0]))
    kl = float(jnp.sum(jnp.exp(log_p) * (log_p - log_q)))
    tokens = jax.random.categorical(jax.random.key(0), log_p, shape=(20_000,))
    errors = {}
    for name in ("k1", "k3"):
        draws = np.asarray(kl_estimate(log_p[tokens], log_q[tokens], name), np.float64)
        errors[name] = draws.std() / np.sqrt(draws.size)
        assert abs(draws.mean() - kl) < 4 * errors[name]
    assert errors["k3"] < errors["k1"] / 2


def test_gradients_as_losses():
    """The gradient of the mean: zero for k1, of the KL itself for k2, k1+ and k3+, wrong for k3."""
    with jax.enable_x64(True):
        logits, reference = distributions(1)
        log_p = jax.nn.log_softmax(logits)

        def kl(logits):
            log_p = jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(log_p) * (log_p - reference))

        right = jax.grad(kl)(logits)
        slope = {
            name: jax.grad(lambda x, n=name: expected(n, x, reference, log_p))(logits)
            for name in ESTIMATORS
        }
    np.testing.assert_allclose(slope["k1"], np.zeros(7), atol=1e-12)
    for name in ("k2", "k1+", "k3+"):
        np.testing.assert_allclose(slope[name], right, rtol=1e-9)
    assert np.max(np.abs(slope["k3"] - right)) > 0.01


def test_k3_is_never_negative_and_zero_for_equal_policies():
    rng = np.random.default_rng(0)
    policy = jnp.asarray(-rng.exponential(size=1000), jnp.float32)
    moved = policy + jnp.asarray(rng.normal(size=1000) * 1e-4, jnp.float32)
    assert np.all(kl_estimate(policy, moved, "k3") >= 0)
    for name in ESTIMATORS:
        assert not np.any(kl_estimate(policy, policy, name))


def test_log_ratios_are_clipped_and_widened():
    far = jnp.asarray([-500.0, 0.0], jnp.bfloat16)
    ratio = log_ratio(far, far[::-1])
    assert ratio.dtype == jnp.float32
    np.testing.assert_array_equal(ratio, [-20.0, 20.0])
    assert np.all(np.isfinite(kl_estimate(far, far[::-1], "k3")))


def test_no_gradient_reaches_the_reference():
    for name in ESTIMATORS:
        slope = jax.grad(lambda q, n=name: jnp.sum(kl_estimate(jnp.asarray(P), q, n)))
        assert not np.any(slope(jnp.asarray(Q))), name


def test_sequence_kl_is_a_sum_over_the_response():
    kl = jnp.asarray([[0.5, 0.25, 9.0], [1.0, jnp.nan, jnp.nan]])
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(sequence_kl(kl, mask), [0.75, 1.0])


def test_the_controller_follows_the_golden_sequence():
    with jax.enable_x64(True):
        beta = jnp.asarray(0.2)
        for kl, expected in ((12.0, 0.201024), (3.0, 0.199994757), (6.0, 0.199994757)):
            beta = adapt_kl_coefficient(beta, jnp.asarray(kl), 256, target=6.0, horizon=1e4)
            np.testing.assert_allclose(beta, expected, rtol=0, atol=6e-10)
    assert adapt_kl_coefficient(0.2, jnp.float32(12.0), 256, target=6.0).dtype == jnp.float32


def test_the_controller_is_linear_within_its_clip_and_can_be_fixed():
    beta = adapt_kl_coefficient(1.0, jnp.float32(6.6), 1000, target=6.0, horizon=1e4)
    np.testing.assert_allclose(beta, 1 + 0.1 * 0.1, rtol=1e-6)
    assert adapt_kl_coefficient(0.2, jnp.float32(60.0), 256, target=None) == jnp.float32(0.2)


def test_an_unknown_estimator_is_named():
    with pytest.raises(UserError, match="k1, k2, k3"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")
