"""Rollouts: independent of batch and mesh, and scored by the learner as they were drawn."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_models import EOS, KINDS, model_and_params, prompts
from scipy import special

from chatyuan import sharding
from chatyuan.align.answers import Answers, answer_hidden, token_entropies, token_scores
from chatyuan.align.rollout import (
    RolloutConfig,
    make_rollout,
    prompts_of,
    read_rollouts,
    write_rollouts,
)
from chatyuan.errors import UserError

G, T = 3, 7
CONFIG = RolloutConfig(samples=G, max_length=T, temperature=0.7)


@functools.cache
def rollout_fn(kind, config=CONFIG, seed=3, method="sample"):
    model, _ = model_and_params(kind)
    return make_rollout(model, config, eos_id=EOS, seed=seed, method=method)


@functools.cache
def drawn(kind):
    tokens, lengths = prompts()
    _, params = model_and_params(kind)
    return rollout_fn(kind)(params, tokens, lengths, np.arange(8, dtype=np.uint32))


@functools.cache
def scorer(kind, temperature=CONFIG.temperature):
    model, params = model_and_params(kind)

    @jax.jit
    def score(answers):
        module = model.bind(params)
        hidden = answer_hidden(module, answers)
        scores = token_scores(module, hidden, answers, temperature)
        return scores, token_entropies(module, hidden, temperature, chunk_tokens=10)

    return score


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_and_the_learner_agree(kind):
    rollouts = drawn(kind)
    scores, _ = scorer(kind)(rollouts.answers)
    mask = np.asarray(rollouts.answers.mask)
    difference = np.abs(np.asarray(scores) - np.asarray(rollouts.log_probs))
    assert np.exp(difference[mask]).mean() <= 1.001
    assert difference.max() < 2e-5
    assert (np.asarray(scores)[~mask] == 0).all()
    assert (np.asarray(rollouts.log_probs)[mask] < 0).all()
    other, _ = scorer(kind, 1.0)(rollouts.answers)
    assert np.abs(np.asarray(other) - np.asarray(rollouts.log_probs)).max() > 0.1, "temperature"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_once_and_only_by_the_end_token(kind):
    answers = jax.tree.map(np.asarray, drawn(kind).answers)
    lengths = answers.lengths
    assert lengths.min() < T and lengths.max() == T, "both kinds of ending are needed here"
    for row, sample in np.ndindex(lengths.shape):
        tokens, n = answers.tokens[row, sample], lengths[row, sample]
        assert (tokens[: n - 1] != EOS).all() and (tokens[n:] == 0).all()
        assert n == T or tokens[n - 1] == EOS
    ended = np.asarray(Answers(*dataclasses.astuple(answers)).ended(EOS))
    last = np.take_along_axis(answers.tokens, lengths[..., None] - 1, -1)[..., 0]
    np.testing.assert_array_equal(ended, last == EOS)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_the_prompt_alone(kind):
    """Another order, another batch size, longer padding: the same tokens."""
    whole = drawn(kind)
    tokens, lengths = prompts()
    _, params = model_and_params(kind)
    order = np.array([6, 1, 4, 0])
    padded = np.pad(tokens[order], ((0, 0), (0, 3)))
    part = rollout_fn(kind)(params, padded, lengths[order], order.astype(np.uint32))
    np.testing.assert_array_equal(part.answers.tokens, np.asarray(whole.answers.tokens)[order])
    np.testing.assert_allclose(part.log_probs, np.asarray(whole.log_probs)[order], atol=1e-5)
    flat = np.asarray(whole.answers.tokens)
    assert len({tuple(row) for row in flat.reshape(-1, T)}) > 20, "samples must differ"
    again = rollout_fn(kind)(params, tokens, lengths, np.arange(8, 16, dtype=np.uint32))
    assert (np.asarray(again.answers.tokens) != flat).any(), "a prompt's next visit draws anew"


def test_eight_devices_draw_what_one_does():
    model, params = model_and_params("encoder_decoder")
    tokens, lengths = prompts()
    for shape in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(shape)
        places = sharding.shardings(model.abstract_params(), model.logical_axes(), mesh)
        batch = {"tokens": tokens, "lengths": lengths, "ids": np.arange(8, dtype=np.uint32)}
        batch = sharding.shard_batch(batch, mesh)
        rollout = make_rollout(model, CONFIG, eos_id=EOS, seed=3, mesh=mesh)
        got = rollout(jax.device_put(params, places), *batch.values())
        want = drawn("encoder_decoder")
        np.testing.assert_array_equal(got.answers.tokens, want.answers.tokens)
        np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)


def test_the_cache_may_be_narrow():
    """bfloat16 keys move log-probabilities a little; the shapes say where they are kept."""
    model, params = model_and_params("encoder_decoder")
    tokens, lengths = prompts()
    config = dataclasses.replace(CONFIG, cache_dtype="bfloat16")
    rollouts = rollout_fn("encoder_decoder", config)(
        params, tokens, lengths, np.arange(8, dtype=np.uint32)
    )
    scores, _ = scorer("encoder_decoder")(rollouts.answers)
    difference = np.abs(np.asarray(scores) - np.asarray(rollouts.log_probs)).max()
    assert 1e-5 < difference < 0.05

    def prefill(params):
        return model.bind(params).prefill(jnp.asarray(tokens), jnp.asarray(lengths), T, "bfloat16")

    cache = jax.eval_shape(prefill, params)[1]
    assert {x.dtype for x in (*cache.self_keys, *cache.self_values)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in (*cache.cross_keys, *cache.cross_values)} == {jnp.dtype("float32")}


def test_decoding_stops_when_all_rows_have_ended():
    """A policy that always ends at once takes one step: places after it are never visited."""
    model, params = model_and_params("encoder_decoder")
    tokens, lengths = prompts()
    output = jax.eval_shape(
        rollout_fn("encoder_decoder"), params, tokens, lengths, np.arange(8, dtype=np.uint32)
    )
    assert output.answers.tokens.shape == (8, G, T)
    head = params["logits_dense"]["kernel"]
    sure = {**params, "logits_dense": {"kernel": jnp.zeros_like(head)}}
    rollouts = rollout_fn("encoder_decoder", dataclasses.replace(CONFIG, max_length=4096))
    # 4,096 steps of attention over 4,096 slots would take minutes; every row ends within some 200.
    got = rollouts(sure, tokens, lengths, np.arange(8, dtype=np.uint32))
    assert int(np.asarray(got.answers.lengths).max()) < 400


def test_greedy_takes_the_likeliest_token():
    tokens, lengths = prompts()
    _, params = model_and_params("encoder_decoder")
    greedy = rollout_fn("encoder_decoder", method="greedy")
    got = greedy(params, tokens, lengths, np.arange(8, dtype=np.uint32))
    assert got.answers.tokens.shape == (8, 1, T)
    cold = dataclasses.replace(CONFIG, samples=1, temperature=1e-4)
    want = rollout_fn("encoder_decoder", cold)(
        params, tokens, lengths, np.arange(8, dtype=np.uint32)
    )
    np.testing.assert_array_equal(got.answers.tokens, want.answers.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_entropies_and_states_that_read_the_end(kind):
    model, params = model_and_params(kind)
    answers = drawn(kind).answers
    scores, entropies = scorer(kind)(answers)

    @jax.jit
    def whole():
        module = model.bind(params)
        hidden = answer_hidden(module, answers, reads_end=True)
        return hidden, answer_hidden(module, answers), module.logits(hidden)

    longer, hidden, logits = whole()
    mask = np.asarray(answers.mask)
    np.testing.assert_allclose(
        np.asarray(longer)[:, :, :T][mask], np.asarray(hidden)[mask], atol=1e-5
    )
    log_probs = special.log_softmax(np.asarray(logits)[:, :, :T] / CONFIG.temperature, axis=-1)
    want = -(np.exp(log_probs) * log_probs).sum(-1)
    np.testing.assert_allclose(np.asarray(entropies)[mask], want[mask], rtol=1e-5)
    chosen = np.take_along_axis(log_probs, np.asarray(answers.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(scores)[mask], chosen[mask], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_moves_no_score(kind):
    """Longer rows on either side, other prompts beside it: the same log-probabilities."""
    answers = drawn(kind).answers
    scores, _ = scorer(kind)(answers)
    host = jax.tree.map(np.asarray, answers)
    longer = Answers(
        np.pad(host.prompts[2:5], ((0, 0), (0, 4)), constant_values=7),
        host.prompt_lengths[2:5],
        np.pad(host.tokens[2:5], ((0, 0), (0, 0), (0, 5)), constant_values=9),
        host.lengths[2:5],
    )
    got, _ = scorer(kind)(jax.tree.map(jnp.asarray, longer))
    np.testing.assert_allclose(got[:, :, :T], np.asarray(scores)[2:5], atol=1e-5)
    assert (np.asarray(got)[:, :, T:] == 0).all()


def test_prompts_are_taken_from_a_loaders_rows():
    encoder = {
        "encoder_input_tokens": np.array([[5, 6, 1, 0], [7, 1, 8, 1]]),
        "encoder_segment_ids": np.array([[1, 1, 1, 0], [1, 1, 2, 2]]),
    }
    tokens, lengths = prompts_of(encoder, 3)
    np.testing.assert_array_equal(tokens, [[5, 6, 1], [7, 1, 0]])
    np.testing.assert_array_equal(lengths, [3, 2])
    stack = {
        "decoder_target_tokens": np.array([[5, 6, 8, 1, 0]]),
        "decoder_segment_ids": np.array([[1, 1, 1, 1, 0]]),
        "decoder_causal_attention": np.array([[1, 1, 1, 0, 0]]),
        "decoder_loss_weights": np.array([[0.0, 0, 1, 1, 0]]),
    }
    tokens, lengths = prompts_of(stack, 4)
    np.testing.assert_array_equal(tokens, [[5, 6, 0, 0]])
    encoder["encoder_segment_ids"][0] = 0
    with pytest.raises(UserError, match="1 of 2 rows have no prompt"):
        prompts_of(encoder, 3)


def test_rollouts_are_stored_token_for_token(tmp_path):
    rollouts = drawn("encoder_decoder")
    rewards = np.arange(8 * G, dtype=np.float32).reshape(8, G)
    texts = [(f"问{row}", [f"答{row}{sample}" for sample in range(G)]) for row in range(8)]
    file = tmp_path / "rollouts.jsonl"
    write_rollouts(file, rollouts, step=4, rewards=rewards, texts=texts)
    write_rollouts(file, rollouts, step=5, rewards=rewards)
    with file.open("a") as out:
        out.write(json.dumps({"step": 6})[:5])
    rows = read_rollouts(file)
    assert len(rows) == 2 * 8 * G and {row["step"] for row in rows} == {4, 5}
    host = jax.tree.map(np.asarray, rollouts)
    entry = rows[4]
    assert (entry["prompt_id"], entry["sample"], entry["reward"]) == (1, 1, 4.0)
    assert (entry["prompt"], entry["answer"]) == ("问1", "答11")
    n = int(host.answers.lengths[1, 1])
    assert entry["tokens"] == host.answers.tokens[1, 1, :n].tolist()
    np.testing.assert_array_equal(
        np.float32(entry["log_probs"]), host.log_probs[1, 1, :n], "as they were, to the bit"
    )


def test_a_value_out_of_range_is_told():
    with pytest.raises(UserError, match="temperature"):
        RolloutConfig(temperature=0.0)
    with pytest.raises(UserError, match="cache_dtype"):
        RolloutConfig(cache_dtype="int8")
