"""Token for token what transformers' `generate` gives on the same weights (torch, CPU)."""

import functools

import numpy as np
import pytest

from chatyuan.decode import DecodeConfig, make_generate
from chatyuan.interop.huggingface import config_from_huggingface, params_from_huggingface
from chatyuan.models import build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS, SEEDS = 14, 3
SIZES = dict(vocab_size=61, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2)
SIZES |= dict(num_decoder_layers=2, dropout_rate=0.0)
SIZES |= dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
KINDS = {
    "t5_1_1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "narrow_heads": dict(feed_forward_proj="gated-silu", tie_word_embeddings=False, num_heads=3),
    "t5_1_0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
}


@functools.cache
def torch_model(kind, seed):
    """Random weights whose outputs differ between prompts and end at different lengths."""
    given = {**SIZES, **KINDS[kind]}
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**given)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "EncDecAttention" in name or "SelfAttention" in name:
                weight.copy_(0.4 * torch.randn_like(weight))
        if given["tie_word_embeddings"]:
            model.shared.weight.mul_(1.5)
            model.shared.weight[1].mul_(2)
        else:
            head = torch.nn.Linear(given["d_model"], given["vocab_size"], bias=False)
            head.weight.copy_(0.4 * torch.randn_like(head.weight))
            head.weight[1].mul_(3)
            model.lm_head = head
            model.config.tie_word_embeddings = False
            model.config.scale_decoder_outputs = False
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    return model, state, {"model_type": "t5", **given}


def padded_prompts(seed):
    rng = np.random.default_rng(seed)
    lengths = np.asarray([11, 3, 7, 1, 5], np.int32)
    tokens = rng.integers(2, SIZES["vocab_size"], (5, 11)) * (np.arange(11) < lengths[:, None])
    return tokens.astype(np.int32), lengths


def torch_generate(model, tokens, lengths, options):
    """Outputs without the start token, cut after the end token, and beam scores."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(np.arange(tokens.shape[1]) < lengths[:, None]).long(),
            max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
            output_scores=True, **options,
        )  # fmt: skip
    outputs = []
    for row in found.sequences[:, 1:].tolist():
        outputs.append(row[: row.index(1) + 1] if 1 in row else row)
    scores = found.sequences_scores.numpy() if "num_beams" in options else None
    return outputs, scores


def options_of(config):
    """The same settings in transformers' words."""
    options = {
        "repetition_penalty": config.repetition_penalty,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "min_new_tokens": config.min_length,
        "suppress_tokens": [0] if config.suppress_pad else None,
    }
    if config.method == "beam":
        options |= {
            "num_beams": config.beam_size,
            "num_return_sequences": config.num_samples,
            "length_penalty": config.length_penalty,
            "early_stopping": config.early_stopping,
        }
    return options


def greedy(**values):
    return DecodeConfig(max_decode_length=STEPS, **{"suppress_pad": False, **values})


def beam(**values):
    return greedy(method="beam", beam_size=4, num_samples=4, **values)


PROCESSORS = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_length": 3}
CASES = [
    ("t5_1_1", greedy(**PROCESSORS, suppress_pad=True)),
    ("t5_1_1", beam()),
    ("t5_1_1", beam(length_penalty=0.6, early_stopping=True)),
    ("t5_1_1", beam(**PROCESSORS, length_penalty=0.6, suppress_pad=True)),
    ("narrow_heads", greedy()),
    ("narrow_heads", beam(length_penalty=0.6, repetition_penalty=0.8)),
    ("t5_1_0", beam(early_stopping=True)),
]


@pytest.mark.parametrize("kind,config", CASES, ids=range(len(CASES)))
def test_tokens_equal_transformers(kind, config):
    model_config, generate, ended = None, None, 0
    for seed in range(SEEDS):
        model, state, hf_config = torch_model(kind, seed)
        if generate is None:
            model_config = config_from_huggingface(hf_config, state)
            generate = make_generate(build(model_config), config, eos_id=1)
        params = params_from_huggingface(state, model_config)
        tokens, lengths = padded_prompts(seed)
        expected, scores = torch_generate(model, tokens, lengths, options_of(config))
        output = generate(params, tokens, lengths, np.zeros(5, np.int32))
        rows = np.asarray(output.tokens).reshape(-1, STEPS)
        ends = np.asarray(output.lengths).reshape(-1)
        found = [row[:end].tolist() for row, end in zip(rows, ends, strict=True)]
        assert found == expected, f"weights of seed {seed}"
        if scores is not None:
            np.testing.assert_allclose(np.asarray(output.scores).reshape(-1), scores, rtol=1e-4)
        ended += sum(row[-1] == 1 for row in found)
    assert ended, "these weights never end a sequence: the test would miss how beams end"
    assert generate.num_compiled() == 1
