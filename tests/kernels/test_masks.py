"""Intervals against masks written out pair by pair."""

import numpy as np
import pytest

from chatyuan.kernels import AttentionMask

T = 9


def visible(mask, batch, q_len, kv_len):
    start, end = (np.asarray(x) for x in mask.intervals(batch, q_len, kv_len))
    assert start.dtype == end.dtype == np.int32 and start.shape == end.shape == (batch, q_len)
    key = np.arange(kv_len)
    return (key >= start[..., None]) & (key < end[..., None])


def pairs(batch, q_len, kv_len, rule):
    shape = (batch, q_len, kv_len)
    return np.array([rule(*index) for index in np.ndindex(shape)]).reshape(shape)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [5, 3, 3, 3, 3, 3, 3, 3, 3]], np.int32)
# Row 0: two packed prefix-LM examples; row 1: right to left, then prefix of the whole segment.
PREFIX = np.array([[1, 1, 0, 1, 0, 0, 0, 0, 0], [2, 1, 1, 1, 0, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([4, 0], np.int32)


def same(b, q, k):
    return SEGMENTS[b, q] == SEGMENTS[b, k] != 0


def prefix_rule(b, q, k):
    if not same(b, q, k):
        return False
    if PREFIX[b, q] == 2:
        return k >= q
    return k <= q or (PREFIX[b, q] == 1 and PREFIX[b, k] == 1)


CASES = {
    "everything": (AttentionMask(), lambda b, q, k: True),
    "causal": (AttentionMask(causal=True), lambda b, q, k: k <= q),
    "window": (AttentionMask(window=2), lambda b, q, k: abs(q - k) <= 2),
    "causal_window": (AttentionMask(causal=True, window=3), lambda b, q, k: q - 3 <= k <= q),
    "prefix_lengths": (
        AttentionMask(causal=True, prefix_lengths=LENGTHS),
        lambda b, q, k: k <= q or k < LENGTHS[b],
    ),
    "key_lengths": (
        AttentionMask(causal=True, key_lengths=LENGTHS),
        lambda b, q, k: k <= q and k < LENGTHS[b],
    ),
    "segments": (
        AttentionMask(query_segment_ids=SEGMENTS, key_segment_ids=SEGMENTS),
        same,
    ),
    "causal_segments": (
        AttentionMask(causal=True, query_segment_ids=SEGMENTS, key_segment_ids=SEGMENTS),
        lambda b, q, k: same(b, q, k) and k <= q,
    ),
    "prefix_tokens": (
        AttentionMask(prefix_tokens=PREFIX, query_segment_ids=SEGMENTS, key_segment_ids=SEGMENTS),
        prefix_rule,
    ),
    "prefix_tokens_alone": (
        AttentionMask(prefix_tokens=np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0]] * 2, np.int32)),
        lambda b, q, k: k <= q or (q < 3 and k < 3),
    ),
    "explicit": (
        AttentionMask(key_start=np.full((2, T), 2, np.int32), causal=True),
        lambda b, q, k: 2 <= k <= q,
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_intervals_are_the_mask(name):
    mask, rule = CASES[name]
    np.testing.assert_array_equal(visible(mask, 2, T, T), pairs(2, T, T, rule))


def test_cross_attention_sees_its_own_segment():
    queries = np.array([[1, 1, 2, 0], [1, 2, 2, 3]], np.int32)
    keys = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]], np.int32)
    mask = AttentionMask(query_segment_ids=queries, key_segment_ids=keys)
    expected = pairs(2, 4, 6, lambda b, q, k: queries[b, q] == keys[b, k] != 0)
    np.testing.assert_array_equal(visible(mask, 2, 4, 6), expected)
    assert not visible(mask, 2, 4, 6)[1, 3].any(), "segment 3 has no keys"


def test_seqio_prefix_example():
    """inputs [9,4,6,1], targets [3,9,1]: five prefix tokens, the shifted start included."""
    kind = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    mask = AttentionMask(prefix_tokens=kind, query_segment_ids=segments, key_segment_ids=segments)
    start, end = mask.intervals(1, T, T)
    np.testing.assert_array_equal(np.asarray(end)[0, :7], [5, 5, 5, 5, 5, 6, 7])
    np.testing.assert_array_equal(np.asarray(start)[0, :7], 0)
    assert (np.asarray(end)[0, 7:] <= np.asarray(start)[0, 7:]).all()
