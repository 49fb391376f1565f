"""Every processor against a naive loop; draws against their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.ops import sampling

B, V, T = 3, 17, 9


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def scores_and_history(rng, vocab=V):
    scores = rng.normal(size=(B, vocab)).astype(np.float32)
    history = rng.integers(0, 4, size=(B, T)).astype(np.int32)
    return scores, history


@pytest.mark.parametrize("length", [1, 4, T])
def test_repetition_penalty(rng, length):
    scores, history = scores_and_history(rng)
    expected = scores.copy()
    for row in range(B):
        for token in set(history[row, :length].tolist()):
            old = scores[row, token]
            expected[row, token] = old * 1.7 if old < 0 else old / 1.7
    got = jax.jit(sampling.repetition_penalty, static_argnums=3)(
        jnp.asarray(scores), jnp.asarray(history), jnp.int32(length), 1.7
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 8, T, T + 1])
@pytest.mark.parametrize("length", [1, 2, 5, T])
def test_ban_repeated_ngrams(rng, size, length):
    scores, history = scores_and_history(rng)
    expected = scores.copy()
    for row in range(B):
        seen = history[row, :length].tolist()
        suffix = seen[len(seen) - (size - 1) :] if size > 1 else []
        for start in range(len(seen) - size + 1):
            if seen[start : start + size - 1] == suffix:
                expected[row, seen[start + size - 1]] = -np.inf
    got = sampling.ban_repeated_ngrams(
        jnp.asarray(scores), jnp.asarray(history), jnp.int32(length), size
    )
    np.testing.assert_array_equal(got, expected)


def test_no_ngram_array_of_history_times_vocabulary():
    """Memory stays O(B T + B V): a [B, T, V] comparison would need 2 GB here."""
    shapes = (
        jax.ShapeDtypeStruct((8, 32128), jnp.float32),
        jax.ShapeDtypeStruct((8, 2048), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    compiled = jax.jit(sampling.ban_repeated_ngrams, static_argnums=3).lower(*shapes, 12).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8 * (32128 + 16 * 2048)


def test_masks(rng):
    scores, _ = scores_and_history(rng)
    allowed = np.arange(V) % 3 != 0
    got = np.asarray(sampling.mask_vocabulary(jnp.asarray(scores), jnp.asarray(allowed)))
    assert np.isneginf(got[:, ~allowed]).all()
    np.testing.assert_array_equal(got[:, allowed], scores[:, allowed])
    for generated, banned in ((2, True), (3, False)):
        got = np.asarray(
            sampling.enforce_min_length(jnp.asarray(scores), jnp.int32(generated), 3, (1, 5))
        )
        assert np.isneginf(got[:, [1, 5]]).all() == banned
        assert np.isfinite(np.delete(got, [1, 5], axis=1)).all()


def test_greedy_takes_the_first_of_equals():
    scores = jnp.asarray([[0.0, 2.0, 2.0], [-jnp.inf, -1.0, -3.0], [jnp.nan] * 3])
    assert sampling.greedy(scores).tolist() == [1, 1, 2]


@pytest.mark.parametrize("width", [17, 128 * 40, 128 * 40 + 5])
@pytest.mark.parametrize("k", [1, 8])
def test_largest(width, k):
    scores = np.random.default_rng(3).normal(size=(B, width)).astype(np.float32)
    scores[1, :-3] = -np.inf  # fewer finite scores than k
    best, ids = map(np.asarray, sampling.largest(jnp.asarray(scores), k))
    np.testing.assert_array_equal(best, -np.sort(-scores, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, ids, axis=1), best)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_selection_is_not_a_sort():
    """The sampling of a step compiles to partial selections; a sort of 32k costs 50 ms a step."""

    def draw(uniforms, scores):
        return sampling.sample(uniforms, scores, temperature=1.0, top_k=40, top_p=0.9)

    shapes = (
        jax.ShapeDtypeStruct((8, 2), jnp.float32),
        jax.ShapeDtypeStruct((8, 32128), jnp.float32),
    )
    text = jax.jit(draw).lower(*shapes).compile().as_text()
    sorts = [line for line in text.splitlines() if " sort(" in line]
    assert not [line for line in sorts if "32128" in line or "5120" in line], sorts


def naive_distribution(logits, temperature, top_k, top_p):
    scores = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scores, kind="stable")
    if top_k:
        order = order[:top_k]
    probs = np.exp(scores[order] - scores[order].max())
    probs /= probs.sum()
    kept, mass = [], 0.0
    for place, prob in zip(order, probs, strict=True):
        if mass >= top_p:
            break
        kept.append(place)
        mass += prob
    result = np.zeros(len(scores))
    result[kept] = np.exp(scores[kept] - scores[kept].max())
    return result / result.sum()


FILTERS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.3, 0, 0.8),
    (0.9, 9, 0.6),
    (1.0, 0, 0.01),
    (1.0, 1, 1.0),
]


@pytest.mark.parametrize("vocab", [V, 700])
@pytest.mark.parametrize("temperature,top_k,top_p", FILTERS)
def test_sampled_frequencies(vocab, temperature, top_k, top_p):
    """Chi-square of 40k draws, and the log-probability returned is that of the naive filter."""
    rng = np.random.default_rng(1)
    logits = (1.5 * rng.normal(size=vocab)).astype(np.float32)
    logits[3] = -np.inf
    expected = naive_distribution(logits, temperature, top_k, top_p)
    draws = 40_000
    keys = jax.random.split(jax.random.key(0), draws)
    uniforms = sampling.row_uniforms(keys, 3)[2]
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, vocab))
    ids, log_probs = jax.jit(sampling.sample, static_argnames=("temperature", "top_k", "top_p"))(
        uniforms, rows, temperature=temperature, top_k=top_k, top_p=top_p
    )
    ids, log_probs = np.asarray(ids), np.asarray(log_probs)
    assert (expected[ids] > 0).all()
    np.testing.assert_allclose(log_probs, np.log(expected[ids]), atol=2e-5)
    counts = np.bincount(ids, minlength=vocab)
    # Rare tokens share a bin, as the test needs about five expected draws in each.
    common = expected * draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    # Wilson-Hilferty: a fixed seed that fails one time in 10^4 under the null.
    limit = (
        freedom * (1 - 2 / (9 * freedom) + 3.7 * (2 / (9 * freedom)) ** 0.5) ** 3 if freedom else 0
    )
    assert statistic <= limit + 1e-9


def test_nucleus_threshold_near_and_far():
    """Rows whose nucleus exceeds the first block take the bisection, and only they."""
    rng = np.random.default_rng(2)
    weights = np.exp(np.stack([4 * rng.normal(size=900), 0.3 * rng.normal(size=900)]))
    weights = weights.astype(np.float32)
    got = np.asarray(sampling.nucleus_threshold(jnp.asarray(weights), 0.9))[:, 0]
    sizes = []
    for row, threshold in zip(weights, got, strict=True):
        order = np.sort(row)[::-1].astype(np.float64)
        count = int((np.cumsum(order) - order < 0.9 * order.sum()).sum())
        assert threshold == order[count - 1]
        sizes.append(count)
    assert sizes[0] < sampling.BLOCK < sizes[1]
    alone = sampling.nucleus_threshold(jnp.asarray(weights[:1]), 0.9)
    assert alone[0, 0] == got[0]


def test_draw_never_hits_zero_weight():
    weights = np.zeros((4, 300), np.float32)
    weights[:, [0, 131, 255]] = 0.1, 0.2, 1e-30
    edge = np.float32(1 - 2**-24)
    uniforms = jnp.asarray([[0, 0], [edge, edge], [0.4, edge], [edge, 0]], jnp.float32)
    ids = np.asarray(sampling.invert_cumulative(uniforms, jnp.asarray(weights)))
    assert (weights[np.arange(4), ids] > 0).all()


def test_uniforms_depend_on_row_and_step_only():
    keys = jax.random.split(jax.random.key(3), 5)
    whole = np.asarray(sampling.row_uniforms(keys, 4))
    part = np.asarray(sampling.row_uniforms(keys[3:4], 3))
    np.testing.assert_array_equal(whole[:3, 3:4], part)
    assert len(np.unique(whole)) == whole.size
