"""Beam search against a naive list-based search and against enumeration."""

import dataclasses

import numpy as np
import pytest
from reference_search import beam_search, exhaustive_best
from test_generate import PROMPTS, answers, run
from toy_model import NumpyToy, toy_params

from chatyuan.decode import DecodeConfig

VOCAB, STEPS = 11, 10
BEAM = DecodeConfig(method="beam", max_decode_length=STEPS, beam_size=4, num_samples=4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length_penalty", [1.0, 0.6, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_equals_the_naive_search(seed, length_penalty, early_stopping):
    params = toy_params(VOCAB, STEPS, seed=seed, scale=0.6)
    config = dataclasses.replace(BEAM, length_penalty=length_penalty, early_stopping=early_stopping)
    output = run(params, PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        pool = beam_search(
            NumpyToy(params, prompt), STEPS, 4, suppressed=(0,),
            length_penalty=length_penalty, early_stopping=early_stopping,
        )  # fmt: skip
        assert answers(output, row) == [tokens for _, tokens in pool]
        np.testing.assert_allclose(output.scores[row], [score for score, _ in pool], rtol=1e-5)


@pytest.mark.parametrize(
    "options,reference",
    [
        ({"repetition_penalty": 1.6}, {"penalty": 1.6}),
        ({"no_repeat_ngram_size": 2}, {"ngram": 2}),
        ({"min_length": 5}, {"min_length": 5}),
        (
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_length": 2},
            {"penalty": 1.3, "ngram": 3, "min_length": 2},
        ),
    ],
)
def test_processors_follow_their_hypotheses(options, reference):
    params = toy_params(VOCAB, STEPS, seed=5, scale=0.6)
    output = run(params, PROMPTS, dataclasses.replace(BEAM, **options))
    for row, prompt in enumerate(PROMPTS):
        pool = beam_search(
            NumpyToy(params, prompt), STEPS, 4, suppressed=(0,),
            length_penalty=1.0, early_stopping=False, **reference,
        )  # fmt: skip
        assert answers(output, row) == [tokens for _, tokens in pool]


def test_wide_beam_finds_the_best_there_is():
    """With length_penalty 0 the stopping rule is exact, and 4^4 hypotheses fit in the beam."""
    vocab, steps = 5, 4
    params = toy_params(vocab, steps, seed=6, scale=0.5)
    config = DecodeConfig(
        method="beam", max_decode_length=steps, beam_size=256, length_penalty=0.0,
        suppress_pad=False,
    )  # fmt: skip
    prompts = [[2, 3], [4], [3, 3, 2]]
    output = run(params, prompts, config)
    for row, prompt in enumerate(prompts):
        score, tokens = exhaustive_best(NumpyToy(params, prompt), steps, vocab, length_penalty=0.0)
        assert answers(output, row) == [tokens]
        np.testing.assert_allclose(output.scores[row, 0], score, rtol=1e-5)


def test_beam_of_one_is_greedy():
    params = toy_params(VOCAB, STEPS, seed=7)
    one = run(params, PROMPTS, dataclasses.replace(BEAM, beam_size=1, num_samples=1))
    greedy = run(params, PROMPTS, DecodeConfig(max_decode_length=STEPS))
    np.testing.assert_array_equal(one.tokens, greedy.tokens)
    np.testing.assert_array_equal(one.lengths, greedy.lengths)


def test_batch_and_fillers_change_nothing():
    params = toy_params(VOCAB, STEPS, seed=8, scale=0.6)
    for early_stopping in (False, True):
        config = dataclasses.replace(BEAM, early_stopping=early_stopping)
        whole = run(params, PROMPTS, config)
        for row, prompt in enumerate(PROMPTS):
            alone = run(params, [prompt, []], config)
            np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
            np.testing.assert_allclose(alone.scores[0], whole.scores[row], rtol=1e-6)
            assert (alone.lengths[1] == 0).all() and (alone.tokens[1] == 0).all()


def test_log_probs_add_up():
    params = toy_params(VOCAB, STEPS, seed=5, scale=0.6)
    config = dataclasses.replace(
        BEAM, repetition_penalty=1.4, model_log_probs=True, length_penalty=0.6
    )
    output = run(params, PROMPTS, config)
    total = output.log_probs.sum(-1) / output.lengths**0.6
    np.testing.assert_allclose(total, output.scores, rtol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        model = NumpyToy(params, prompt)
        for place, tokens in enumerate(answers(output, row)):
            expected = [model.log_probs(tokens[:i])[token] for i, token in enumerate(tokens)]
            got = output.model_log_probs[row, place, : len(tokens)]
            np.testing.assert_allclose(got, expected, atol=1e-5)
