"""Tiny models of every kind, and batches for them, shared by the tests of models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan.models import ModelConfig, build
from chatyuan.models.loss import supervised_loss

VOCAB = 64
TINY = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    head_dim=6,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
)
PREFIX = dataclasses.replace(TINY, architecture="prefix_lm", mlp_activations=("gelu",))
PER_LAYER = "relative_bias_per_layer"
KINDS = {
    "t5_1_1": TINY,
    "t5_1_0": dataclasses.replace(TINY, mlp_activations=("relu",), tie_embeddings=True),
    "umt5": dataclasses.replace(TINY, position=PER_LAYER),
    "rope_gqa_encoder_decoder": dataclasses.replace(
        TINY, position="rope", num_kv_heads=2, qk_norm=True, scan_layers=True
    ),
    "unilm_bias": dataclasses.replace(PREFIX, tie_embeddings=True),
    "unilm_per_layer": dataclasses.replace(PREFIX, position=PER_LAYER),
    "unilm_rope": dataclasses.replace(PREFIX, position="rope"),
    "unilm_alibi": dataclasses.replace(PREFIX, position="alibi"),
    "llama": dataclasses.replace(
        PREFIX,
        position="rope",
        causal_only=True,
        num_kv_heads=1,
        norm_head=True,
        mlp_activations=("silu", "linear"),
    ),
}


def random_params(config, seed=0):
    """Parameters whose norms and tables are random too, so that nothing is tested at 1."""
    params = build(config).init(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def jitter(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return leaf + 0.2 * noise if path[-1].key in ("scale", "rel_embedding") else leaf

    return jax.tree_util.tree_map_with_path(jitter, params)


def encoder_decoder_batch(seed=0, rows=2, inputs=9, targets=7):
    """Row 0 is full, the others are padded on both sides."""
    rng = np.random.default_rng(seed)
    batch = {}
    for side, length in (("encoder", inputs), ("decoder", targets)):
        real = np.arange(length) < (length - 2 * np.arange(rows)[:, None])
        batch[f"{side}_segment_ids"] = real.astype(np.int32)
        batch[f"{side}_positions"] = (np.arange(length) * real).astype(np.int32)
        tokens = rng.integers(3, VOCAB, (rows, length)) * real
        batch[f"{side}_input_tokens"] = tokens.astype(np.int32)
    batch["decoder_input_tokens"][:, 0] = 0
    targets = rng.integers(3, VOCAB, batch["decoder_input_tokens"].shape)
    batch["decoder_target_tokens"] = targets.astype(np.int32)
    batch["decoder_loss_weights"] = batch["decoder_segment_ids"].astype(np.float32)
    return batch


def prefix_batch(seed=0, rows=2, length=12, prefix=4):
    """One example a row, the first `prefix` tokens bidirectional; row r padded by 2 r."""
    rng = np.random.default_rng(seed)
    real = np.arange(length) < (length - 2 * np.arange(rows)[:, None])
    batch = {
        "decoder_segment_ids": real.astype(np.int32),
        "decoder_positions": (np.arange(length) * real).astype(np.int32),
        "decoder_input_tokens": (rng.integers(3, VOCAB, real.shape) * real).astype(np.int32),
        "decoder_target_tokens": rng.integers(3, VOCAB, real.shape).astype(np.int32),
        "decoder_loss_weights": (real & (np.arange(length) >= prefix)).astype(np.float32),
        "decoder_causal_attention": (real & (np.arange(length) < prefix)).astype(np.int32),
    }
    return batch


def batch_for(config, **sizes):
    if config.architecture == "prefix_lm":
        return prefix_batch(**sizes)
    return encoder_decoder_batch(**sizes)


def logits_function(config):
    """Returns the compiled `f(params, batch) -> logits`."""
    model = build(config)

    @jax.jit
    def logits(params, batch):
        module = model.bind(params)
        return module.logits(module.hidden(batch))

    return lambda params, batch: logits(params, jax.tree.map(jnp.asarray, batch))


def loss_and_gradients(config, seed=None):
    """Returns (mean loss, its gradient); dropout only with a seed."""
    loss_fn = supervised_loss(build(config))
    key = None if seed is None else jax.random.key(seed)

    def mean(params, batch):
        total, weight, _ = loss_fn(params, batch, key)
        return total / weight

    batch = jax.tree.map(jnp.asarray, batch_for(config))
    return jax.jit(jax.value_and_grad(mean))(random_params(config), batch)
