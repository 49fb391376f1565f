"""Buckets against published values, Toeplitz expansion against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.kernels import AlibiBias, RelativePositionBias, relative_position_bucket


def test_published_buckets():
    """Values of T5's function (32 buckets, distance 128) at the changes and both ends."""

    def bucket(relative, bidirectional):
        return relative_position_bucket(
            np.asarray(relative, np.int32),
            bidirectional=bidirectional,
            num_buckets=32,
            max_distance=128,
        ).tolist()

    assert bucket([0, -1, -7, -8, -11, -12, -15, -16, -90, -91, -999], True) == [
        *(0, 1, 7, 8, 8, 9, 9, 10, 14, 15, 15)
    ]
    assert bucket([1, 7, 8, 12, 16, 91, 999], True) == [17, 23, 24, 25, 26, 31, 31]
    assert bucket([5, 0, -1, -15, -16, -18, -112, -113, -999], False) == [
        *(0, 0, 1, 15, 16, 16, 30, 31, 31)
    ]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_those_of_transformers(bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = np.arange(-9000, 9001)
    theirs = t5.T5Attention._relative_position_bucket(
        torch.tensor(relative), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    ours = relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(
    ("offset", "traced"), [(0, False), (3, False), (40, False), (-40, False), (0, True), (3, True)]
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_expansion_is_the_table_entry_by_entry(offset, traced, bidirectional):
    heads, q_len, kv_len = 2, 4, 9
    table = np.random.default_rng(0).normal(size=(heads, 8)).astype(np.float32)

    def dense(offset):
        bias = RelativePositionBias(
            jnp.asarray(table), bidirectional, max_distance=6, query_offset=offset
        )
        return bias.dense(q_len, kv_len)

    got = jax.jit(dense)(jnp.int32(offset)) if traced else dense(offset)
    relative = np.arange(kv_len)[None, :] - (np.arange(q_len)[:, None] + offset)
    bucket = relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=8, max_distance=6
    )
    np.testing.assert_array_equal(np.asarray(got), table[:, bucket])


def test_gradient_counts_the_pairs_of_a_bucket():
    table = jnp.zeros((1, 8), jnp.float32)

    def total(table):
        return jnp.sum(RelativePositionBias(table, True, max_distance=6).dense(5, 7))

    relative = np.arange(7)[None, :] - np.arange(5)[:, None]
    bucket = relative_position_bucket(relative, bidirectional=True, num_buckets=8, max_distance=6)
    counts = np.bincount(bucket.ravel(), minlength=8)
    np.testing.assert_array_equal(np.asarray(jax.grad(total)(table))[0], counts)


@pytest.mark.parametrize("offset", [0, 2])
def test_alibi_is_minus_slope_times_distance(offset):
    slopes = np.array([0.5, 0.25], np.float32)
    got = AlibiBias(jnp.asarray(slopes), offset).dense(3, 6)
    distance = np.abs(np.arange(6)[None, :] - (np.arange(3)[:, None] + offset))
    np.testing.assert_array_equal(np.asarray(got), -slopes[:, None, None] * distance)
