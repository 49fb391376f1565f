"""Reward-model losses: golden values, rax, ties, padding, one gradient for a prompt's pairs."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.ops.reward_losses import (
    centering_loss,
    pairwise_loss,
    plackett_luce_loss,
    preference_pairs,
    reward_loss,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
SCORES = [1.2, 0.4, 0.1, -0.7]


def one_prompt(scores=SCORES, ranks=(0, 1, 2, 3), mask=None):
    mask = np.ones(len(scores), bool) if mask is None else mask
    return (
        jnp.asarray([scores]),
        jnp.asarray([ranks], jnp.int32),
        jnp.asarray([mask], bool),
    )


def batch(seed=0, prompts=6, answers=5):
    """Ragged prompts with ties; the padding holds a score and a rank that would matter."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(prompts, answers)) * 2
    ranks = rng.integers(0, 4, (prompts, answers))
    mask = np.arange(answers) < rng.integers(2, answers + 1, (prompts, 1))
    scores[~mask] = 1e4
    ranks[~mask] = -1
    return scores, ranks.astype(np.int32), mask


def naive(scores, ranks, mask):
    """Pair by pair: (mean loss, share right, mean margin, pairs) of one prompt."""
    losses, right, margins = [], [], []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if mask[i] and mask[j] and ranks[i] < ranks[j]:
            losses.append(np.log1p(np.exp(-(scores[i] - scores[j]))))
            right.append(scores[i] > scores[j])
            margins.append(scores[i] - scores[j])
    return [np.mean(values) if values else 0.0 for values in (losses, right, margins)], len(losses)


def test_golden_values():
    with jax.enable_x64(True):
        sums = reward_loss(*one_prompt())
        np.testing.assert_allclose(sums.total, 0.335102331, rtol=0, atol=6e-10)
        assert sums.weight == 1 and sums.accuracy == 1
        order = plackett_luce_loss(*one_prompt())
        np.testing.assert_allclose(order, [1.758865951], rtol=0, atol=6e-10)
        margin = pairwise_loss(jnp.asarray(1.2), jnp.asarray(0.4), 1 / 3)
        np.testing.assert_allclose(margin, 0.486792581, rtol=0, atol=6e-10)
        pair = one_prompt(SCORES[:2], (0, 1))
        sums = reward_loss(*pair, centering=1e-2)
        np.testing.assert_allclose(sums.centering, 0.0256, rtol=1e-12)
        np.testing.assert_allclose(sums.total, sums.ranking + 0.0256, rtol=1e-12)
        margins = jnp.full((1, 2, 2), 1 / 3)
        sums = reward_loss(*pair, margins_BKK=margins)
        np.testing.assert_allclose(sums.total, 0.486792581, rtol=0, atol=6e-10)
    np.testing.assert_allclose(reward_loss(*one_prompt()).total, 0.335102331, rtol=1e-6)
    np.testing.assert_allclose(centering_loss(jnp.asarray(1.2), jnp.asarray(0.4)), 2.56, rtol=1e-6)


def test_sums_equal_a_naive_loop():
    scores, ranks, mask = batch()
    weights = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])
    with jax.enable_x64(True):
        sums = reward_loss(*map(jnp.asarray, (scores, ranks, mask)), weights_B=jnp.asarray(weights))
    expected, weight = np.zeros(3), 0.0
    for row, row_weight in zip(zip(scores, ranks, mask, strict=True), weights, strict=True):
        means, pairs = naive(*row)
        expected += row_weight * np.asarray(means)
        weight += row_weight * (pairs > 0)
    np.testing.assert_allclose(
        [sums.total, sums.accuracy, sums.margin, sums.weight], [*expected, weight], rtol=1e-12
    )


def test_every_pair_counts_once():
    pairs = preference_pairs(*one_prompt()[1:])
    assert pairs.sum() == 6
    assert not np.any(pairs & pairs.transpose(0, 2, 1))


def test_prompts_weigh_alike_whatever_their_number_of_answers():
    """A prompt of four answers and one of two: the mean of the two means, not of seven pairs."""
    scores = jnp.asarray([SCORES, [0.5, 1.5, 0.0, 0.0]])
    ranks = jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3]], jnp.int32)
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    sums = reward_loss(scores, ranks, mask)
    np.testing.assert_allclose(sums.total, 0.335102331 + np.log1p(np.exp(1.0)), rtol=1e-6)
    assert sums.weight == 2


@pytest.mark.parametrize("ranking", ["pairwise", "plackett_luce"])
def test_ties_and_padding_are_not_compared(ranking):
    scores = jnp.asarray([[0.3, -0.2, 1.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    ranks = jnp.asarray([[0, 1, 1, 2], [0, 0, 0, 0]], jnp.int32)
    mask = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 1]], bool)

    def total(scores):
        return reward_loss(scores, ranks, mask, ranking=ranking, centering=0.1).total

    gradient = jax.grad(total)(scores)
    assert gradient[0, 3] == 0 and not np.any(gradient[1])
    sums = reward_loss(scores, ranks, mask, ranking=ranking)
    assert sums.weight == 1  # a prompt of nothing but ties has no weight
    poisoned = scores.at[0, 3].set(jnp.nan)
    assert total(poisoned) == total(scores)
    np.testing.assert_array_equal(jax.grad(total)(poisoned), gradient)


def test_tied_answers_do_not_compete_in_plackett_luce():
    scores, ranks, mask = one_prompt([0.3, -0.2, 1.0], (0, 1, 1))
    expected = np.log(np.exp([0.3, -0.2, 1.0]).sum()) - 0.3
    np.testing.assert_allclose(plackett_luce_loss(scores, ranks, mask), [expected], rtol=1e-6)


@pytest.mark.parametrize("ranking", ["pairwise", "plackett_luce"])
def test_the_order_of_the_answers_does_not_matter(ranking):
    scores, ranks, mask = batch(1)
    order = np.array([3, 0, 4, 1, 2])
    first = reward_loss(*map(jnp.asarray, (scores, ranks, mask)), ranking=ranking)
    moved = (values[:, order] for values in (scores, ranks, mask))
    second = reward_loss(*map(jnp.asarray, moved), ranking=ranking)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_swapping_the_answers_flips_the_gradient():
    """d loss / d score_chosen = -d loss / d score_rejected, and equal scores cost ln 2."""
    gradient = jax.grad(lambda s: reward_loss(s, *one_prompt(SCORES[:2], (0, 1))[1:]).total)
    one = gradient(jnp.asarray([[1.2, 0.4]]))[0]
    np.testing.assert_allclose(one[0], -one[1], rtol=1e-6)
    assert one[0] < 0
    np.testing.assert_allclose(reward_loss(*one_prompt([0.5, 0.5], (0, 1))).total, np.log(2))


def test_hopeless_pairs_have_a_finite_loss_and_gradient():
    loss, slope = jax.value_and_grad(pairwise_loss)(jnp.float32(-100.0), jnp.float32(100.0))
    np.testing.assert_allclose([loss, slope], [200.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["kwise", "plackett_luce"])
def test_rax_agrees(name):
    """pairwise_logistic_loss and listmle_loss of rax, with the gradient of their means."""
    golden = json.loads((GOLDEN / "rax.json").read_text())[name]
    for case in golden["cases"]:
        scores, ranks, mask = (jnp.asarray([case[key]]) for key in ("scores", "ranks", "mask"))
        ranking = "pairwise" if name == "kwise" else "plackett_luce"

        def total(values, ranks=ranks, mask=mask, ranking=ranking):
            return reward_loss(values, ranks, mask, ranking=ranking).total

        value, gradient = jax.value_and_grad(total)(scores.astype(jnp.float32))
        np.testing.assert_allclose(value, case["loss"], rtol=2e-6)
        np.testing.assert_allclose(gradient[0], case["gradient"], rtol=1e-5, atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="Did you mean pairwise"):
        reward_loss(*one_prompt(), ranking="pairwize")
    with pytest.raises(UserError, match="margins need"):
        reward_loss(*one_prompt(), ranking="plackett_luce", margins_BKK=jnp.zeros((1, 4, 4)))
