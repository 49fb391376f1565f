"""Rotary positions and ALiBi's slopes."""

import jax.numpy as jnp
import numpy as np

from chatyuan.ops.positions import alibi_slopes, rope


def test_rope_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        rotated = [
            rope(x, jnp.full((1, 1), p, jnp.int32))
            for x, p in ((query, q_position), (key, k_position))
        ]
        return np.sum(np.asarray(rotated[0] * rotated[1]), axis=-1)

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert np.abs(score(7, 3) - score(3, 7)).max() > 1e-3


def test_rope_rotates_each_pair_by_its_frequency():
    x = np.zeros((1, 1, 1, 4), np.float32)
    x[..., 0], x[..., 1] = 1.0, 1.0
    got = np.asarray(rope(jnp.asarray(x), jnp.full((1, 1), 3, jnp.int32), theta=100.0))[0, 0, 0]
    expected = [np.cos(3.0), np.cos(0.3), np.sin(3.0), np.sin(0.3)]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    start = rope(jnp.asarray(x, jnp.bfloat16), jnp.zeros((1, 1), jnp.int32))
    assert start.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(start, np.float32), x)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
    # Six heads: those of four, then every second one of eight.
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
