"""Preference losses: golden values in float64, gradients by differences, what each must ignore."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.ops import preference_losses
from chatyuan.ops.preference_losses import (
    LOSSES,
    PairLogProbs,
    PreferenceLoss,
    kto_kl,
    kto_losses,
    preference_loss,
    preference_sums,
)

# Worked by hand in float64: pi_c -12, pi_r -15, ref_c -13, ref_r -14, 6 and 8 tokens, beta 0.1.
GOLDEN = [
    ({"loss": "dpo"}, -12.0, 0.598138869),
    ({"loss": "cdpo", "label_smoothing": 0.1}, -12.0, 0.618138869),
    ({"loss": "robust", "label_smoothing": 0.1}, -12.0, 0.573138869),
    ({"loss": "ipo_sum"}, -12.0, 9.0),
    ({"loss": "ipo"}, -12.0, 22.168402778),
    ({"loss": "ipo"}, -10.0, 19.140625),  # (3/6 + 1/8 - 5)^2: each fall over its own tokens
    ({"loss": "hinge"}, -12.0, 0.8),
    ({"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, -12.0, 1.136871006),
    ({"loss": "orpo", "orpo_lambda": 0.1}, -12.0, 2.076884167),
    ({"loss": "kto"}, -12.0, (0.482507142 + 0.467545694) / 2),
    ({"loss": "dpo"}, -13.5, 0.668459648),
    ({"loss": "dpop", "dpop_lambda": 5.0}, -13.5, 0.798138869),
    ({"loss": "dpo", "nll_weight": 1.0}, -13.5, 2.918459648),
]
ONE_OF_EACH = [
    {"loss": name, **({"label_smoothing": 0.1} if "label_smoothing" in entry.options else {})}
    for name, entry in LOSSES.items()
]


def pair_of(chosen, rejected=-15.0, reference_chosen=-13.0, reference_rejected=-14.0, **more):
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
        "chosen_tokens": 6.0,
        "rejected_tokens": 8.0,
        **more,
    }
    rows = np.broadcast_arrays(*(np.atleast_1d(value) for value in values.values()))
    fields = dict(zip(values, map(jnp.asarray, rows), strict=True))
    return PairLogProbs(kl=jnp.asarray(0.3), **fields)


def pairs(rows=5, seed=0):
    """Random pairs on both sides of every kink."""
    rng = np.random.default_rng(seed)
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    values = {name: -rng.uniform(5, 25, rows) for name in names}
    counts = rng.integers(3, 12, (2, rows)).astype(np.float64)
    return pair_of(**values, chosen_tokens=counts[0], rejected_tokens=counts[1])


@pytest.mark.parametrize(("options", "chosen", "expected"), GOLDEN, ids=str)
def test_golden_values(options, chosen, expected):
    with jax.enable_x64(True):
        terms = preference_loss(pair_of(chosen), PreferenceLoss(**options))
        np.testing.assert_allclose(terms.loss[0], expected, rtol=0, atol=6e-10)
    terms = preference_loss(pair_of(np.float32(chosen)), PreferenceLoss(**options))
    assert terms.loss.dtype == jnp.float32
    np.testing.assert_allclose(terms.loss[0], expected, rtol=1e-6)


def test_golden_values_of_single_answers():
    with jax.enable_x64(True):
        both = kto_losses(
            jnp.asarray([-12.0, -15.0]),
            jnp.asarray([-13.0, -14.0]),
            jnp.asarray([True, False]),
            jnp.asarray(0.3),
            PreferenceLoss("kto"),
        )
        np.testing.assert_allclose(both, [0.482507142, 0.467545694], rtol=0, atol=6e-10)
        nll = preference_loss(pair_of(-12.0), PreferenceLoss("orpo", orpo_lambda=1.0))
        np.testing.assert_allclose(nll.loss - nll.nll, 0.768841666, rtol=0, atol=6e-10)


def test_weights_of_kto_scale_their_kind_of_answer():
    options = PreferenceLoss("kto", desirable_weight=2.0, undesirable_weight=0.5)
    terms = preference_loss(pair_of(-12.0), options)
    np.testing.assert_allclose(
        terms.loss[0], (2.0 * 0.482507142 + 0.5 * 0.467545694) / 2, rtol=1e-6
    )


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=str)
def test_gradients_equal_differences(options):
    """Only the policy's log-probs get one; the reference, the counts and KTO's KL are constants."""
    with jax.enable_x64(True):
        batch = pairs()

        def total(pair):
            return jnp.sum(preference_loss(pair, PreferenceLoss(**options)).loss)

        gradients = jax.grad(total)(batch)
        for name in ("chosen", "rejected"):
            for row in range(batch.chosen.size):
                step = np.zeros(batch.chosen.size)
                step[row] = 1e-5
                moved = [
                    total(batch._replace(**{name: getattr(batch, name) + sign * step}))
                    for sign in (1, -1)
                ]
                numeric = (moved[0] - moved[1]) / 2e-5
                np.testing.assert_allclose(getattr(gradients, name)[row], numeric, atol=1e-8)
        for name in ("reference_chosen", "reference_rejected", "chosen_tokens", "kl"):
            assert not np.any(getattr(gradients, name)), name


@pytest.mark.parametrize("name", ["dpo", "cdpo", "dpop", "kto"])
def test_policy_equal_to_the_reference(name):
    """The first step of a run: ln 2 for every pair, no margin, no fall."""
    batch = pair_of(chosen=[-12.0, -7.0], rejected=[-9.0, -20.0])
    batch = batch._replace(
        reference_chosen=batch.chosen, reference_rejected=batch.rejected, kl=jnp.asarray(0.0)
    )
    smoothing = {"label_smoothing": 0.2} if name == "cdpo" else {}
    terms = preference_loss(batch, PreferenceLoss(name, **smoothing))
    expected = 0.5 if name == "kto" else np.log(2)
    np.testing.assert_allclose(terms.loss, np.full(2, expected), rtol=1e-6)
    for zero in (terms.margin, terms.accuracy, terms.chosen_fall, terms.rejected_fall):
        np.testing.assert_array_equal(zero, np.zeros(2))


def test_robust_is_dpo_on_average_over_flipped_labels():
    with jax.enable_x64(True):
        batch, smooth = pairs(), 0.3
        flipped = batch._replace(
            chosen=batch.rejected,
            rejected=batch.chosen,
            reference_chosen=batch.reference_rejected,
            reference_rejected=batch.reference_chosen,
        )
        options = PreferenceLoss("robust", label_smoothing=smooth)
        mean = (1 - smooth) * preference_loss(batch, options).loss
        mean += smooth * preference_loss(flipped, options).loss
        np.testing.assert_allclose(mean, preference_loss(batch, PreferenceLoss()).loss, rtol=1e-12)


def test_dpop_is_dpo_while_the_chosen_answer_has_not_fallen():
    batch = pair_of(chosen=[-12.0, -13.5])
    plain = preference_loss(batch, PreferenceLoss("dpo")).loss
    guarded = preference_loss(batch, PreferenceLoss("dpop")).loss
    assert guarded[0] == plain[0]
    assert guarded[1] > plain[1]


def test_metrics_show_the_fall_of_the_chosen_answer():
    """The known weakness of DPO: a right answer that both models make ever less likely."""
    terms = preference_loss(pair_of(chosen=[-12.0, -33.0], rejected=-55.0), PreferenceLoss())
    np.testing.assert_allclose(terms.chosen_fall, [-1.0, 20.0])
    np.testing.assert_allclose(terms.rejected_fall, [41.0, 41.0])
    np.testing.assert_allclose(terms.chosen_log_prob, [-12.0, -33.0])
    np.testing.assert_allclose(terms.rejected_log_prob, [-55.0, -55.0])
    np.testing.assert_allclose(terms.chosen_reward, [0.1, -2.0], rtol=1e-6)
    np.testing.assert_allclose(terms.rejected_reward, [-4.1, -4.1], rtol=1e-6)
    np.testing.assert_allclose(terms.margin, [4.2, 2.1], rtol=1e-6)
    np.testing.assert_array_equal(terms.accuracy, [1.0, 1.0])


def test_accuracy_counts_a_higher_reward_and_not_a_higher_log_prob():
    batch = pair_of(
        chosen=[-10.0, -20.0],
        rejected=[-20.0, -10.0],
        reference_chosen=[-5.0, -25.0],
        reference_rejected=[-25.0, -5.0],
    )
    np.testing.assert_array_equal(preference_loss(batch, PreferenceLoss()).accuracy, [0.0, 1.0])


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_losses_without_reference(name):
    """They run without one; given one, only the falls change."""
    options = PreferenceLoss(name)
    with_reference = preference_loss(pair_of(-12.0), options)
    bare = pair_of(-12.0)._replace(reference_chosen=None, reference_rejected=None, kl=None)
    terms = preference_loss(bare, options)
    assert terms.loss == with_reference.loss
    assert terms.margin == with_reference.margin
    assert terms.chosen_fall is None and terms.rejected_fall is None
    assert with_reference.chosen_fall == -1.0
    np.testing.assert_allclose(terms.chosen_reward, 0.1 * -12 / 6, rtol=1e-6)


def test_orpo_stays_finite_for_a_certain_answer():
    certain = pair_of(chosen=0.0)
    loss, gradient = jax.value_and_grad(
        lambda pair: jnp.sum(preference_loss(pair, PreferenceLoss("orpo")).loss)
    )(certain)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probs_stay_finite(name):
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].options else {}
    batch = pair_of(chosen=[-5000.0, -1.0], rejected=[-1.0, -5000.0], reference_rejected=-10.0)
    value = functools.partial(preference_loss, options=PreferenceLoss(name, **smoothing))
    assert np.all(np.isfinite(value(batch).loss))
    gradient = jax.grad(lambda pair: jnp.sum(value(pair).loss))(batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_log_probs_are_widened_first():
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pair_of(np.float32(-12.0)))
    terms = preference_loss(batch, PreferenceLoss())
    assert terms.loss.dtype == jnp.float32
    np.testing.assert_allclose(terms.loss, 0.598138869, rtol=1e-6)


def test_the_kl_of_kto():
    log_probs, reference = jnp.asarray([-10.0, -12.0, 900.0]), jnp.asarray([-11.0, -12.5, 0.0])
    weights = jnp.asarray([1.0, 1.0, 0.0])
    np.testing.assert_allclose(kto_kl(log_probs, reference, weights), 0.75)
    assert kto_kl(reference, log_probs, weights) == 0.0  # never below 0
    gradient = jax.grad(lambda values: kto_kl(values, reference, weights))(log_probs)
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_the_gradient_of_kto_stops_at_the_kl():
    def loss(log_probs):
        kl = jnp.mean(log_probs)  # a careless caller: still a constant
        return jnp.sum(kto_losses(log_probs, log_probs * 0, True, kl, PreferenceLoss("kto")))

    values = jnp.asarray([1.0, 3.0])
    sigma = 1 / (1 + np.exp(-0.1 * (np.asarray(values) - 2.0)))
    np.testing.assert_allclose(jax.grad(loss)(values), -0.1 * sigma * (1 - sigma), rtol=1e-5)


def test_sums_over_pairs_leave_out_rows_without_weight():
    batch = pair_of(chosen=[-12.0, -13.5, 77.0], chosen_tokens=[6.0, 6.0, 0.0])
    weights = jnp.asarray([1.0, 3.0, 0.0])
    options = PreferenceLoss(nll_weight=1.0)
    summed, weight = preference_sums(preference_loss(batch, options), weights)
    assert weight == 4.0
    np.testing.assert_allclose(summed.loss, 0.598138869 + 2.0 + 3 * 2.918459648, rtol=1e-6)
    np.testing.assert_allclose(summed.chosen_fall, -1.0 + 3 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(summed.nll, 2.0 + 3 * 2.25, rtol=1e-6)


def test_a_row_without_tokens_does_not_poison_the_gradient():
    batch = pair_of(chosen=[-12.0, 0.0], rejected=[-15.0, 0.0], chosen_tokens=[6.0, 0.0])
    batch = batch._replace(rejected_tokens=jnp.asarray([8.0, 0.0]))
    weights = jnp.asarray([1.0, 0.0])
    for options in ONE_OF_EACH:
        terms = functools.partial(preference_loss, options=PreferenceLoss(**options, nll_weight=1))
        gradient = jax.grad(lambda pair, t=terms: preference_sums(t(pair), weights)[0].loss)(batch)
        assert np.all(np.isfinite(gradient.chosen)) and gradient.chosen[1] == 0, options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpoo"}, "Did you mean dpo"),
        ({"loss": "dpo", "label_smoothing": 0.1}, "belongs to cdpo, robust"),
        ({"loss": "cdpo"}, "label_smoothing = 0 is 'dpo'"),
        ({"loss": "robust", "label_smoothing": 0.5}, r"in \[0, 0.5\)"),
        ({"loss": "dpo", "beta": 0.0}, "beta = 0.0 must be above 0"),
        ({"loss": "orpo", "beta": 0.2}, "no effect"),
        ({"loss": "dpo", "nll_weight": -1.0}, "nll_weight = -1.0 must be at least 0"),
        ({"loss": "hinge", "dpop_lambda": 1.0}, "belongs to dpop"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PreferenceLoss(**options).check()


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="needs reference_chosen, reference_rejected"):
        preference_loss(PairLogProbs(jnp.zeros(1), jnp.zeros(1)), PreferenceLoss())
    with pytest.raises(ValueError, match="needs chosen_tokens"):
        preference_loss(pair_of(-1.0)._replace(chosen_tokens=None), PreferenceLoss(nll_weight=1.0))
    with pytest.raises(ValueError, match="needs kl"):
        preference_loss(pair_of(-1.0)._replace(kl=None), PreferenceLoss("kto"))


def test_every_loss_has_a_golden_value():
    assert {options["loss"] for options, _, _ in GOLDEN} == set(preference_losses.LOSSES)
