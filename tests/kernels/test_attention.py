"""The reference against NumPy loops, every other implementation against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.kernels import (
    IMPLEMENTATIONS,
    AlibiBias,
    AttentionMask,
    RelativePositionBias,
    dot_product_attention,
    prepare,
    select_implementation,
)

B, T, S, N, H = 2, 5, 7, 4, 3
# Those that a CPU runs, Pallas kernels as ordinary operations.
TESTED = ["reference", "dense", "xla", "pallas_gpu"]
OTHERS = TESTED[1:]
START = np.array([[0, 0, 1, 2, 3], [0, 0, 0, 0, 4]], np.int32)
END = np.array([[1, 7, 4, 3, 3], [2, 5, 7, 0, 7]], np.int32)  # rows (0, 4) and (1, 3) see nothing
EMPTY = END <= START
MASK = AttentionMask(key_start=START, key_end=END)


def arrays(kv_heads=N, dtype=np.float32):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, T, N, H)).astype(dtype)
    key, value = (rng.normal(size=(B, S, kv_heads, H)).astype(dtype) for _ in range(2))
    table = rng.normal(size=(N, 8)).astype(np.float32)
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), jnp.asarray(table)


def how(implementation):
    """Options of a call."""
    return {"implementation": implementation, "interpret": implementation.startswith("pallas")}


def t5_bias(table):
    return RelativePositionBias(table, bidirectional=True, max_distance=6)


def loops(query, key, value, bias_NTS, scale):
    """Attention of every query written out."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(B, T, N):
        keys = slice(START[b, t], max(START[b, t], END[b, t]))
        scores = scale * key[b, keys, n // group] @ query[b, t, n] + bias_NTS[n, t, keys]
        if scores.size:
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ value[b, keys, n // group]
    return out


@pytest.mark.parametrize("implementation", TESTED)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_its_definition(implementation, kv_heads):
    query, key, value, table = arrays(kv_heads)
    bias = t5_bias(table)
    got = dot_product_attention(
        query, key, value, mask=MASK, bias=bias, scale=0.7, **how(implementation)
    )
    dense = np.asarray(bias.dense(T, S), np.float64)
    as_numpy = [np.asarray(x, np.float64) for x in (query, key, value)]
    np.testing.assert_allclose(got, loops(*as_numpy, dense, 0.7), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got)[EMPTY], 0.0)


def gradients(implementation, kv_heads, with_bias, with_mask, dtype=np.float32):
    inputs = arrays(kv_heads, dtype)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, N, H)), jnp.float32)

    def value(query, key, value, table):
        out = dot_product_attention(
            query,
            key,
            value,
            mask=MASK if with_mask else None,
            bias=t5_bias(table) if with_bias else None,
            scale=0.7,
            **how(implementation),
        )
        assert out.dtype == value.dtype
        return jnp.sum(out.astype(jnp.float32) * weight)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))(*inputs)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize(
    ("kv_heads", "with_bias", "with_mask"),
    [(4, True, True), (2, True, True), (1, False, True), (4, False, False)],
)
def test_gradients_equal_the_references(implementation, kv_heads, with_bias, with_mask):
    value, grads = gradients(implementation, kv_heads, with_bias, with_mask)
    expected, expected_grads = gradients("reference", kv_heads, with_bias, with_mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.parametrize("implementation", TESTED)
def test_rows_without_keys_send_no_gradient(implementation):
    query, key, value, table = arrays()

    def of_empty_rows(query, key, value, table):
        out = dot_product_attention(
            query,
            key,
            value,
            mask=MASK,
            bias=t5_bias(table),
            scale=1.0,
            **how(implementation),
        )
        return jnp.sum(jnp.where(EMPTY[:, :, None, None], out + out**2, 0.0))

    for gradient in jax.grad(of_empty_rows, argnums=(0, 1, 2, 3))(query, key, value, table):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("implementation", TESTED)
def test_softmax_identities_of_the_table(implementation):
    """A constant added to the table changes nothing, so its gradient sums to 0 for every head."""
    query, key, value, table = arrays()
    _, grads = gradients(implementation, N, True, True)
    np.testing.assert_allclose(np.sum(grads[3], axis=1), 0.0, atol=1e-5)
    out, shifted = (
        dot_product_attention(
            query,
            key,
            value,
            mask=MASK,
            bias=t5_bias(entries),
            scale=1.0,
            **how(implementation),
        )
        for entries in (table, table + 3.0)
    )
    np.testing.assert_allclose(out, shifted, atol=1e-5)


@pytest.mark.parametrize("implementation", TESTED)
def test_bfloat16_stays_close_to_float32(implementation):
    _, grads = gradients(implementation, N, True, True, jnp.bfloat16)
    _, expected = gradients("reference", N, True, True)
    for got, want in zip(grads, expected, strict=True):
        error = np.abs(np.asarray(got, np.float32) - np.asarray(want)).max()
        assert error <= 0.03 * np.abs(np.asarray(want)).max()


@pytest.mark.parametrize("bias_kind", ["t5", "alibi"])
def test_prepared_mask_and_bias_mean_the_same(bias_kind):
    query, key, value, table = arrays()
    slopes = AlibiBias(jnp.asarray([0.5, 0.25, 0.125, 0.0625], jnp.float32))
    bias = t5_bias(table) if bias_kind == "t5" else slopes
    mask = AttentionMask(causal=True, window=3)
    prepared = prepare(mask, bias, batch=B, q_len=T, kv_len=S)
    once = dot_product_attention(query, key, value, mask=mask, bias=bias, scale=1.0)
    again = dot_product_attention(query, key, value, mask=prepared[0], bias=prepared[1], scale=1.0)
    np.testing.assert_array_equal(once, again)


def test_choice_of_implementation():
    name, reason = select_implementation(None)
    assert name in IMPLEMENTATIONS and reason
    query, key, value, _ = arrays()
    with pytest.raises(UserError, match="'denze' must be one of.*Did you mean dense"):
        dot_product_attention(query, key, value, scale=1.0, implementation="denze")
