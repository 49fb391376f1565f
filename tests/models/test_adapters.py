"""Adapters: nothing at first, then what the merged matrices would be."""

import dataclasses

import jax
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.models import ModelConfig, adapters, build
from chatyuan.models.loss import supervised_loss

PLAIN = ModelConfig(
    vocab_size=24, embed_dim=16, mlp_dim=24, num_heads=2, head_dim=8, num_encoder_layers=2,
    num_decoder_layers=2,
)  # fmt: skip
KINDS = {
    "encoder_decoder": PLAIN,
    "prefix_lm": dataclasses.replace(PLAIN, architecture="prefix_lm", position="rope"),
}


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    """(model, its weights, the same with adapters, their weights)."""
    plain = KINDS[request.param]
    low = build(dataclasses.replace(plain, adapter_rank=3, adapter_alpha=6.0))
    return build(plain), build(plain).init(jax.random.key(0)), low, low.init(jax.random.key(0))


def batch(config):
    rng = np.random.default_rng(0)
    tokens, ones = rng.integers(2, 24, (4, 9)), np.ones((4, 9), np.int32)
    places = np.tile(np.arange(9), (4, 1))
    found = {
        "decoder_input_tokens": np.roll(tokens, 1, 1), "decoder_target_tokens": tokens,
        "decoder_loss_weights": ones.astype(np.float32), "decoder_segment_ids": ones,
        "decoder_positions": places,
    }  # fmt: skip
    if config.architecture == "encoder_decoder":
        extra = {"encoder_input_tokens": tokens, "encoder_segment_ids": ones}
        return found | extra | {"encoder_positions": places}
    return found | {"decoder_causal_attention": (places < 4).astype(np.int32)}


def loss(model, params):
    total, weight, _ = supervised_loss(model)(params, batch(model.config), None)
    return total / weight


def shaken(params):
    """Adapters whose second half is no longer zero."""
    found = adapters.adapters_of(params)
    return adapters.joined(params, jax.tree.map(lambda x: x + 0.1 * np.cos(7 * x + 1), found))


def test_they_change_nothing_at_first(models):
    plain, params, low, with_adapters = models
    base = adapters.without_adapters(with_adapters)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    assert float(loss(low, with_adapters)) == float(loss(plain, params))
    alone = low.init_adapters(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, alone, adapters.adapters_of(with_adapters))
    query = alone["decoder"]["layers"]["self_attention"]["query"]
    assert query["adapter_in"].shape == (2, 16, 3) and query["adapter_out"].shape == (2, 3, 16)
    assert np.std(query["adapter_in"]) == pytest.approx(0.25, rel=0.3)
    assert not np.any(query["adapter_out"])


def test_they_are_the_merged_matrices(models):
    plain, _, low, params = models
    params = shaken(params)
    merged = adapters.merged(params, low.config)
    assert float(loss(low, params)) == pytest.approx(float(loss(plain, merged)), rel=1e-6)
    wo = params["decoder"]["layers"]["mlp"]["wo"]
    whole = [
        k.astype(np.float64) + 2.0 * a.astype(np.float64) @ b.astype(np.float64)
        for k, a, b in zip(*map(np.asarray, (wo["kernel"], *(wo[n] for n in adapters.NAMES))),
                           strict=True)
    ]  # fmt: skip
    got = merged["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    np.testing.assert_allclose(got, whole, atol=1e-6)


def test_their_gradient_is_that_of_the_merged_matrices(models):
    plain, _, low, params = models
    params = shaken(params)
    ours = jax.grad(lambda p: loss(low, p))(params)
    whole = jax.grad(lambda p: loss(plain, p))(adapters.merged(params, low.config))
    for part, matrix in (("self_attention", "out"), ("mlp", "wo")):
        here, there, values = (x["decoder"]["layers"][part][matrix] for x in (ours, whole, params))
        for layer in range(2):
            three = (there["kernel"], *map(values.get, adapters.NAMES))
            d, a, b = (np.asarray(x[layer]) for x in three)
            np.testing.assert_allclose(here["adapter_in"][layer], 2 * d @ b.T, atol=2e-6)
            np.testing.assert_allclose(here["adapter_out"][layer], 2 * a.T @ d, atol=2e-6)


def test_a_rank_below_zero_is_told():
    with pytest.raises(UserError, match="adapter_rank = -1"):
        dataclasses.replace(PLAIN, adapter_rank=-1)
