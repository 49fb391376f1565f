"""Text metrics against naive versions and known values."""

import functools

import numpy as np
import pytest

from chatyuan.evaluate import text_metrics


def test_exact_match_ignores_width_and_spaces():
    assert text_metrics.exact_match("正面。 Ａ", "正面。A") == 1
    assert text_metrics.exact_match("正面", "负面") == 0


def naive_lcs(a, b):
    @functools.cache
    def visit(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + visit(i + 1, j + 1)
        return max(visit(i + 1, j), visit(i, j + 1))

    return visit(0, 0)


def test_rouge_l_equals_the_naive_recursion():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(rng.choice(list("甲乙丙丁"), n)) for n in rng.integers(0, 30, size=2))
        expected = 2 * naive_lcs(a, b) / (len(a) + len(b)) if a or b else 1.0
        assert text_metrics.rouge_l(a, b) == pytest.approx(expected)


def test_chrf():
    assert text_metrics.chrf("今天天气很好", "今天天气很好") == pytest.approx(1)
    assert text_metrics.chrf("好", "坏") == 0
    assert text_metrics.chrf("", "") == 1 and text_metrics.chrf("", "好") == 0
    # Orders 1 and 2 by hand: precision (2/3 + 1/2) / 2, recall (2/2 + 1/1) / 2.
    precision, recall = 7 / 12, 1.0
    expected = 5 * precision * recall / (4 * precision + recall)
    assert text_metrics.chrf("天气好", "天气") == pytest.approx(expected)


def test_distinct():
    assert text_metrics.distinct(["好好好好"], 1) == 1 / 4
    assert text_metrics.distinct(["天气好", "天气"], 2) == 2 / 3  # 天气 twice, 气好
    assert text_metrics.distinct(["好", ""], 2) == 0


def test_mean():
    assert text_metrics.mean(text_metrics.exact_match, ["a", "b"], ["a", "c"]) == 0.5
    assert text_metrics.mean(text_metrics.chrf, [], []) == 0
    with pytest.raises(ValueError):
        text_metrics.mean(text_metrics.chrf, ["a"], [])
