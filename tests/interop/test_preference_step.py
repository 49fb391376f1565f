"""One step of DPO against the straightforward one on transformers' T5: log-probs, loss, gradients.

There every answer is a row of its own with its prompt encoded again, and the whole log-softmax.
"""

import jax
import numpy as np
import pytest
from test_huggingface import make_torch

from chatyuan.align.answers import Answers
from chatyuan.align.pairs import answer_log_probs, pair_figures, pair_terms
from chatyuan.interop.huggingface import config_from_huggingface, params_from_huggingface
from chatyuan.models import build
from chatyuan.ops.preference_losses import PreferenceLoss

torch = pytest.importorskip("torch")
EOS, BETA, NLL = 1, 0.1, 0.5


def pairs():
    """Three prompts with two answers each, of different lengths, padded on the right."""
    rng = np.random.default_rng(5)
    prompt_lengths, lengths = np.array([9, 4, 6]), np.array([[7, 3], [2, 6], [5, 5]])
    prompts = rng.integers(3, 97, (3, 9)) * (np.arange(9) < prompt_lengths[:, None])
    places = np.arange(7)
    tokens = rng.integers(3, 97, (3, 2, 7)) * (places < lengths[..., None])
    tokens[places == lengths[..., None] - 1] = EOS
    return [x.astype(np.int32) for x in (prompts, prompt_lengths, tokens, lengths)]


def torch_log_probs(model, prompts, tokens, lengths):
    """Sums over the tokens of column k, [3, 2]."""
    columns = []
    for k in range(2):
        target = torch.tensor(tokens[:, k], dtype=torch.long)
        logits = model(
            input_ids=torch.tensor(prompts, dtype=torch.long),
            attention_mask=torch.tensor(prompts > 0, dtype=torch.long),
            decoder_input_ids=torch.nn.functional.pad(target, (1, 0))[:, :-1],
        ).logits
        each = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        columns.append((each * torch.tensor(np.arange(7) < lengths[:, k, None])).sum(-1))
    return torch.stack(columns, 1)


def test_a_step_equals_torch():
    prompts, prompt_lengths, tokens, lengths = pairs()
    policy, state, hf_config = make_torch("t5_1_1")
    reference, _, _ = make_torch("t5_1_1")
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.02 * torch.randn_like(weight)
        reference_log_probs = torch_log_probs(reference, prompts, tokens, lengths)
    log_probs = torch_log_probs(policy, prompts, tokens, lengths)
    h = log_probs - reference_log_probs
    losses = -torch.nn.functional.logsigmoid(BETA * (h[:, 0] - h[:, 1]))
    losses = losses - NLL * log_probs[:, 0] / torch.tensor(lengths[:, 0])
    losses.mean().backward()
    gradients = {name: np.zeros_like(weight) for name, weight in state.items()}
    learned = {name: w.grad for name, w in policy.named_parameters() if w.grad is not None}
    gradients |= {name: gradient.numpy() for name, gradient in learned.items()}

    config = config_from_huggingface(hf_config, state)
    model, params = build(config), params_from_huggingface(state, config)
    answers = Answers(prompts, prompt_lengths, tokens, lengths)
    ranks = np.tile([0, 1], (3, 1))
    options = PreferenceLoss(beta=BETA, nll_weight=NLL)

    @jax.jit
    def step(params):
        def loss(params):
            found = answer_log_probs(model, params, answers)
            terms, weights = pair_terms(
                found, reference_log_probs.numpy(), lengths, ranks, options
            )
            figures, weight = pair_figures(terms, weights, None)
            return figures["loss"] / weight, found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, found), ours = step(params)
    np.testing.assert_allclose(found, log_probs.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(loss, losses.mean().item(), rtol=1e-5)
    # A gradient is converted as the weights are; ties (shared, encoder, decoder) stay one.
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if name in gradients:
            gradients[name] = gradients["shared.weight"]
    theirs = params_from_huggingface(gradients, config)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, got), wanted in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(wanted).max() > 0, name
        np.testing.assert_allclose(
            got, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=1e-3, err_msg=name
        )
