"""Policy and value losses, entropy, aggregation: golden values, rlax, tunix, exact accumulation."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.ops.policy_losses import (
    AGGREGATIONS,
    aggregate,
    entropy,
    explained_variance,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"


def tokens(ratios, advantages, **options):
    """The loss of one response whose tokens have these ratios."""
    ratios, advantages = (jnp.asarray([values]) for values in (ratios, advantages))
    old = jnp.full(ratios.shape, -1.0)
    return policy_loss(jnp.log(ratios) + old, old, advantages, jnp.ones(ratios.shape), **options)


def test_golden_values():
    with jax.enable_x64(True):
        terms = tokens([0.7, 1.0, 1.3], [1.0, -1.0, 1.0])
        np.testing.assert_allclose(terms.loss[0], [-0.7, 1.0, -1.2], rtol=1e-12)
        np.testing.assert_array_equal(terms.clipped[0], [0.0, 0.0, 1.0])
        row = jnp.ones((1, 1))
        value = value_loss(1.5 * row, row, row, row, clip=0.2)
        np.testing.assert_allclose(value.loss, [[0.125]], rtol=1e-12)
    assert tokens([0.7], [1.0]).loss.dtype == jnp.float32


def test_rlax_agrees():
    """The mean over tokens and its gradient by the ratios."""
    for case in json.loads((GOLDEN / "rlax.json").read_text())["surrogate"]:
        with jax.enable_x64(True):

            def mean(ratios, case=case):
                epsilon = case["epsilon"]
                terms = tokens(ratios, case["advantages"], clip_low=epsilon, clip_high=epsilon)
                total, weight = aggregate(terms.loss, jnp.ones(terms.loss.shape))
                return total / weight

            value, gradient = jax.value_and_grad(mean)(jnp.asarray(case["ratios"]))
            np.testing.assert_allclose(value, case["loss"], rtol=1e-12)
            np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-9, atol=1e-14)


def test_the_first_minibatch_is_the_plain_policy_gradient():
    """Equal policies: ratio 1, nothing clipped, no KL, and the gradient is -A."""
    log_probs = jnp.asarray([[-1.0, -2.0, -0.5]])
    advantages, mask = jnp.asarray([[1.0, -2.0, 0.5]]), jnp.ones((1, 3))

    def total(values):
        return jnp.sum(policy_loss(values, log_probs, advantages, mask).loss)

    terms = policy_loss(log_probs, log_probs, advantages, mask)
    np.testing.assert_array_equal(terms.ratio, np.ones((1, 3)))
    for zero in (terms.clipped, terms.dual_clipped, terms.approx_kl):
        assert not np.any(zero)
    np.testing.assert_allclose(jax.grad(total)(log_probs), -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "clipped"),
    [
        (1.5, 1.0, {}, -1.2, 1),  # good and already likelier: no further
        (0.5, 1.0, {}, -0.5, 0),  # good and less likely: pulled back in full
        (1.5, -1.0, {}, 1.5, 0),  # bad and likelier: pushed down in full
        (0.5, -1.0, {}, 0.8, 1),  # bad and already rarer: no further
        (1.25, 1.0, {"clip_high": 0.28}, -1.25, 0),
        (1.35, 1.0, {"clip_high": 0.28}, -1.28, 1),
        (0.65, -1.0, {"clip_low": 0.3}, 0.7, 1),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, 0),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0, 0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2, 1),
    ],
)
def test_every_side_of_the_clips(ratio, advantage, options, loss, clipped):
    terms = tokens([ratio], [advantage], **options)
    np.testing.assert_allclose(terms.loss[0, 0], loss, rtol=1e-6)
    assert terms.clipped[0, 0] == clipped
    dual_clipped = bool(terms.dual_clipped[0, 0])
    assert dual_clipped == ("dual_clip" in options and abs(loss - 3.0) < 1e-6)
    slope = jax.grad(lambda r: tokens(r, [advantage], **options).loss[0, 0])(jnp.asarray([ratio]))
    stopped = clipped or dual_clipped
    np.testing.assert_allclose(slope[0], 0.0 if stopped else -advantage, rtol=1e-6)


def test_approx_kl_is_that_of_the_old_policy_against_the_new():
    terms = tokens([0.5, 1.0, 2.0], [1.0, 1.0, 1.0])
    expected = [0.5 - 1 - np.log(0.5), 0.0, 2 - 1 - np.log(2)]
    np.testing.assert_allclose(terms.approx_kl[0], expected, rtol=1e-5, atol=1e-7)


def problem(rows=8, length=6, seed=0):
    """Ragged responses with a row of nothing; NaN under the mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
    mask[3] = False
    fields = [-rng.exponential(size=(rows, length)) for _ in range(2)]
    fields += [rng.normal(size=(rows, length))]
    return [jnp.asarray(np.where(mask, field, np.nan), jnp.float32) for field in fields] + [
        jnp.asarray(mask)
    ]


def test_padding_reaches_neither_loss_nor_gradient():
    new, old, advantages, mask = problem()
    clean = [jnp.where(mask, field, 0.0) for field in (new, old, advantages)]

    def policy(values, old, advantages):
        terms = policy_loss(values, old, advantages, mask, dual_clip=3.0)
        return sum(jnp.sum(field) for field in terms)

    def critic(values, old, returns):
        return sum(jnp.sum(field) for field in value_loss(values, old, returns, mask))

    for function in (policy, critic):
        one, one_gradient = jax.value_and_grad(function)(new, old, advantages)
        other, other_gradient = jax.value_and_grad(function)(*clean)
        assert one == other
        np.testing.assert_array_equal(one_gradient, other_gradient)
        assert not np.any(np.asarray(one_gradient)[~np.asarray(mask)])


def test_gradients_pass_to_the_trained_policy_and_critic_alone():
    new, old, advantages, mask = (jnp.nan_to_num(field.astype(float)) for field in problem())

    def policy(fields):
        return jnp.sum(policy_loss(*fields, mask, weights_BT=fields[2]).loss)

    def critic(fields):
        return jnp.sum(value_loss(*fields, mask).loss)

    for function in (policy, critic):
        gradients = jax.grad(function)((new, old, advantages))
        assert np.any(gradients[0]) and not np.any(gradients[1]) and not np.any(gradients[2])


@pytest.mark.parametrize(
    ("value", "clip", "loss", "clipped"),
    [
        (1.5, 0.2, 0.125, 0),  # far from the return: the unclipped error counts
        (1.5, None, 0.125, 0),
        (0.9, 0.2, 0.5 * 0.1**2, 0),
        (0.2, 0.2, 0.32, 0),
    ],
)
def test_value_loss_around_old_values(value, clip, loss, clipped):
    row = jnp.ones((1, 1))
    terms = value_loss(value * row, row, row, row, clip=clip)
    np.testing.assert_allclose(terms.loss[0, 0], loss, rtol=1e-6)
    assert terms.clipped[0, 0] == clipped


def test_a_value_that_ran_ahead_of_its_clip_gets_no_gradient():
    """Old 0, return 1, value 0.9: already moved by more than 0.2, so the step stops here."""
    row = jnp.ones((1, 1))
    loss, slope = jax.value_and_grad(
        lambda v: jnp.sum(value_loss(v, 0 * row, row, row, clip=0.2).loss)
    )(0.9 * row)
    np.testing.assert_allclose(loss, 0.5 * 0.8**2, rtol=1e-6)
    assert slope == 0
    assert value_loss(0.9 * row, 0 * row, row, row).clipped == 1


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_tunix_agrees_on_aggregation(mode):
    golden = json.loads((GOLDEN / "tunix.json").read_text())["aggregate"]
    losses, mask = jnp.asarray(golden["losses"], jnp.float32), jnp.asarray(golden["mask"])
    total, weight = aggregate(losses, mask, mode)
    np.testing.assert_allclose(total / weight, golden[mode], rtol=1e-6)


def test_the_constant_length_is_the_one_given():
    total, weight = aggregate(jnp.ones((2, 3)), jnp.ones((2, 3)), AGGREGATIONS[-1], length=12)
    assert (total, weight) == (6, 24)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_microbatches_do_not_change_the_gradient(mode):
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 rows: sums and weights add up, and one division follows."""
    with jax.enable_x64(True):
        new, old, advantages, mask = problem()

        def gradient(parts):
            sums, weights = jnp.zeros_like(new), 0.0
            for rows in np.split(np.arange(8), parts):

                def total(values, rows=rows):
                    fields = (values[rows], old[rows], advantages[rows], mask[rows])
                    return aggregate(policy_loss(*fields).loss, mask[rows], mode)

                slope, weight = jax.grad(total, has_aux=True)(new)
                sums, weights = sums + slope, weights + weight
            return sums / weights

        whole = gradient(1)
        assert np.any(whole)
        for parts in (2, 4, 8):
            np.testing.assert_allclose(gradient(parts), whole, rtol=1e-6, atol=1e-9)


def test_gradients_equal_differences():
    with jax.enable_x64(True):
        new, old, advantages, mask = problem(seed=1)
        new, old, advantages = (
            jnp.nan_to_num(field).astype(jnp.float64) for field in (new, old, advantages)
        )

        def total(values):
            terms = policy_loss(values, old, advantages, mask, clip_high=0.28, dual_clip=3.0)
            return aggregate(terms.loss, mask)[0]

        gradient = np.asarray(jax.grad(total)(new))
        for index in [(0, 0), (1, 1), (2, 0), (5, 2), (7, 0)]:
            step = np.zeros(new.shape)
            step[index] = 1e-6
            numeric = float(total(new + step) - total(new - step)) / 2e-6
            np.testing.assert_allclose(gradient[index], numeric, rtol=1e-6, atol=1e-8)


def test_importance_weights_are_truncated():
    trainer = jnp.log(jnp.asarray([[0.5, 0.9, 0.2, 0.1]]))
    sampler = jnp.log(jnp.asarray([[0.5, 0.1, 0.4, 0.9]]))
    mask = jnp.asarray([[1, 1, 1, 0]])
    weights = truncated_importance_weights(trainer, sampler, mask)
    np.testing.assert_allclose(weights, [[1.0, 2.0, 0.5, 0.0]], rtol=1e-6)
    whole = truncated_importance_weights(trainer, sampler, mask, cap=5.0, level="sequence")
    np.testing.assert_allclose(whole, [[4.5, 4.5, 4.5, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(truncated_importance_weights(sampler, sampler, mask), mask)
    slope = jax.grad(lambda x: jnp.sum(truncated_importance_weights(x, sampler, mask)))
    assert not np.any(slope(trainer))


def test_importance_weights_scale_the_loss():
    options = {"weights_BT": jnp.asarray([[0.5, 2.0]])}
    plain = tokens([1.1, 0.9], [1.0, -1.0])
    weighted = tokens([1.1, 0.9], [1.0, -1.0], **options)
    np.testing.assert_allclose(weighted.loss, plain.loss * options["weights_BT"], rtol=1e-6)
    np.testing.assert_array_equal(weighted.ratio, plain.ratio)


def test_entropy():
    assert entropy(jnp.zeros((2, 8), jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(entropy(jnp.zeros((2, 8))), np.full(2, np.log(8)), rtol=1e-6)
    logits = np.random.default_rng(0).normal(size=(3, 9)) * 5
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(entropy(jnp.asarray(logits)), expected, rtol=1e-5)
    np.testing.assert_allclose(entropy(jnp.asarray(logits + 1e4)), expected, rtol=1e-2)


def test_entropy_with_forbidden_and_certain_tokens():
    logits = jnp.asarray([[0.0, 0.0, -jnp.inf], [500.0, 0.0, -500.0]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(entropy(x)))(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_explained_variance():
    returns = jnp.asarray([[1.0, 2.0, 3.0, jnp.nan]])
    mask = jnp.asarray([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1
    np.testing.assert_allclose(explained_variance(jnp.full((1, 4), 2.0), returns, mask), 0.0)
    biased = explained_variance(returns + 1.0, returns, mask)  # 1 - 1 / (2 / 3)
    np.testing.assert_allclose(biased, -0.5, rtol=1e-5)
    assert explained_variance(returns, jnp.ones((1, 4)), mask) == 0


def test_mistakes_are_named():
    with pytest.raises(UserError, match="dual_clip = 0.5 must be above 1"):
        tokens([1.0], [1.0], dual_clip=0.5)
    with pytest.raises(UserError, match="Did you mean token-mean"):
        aggregate(jnp.ones((1, 1)), jnp.ones((1, 1)), "token_mean")
    with pytest.raises(UserError, match="token or sequence"):
        truncated_importance_weights(*[jnp.ones((1, 1))] * 3, level="row")
