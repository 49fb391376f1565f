"""Scores of given answers against a naive loop and against the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import NumpyToy, ToyModel, toy_params

from chatyuan.decode import TextConfig
from chatyuan.errors import UserError
from chatyuan.evaluate.choices import ChoiceScorer, choice_accuracy, choice_log_probs
from chatyuan.models import ModelConfig, build

VOCAB = 12


class Digits:
    """Digit d is token d + 2."""

    size, pad_id, eos_id, sentinel_ids = VOCAB, 0, 1, ()

    def encode(self, text):
        return [int(letter) + 2 for letter in text]

    def decode(self, ids):
        return "".join(str(i - 2) for i in ids if i > 1)


PROMPTS = ["12", "9", "345678", "00", "4"]
CHOICES = [["1", "2"], ["77", "7", "123456789"], ["5", "6"], ["8", "9", "10"], ["3"]]
CONFIG = TextConfig(input_lengths=(4, 8), batch_sizes=(1, 4))


@pytest.fixture(scope="module")
def params():
    return toy_params(VOCAB, 16, seed=1)


def naive(params, prompt, answer):
    model = NumpyToy(params, [*Digits().encode(prompt), 1])
    tokens = [*Digits().encode(answer), 1]
    return sum(model.log_probs(tokens[:i])[token] for i, token in enumerate(tokens))


@pytest.mark.parametrize("normalisation", ["sum", "tokens", "characters"])
def test_equals_the_naive_sum(params, normalisation):
    scorer = ChoiceScorer(ToyModel(), Digits(), CONFIG, normalisation=normalisation)
    results = scorer.score(params, PROMPTS, CHOICES)
    for prompt, answers, result in zip(PROMPTS, CHOICES, results, strict=True):
        expected = np.asarray([naive(params, prompt, answer) for answer in answers])
        np.testing.assert_allclose(result.log_probs, expected, rtol=1e-5)
        sizes = np.asarray([len(answer) for answer in answers])
        divisor = {"sum": 1, "tokens": sizes + 1, "characters": sizes}[normalisation]
        assert result.best == np.argmax(expected / divisor)
        np.testing.assert_allclose(result.scores, expected / divisor, rtol=1e-5)
    best = [result.best for result in results]
    assert choice_accuracy(results, best) == 1
    assert choice_accuracy(results, [best[0], *(b + 1 for b in best[1:])]) == 0.2


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_equals_one_full_pass(architecture):
    """The cached path against `hidden` on a batch with the answer as its target."""
    config = ModelConfig(
        architecture=architecture, vocab_size=VOCAB, embed_dim=16, mlp_dim=24, num_heads=2,
        head_dim=8, num_encoder_layers=2, num_decoder_layers=2,
    )  # fmt: skip
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    prompt, answer = [5, 6, 7], [8, 3, 1]
    got = choice_log_probs(
        model, params, jnp.asarray([[*prompt, 0]]), jnp.asarray([3]),
        jnp.asarray([[[*answer, 0], [4, 1, 0, 0]]]), jnp.asarray([[3, 2]]),
    )  # fmt: skip
    if architecture == "encoder_decoder":
        batch = {
            "encoder_input_tokens": [prompt],
            "encoder_segment_ids": [[1] * 3],
            "decoder_input_tokens": [[0, *answer[:-1]]],
            "decoder_segment_ids": [[1] * 3],
        }
        first = 0
    else:
        whole = [*prompt, *answer]
        batch = {
            "decoder_input_tokens": [[0, *whole[:-1]]],
            "decoder_segment_ids": [[1] * 6],
            "decoder_positions": [list(range(6))],
            "decoder_causal_attention": [[1] * 4 + [0] * 2],
        }
        first = 3
    bound = model.bind(params)
    batch = {name: jnp.asarray(rows, jnp.int32) for name, rows in batch.items()}
    log_probs = jax.nn.log_softmax(bound.logits(bound.hidden(batch)))[0, first:]
    expected = log_probs[jnp.arange(3), jnp.asarray(answer)].sum()
    np.testing.assert_allclose(got[0, 0], expected, rtol=2e-5)


def test_fillers_score_nothing(params):
    got = choice_log_probs(
        ToyModel(), params, np.asarray([[3, 1], [0, 0]]), np.asarray([2, 0]),
        np.full((2, 2, 1), 4), np.asarray([[1, 0], [0, 0]]),
    )  # fmt: skip
    assert got[0, 0] < 0 and (np.asarray(got).ravel()[1:] == 0).all()


def test_mistakes_are_named(params):
    scorer = ChoiceScorer(ToyModel(), Digits())
    with pytest.raises(UserError, match="no answers"):
        scorer.score(params, ["1"], [[]])
    with pytest.raises(UserError, match="1 lists of answers for 2 prompts"):
        scorer.score(params, ["1", "2"], [["1"]])
    with pytest.raises(UserError, match="Did you mean tokens"):
        ChoiceScorer(ToyModel(), Digits(), normalisation="token")
