"""Logits equal those of transformers (torch, CPU, random weights) on padded batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.errors import UserError
from chatyuan.interop.huggingface import config_from_huggingface, params_from_huggingface
from chatyuan.models import build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2)
SIZES |= dict(num_decoder_layers=3, dropout_rate=0.0, decoder_start_token_id=0)
KINDS = {
    "t5_1_0": ("t5", dict(feed_forward_proj="relu", tie_word_embeddings=True)),
    "t5_1_1": ("t5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("mt5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "umt5": ("umt5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "gated_silu": ("t5", dict(feed_forward_proj="gated-silu", tie_word_embeddings=False)),
    "narrow_heads": (
        "t5",
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_heads=3, d_kv=6),
    ),
}
CLASSES = {
    "t5": ("T5Config", "T5ForConditionalGeneration"),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration"),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration"),
}


def make_torch(kind):
    """A random model whose head, if untied, really is its own, whatever transformers 5 does."""
    model_type, changes = KINDS[kind]
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[model_type])
    torch.manual_seed(0)
    given = {**SIZES, **changes}
    model = model_class(config_class(**given)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif "relative_attention_bias" in name:
                weight.copy_(torch.randn_like(weight))
        if not given["tie_word_embeddings"]:
            head = torch.nn.Linear(given["d_model"], given["vocab_size"], bias=False)
            head.weight.copy_(0.2 * torch.randn_like(head.weight))
            model.lm_head = head
            assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
            model.config.tie_word_embeddings = False  # read by umT5 when it runs
            model.config.scale_decoder_outputs = False  # read by T5 when it runs
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    return model, state, {"model_type": model_type, **given}


def padded_batch():
    rng = np.random.default_rng(1)
    lengths = np.array([40, 17, 1])
    inputs = rng.integers(3, 97, (3, 40)) * (np.arange(40) < lengths[:, None])
    decoder = np.concatenate([np.zeros((3, 1)), rng.integers(3, 97, (3, 11))], axis=1)
    return inputs.astype(np.int32), decoder.astype(np.int32)


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_equal_torch(kind):
    model, state, hf_config = make_torch(kind)
    inputs, decoder = padded_batch()
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs > 0, dtype=torch.long),
            decoder_input_ids=torch.tensor(decoder, dtype=torch.long),
        ).logits.numpy()
    config = config_from_huggingface(hf_config, state)
    assert config.tie_embeddings == (kind == "t5_1_0")
    ours = build(config)
    params = params_from_huggingface(state, config)
    assert jax.tree.structure(params) == jax.tree.structure(ours.abstract_params())
    batch = {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": (inputs > 0).astype(np.int32),
        "decoder_input_tokens": decoder,
        "decoder_segment_ids": np.ones_like(decoder),
    }

    @jax.jit
    def logits(params, batch):
        module = ours.bind(params)
        return module.logits(module.hidden(batch))

    got = np.asarray(logits(params, jax.tree.map(jnp.asarray, batch)))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_mistakes_are_named():
    _, state, hf_config = make_torch("t5_1_1")
    config = config_from_huggingface(hf_config, state)
    with pytest.raises(UserError, match="shared.weight is missing"):
        params_from_huggingface({}, config)
    with pytest.raises(UserError, match="belong to no parameter: extra"):
        params_from_huggingface({**state, "extra": np.zeros(3)}, config)
    small = {**state, "shared.weight": state["shared.weight"][:90]}
    with pytest.raises(UserError, match="token_embedder/embedding has shape"):
        params_from_huggingface(small, config)
    tied = config_from_huggingface({**hf_config, "tie_word_embeddings": True})
    with pytest.raises(UserError, match="tie_embeddings = True; set"):
        params_from_huggingface(state, tied)
    with pytest.raises(UserError, match="model_type = 'bart'"):
        config_from_huggingface({**hf_config, "model_type": "bart"})
    with pytest.raises(UserError, match="feed_forward_proj = 'gelu'"):
        config_from_huggingface({**hf_config, "feed_forward_proj": "gelu"})


def test_tied_weights_decide_over_the_configuration():
    """transformers 5 says tied for models with two tensors; the tensors are right."""
    _, state, hf_config = make_torch("t5_1_1")
    said_tied = {**hf_config, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not config_from_huggingface(said_tied, state).tie_embeddings
