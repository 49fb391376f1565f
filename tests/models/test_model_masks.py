"""Who influences whom: proved by gradients, with a token of its own at every position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import (
    KINDS,
    PREFIX,
    TINY,
    encoder_decoder_batch,
    logits_function,
    prefix_batch,
    random_params,
)

from chatyuan.models import build

T = 8
# Each row of a prefix-LM batch: segment ids, causal attention.
ROWS = {
    "bidirectional": ([1] * 8, [1] * 8),
    "left_to_right": ([1] * 6 + [0] * 2, [0] * 8),
    "right_to_left": ([1] * 7 + [0], [2] * 7 + [0]),
    "prefix": ([1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]),
    "packed": ([1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 1, 1, 0, 0]),
}


def influence(config, batch, token_key):
    """Returns bool [B, T, positions]: a gradient of output (b, t) reaches that token."""
    model = build(config)
    params = random_params(config)
    batch = jax.tree.map(jnp.asarray, batch)

    def outputs(table):
        changed = {**params, "token_embedder": {"embedding": table}}
        return jnp.sum(jnp.sin(model.bind(changed).hidden(batch)), axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(params["token_embedder"]["embedding"])
    reached = np.asarray(jnp.any(jacobian != 0, axis=-1))  # [B, T, V]
    tokens = np.asarray(batch[token_key])
    return np.stack([reached[b][:, tokens[b]] for b in range(tokens.shape[0])])


def expected_prefix(segments, kinds):
    seen = np.zeros((T, T), bool)
    for q, k in np.ndindex(T, T):
        if segments[q] == segments[k] != 0:
            both_prefix = kinds[q] == kinds[k] == 1
            seen[q, k] = k >= q if kinds[q] == 2 else (k <= q or both_prefix)
    return seen | np.eye(T, dtype=bool)  # the residual stream


@pytest.fixture(scope="module")
def prefix_influence():
    segments, kinds = (np.array(part, np.int32) for part in zip(*ROWS.values(), strict=True))
    batch = {
        "decoder_segment_ids": segments,
        "decoder_causal_attention": kinds,
        "decoder_input_tokens": np.tile(np.arange(3, 3 + T, dtype=np.int32), (len(ROWS), 1)),
    }
    return influence(PREFIX, batch, "decoder_input_tokens"), segments, kinds


@pytest.mark.parametrize("row", range(len(ROWS)), ids=list(ROWS))
def test_prefix_lm_sees_exactly_its_mask(prefix_influence, row):
    seen, segments, kinds = prefix_influence
    np.testing.assert_array_equal(seen[row], expected_prefix(segments[row], kinds[row]))


def test_causal_only_ignores_the_prefix():
    config = KINDS["llama"]
    batch = prefix_batch(rows=1, length=T)
    batch["decoder_input_tokens"][0] = np.arange(3, 3 + T)
    seen = influence(config, batch, "decoder_input_tokens")[0]
    np.testing.assert_array_equal(seen, np.tri(T, dtype=bool))


def test_encoder_decoder_sees_the_past_and_its_whole_input():
    batch = encoder_decoder_batch(rows=2, inputs=5, targets=4)
    batch["encoder_input_tokens"][:] = np.arange(20, 25)
    batch["decoder_input_tokens"][:] = np.arange(3, 7)
    past = influence(TINY, batch, "decoder_input_tokens")
    np.testing.assert_array_equal(past[0], np.tri(4, dtype=bool))
    whole = influence(TINY, batch, "encoder_input_tokens")
    assert whole[0].all()
    assert whole[1, :2, :3].all()
    assert not whole[1, :, 3:].any(), "padding of the input is invisible"
    assert not whole[1, 2:].any(), "padding rows of the decoder see nothing"


@pytest.fixture(scope="module", params=["t5_1_1", "umt5", "unilm_bias", "unilm_rope"])
def case(request):
    config = KINDS[request.param]
    return config, logits_function(config), random_params(config)


def test_padding_and_packing_change_nothing(case):
    """Two examples alone, padded further with rubbish, and packed into one row: equal logits."""
    config, logits, params = case
    sides = ["decoder"] if config.architecture == "prefix_lm" else ["encoder", "decoder"]
    lengths = {"encoder": (5, 3), "decoder": (4, 6)}
    rng = np.random.default_rng(0)
    names = ["input_tokens", "segment_ids", "positions"]
    packed = {f"{side}_{name}": np.zeros((3, 12), np.int32) for side in sides for name in names}
    packed["decoder_causal_attention"] = np.zeros((3, 12), np.int32)
    for side in sides:
        tokens = packed[f"{side}_input_tokens"]
        tokens[:] = rng.integers(3, 60, (3, 12))  # rubbish where nothing is written below
        begin = 0
        for i, length in enumerate(lengths[side]):
            content = rng.integers(3, 60, length)
            # Row 0 and row 1 hold one example each, row 2 both.
            for row, at, segment in ((i, 0, 1), (2, begin, i + 1)):
                tokens[row, at : at + length] = content
                packed[f"{side}_segment_ids"][row, at : at + length] = segment
                packed[f"{side}_positions"][row, at : at + length] = np.arange(length)
                if side == "decoder":
                    packed["decoder_causal_attention"][row, at : at + 2] = 1
            begin += length
    if config.architecture != "prefix_lm":
        del packed["decoder_causal_attention"]
    got = np.asarray(logits(params, packed))
    scale = np.abs(got).max()
    first, second = lengths["decoder"]
    np.testing.assert_allclose(got[2, :first], got[0, :first], atol=1e-5 * scale)
    np.testing.assert_allclose(got[2, first:10], got[1, :second], atol=1e-5 * scale)
    other = dict(packed)
    for side in sides:
        real = packed[f"{side}_segment_ids"] > 0
        rubbish = rng.integers(3, 60, real.shape).astype(np.int32)
        tokens = packed[f"{side}_input_tokens"]
        other[f"{side}_input_tokens"] = np.where(real, tokens, rubbish)
    again = np.asarray(logits(params, other))
    real = packed["decoder_segment_ids"] > 0
    np.testing.assert_array_equal(again[real], got[real])


def test_positions_are_counted_where_the_batch_has_none():
    config = dataclasses.replace(TINY, position="rope")
    batch = encoder_decoder_batch()
    logits, params = logits_function(config), random_params(config)
    without = {name: value for name, value in batch.items() if not name.endswith("positions")}
    real = batch["decoder_segment_ids"] > 0
    got, expected = (np.asarray(logits(params, b))[real] for b in (without, batch))
    np.testing.assert_allclose(got, expected, atol=1e-5)
