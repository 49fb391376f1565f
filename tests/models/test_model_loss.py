"""The loss and the scores of targets are those of the logits, which neither of them keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from model_kinds import KINDS, TINY, batch_for, random_params

from chatyuan.models import build
from chatyuan.models.loss import LossConfig, supervised_loss, target_log_probs
from chatyuan.ops.losses import cross_entropy

TERMS = {"z_loss": 1e-2, "max_z_loss": 1e-3, "label_smoothing": 0.1}
# Every way from hidden states to logits: a matrix, a tied and scaled one, a tied one, a normed one.
HEADS = ("t5_1_1", "t5_1_0", "unilm_bias", "llama")


@pytest.mark.parametrize("kind", HEADS)
def test_loss_gradient_and_scores_are_those_of_the_logits(kind):
    model = build(KINDS[kind])
    params, batch = random_params(KINDS[kind]), jax.tree.map(jnp.asarray, batch_for(KINDS[kind]))
    loss_fn, score = supervised_loss(model, LossConfig(**TERMS)), target_log_probs(model)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]

    def ours(params):
        total, _, metrics = loss_fn(params, batch, None)
        log_probs = score(params, batch)
        return total + 0.3 * jnp.sum(log_probs**2), (metrics["accuracy"][0], log_probs)

    def with_logits(params):
        module = model.bind(params)
        logits = module.logits(module.hidden(batch))
        sums = cross_entropy(logits, targets, weights, **TERMS)
        log_p = jax.nn.log_softmax(logits)
        log_probs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        log_probs = jnp.where(weights > 0, log_probs, 0.0)
        return sums.total + 0.3 * jnp.sum(log_probs**2), (sums.correct, log_probs)

    (got, aside), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (want, expected), wanted = jax.jit(jax.value_and_grad(with_logits, has_aux=True))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert aside[0] == expected[0]
    np.testing.assert_allclose(aside[1], expected[1], atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_a_training_step_never_holds_the_logits():
    """4096 targets and 30,000 pieces: neither the loss nor its gradient makes an array of both."""
    config = dataclasses.replace(TINY, vocab_size=30_000)
    model, loss_fn = build(config), supervised_loss(build(config))
    batch = batch_for(TINY, rows=2, inputs=16, targets=2048)
    gradient = jax.grad(lambda params: loss_fn(params, batch, None)[0])
    jaxpr = jax.make_jaxpr(gradient)(model.abstract_params())
    assert max(sizes(jaxpr.jaxpr)) < 4096 * 30_000 / 4
