"""Figures of a reward model, against numbers worked out by hand."""

import numpy as np
import pytest

from chatyuan.evaluate import preferences


def test_pairs_leave_out_ties_and_padding():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 9.0]])
    ranks = np.array([[0, 1, 1], [1, 0, 0]])
    lengths = np.array([[4, 2, 7], [3, 3, 0]])
    pairs = preferences.pairs_of(scores, ranks, lengths)
    assert pairs.gap.tolist() == [2.0, 1.0, 5.0] and pairs.length_gap.tolist() == [2, -3, 0]


def test_equal_scores_are_half_right_and_length_may_count_either_way():
    assert preferences.accuracy(np.array([1.0, 0.0, -1.0, 2.0])) == 0.625
    assert preferences.length_accuracy(np.array([-1, -2, -3, 1])) == 0.75


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662.
    assert preferences.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert preferences.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert preferences.wilson(0, 0) == (0.0, 1.0)


def test_calibrated_scores_have_no_calibration_error():
    gap = np.log(3.0)  # right three times in four
    assert preferences.calibration_error(np.array([gap] * 3 + [-gap])) == pytest.approx(0)
    assert preferences.calibration_error(np.array([gap] * 4)) == pytest.approx(0.25)


def test_bins_go_from_close_to_far_and_hold_every_pair():
    gap = np.array([-0.1, 0.2, -0.3, 0.4, 1.0, 2.0, 3.0])
    rows = preferences.by_gap(gap, bins=2)
    assert [row["pairs"] for row in rows] == [4, 3]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0]
    assert rows[0]["largest gap"] <= rows[1]["smallest gap"]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    assert len(preferences.by_gap(gap[:3], bins=5)) == 3
