"""Reward functions: what they are given, and what is told when they are wrong."""

import sys
import types

import numpy as np
import pytest

from chatyuan.align.answers import Answers
from chatyuan.align.rewards import (
    HostAnswers,
    RewardSource,
    call_function,
    load_function,
)
from chatyuan.errors import RunFailed, UserError


class Letters:
    """Token i is the i-th letter."""

    size, pad_id, eos_id = 30, 0, 1

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 2) for i in ids)


@pytest.fixture
def host():
    tokens = np.array([[[2, 3, 1], [4, 0, 0]], [[5, 0, 40], [2, 1, 0]]], np.int32)
    lengths = np.array([[3, 1], [3, 2]], np.int32)
    prompts = np.array([[9, 1], [10, 0]], np.int32)
    return HostAnswers(Answers(prompts, np.array([2, 1]), tokens, lengths), Letters())


def score(host, function):
    return call_function("mine:reward", function, host)


def test_a_function_gets_what_it_names(host):
    seen = {}

    def reward(prompts, answers, prompt_tokens, answer_tokens, scale=2):
        seen.update(p=prompts, a=answers, pt=prompt_tokens, at=answer_tokens)
        return [scale * len(answer) for answer in answers]

    scores = score(host, reward)
    assert seen["p"] == ["h", "h", "i", "i"] and seen["a"] == ["ab", "c", "d", "a"]
    assert seen["pt"] == [[9, 1], [9, 1], [10], [10]]
    assert seen["at"] == [[2, 3, 1], [4], [5, 0, 40], [2, 1]]
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [[4, 2], [2, 2]])
    np.testing.assert_array_equal(score(host, lambda answers: np.eye(2, dtype=bool)), np.eye(2))


@pytest.mark.parametrize(
    "returned,words",
    [
        ([1.0, 2.0, 3.0], r"shape \(3,\) for 4 answers"),
        (1.0, r"shape \(\)"),
        ([1.0, float("nan"), 2.0, 3.0], "returned nan for 1 of 4 answers, the first being 'c'"),
        ([1.0, 2.0, float("inf"), 3.0], "returned inf for 1 of 4"),
        (["a", "b", "c", "d"], "they should be numbers"),
        ([None] * 4, "they should be numbers"),
        ([[1.0], [1.0, 2.0]], "unequal shapes"),
    ],
)
def test_wrong_scores_are_told(host, returned, words):
    with pytest.raises(UserError, match=words) as error:
        score(host, lambda answers: returned)
    assert "mine:reward" in str(error.value) and "Nothing was learned" in str(error.value)


def test_a_function_that_fails_is_named(host):
    def reward(answers):
        return answers[7]

    with pytest.raises(RunFailed, match="mine:reward failed: IndexError"):
        score(host, reward)


def test_functions_are_imported_by_name(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.length = lambda answers: [len(a) for a in answers]
    module.wrong = lambda answer: 0.0
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    assert load_function("my_rewards:length") is module.length
    for name, words in (
        ("my_rewards:lenght", "Did you mean length"),
        ("my_rewards.length", "should be written package.module:function"),
        ("my_rewardz:length", "No module named 'my_rewardz'"),
        ("my_rewards:wrong", "asks for answer; it is offered .* Did you mean answers"),
    ):
        with pytest.raises(UserError, match=words):
            load_function(name)


def test_a_source_is_a_function_or_a_model():
    assert RewardSource(function="a:b").name == "a:b"
    for settings in ({}, {"function": "a:b", "model": "runs/reward"}):
        with pytest.raises(UserError, match="either function or model"):
            RewardSource(**settings)
    with pytest.raises(UserError, match="weight = nan"):
        RewardSource(function="a:b", weight=float("nan"))
