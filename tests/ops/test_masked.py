"""Masked sums and whitening: values by NumPy, and nothing from under the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.ops.masked import (
    keep,
    masked_count,
    masked_mean,
    masked_sum,
    masked_variance,
    masked_whiten,
)

MASK = np.array([[1, 1, 0, 1], [0, 1, 1, 0]], bool)


def values(poison=np.nan):
    rng = np.random.default_rng(0)
    return np.where(MASK, rng.normal(size=MASK.shape) + 3, poison).astype(np.float32)


def test_statistics_are_those_of_the_kept_values():
    kept, array = values()[MASK], jnp.asarray(values())
    mask = jnp.asarray(MASK)
    np.testing.assert_allclose(masked_sum(array, mask), kept.sum(), rtol=1e-6)
    np.testing.assert_allclose(masked_mean(array, mask), kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(masked_variance(array, mask), kept.var(ddof=1), rtol=1e-6)
    np.testing.assert_allclose(masked_variance(array, mask, ddof=0), kept.var(), rtol=1e-6)
    rows = [row[keep_row].mean() for row, keep_row in zip(values(), MASK, strict=True)]
    np.testing.assert_allclose(masked_mean(array, mask, axis=-1), rows, rtol=1e-6)
    np.testing.assert_array_equal(masked_count(array, mask, axis=-1), [3, 2])


def test_nothing_kept_gives_zero():
    nothing = jnp.zeros(MASK.shape, bool)
    array = jnp.asarray(values())
    for result in (masked_mean(array, nothing), masked_variance(array, nothing)):
        assert result == 0
    assert not np.any(masked_whiten(array, nothing))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    kept = values()[MASK].astype(np.float64)
    whitened = masked_whiten(jnp.asarray(values()), jnp.asarray(MASK), shift_mean=shift_mean)
    expected = (kept - kept.mean()) / kept.std(ddof=1) + (0 if shift_mean else kept.mean())
    np.testing.assert_allclose(np.asarray(whitened)[MASK], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(whitened)[~MASK])


def test_gradients_pass_to_kept_values_alone():
    mask = jnp.asarray(MASK)
    for function in (masked_sum, masked_mean, masked_variance):
        gradient = np.asarray(jax.grad(lambda x, f=function: f(x, mask))(jnp.asarray(values())))
        assert np.all(np.isfinite(gradient)) and not np.any(gradient[~MASK])
        assert np.all(gradient[MASK] != 0)


def test_narrow_types_are_widened_and_numbers_serve_as_masks():
    wide = keep(jnp.asarray([1, 2, 3]), jnp.asarray([1.0, 0.0, 0.5]))
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, [1, 0, 3])
    many = jnp.full(4096, 1.0, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    assert masked_sum(many, jnp.ones(4096)) == 4096
