"""Normalisation keeps Chinese punctuation and unifies width."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatyuan.text.normalize import fingerprint, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("１２月ＡＢｃ", "12月ABc"),
        ("你好，世界！（好）", "你好，世界！（好）"),
        ("你好,世界!真的吗?", "你好，世界！真的吗？"),
        ("version 1,000: ok (yes)", "version 1,000: ok (yes)"),
        ("一\u3000二\u200b三\ufeff", "一 二三"),
        ("㊣①½℃…", "㊣①½℃…"),
        ("\u2f00\uf900", "一豈"),
        ("e\u0301", "é"),
        ("行一\r\n行二\x07", "行一\n行二"),
        ("制表\t符", "制表\t符"),
    ],
)
def test_examples(text, expected):
    assert normalize(text) == expected


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(text):
    once = normalize(text)
    assert unicodedata.is_normalized("NFC", once)
    assert normalize(once) == once


@pytest.mark.parametrize(
    ("one", "other"),
    [("很好！！！", "很好。"), ("Ａ Ｂ", "ab"), ("（质量）不错~", "质量不错"), ("１0分", "10分")],
)
def test_fingerprints_ignore_punctuation_space_width_and_case(one, other):
    assert fingerprint(one) == fingerprint(other) != ""


def test_fingerprints_differ_where_text_does():
    assert fingerprint("很好") != fingerprint("不好")
    assert fingerprint("！？…") == ""
