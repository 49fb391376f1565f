"""Advantages: golden values, rlax, tunix, a naive loop; what padding and groups must not do."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.ops.advantages import (
    GROUP_ESTIMATORS,
    best_of_n,
    center_scores,
    discounted_returns,
    expected_best_of_n,
    gae,
    group_advantages,
    informative_groups,
    reinforce_plus_plus,
    spread_over_tokens,
    whiten_advantages,
)
from chatyuan.ops.token_rewards import token_rewards

GOLDEN = pathlib.Path(__file__).parent / "golden"
# The 9 and the 7 are poison in the padding.
REWARDS = np.array([[-0.1, 0.2, 0.0, 1.0], [0.3, -0.2, 0.5, 9.0]])
VALUES = np.array([[0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 7.0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
ADVANTAGES = [[0.49065, 0.727, 0.66, 0.8], [0.4855, 0.09, 0.2, 0.0]]
RETURNS = [[0.99065, 1.127, 0.96, 1.0], [0.5855, 0.29, 0.5, 0.0]]
WHITENED = [[-0.009981, 0.877845, 0.626166, 1.152062], [-0.029327, -1.514984, -1.10178, 0.0]]


def arrays(*values):
    return tuple(map(jnp.asarray, values))


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["gae"]


def test_golden_values():
    with jax.enable_x64(True):
        advantages, returns = gae(*arrays(REWARDS, VALUES, MASK), gamma=1.0, lam=0.95)
        np.testing.assert_allclose(advantages, ADVANTAGES, rtol=0, atol=1e-12)
        np.testing.assert_allclose(returns, RETURNS, rtol=0, atol=1e-12)
        whitened = whiten_advantages(advantages, jnp.asarray(MASK))
        np.testing.assert_allclose(whitened, WHITENED, rtol=0, atol=6e-7)
    advantages, returns = gae(*arrays(REWARDS, VALUES, MASK))
    assert advantages.dtype == returns.dtype == jnp.float32
    np.testing.assert_allclose(advantages, ADVANTAGES, rtol=1e-6)
    np.testing.assert_allclose(returns, RETURNS, rtol=1e-6)


@pytest.mark.parametrize("case", range(len(cases("rlax"))))
def test_rlax_agrees(case):
    case = cases("rlax")[case]
    with jax.enable_x64(True):
        inputs = arrays(*(case[name] for name in ("rewards", "values", "mask")))
        advantages, _ = gae(*inputs, gamma=case["gamma"], lam=case["lam"])
        np.testing.assert_allclose(advantages, case["advantages"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", range(len(cases("tunix"))))
def test_tunix_agrees(case):
    """On masks with gaps too: tokens in a response that are not the policy's are stepped over."""
    case = cases("tunix")[case]
    inputs = arrays(*(case[name] for name in ("rewards", "values", "mask")))
    advantages, returns = gae(*inputs, gamma=case["gamma"], lam=case["lam"])
    np.testing.assert_allclose(advantages, case["advantages"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, case["returns"], rtol=1e-5, atol=1e-6)
    whitened = whiten_advantages(advantages, inputs[2])
    np.testing.assert_allclose(whitened, case["whitened"], rtol=1e-5, atol=2e-6)


def naive_gae(rewards, values, mask, gamma, lam):
    """sum over later tokens of (gamma lam)^k delta, row by row, padding cut off first."""
    out = np.zeros_like(rewards)
    for row, length in enumerate(mask.sum(-1)):
        r, v = rewards[row, :length], np.append(values[row, :length], 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for t in range(length):
            out[row, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
    return out


def test_gae_equals_a_naive_sum_and_does_not_see_padding():
    rng = np.random.default_rng(1)
    mask = np.arange(7) < rng.integers(0, 8, (6, 1))
    rewards, values = rng.normal(size=(2, 6, 7))
    expected = naive_gae(rewards, values, mask, 0.9, 0.8)
    rewards[~mask] = values[~mask] = np.nan
    with jax.enable_x64(True):
        advantages, returns = gae(*arrays(rewards, values, mask), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)
    np.testing.assert_allclose(returns, expected + np.where(mask, values, 0), rtol=1e-12)


def test_with_lambda_one_returns_are_rewards_to_go_whatever_the_critic():
    mask = jnp.asarray(MASK)
    for values in (VALUES, VALUES * -3):
        _, returns = gae(*arrays(REWARDS, values), mask, gamma=0.9, lam=1.0)
        to_go = discounted_returns(jnp.asarray(REWARDS), mask, gamma=0.9)
        np.testing.assert_allclose(returns, to_go, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_go[1], [0.3 - 0.18 + 0.405, -0.2 + 0.45, 0.5, 0.0], rtol=1e-6)


def test_nothing_passes_a_gradient():
    def total(inputs):
        advantages, returns = gae(*inputs, jnp.asarray(MASK))
        return jnp.sum(whiten_advantages(advantages, jnp.asarray(MASK))) + jnp.sum(returns)

    assert not any(map(np.any, jax.grad(total)(arrays(REWARDS, VALUES))))
    scores = jnp.asarray([[1.0, 0.0, 0.5]])
    for name in GROUP_ESTIMATORS:
        greedy = jnp.ones(1) if name == "remax" else None
        slope = jax.grad(
            lambda x, n=name, g=greedy: group_advantages(x, n, greedy_scores_B=g)[0, 0]
        )
        assert not np.any(slope(scores)), name


@pytest.mark.parametrize(
    ("estimator", "options", "expected"),
    [
        ("grpo", {"ddof": 1, "eps": 1e-6}, [1.224742, -1.224742, 0.0, 0.0]),
        ("grpo", {"ddof": 0, "eps": 0.0}, [math.sqrt(2), -math.sqrt(2), 0.0, 0.0]),
        ("rloo", {}, [0.666667, -0.666667, 0.0, 0.0]),
        ("dr_grpo", {}, [0.5, -0.5, 0.0, 0.0]),
    ],
)
def test_golden_group_advantages(estimator, options, expected):
    scores = jnp.asarray([[1.0, 0.0, 0.5, 0.5]])
    advantages = group_advantages(scores, estimator, **options)
    np.testing.assert_allclose(advantages[0], expected, rtol=0, atol=6e-7)


def test_tunix_agrees_on_groups():
    golden = json.loads((GOLDEN / "tunix.json").read_text())["groups"]
    scores = jnp.asarray(golden["scores"], jnp.float32)
    for name in ("grpo", "rloo", "dr_grpo"):
        np.testing.assert_allclose(group_advantages(scores, name), golden[name], rtol=1e-5)


def test_rloo_is_the_score_less_the_mean_of_the_others():
    scores = np.random.default_rng(0).normal(size=(3, 5))
    with jax.enable_x64(True):
        advantages = group_advantages(jnp.asarray(scores), "rloo")
    for row, column in np.ndindex(3, 5):
        others = np.delete(scores[row], column)
        np.testing.assert_allclose(advantages[row, column], scores[row, column] - others.mean())


def test_grpo_by_the_spread_of_the_batch():
    scores = np.array([[1.0, 0.0], [10.0, 4.0]])
    expected = (scores - scores.mean(-1, keepdims=True)) / scores.std(ddof=1)
    found = group_advantages(jnp.asarray(scores), "grpo", scale="batch", eps=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_groups_of_equal_scores():
    scores = jnp.asarray([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]])
    for name in ("grpo", "rloo", "dr_grpo"):
        advantages = group_advantages(scores, name)
        np.testing.assert_allclose(advantages[0], np.zeros(3), atol=2e-2)
        assert np.all(np.isfinite(advantages))
    np.testing.assert_array_equal(informative_groups(scores), [False, True])


def test_remax_compares_with_the_greedy_response():
    advantages = group_advantages(
        jnp.asarray([[1.0, 3.0], [0.0, 0.0]]), "remax", greedy_scores_B=jnp.asarray([2.0, -1.0])
    )
    np.testing.assert_array_equal(advantages, [[-1.0, 1.0], [1.0, 1.0]])
    one = group_advantages(jnp.ones((2, 1)), "remax", greedy_scores_B=jnp.zeros(2))
    np.testing.assert_array_equal(one, np.ones((2, 1)))


def test_reinforce_plus_plus_whitens_the_returns_to_go():
    mask = jnp.asarray(MASK)
    kl = jnp.asarray([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 9.0]])
    scores = center_scores(jnp.asarray([[1.0, -2.0]]))[0]  # the baseline: both of one prompt
    np.testing.assert_allclose(scores, [1.5, -1.5])
    rewards = token_rewards(scores, kl, mask, 0.1)
    to_go = np.array([[1.4, 1.41, 1.43, 1.46], [-1.68, -1.63, -1.57, 0.0]])
    np.testing.assert_allclose(discounted_returns(rewards, mask), to_go, rtol=1e-5)
    kept = to_go[MASK.astype(bool)]
    expected = np.where(MASK, (to_go - kept.mean()) / kept.std(ddof=1), 0.0)
    np.testing.assert_allclose(reinforce_plus_plus(rewards, mask), expected, rtol=1e-5)


def test_spread_over_tokens():
    spread = spread_over_tokens(jnp.asarray([2.0, -1.0]), jnp.asarray(MASK))
    np.testing.assert_array_equal(spread, [[2, 2, 2, 2], [-1, -1, -1, 0]])


def test_best_of_n():
    scores = jnp.asarray([[0.0, 2.0, 2.0, 1.0], [4.0, -1.0, 0.0, 3.0]])
    np.testing.assert_array_equal(best_of_n(scores), [1, 0])
    np.testing.assert_allclose(expected_best_of_n(scores, 1), scores.mean(-1))
    np.testing.assert_allclose(expected_best_of_n(scores, 4), scores.max(-1))
    pairs = [max(one, other) for i, one in enumerate([4, -1, 0, 3]) for other in [4, -1, 0, 3][:i]]
    np.testing.assert_allclose(expected_best_of_n(scores, 2)[1], np.mean(pairs), rtol=1e-6)
    with pytest.raises(ValueError, match="1 <= n <= 4"):
        expected_best_of_n(scores, 5)


def test_mistakes_are_named():
    scores = jnp.ones((2, 4))
    with pytest.raises(UserError, match="Did you mean grpo"):
        group_advantages(scores, "grppo")
    with pytest.raises(UserError, match="group, batch"):
        group_advantages(scores, "grpo", scale="none")
    with pytest.raises(UserError, match="at least 2"):
        group_advantages(scores[:, :1], "rloo")
    with pytest.raises(ValueError, match="belongs to remax"):
        group_advantages(scores, "remax")
    with pytest.raises(ValueError, match="belongs to remax"):
        group_advantages(scores, "rloo", greedy_scores_B=jnp.ones(2))
