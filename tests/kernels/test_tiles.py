"""Tiles and visited blocks against the dense bias and the mask, block by block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.kernels import AlibiBias, RelativePositionBias
from chatyuan.kernels.tiles import Tiling

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(2, 8)).astype(np.float32)
# T, S, bq, bk, key index of query 0.
SHAPES = [
    (64, 64, 16, 16, 0),
    (200, 100, 16, 32, 0),
    (100, 200, 32, 16, 70),
    (16, 100, 16, 16, 1000),
    (33, 65, 16, 16, -300),
    (40, 40, 64, 64, 0),
]


def bias_of(kind, offset):
    if kind == "alibi":
        return AlibiBias(jnp.abs(jnp.asarray(TABLE[:, 0])), offset)
    return RelativePositionBias(jnp.asarray(TABLE), kind == "two_sided", 24, offset)


@pytest.mark.parametrize("kind", ["two_sided", "one_sided", "alibi"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_finds_its_part_of_the_dense_bias(kind, shape):
    q_len, kv_len, q_block, kv_block, offset = shape
    bias = bias_of(kind, offset)
    tiling = Tiling(q_len, kv_len, q_block, kv_block, bias.constant_beyond())
    stack = np.asarray(tiling.expand(bias.by_distance(q_len, kv_len)))
    dense = np.asarray(bias.dense(q_len, kv_len))
    everything = np.zeros((1, q_len), np.int32), np.full((1, q_len), kv_len, np.int32)
    by_query = np.asarray(tiling.query_bounds(*everything))[0]
    by_key = np.asarray(tiling.key_bounds(*everything))[0]
    for i, j in itertools.product(range(tiling.q_blocks), range(tiling.kv_blocks)):
        tile = int(tiling.tile(i, j))
        want = dense[:, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
        np.testing.assert_array_equal(stack[:, tile, : want.shape[1], : want.shape[2]], want)
        # 0: far to the left, 1: near, 2: far to the right.
        region = np.searchsorted(by_query[i, 1:3], j, side="right")
        assert region == 2 - np.searchsorted(by_key[j, 1:3], i, side="right")
        assert by_query[i, 0] <= j < by_query[i, 3]
        assert by_key[j, 0] <= i < by_key[j, 3]
        if region != 1:
            assert tile == (0 if region == 0 else tiling.tiles - 1)
            assert np.ptp(stack[:, tile], axis=(1, 2)).max() == 0.0


def test_number_of_tiles_does_not_depend_on_the_length_once_the_buckets_saturate():
    bias = RelativePositionBias(jnp.asarray(TABLE), True)
    counts = {
        length: Tiling(length, length, 64, 64, bias.constant_beyond()).tiles
        for length in (512, 4096, 65536)
    }
    assert set(counts.values()) == {7}
    assert Tiling(4096, 4096, 128, 128, bias.constant_beyond()).tiles == 5


def test_bounds_hold_every_visible_key_and_skip_the_rest():
    tiling = Tiling(60, 90, 16, 16, (-24, 24))
    start = RNG.integers(0, 90, (3, 60)).astype(np.int32)
    end = np.minimum(start + RNG.integers(-5, 20, (3, 60)), 90).astype(np.int32)
    end[0, 16:32] = 0
    end[1] = 0
    key = np.arange(90)
    visible = (key >= start[..., None]) & (key < end[..., None])
    blocks = np.pad(visible, ((0, 0), (0, 4), (0, 6))).reshape(3, 4, 16, 6, 16).any(axis=(2, 4))
    by_query, by_key = (
        np.asarray(bounds(start, end)) for bounds in (tiling.query_bounds, tiling.key_bounds)
    )
    assert (np.diff(by_query, axis=2) >= 0).all() and (np.diff(by_key, axis=2) >= 0).all()
    for row, i, j in np.ndindex(blocks.shape):
        seen = np.flatnonzero(blocks[row, i])
        hull = (seen[0], seen[-1] + 1) if seen.size else (0, 0)
        got = by_query[row, i, [0, 3]]
        assert tuple(got) == hull if seen.size else got[0] == got[1]
        if hull[0] <= j < hull[1]:
            assert by_key[row, j, 0] <= i < by_key[row, j, 3]
    assert (by_key[1, :, 0] == by_key[1, :, 3]).all()


def test_gradient_of_the_expansion_counts_each_distance():
    tiling = Tiling(40, 56, 16, 16)
    (counts,) = jax.linear_transpose(
        tiling.expand, jax.ShapeDtypeStruct((1, 40 + 56 - 1), jnp.float32)
    )(jnp.ones((1, tiling.tiles, 16, 16), jnp.float32))
    # Each of the tiles' distances falls on a value, those of the padding on the first or the last.
    assert counts.sum() == tiling.tiles * 16 * 16
    assert (np.asarray(counts) > 0).all()
