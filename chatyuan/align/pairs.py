"""Preference losses on batches of prompts with K ranked answers: pairs from log-probs.

Legend: P prompts, K answers of a prompt, C = K columns, or K + 1 with an answer of another prompt
(KTO's reference point). The pairs of a prompt are one gradient: their mean, so that every prompt
weighs the same however many answers it has.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from chatyuan.align.answers import Answers, answer_hidden, token_scores
from chatyuan.ops.masked import masked_sum
from chatyuan.ops.preference_losses import (
    LOSSES,
    PairLogProbs,
    PreferenceLoss,
    PreferenceTerms,
    kto_kl,
    preference_loss,
    preference_sums,
)
from chatyuan.ops.reward_losses import preference_pairs


def answer_log_probs(
    model: Any,
    params: Any,
    answers: Answers,
    *,
    dropout_key: Array | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Returns log p(answer | prompt), float32 `[P, C]`, nats; the encoder runs once a prompt.

    Args:
      model: a language model.
      params: its parameters.
      answers: see `Answers`; one of length 0 has 0.
      dropout_key: None when not training.
      mesh: over which parameters and batch are split; None = one device.
    """
    module = model.bind(params)
    hidden = answer_hidden(module, answers, dropout_key=dropout_key, mesh=mesh)
    return jnp.sum(token_scores(module, hidden, answers, mesh=mesh), axis=-1)


def pair_terms(
    log_probs_PC: Array,
    reference_PC: Array | None,
    lengths_PC: Array,
    ranks_PK: Array,
    loss: PreferenceLoss,
    *,
    best_only: bool = False,
) -> tuple[PreferenceTerms, Array]:
    """Returns the terms of "answer i beats answer j" at `[P, i, j]`, and the weight of each.

    Weights are 0 where i does not beat j; those of a prompt sum to 1, or to 0 without a pair.

    Args:
      log_probs_PC: of the policy, nats a whole answer; the gradient passes to them.
      reference_PC: of the reference; None for losses without.
      lengths_PC: tokens, the end token included; 0 = no such answer.
      ranks_PK: smaller is better, equal is a tie.
      loss: which, and its coefficients.
      best_only: only the best answer of a prompt (each of them, in a tie) beats others.
    """
    count = ranks_PK.shape[1]
    real_PK = lengths_PC[:, :count] > 0
    pairs_PKK = preference_pairs(ranks_PK, real_PK)
    if best_only:
        best_P1 = jnp.min(ranks_PK, axis=1, keepdims=True, where=real_PK, initial=2**30)
        pairs_PKK &= (ranks_PK == best_P1)[:, :, None]
    number_P11 = jnp.sum(pairs_PKK, axis=(1, 2), keepdims=True)
    weights_PKK = pairs_PKK / jnp.maximum(number_P11, 1).astype(jnp.float32)

    def of_pairs(values_PC: Array | None) -> tuple[Array | None, Array | None]:
        if values_PC is None:
            return None, None
        values_PK = values_PC[:, :count]
        return tuple(jnp.broadcast_arrays(values_PK[:, :, None], values_PK[:, None, :]))

    chosen, rejected = of_pairs(log_probs_PC)
    reference_chosen, reference_rejected = of_pairs(reference_PC)
    chosen_tokens, rejected_tokens = of_pairs(lengths_PC)
    kl = None
    if LOSSES[loss.loss].needs_kl:
        kl = kto_kl(log_probs_PC[:, -1], reference_PC[:, -1], lengths_PC[:, -1])
    pair = PairLogProbs(
        chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens, kl
    )
    return preference_loss(pair, loss), weights_PKK


def pair_figures(
    terms: PreferenceTerms, weights_PKK: Array, fall_limit: float | None
) -> tuple[dict[str, Array], Array]:
    """Returns what a run reports, as sums over prompts by name, and their weight.

    Args:
      terms, weights_PKK: of `pair_terms`.
      fall_limit: nats; `chosen_fallen` is the share of pairs whose chosen answer has become less
        likely than under the reference by more. None leaves it out.
    """
    sums, weight = preference_sums(terms, weights_PKK)
    figures = {
        "loss": sums.loss,
        "accuracy": sums.accuracy,
        "chosen_reward": sums.chosen_reward,
        "rejected_reward": sums.rejected_reward,
        "reward_margin": sums.margin,
        "chosen_log_prob": sums.chosen_log_prob,
        "rejected_log_prob": sums.rejected_log_prob,
        "chosen_nll": sums.nll,
    }
    if sums.chosen_fall is not None:
        figures |= {"chosen_fall": sums.chosen_fall, "rejected_fall": sums.rejected_fall}
        if fall_limit is not None:
            fallen = (terms.chosen_fall > fall_limit) * weights_PKK
            figures["chosen_fallen"] = masked_sum(fallen, weights_PKK)
    return jax.tree.map(lambda value: value.astype(jnp.float32), figures), weight
