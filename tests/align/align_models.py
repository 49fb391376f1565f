"""Tiny models and prompts shared by the tests of alignment."""

import dataclasses
import functools

import jax
import numpy as np

from chatyuan.models import ModelConfig, build

VOCAB, EOS = 24, 1
ENCODER_DECODER = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=16,
    mlp_dim=24,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
)
PREFIX_LM = dataclasses.replace(
    ENCODER_DECODER, architecture="prefix_lm", position="rope", tie_embeddings=True
)
KINDS = {"encoder_decoder": ENCODER_DECODER, "prefix_lm": PREFIX_LM}


@functools.cache
def model_and_params(kind: str, seed: int = 0):
    """A model and random weights whose answers end now and then before the longest length."""
    model = build(KINDS[kind])
    return model, model.init(jax.random.key(seed))


def prompts(count: int = 8, width: int = 6, seed: int = 0):
    """Prompts of different lengths, padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, count).astype(np.int32)
    tokens = rng.integers(3, VOCAB, (count, width)) * (np.arange(width) < lengths[:, None])
    return tokens.astype(np.int32), lengths
