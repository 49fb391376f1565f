"""Cross entropy: values against a naive loop and optax, gradients against autodiff, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chatyuan.ops.losses import cross_entropy

OPTIONS = [
    {},
    {"z_loss": 1e-2},
    {"max_z_loss": 2e-2},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "max_z_loss": 2e-2, "label_smoothing": 0.2},
]


def _problem(shape=(3, 5), vocab=17, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(*shape, vocab)) * 4).astype(np.float32)
    targets = rng.integers(0, vocab, shape).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], shape).astype(np.float32)
    return logits, targets, weights


def _naive(logits, targets, weights, z_loss=0.0, max_z_loss=0.0, label_smoothing=0.0):
    """Token by token in float64, from the formulas and not from the implementation."""
    out = dict.fromkeys(("total", "nll", "z_loss", "max_z_loss", "correct", "weight"), 0.0)
    vocab = logits.shape[-1]
    for index in np.ndindex(*targets.shape):
        row, target, weight = logits[index].astype(np.float64), targets[index], weights[index]
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        log_z = row.max() + np.log(np.exp(row - row.max()).sum())
        q = np.full(vocab, label_smoothing / (vocab - 1))
        q[target] = 1 - label_smoothing
        entropy = -sum(p * np.log(p) for p in q if p > 0)
        smoothed = -sum(p * np.log(probabilities[v]) for v, p in enumerate(q)) - entropy
        z_term, max_term = z_loss * log_z**2, max_z_loss * row.max() ** 2
        out["total"] += weight * (smoothed + z_term + max_term)
        out["nll"] += weight * -np.log(probabilities[target])
        out["z_loss"] += weight * z_term
        out["max_z_loss"] += weight * max_term
        out["correct"] += weight * (row.argmax() == target)
        out["weight"] += weight
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sums_equal_a_naive_loop(options):
    problem = _problem()
    sums = cross_entropy(*map(jnp.asarray, problem), **options)
    for name, expected in _naive(*problem, **options).items():
        np.testing.assert_allclose(
            getattr(sums, name), expected, rtol=2e-6, atol=1e-6, err_msg=name
        )


def _differentiable_naive(logits, targets, z_loss, max_z_loss, label_smoothing):
    """The same loss per token from jax.nn pieces, for autodiff."""
    log_p = jax.nn.log_softmax(logits)
    one_hot = jax.nn.one_hot(targets, logits.shape[-1])
    q = optax.smooth_labels(one_hot, 0.0)
    q = q * (1 - label_smoothing) + (1 - q) * (label_smoothing / (logits.shape[-1] - 1))
    loss = -jnp.sum(q * log_p, axis=-1)
    loss += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return loss + max_z_loss * jnp.max(logits, axis=-1) ** 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_equals_autodiff_of_the_naive_form(options):
    logits, targets, weights = map(jnp.asarray, _problem())
    full = {"z_loss": 0.0, "max_z_loss": 0.0, "label_smoothing": 0.0, **options}

    def ours(logits, weights):
        return cross_entropy(logits, targets, weights, **full).total

    def naive(logits, weights):
        loss = _differentiable_naive(logits, targets, **full)
        entropy = 0.0
        if full["label_smoothing"]:
            off = full["label_smoothing"] / (logits.shape[-1] - 1)
            on = 1 - full["label_smoothing"]
            entropy = -(on * np.log(on) + (logits.shape[-1] - 1) * off * np.log(off))
        return jnp.sum((loss - entropy) * weights)

    gradients = jax.jit(jax.grad(ours, argnums=(0, 1)))(logits, weights)
    expected = jax.jit(jax.grad(naive, argnums=(0, 1)))(logits, weights)
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=2e-6)


def test_nll_and_its_gradient_equal_optax():
    logits, targets, weights = map(jnp.asarray, _problem(shape=(7,), vocab=33))

    def ours(logits):
        return cross_entropy(logits, targets, weights).nll

    def theirs(logits):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(loss * weights)

    for ours_value, theirs_value in zip(
        jax.value_and_grad(ours)(logits), jax.value_and_grad(theirs)(logits), strict=True
    ):
        np.testing.assert_allclose(ours_value, theirs_value, rtol=2e-6, atol=1e-6)


def test_huge_and_bfloat16_logits_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0]], jnp.bfloat16)
    targets, weights = jnp.asarray([0], jnp.int32), jnp.ones((1,))
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, targets, weights).total)(logits)
    assert value == 0
    assert gradient.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_target_outside_the_vocabulary_is_loud():
    logits, weights = jnp.zeros((1, 4)), jnp.ones((1,))
    assert np.isnan(cross_entropy(logits, jnp.asarray([4], jnp.int32), weights).total)


def test_zero_weights_add_nothing():
    logits, targets, _ = map(jnp.asarray, _problem())
    sums = cross_entropy(logits, targets, jnp.zeros(targets.shape), z_loss=1.0)
    assert all(value == 0 for value in sums)


def test_residuals_hold_no_second_array_of_the_size_of_the_logits():
    logits, targets, weights = map(jnp.asarray, _problem(shape=(64,), vocab=1000))
    options = {"z_loss": 1e-4, "max_z_loss": 2e-4, "label_smoothing": 0.1}
    _, pullback = jax.vjp(lambda x: cross_entropy(x, targets, weights, **options).total, logits)
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= logits.size]
    assert len(large) == 1, [leaf.shape for leaf in large]
    # Compiled, the gradient is written over the logits: no temporary of their size remains.
    gradient = jax.jit(
        jax.grad(lambda x: cross_entropy(x, targets, weights, **options).total), donate_argnums=0
    )
    memory = gradient.lower(logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes < logits.nbytes // 4
