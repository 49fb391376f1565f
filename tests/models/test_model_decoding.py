"""Cached decoding gives the logits of the whole pass, for every kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import KINDS, VOCAB, logits_function, random_params

from chatyuan.models import build

B, S, T, G = 2, 5, 4, 2
LENGTHS = np.array([5, 3], np.int32)


def prompts_and_outputs():
    rng = np.random.default_rng(2)
    prompts = rng.integers(3, VOCAB, (B, S)) * (np.arange(S) < LENGTHS[:, None])
    outputs = rng.integers(3, VOCAB, (B * G, T))
    return prompts.astype(np.int32), outputs.astype(np.int32)


def whole_batch(config, prompts, outputs):
    """The batch of the uncached pass, and where each row's logits begin."""
    rows = np.repeat(np.arange(B), G)
    if config.architecture == "encoder_decoder":
        shifted = np.concatenate([np.zeros((B * G, 1)), outputs[:, :-1]], axis=1)
        return {
            "encoder_input_tokens": prompts[rows],
            "encoder_segment_ids": (prompts[rows] > 0).astype(np.int32),
            "decoder_input_tokens": shifted.astype(np.int32),
            "decoder_segment_ids": np.ones((B * G, T), np.int32),
        }, np.zeros(B * G, np.int32)
    length = S + T
    names = ("decoder_input_tokens", "decoder_segment_ids", "decoder_causal_attention")
    batch = {name: np.zeros((B * G, length), np.int32) for name in names}
    for row, prompt in enumerate(rows):
        text = [0, *prompts[prompt, : LENGTHS[prompt]], *outputs[row, :-1]]
        batch["decoder_input_tokens"][row, : len(text)] = text
        batch["decoder_segment_ids"][row, : len(text)] = 1
        batch["decoder_causal_attention"][row, : LENGTHS[prompt] + 1] = 1
    return batch, LENGTHS[rows]


@pytest.mark.parametrize("kind", list(KINDS))
def test_cached_equals_uncached(kind):
    config = KINDS[kind]
    model, params = build(config), random_params(config)
    prompts, outputs = prompts_and_outputs()
    batch, begin = whole_batch(config, prompts, outputs)
    logits = np.asarray(logits_function(config)(params, batch))
    expected = np.stack([logits[row, at : at + T] for row, at in enumerate(begin)])

    @functools.partial(jax.jit, static_argnums=3)
    def prefill(params, tokens, lengths, room):
        return model.bind(params).prefill(tokens, lengths, room)

    step = jax.jit(lambda params, tokens, cache: model.bind(params).step(tokens, cache))
    first, cache = prefill(params, jnp.asarray(prompts), jnp.asarray(LENGTHS), T)
    assert first.shape == (B, VOCAB) and first.dtype == jnp.float32
    cache = cache.expand(G)
    got = [np.repeat(np.asarray(first), G, axis=0)]
    # Halfway the two rows of each prompt change places: a beam search does this all the time.
    order = np.arange(B * G)
    for t in range(T - 1):
        if t == 1:
            order = order.reshape(B, G)[:, ::-1].ravel()
            cache = cache.take(jnp.asarray(order))
        logits, cache = step(params, jnp.asarray(outputs[order, t]), cache)
        got.append(np.asarray(logits)[np.argsort(order)])
    error = np.abs(np.stack(got, axis=1) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def test_cross_keys_are_kept_once_per_prompt():
    config = KINDS["t5_1_1"]
    model = build(config)

    def cache_of(params):
        tokens, lengths = jnp.ones((B, S), jnp.int32), jnp.full(B, S, jnp.int32)
        return model.bind(params).prefill(tokens, lengths, T)[1].expand(3)

    cache = jax.eval_shape(cache_of, model.abstract_params())
    assert {x.shape[0] for x in (*cache.cross_keys, *cache.cross_values)} == {B}
    assert {x.shape[0] for x in (*cache.self_keys, *cache.self_values)} == {3 * B}
    assert cache.start.shape == (3 * B,) and cache.index.shape == ()
