"""Token rewards, running moments, endings: the score once, at EOS; nothing from padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.ops.token_rewards import (
    Endings,
    Moments,
    last_token_mask,
    merge_moments,
    moments_of,
    no_moments,
    normalise_scores,
    response_lengths,
    shape_scores,
    token_rewards,
)

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
KL = np.array([[0.1, -0.2, 0.0, 0.3], [0.5, 0.25, 7.0, np.nan], [-0.4, 8.0, 8.0, 8.0]])


def test_the_score_stands_once_at_the_last_token():
    rewards = token_rewards(jnp.asarray([0.7, -0.6, 1.0]), jnp.asarray(KL), jnp.asarray(MASK), 0.5)
    expected = [
        [-0.05, 0.1, 0.0, -0.15 + 0.7],
        [-0.25, -0.125 - 0.6, 0.0, 0.0],
        [0.2 + 1.0, 0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6, atol=1e-7)


def test_rewards_of_a_response_sum_to_its_score_less_its_kl():
    rng = np.random.default_rng(0)
    mask = np.arange(9) < rng.integers(1, 10, (20, 1))
    kl, scores = rng.normal(size=(20, 9)), rng.normal(size=20)
    with jax.enable_x64(True):
        rewards = np.asarray(token_rewards(*map(jnp.asarray, (scores, kl, mask)), 0.3))
    np.testing.assert_allclose(rewards.sum(-1), scores - 0.3 * (kl * mask).sum(-1), rtol=1e-12)
    assert not np.any(rewards[~mask])


def test_rewards_are_floats_whatever_comes_in():
    """Scores of +-0.6 added to an integer array would be 0: a bug of a published library."""
    narrow = token_rewards(
        jnp.asarray([0.7, -0.6, 1.0], jnp.bfloat16),
        jnp.zeros(MASK.shape, jnp.int32),
        jnp.asarray(MASK, jnp.int32),
        0.1,
    )
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow.sum(-1), [0.7, -0.6, 1.0], rtol=4e-3)
    whole = token_rewards(
        jnp.asarray([3, 0, -2]), jnp.zeros(MASK.shape), jnp.asarray(MASK), jnp.float32(0.1)
    )
    np.testing.assert_array_equal(whole.sum(-1), [3, 0, -2])


def test_the_last_token_is_found_by_the_mask():
    """Also when tokens in the middle are not the policy's, and in a row of nothing."""
    mask = jnp.asarray([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    expected = [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(last_token_mask(mask), np.array(expected, bool))
    np.testing.assert_array_equal(response_lengths(mask), [2, 0, 4])


def test_no_gradient_passes_the_rewards():
    def total(kl):
        return jnp.sum(token_rewards(jnp.ones(3), kl, jnp.asarray(MASK), 0.5))

    assert not np.any(jax.grad(total)(jnp.asarray(np.nan_to_num(KL))))


def test_moments_do_not_depend_on_how_the_values_were_cut():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000) * 3 + 50
    with jax.enable_x64(True):
        for cuts in ([], [1], [10, 11, 500], list(range(100, 1000, 100))):
            moments = Moments(jnp.int32(0), jnp.float64(0), jnp.float64(0))
            for part in np.split(values, cuts):
                moments = merge_moments(moments, moments_of(jnp.asarray(part)))
            assert moments.count == 1000
            np.testing.assert_allclose(moments.mean, values.mean(), rtol=1e-13)
            np.testing.assert_allclose(moments.std(), values.std(ddof=1), rtol=1e-12)
            np.testing.assert_allclose(moments.variance(ddof=0), values.var(), rtol=1e-12)


def test_moments_in_float32_survive_a_large_mean():
    """E[x^2] - E[x]^2 in float32 would have no correct digit here."""
    values = np.random.default_rng(0).normal(size=(50, 20)) + 3000
    moments = no_moments()
    for part in values.astype(np.float32):
        moments = merge_moments(moments, moments_of(jnp.asarray(part)))
    np.testing.assert_allclose(moments.std(), values.std(ddof=1), rtol=1e-3)
    assert (moments.count.dtype, moments.mean.dtype) == (jnp.int32, jnp.float32)


def test_moments_of_little():
    assert no_moments().std() == 0
    one = moments_of(jnp.asarray([5.0, 900.0]), jnp.asarray([1, 0]))
    assert (one.count, one.mean, one.std()) == (1, 5.0, 0.0)


def test_scores_are_normalised_and_then_clipped():
    scores = jnp.asarray([1.0, 5.0, -20.0])
    np.testing.assert_allclose(
        normalise_scores(scores, mean=1.0, std=2.0, clip=3.0), [0.0, 2.0, -3.0], rtol=1e-6
    )
    np.testing.assert_allclose(normalise_scores(scores, std=jnp.float32(2.0)), scores / 2)
    assert np.all(np.isfinite(normalise_scores(scores, std=0.0, clip=5.0)))
    assert normalise_scores(jnp.asarray([2, 4]), std=4.0).dtype == jnp.float32


def shaped(endings, scores=(0.5, 0.5, 0.5), lengths=(3, 10, 10), ended=(True, True, False)):
    arrays = jnp.asarray(scores), jnp.asarray(lengths, jnp.int32), jnp.asarray(ended)
    return shape_scores(*arrays, 10, endings)


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        (Endings(), [0.5, 0.5, 0.5]),
        (Endings(missing_eos_score=-1.0), [0.5, 0.5, -1.0]),
        (Endings(missing_eos_penalty=2.0), [0.5, 0.5, -1.5]),
        (Endings(missing_eos_score=-1.0, min_length=4), [-1.0, 0.5, -1.0]),
        (Endings(missing_eos_score=-1.0, min_length=3), [0.5, 0.5, -1.0]),
        (Endings(overlong_buffer=4, overlong_penalty=0.5), [0.5, 0.0, 0.0]),
        (Endings(missing_eos_score=0.0, overlong_buffer=4), [0.5, -0.5, -1.0]),
    ],
    ids=str,
)
def test_endings(endings, expected):
    np.testing.assert_allclose(shaped(endings), expected, rtol=1e-6)


def test_the_overlong_penalty_grows_from_the_start_of_its_buffer():
    endings = Endings(overlong_buffer=4, overlong_penalty=2.0)
    scores = shaped(endings, (0.0,) * 5, (2, 6, 7, 9, 10), (True,) * 5)
    np.testing.assert_allclose(scores, [0.0, 0.0, -0.5, -1.5, -2.0])
