"""Greedy and sampled generation on an enumerable model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_search import greedy_search
from toy_model import NumpyToy, ToyModel, toy_params

from chatyuan.decode import DecodeConfig, make_generate
from chatyuan.errors import UserError

VOCAB, STEPS = 11, 12
PROMPTS = [[3, 4], [5, 6, 7, 2], [9], [2, 2, 8], [10, 4, 1]]


@pytest.fixture(scope="module")
def params():
    return toy_params(VOCAB, STEPS, seed=4, scale=0.8)


def pack(prompts, width=4, pad=0):
    tokens = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.asarray([len(p) for p in prompts], np.int32)


@functools.cache
def generate_fn(config):
    return make_generate(ToyModel(), config, eos_id=1)


def run(params, prompts, config, seeds=None):
    tokens, lengths = pack(prompts)
    seeds = np.arange(len(prompts)) if seeds is None else seeds
    generate = generate_fn(config)
    return jax.tree.map(np.asarray, generate(params, tokens, lengths, seeds))


def answers(output, row):
    return [
        tokens[:length].tolist()
        for tokens, length in zip(output.tokens[row], output.lengths[row], strict=True)
    ]


@pytest.mark.parametrize(
    "config,reference",
    [
        (DecodeConfig(suppress_pad=False), {}),
        (DecodeConfig(), {"suppressed": (0,)}),
        (DecodeConfig(repetition_penalty=1.8), {"suppressed": (0,), "penalty": 1.8}),
        (DecodeConfig(repetition_penalty=0.5, suppress_pad=False), {"penalty": 0.5}),
        (DecodeConfig(no_repeat_ngram_size=2), {"suppressed": (0,), "ngram": 2}),
        (DecodeConfig(no_repeat_ngram_size=1, suppress_pad=False), {"ngram": 1}),
        (DecodeConfig(min_length=6), {"suppressed": (0,), "min_length": 6}),
        (
            DecodeConfig(min_length=3, no_repeat_ngram_size=3, repetition_penalty=1.2),
            {"suppressed": (0,), "min_length": 3, "ngram": 3, "penalty": 1.2},
        ),
    ],
)
def test_greedy_equals_the_naive_loop(params, config, reference):
    config = dataclasses.replace(config, max_decode_length=STEPS)
    output = run(params, PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        tokens, log_probs = greedy_search(NumpyToy(params, prompt), STEPS, **reference)
        assert answers(output, row) == [tokens]
        np.testing.assert_allclose(output.log_probs[row, 0, : len(tokens)], log_probs, atol=1e-5)
        assert (output.tokens[row, 0, len(tokens) :] == 0).all()
        assert (output.log_probs[row, 0, len(tokens) :] == 0).all()
        np.testing.assert_allclose(output.scores[row, 0], sum(log_probs), rtol=1e-5)


def test_several_end_tokens_and_forbidden_ids(params):
    tokens, lengths = pack(PROMPTS)
    config = DecodeConfig(max_decode_length=STEPS)
    generate = make_generate(
        ToyModel(), config, eos_id=(1, 5), valid_vocab_size=9, suppressed=(6, 7)
    )
    output = jax.tree.map(np.asarray, generate(params, tokens, lengths, np.zeros(5, np.int32)))
    for row, prompt in enumerate(PROMPTS):
        model = NumpyToy(params, prompt)
        expected = []
        while len(expected) < STEPS and not {1, 5} & set(expected):
            scores = model.logits(expected)
            scores[[0, 6, 7, 9, 10]] = -np.inf
            expected.append(int(scores.argmax()))
        assert answers(output, row) == [expected]


def test_filler_rows_end_at_once_and_change_nothing(params):
    config = DecodeConfig(max_decode_length=STEPS)
    whole = run(params, PROMPTS, config)
    padded = run(params, [PROMPTS[0], [], PROMPTS[1], []], config)
    np.testing.assert_array_equal(padded.tokens[[0, 2]], whole.tokens[:2])
    assert padded.lengths[:, 0].tolist()[1::2] == [0, 0]
    assert (padded.tokens[[1, 3]] == 0).all() and (padded.log_probs[[1, 3]] == 0).all()


def test_loop_stops_when_all_rows_end():
    """Counts the steps that were run, by a callback in the model."""
    counted = []

    class Counting(ToyModel):
        def bind(self, params):
            bound = super().bind(params)

            class Bound:
                prefill = staticmethod(bound.prefill)

                @staticmethod
                def step(tokens, cache):
                    jax.debug.callback(
                        lambda position: counted.append(int(position)), cache.position[0]
                    )
                    return bound.step(tokens, cache)

            return Bound()

    params = toy_params(VOCAB, 50, seed=4)
    params["step"] = params["step"].at[5, 1].set(100.0)  # everyone ends at the sixth token
    tokens, lengths = pack(PROMPTS[:2])
    config = DecodeConfig(max_decode_length=50, min_length=2)
    output = make_generate(Counting(), config, eos_id=1)(params, tokens, lengths, np.zeros(2))
    jax.effects_barrier()
    assert output.lengths.max() == len(counted) + 1 <= 6


SAMPLE = DecodeConfig(method="sample", max_decode_length=STEPS, num_samples=3, temperature=0.9)


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}])
def test_rows_do_not_depend_on_their_batch(params, filters):
    config = dataclasses.replace(SAMPLE, **filters)
    seeds = np.asarray([11, 12, 13, 14, 15])
    whole = run(params, PROMPTS, config, seeds)
    order = [3, 0, 4]
    part = run(params, [PROMPTS[i] for i in order], config, seeds[order])
    np.testing.assert_array_equal(part.tokens, whole.tokens[order])
    np.testing.assert_allclose(part.log_probs, whole.log_probs[order], rtol=1e-6)
    shuffled = run(
        params, [PROMPTS[i] for i in order] + [[], []], config, np.r_[seeds[order], 0, 0]
    )
    np.testing.assert_array_equal(shuffled.tokens[:3], whole.tokens[order])
    assert len({tuple(row) for row in whole.tokens.reshape(-1, STEPS)}) > 5
    other = run(params, PROMPTS, config, seeds + 100)
    assert not np.array_equal(other.tokens, whole.tokens)


def test_a_sample_does_not_depend_on_how_many_there_are(params):
    whole = run(params, PROMPTS, SAMPLE)
    fewer = run(params, PROMPTS, dataclasses.replace(SAMPLE, num_samples=2))
    np.testing.assert_array_equal(fewer.tokens, whole.tokens[:, :2])


def test_keys_instead_of_seeds(params):
    by_seed = run(params, PROMPTS, SAMPLE, np.arange(5))
    by_keys = run(params, PROMPTS, SAMPLE, jax.vmap(jax.random.key)(jnp.arange(5)))
    np.testing.assert_array_equal(by_seed.tokens, by_keys.tokens)
    one = run(params, PROMPTS, SAMPLE, jax.random.key(0))
    again = run(params, PROMPTS[:2] + PROMPTS[:3], SAMPLE, jax.random.key(0))
    np.testing.assert_array_equal(one.tokens[:2], again.tokens[:2])
    assert not np.array_equal(again.tokens[:2], again.tokens[2:4])


def test_sampled_sequences_follow_the_model():
    """Frequencies of whole sequences of three tokens, chi-square against the enumeration."""
    vocab, steps, draws = 4, 3, 4096
    params = toy_params(vocab, steps, seed=9, scale=0.7)
    config = DecodeConfig(
        method="sample", max_decode_length=steps, num_samples=draws, temperature=0.8, min_length=1
    )
    output = run(params, [[2, 3]], config)
    model, expected = NumpyToy(params, [2, 3]), {}

    def visit(prefix, prob):
        if prefix and (prefix[-1] == 1 or len(prefix) == steps):
            expected[tuple(prefix)] = prob
            return
        scores = model.logits(prefix)
        scores[0] = -np.inf
        if not prefix:
            scores[1] = -np.inf
        weights = np.exp((scores - scores.max()) / 0.8)
        for token in np.flatnonzero(weights):
            visit([*prefix, int(token)], prob * weights[token] / weights.sum())

    visit([], 1.0)
    found = [tuple(answer) for answer in answers(output, 0)]
    assert set(found) <= set(expected)
    statistic = sum(
        (found.count(key) - draws * prob) ** 2 / (draws * prob) for key, prob in expected.items()
    )
    assert statistic < len(expected) + 4 * (2 * len(expected)) ** 0.5
    log_probs = {key: np.log(prob) for key, prob in expected.items()}
    np.testing.assert_allclose(output.scores[0], [log_probs[key] for key in found], atol=1e-5)


def test_model_log_probs(params):
    config = dataclasses.replace(SAMPLE, top_k=3, repetition_penalty=1.5, model_log_probs=True)
    output = run(params, PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        model = NumpyToy(params, prompt)
        for place, tokens in enumerate(answers(output, row)):
            expected = [model.log_probs(tokens[:i])[token] for i, token in enumerate(tokens)]
            got = output.model_log_probs[row, place]
            np.testing.assert_allclose(got[: len(tokens)], expected, atol=1e-5)
            assert (got[len(tokens) :] == 0).all()
    assert (output.log_probs >= output.model_log_probs - 1.5).all()
    assert run(params, PROMPTS, SAMPLE).model_log_probs is None


def test_one_compilation_a_shape(params):
    generate = make_generate(ToyModel(), DecodeConfig(max_decode_length=4), eos_id=1)
    for size in (1, 3, 1, 3):
        for seed in range(2):
            tokens, lengths = pack(PROMPTS[:size])
            generate(params, tokens, lengths, np.full(size, seed))
    assert generate.num_compiled() == 2


@pytest.mark.parametrize(
    "values,words",
    [
        ({"method": "gredy"}, "Did you mean greedy"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_samples": 2}, "num_samples"),
        ({"method": "beam", "beam_size": 2, "num_samples": 3}, "beam_size"),
        ({"max_decode_length": 0}, "max_decode_length"),
        ({"min_length": 9, "max_decode_length": 9}, "min_length"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
    ],
)
def test_bad_configuration(values, words):
    with pytest.raises(UserError, match=words):
        DecodeConfig(**values)


def test_every_option_is_explained():
    for field in dataclasses.fields(DecodeConfig):
        assert field.metadata["help"]
