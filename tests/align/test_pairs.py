"""Preference losses on batches: which pairs with what weight; no split changes a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_models import EOS, VOCAB, model_and_params, prompts

from chatyuan.align.answers import Answers
from chatyuan.align.pairs import answer_log_probs, pair_figures, pair_terms
from chatyuan.ops.preference_losses import PairLogProbs, PreferenceLoss, preference_loss
from chatyuan.train.step import _split, _sum_gradients

LONGEST = 5
RANKS = np.array([[0, 1, 2], [2, 0, 0], [0, 1, 0], [1, 1, 1]])
LENGTHS = np.array([[4, 5, 3], [2, 2, 5], [3, 4, 0], [2, 3, 4]])  # the third has two answers
# Worked out by hand: who beats whom.
ALL = [{(0, 1), (0, 2), (1, 2)}, {(1, 0), (2, 0)}, {(0, 1)}, set()]
BEST = [{(0, 1), (0, 2)}, {(1, 0), (2, 0)}, {(0, 1)}, set()]


def answers(count=8, columns=2, seed=3):
    """Random answers of different lengths to `prompts`, their last token the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST + 1, (count, columns)).astype(np.int32)
    tokens = rng.integers(3, VOCAB, (count, columns, LONGEST)).astype(np.int32)
    places = np.arange(LONGEST)
    tokens = np.where(places == lengths[..., None] - 1, EOS, tokens)
    tokens *= places < lengths[..., None]
    return Answers(*prompts(count), tokens, lengths)


@pytest.mark.parametrize("best_only, wanted", [(False, ALL), (True, BEST)])
def test_a_prompts_pairs_are_one_mean(best_only, wanted):
    rng = np.random.default_rng(0)
    log_probs, reference = (rng.normal(-5, 2, RANKS.shape).astype(np.float32) for _ in range(2))
    loss = PreferenceLoss("ipo", beta=0.2, nll_weight=0.3)
    terms, weights = pair_terms(log_probs, reference, LENGTHS, RANKS, loss, best_only=best_only)
    assert [set(zip(*np.nonzero(row), strict=True)) for row in np.asarray(weights)] == wanted
    np.testing.assert_allclose(weights.sum((1, 2)), [1, 1, 1, 0], rtol=1e-6)
    figures, weight = pair_figures(terms, weights, fall_limit=1.0)
    assert weight == 3
    total = {"loss": 0.0, "chosen_fall": 0.0, "chosen_fallen": 0.0}
    for p, pairs in enumerate(wanted):
        for i, j in pairs:
            values = (log_probs[p, i], log_probs[p, j], reference[p, i], reference[p, j])
            counts = (LENGTHS[p, i], LENGTHS[p, j])
            alone = preference_loss(PairLogProbs(*map(np.float32, (*values, *counts))), loss)
            fall = reference[p, i] - log_probs[p, i]
            total["loss"] += float(alone.loss) / len(pairs)
            total["chosen_fall"] += fall / len(pairs)
            total["chosen_fallen"] += (fall > 1.0) / len(pairs)
    for name, value in total.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["encoder_decoder", "prefix_lm"])
def test_answers_that_share_a_prompt_are_as_likely_as_alone(kind):
    model, params = model_and_params(kind)
    both = answers()
    together = answer_log_probs(model, params, both)
    for k in range(2):
        alone = Answers(
            both.prompts, both.prompt_lengths, both.tokens[:, k, None], both.lengths[:, k, None]
        )
        found = answer_log_probs(model, params, alone)[:, 0]
        np.testing.assert_allclose(together[:, k], found, rtol=1e-5, atol=1e-5)


def test_kto_compares_with_the_answer_in_the_last_column():
    log_probs = jnp.array([[-3.0, -4.0, -2.0], [-5.0, -6.0, -1.0], [-2.0, -2.5, -9.0]])
    reference = jnp.array([[-3.5, -4.5, -2.6], [-5.0, -5.0, -1.4], [-2.0, -2.5, 0.0]])
    lengths = jnp.array([[2, 2, 2], [3, 2, 1], [1, 1, 0]])  # the last row has no foreign answer
    ranks = jnp.array([[0, 1], [1, 0], [0, 1]])

    def loss(log_probs):
        terms, weights = pair_terms(log_probs, reference, lengths, ranks, PreferenceLoss("kto"))
        return jnp.sum(terms.loss * weights)

    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    kl = (0.6 + 0.4) / 2
    h = np.array([[0.5, 0.5], [-1.0, 0.0], [0.0, 0.0]])  # chosen, rejected
    by_hand = 0.5 * (sigma(-0.1 * (h[:, 0] - kl)) + sigma(0.1 * (h[:, 1] - kl))).sum()
    value, gradient = jax.value_and_grad(loss)(log_probs)
    np.testing.assert_allclose(value, by_hand, rtol=1e-6)
    assert not np.asarray(gradient)[:, 2].any(), "the reference point is a constant"


def test_microbatches_change_no_gradient():
    model, params = model_and_params("encoder_decoder")
    given = answers(8, 3)
    reference = np.asarray(answer_log_probs(model, params, given)) + 0.5
    batch = {
        "prompts": given.prompts, "prompt_lengths": given.prompt_lengths, "answers": given.tokens,
        "lengths": given.lengths, "ranks": np.tile(np.arange(3), (8, 1)), "reference": reference,
    }  # fmt: skip
    options = PreferenceLoss(nll_weight=0.5)

    def loss_fn(params, batch, key):
        del key
        rows = Answers(*(batch[n] for n in ("prompts", "prompt_lengths", "answers", "lengths")))
        log_probs = answer_log_probs(model, params, rows)
        terms, weights = pair_terms(
            log_probs, batch["reference"], batch["lengths"], batch["ranks"], options
        )
        figures, weight = pair_figures(terms, weights, None)
        return figures["loss"], weight, {}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(parts):
        split = _split(jax.tree.map(jnp.asarray, batch), parts, None)
        loss, weight, _, summed = _sum_gradients(loss_fn, params, split, jax.random.key(0), None)
        return loss / weight, jax.tree.map(lambda x: x / weight, summed)

    whole = gradients(1)
    for parts in (2, 8):
        cut = gradients(parts)
        np.testing.assert_allclose(cut[0], whole[0], rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), cut[1], whole[1])
