"""The reward model reads the end token, whatever else is in the batch; the critic is the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_models import KINDS, VOCAB

from chatyuan.align.answers import Answers, batch_of
from chatyuan.errors import UserError
from chatyuan.models import build
from chatyuan.models.reward import Normalisation, RewardModel, read_normalisation

EOS = 1
ARCHITECTURES = ["encoder_decoder", "prefix_lm"]


def ragged(rows, width, pad=0):
    tokens = np.full((len(rows), width), pad, np.int32)
    for row, values in enumerate(rows):
        tokens[row, : len(values)] = values
    return tokens, np.array([len(row) for row in rows], np.int32)


def texts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [[*rng.integers(3, VOCAB, n - 1), EOS] for n in lengths]


PROMPTS, ANSWERS = texts(0, (5, 3)), texts(1, (4, 6, 2, 5))


def rows_of(config, prompts=PROMPTS, answers=ANSWERS, widths=(5, 6), pad=0, lengths=None):
    tokens, counts = ragged(answers, widths[1], pad)
    counts = counts if lengths is None else np.array(lengths, np.int32)
    groups = (len(prompts), len(answers) // len(prompts))
    every = Answers(
        *ragged(prompts, widths[0], pad), tokens.reshape(*groups, -1), counts.reshape(groups)
    )
    return batch_of(jax.tree.map(jnp.asarray, every), config.architecture, reads_end=True)


SCORE = jax.jit(lambda model, params, batch: model.score(params, batch), static_argnums=0)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return RewardModel(KINDS[request.param])


@pytest.fixture(scope="module")
def params(model):
    params = model.init(jax.random.key(0))
    # Of a fresh head the scores are small; their differences should not drown in rounding.
    return params | {"head": {"kernel": params["head"]["kernel"] * 4, "bias": jnp.float32(0.25)}}


def test_padding_and_company_do_not_move_a_score(model, params):
    score = functools.partial(SCORE, model)
    expected = score(params, rows_of(model.config))
    assert np.ptp(expected) > 0.1
    for widths in ((9, 6), (5, 11)):
        wider = score(params, rows_of(model.config, widths=widths))
        np.testing.assert_allclose(wider, expected, atol=1e-5)
    # What lies beyond the lengths is never read.
    dirty = score(params, rows_of(model.config, pad=7))
    np.testing.assert_allclose(dirty, expected, atol=1e-5)
    one = score(params, rows_of(model.config, PROMPTS[1:], ANSWERS[2:]))
    np.testing.assert_allclose(one, expected[2:], atol=1e-5)


def test_left_padding_of_the_prompt_does_not_move_a_score():
    model = RewardModel(KINDS["encoder_decoder"])
    params = model.init(jax.random.key(0))
    right = rows_of(model.config, widths=(8, 6))
    left = dict(right)
    for name in ("encoder_input_tokens", "encoder_segment_ids"):
        values = np.asarray(right[name])
        shifts = 8 - np.array([len(p) for p in PROMPTS])
        rolled = [np.roll(v, s) for v, s in zip(values, shifts, strict=True)]
        left[name] = jnp.asarray(np.stack(rolled))
    assert not np.array_equal(left["encoder_input_tokens"], right["encoder_input_tokens"])
    score = functools.partial(SCORE, model)
    np.testing.assert_allclose(score(params, left), score(params, right), atol=1e-5)


def test_the_score_is_the_head_at_the_end_tokens_position(model, params):
    batch = rows_of(model.config)
    values = np.asarray(jax.jit(model.values)(params, batch))
    scores = np.asarray(SCORE(model, params, batch))
    inputs = np.asarray(batch["decoder_input_tokens"])
    for row, answer in enumerate(ANSWERS):
        prompt = PROMPTS[row // 2] if model.config.architecture == "prefix_lm" else []
        at = len(prompt) + len(answer)
        assert list(inputs[row, 1 : at + 1]) == [*prompt, *answer]
        assert inputs[row, at] == EOS and scores[row] == values[row, at]


def test_a_score_depends_on_prompt_and_answer_and_on_nothing_later(model, params):
    score = functools.partial(SCORE, model)
    base = score(params, rows_of(model.config))
    prompts = [list(PROMPTS[0]), PROMPTS[1]]
    prompts[0][1] += 1
    moved = score(params, rows_of(model.config, prompts))
    assert (np.abs(moved - base)[:2] > 1e-4).all() and np.abs(moved - base)[2:].max() < 1e-6
    answers = [list(ANSWERS[0]), *ANSWERS[1:]]
    answers[0][1] += 1
    moved = score(params, rows_of(model.config, answers=answers))
    assert abs(moved - base)[0] > 1e-4 and np.abs(moved - base)[1:].max() < 1e-6


def test_answers_of_a_prompt_share_the_encoder(model, params):
    """The same rows with the prompt repeated for each answer."""
    shared = rows_of(model.config)
    apart = rows_of(model.config, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    if model.config.architecture == "encoder_decoder":
        assert len(shared["encoder_input_tokens"]) == 2 and len(apart["encoder_input_tokens"]) == 4
    score = functools.partial(SCORE, model)
    np.testing.assert_allclose(score(params, shared), score(params, apart), atol=1e-5)


def test_absent_answers_are_finite(model, params):
    batch = rows_of(model.config, lengths=(4, 0, 0, 5))
    gradients = jax.jit(jax.grad(lambda p: model.score(p, batch)[jnp.array([0, 3])].sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.isfinite(model.score(params, batch)).all()


def test_a_language_model_becomes_a_reward_model():
    config = KINDS["encoder_decoder"]
    model, language = RewardModel(config), build(config)
    weights = language.init(jax.random.key(3))
    params = model.on_language_model(weights, model.init_head(jax.random.key(4)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract_params())
    assert jax.tree.structure(params) == jax.tree.structure(
        model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)
    )
    batch = rows_of(config)
    hidden = language.bind(weights).hidden(batch)
    expected = hidden @ params["head"]["kernel"]
    np.testing.assert_allclose(model.values(params, batch), expected, atol=1e-6)
    assert "logits_dense" in weights and "logits_dense" not in params["backbone"]


def test_the_head_starts_small_and_unbiased():
    config = dataclasses.replace(KINDS["encoder_decoder"], embed_dim=4096)
    head = RewardModel(config).init_head(jax.random.key(0))
    assert float(head["bias"]) == 0
    assert float(head["kernel"].std()) == pytest.approx((4096 + 1) ** -0.5, rel=0.03)


def test_normalisation_is_read_from_a_checkpoint_or_refused():
    kept = Normalisation(1.5, 0.5)
    read = read_normalisation("run", {"metrics": kept.figures()})
    assert read == kept and float(read(jnp.float32(2.0))) == 1.0
    for meta in (
        {},
        {"metrics": {"reward/mean": 1.0}},
        {"metrics": {"reward/mean": 1.0, "reward/std": 0.0}},
    ):
        with pytest.raises(UserError, match="reward model run"):
            read_normalisation("run", meta)
