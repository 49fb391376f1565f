"""PPO's policy and value losses, entropy, and how losses of tokens become one number.

Shapes: B responses, T response tokens, V vocabulary. Index t of every [B, T] array belongs to the
token y_{t+1} chosen at t. The mask is 1 on response tokens, EOS included.

Losses come per token, to be reduced by `aggregate` to a pair (sum, weight). Add the sums and the
weights of all microbatches and divide once: then neither their number nor the mesh changes the
gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.kl import log_ratio
from chatyuan.ops.masked import at_least_float32, keep, masked_count, masked_mean, masked_sum

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


class PolicyTerms(NamedTuple):
    """Policy loss and its health, per token [B, T]; 0 on padding, all but the loss constant."""

    loss: jax.Array
    ratio: jax.Array  # p(token) / p_old(token); 1 at the first minibatch
    clipped: jax.Array  # 1 where the clip decides: the token has no gradient
    dual_clipped: jax.Array  # 1 where the dual clip decides
    approx_kl: jax.Array  # k3 of KL(old || new): ratio - 1 - log ratio, never negative


class ValueTerms(NamedTuple):
    """Value loss per token [B, T]; 0 on padding."""

    loss: jax.Array
    clipped: jax.Array  # 1 where the clipped error is the larger: the token has no gradient


def policy_loss(
    log_probs_BT: jax.Array,
    old_log_probs_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights_BT: jax.Array | None = None,
) -> PolicyTerms:
    """The clipped surrogate of PPO (Schulman et al., arXiv:1707.06347 eq. 7), per token.

        ratio = exp(log p - log p_old)
        loss  = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))
        A < 0 with dual clip c: loss = min(loss, -A c)     (Ye et al., arXiv:1912.09729 eq. 5)

    clip_high above clip_low is DAPO's clip-higher (arXiv:2503.14476).

    Args:
      log_probs_BT: [B, T] of the policy being trained; the gradient passes to them alone.
      old_log_probs_BT: [B, T] of the policy that made the rollouts, fixed over all epochs.
      advantages_BT: [B, T].
      mask_BT: [B, T] response mask; what stands under its zeros does not matter.
      clip_low: how far a ratio may fall below 1.
      clip_high: how far it may rise above 1.
      dual_clip: c, above 1; None = off.
      weights_BT: [B, T] importance weights of the sampler, from `truncated_importance_weights`.

    Raises:
      UserError: dual_clip is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise UserError(
            f"dual_clip = {dual_clip} must be above 1, for example 3; None turns it off."
        )
    old_log_probs_BT, advantages_BT = jax.lax.stop_gradient(
        (keep(old_log_probs_BT, mask_BT), keep(advantages_BT, mask_BT))
    )
    log_ratio_BT = log_ratio(keep(log_probs_BT, mask_BT), old_log_probs_BT)
    ratio_BT = jnp.exp(log_ratio_BT)
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    loss_BT = jnp.maximum(plain_BT, clipped_BT)
    dual_BT = jnp.zeros(loss_BT.shape, bool)
    if dual_clip is not None:
        ceiling_BT = -advantages_BT * dual_clip
        dual_BT = (advantages_BT < 0) & (loss_BT > ceiling_BT)
        loss_BT = jnp.where(dual_BT, ceiling_BT, loss_BT)
    if weights_BT is not None:
        loss_BT *= jax.lax.stop_gradient(keep(weights_BT, mask_BT))
    watched = (
        ratio_BT,
        (clipped_BT > plain_BT).astype(loss_BT.dtype),
        dual_BT.astype(loss_BT.dtype),
        jnp.expm1(log_ratio_BT) - log_ratio_BT,
    )
    watched = (jax.lax.stop_gradient(keep(values_BT, mask_BT)) for values_BT in watched)
    return PolicyTerms(keep(loss_BT, mask_BT), *watched)


def value_loss(
    values_BT: jax.Array,
    old_values_BT: jax.Array,
    returns_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip: float | None = 0.2,
) -> ValueTerms:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) per token (OpenAI's PPO).

    Args:
      values_BT: [B, T] of the critic being trained; the gradient passes to them alone.
      old_values_BT: [B, T] from the time of the rollout, fixed over all epochs.
      returns_BT: [B, T] unwhitened advantages + old values.
      mask_BT: [B, T] response mask; what stands under its zeros does not matter.
      clip: c; None = 0.5 (V - R)^2.
    """
    values_BT = keep(values_BT, mask_BT)
    old_values_BT, returns_BT = jax.lax.stop_gradient(
        (keep(old_values_BT, mask_BT), keep(returns_BT, mask_BT))
    )
    plain_BT = jnp.square(values_BT - returns_BT)
    if clip is None:
        return ValueTerms(0.5 * plain_BT, jnp.zeros_like(plain_BT))
    near_BT = jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)
    clipped_BT = jnp.square(near_BT - returns_BT)
    decides_BT = (clipped_BT > plain_BT).astype(plain_BT.dtype)
    return ValueTerms(0.5 * jnp.maximum(plain_BT, clipped_BT), jax.lax.stop_gradient(decides_BT))


def aggregate(
    values_BT: jax.Array, mask_BT: jax.Array, mode: str = "token-mean", *, length: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Reduces values of tokens to (sum, weight), both scalars; the loss is sum / weight.

        token-mean               sum over tokens / tokens: long responses weigh more (DAPO)
        seq-mean-token-mean      mean over each response's tokens, then over responses (GRPO)
        seq-mean-token-sum       sum over each response's tokens, then mean over responses
        seq-mean-token-sum-norm  sum over tokens / (responses * length), a constant (Dr.GRPO)

    The names are verl's. A response without a token under the mask is not counted, so filtered or
    filling rows have mask 0 and no influence.

    Args:
      values_BT: [B, T]; what stands under the mask's zeros does not matter.
      mask_BT: [B, T] response mask.
      mode: a name of AGGREGATIONS.
      length: the constant of seq-mean-token-sum-norm, the longest response allowed; T by default.

    Raises:
      UserError: an unknown mode.
    """
    if mode not in AGGREGATIONS:
        raise UserError(
            f"The loss aggregation {mode!r} must be one of {', '.join(AGGREGATIONS)}."
            + did_you_mean(mode, AGGREGATIONS)
        )
    tokens_B = masked_count(values_BT, mask_BT, axis=-1)
    if mode == "token-mean":
        return masked_sum(values_BT, mask_BT), jnp.sum(tokens_B)
    responses = jnp.sum(tokens_B > 0).astype(tokens_B.dtype)
    if mode == "seq-mean-token-mean":
        return jnp.sum(masked_mean(values_BT, mask_BT, axis=-1)), responses
    total = masked_sum(values_BT, mask_BT)
    if mode == "seq-mean-token-sum":
        return total, responses
    return total, responses * (length or mask_BT.shape[-1])


def truncated_importance_weights(
    log_probs_BT: jax.Array,
    sampler_log_probs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    cap: float = 2.0,
    level: str = "token",
) -> jax.Array:
    """min(p(token) / p_sampler(token), cap): corrects for a sampler that differs from the trainer.

    p is the trainer's old policy, whose log-probs the surrogate's ratio is taken against; the
    sampler may run another precision or an older version (TIS: Yao et al. 2025; IMPALA's rho).
    1 everywhere when both are the same program and version.

    Args:
      log_probs_BT: [B, T] of the trainer's old policy.
      sampler_log_probs_BT: [B, T] of the sampler, when it drew the token.
      mask_BT: [B, T] response mask.
      cap: the largest weight, 2 to 3.
      level: "token", or "sequence" for the ratio of the whole response on each of its tokens.

    Returns:
      [B, T] constant, 0 on padding.

    Raises:
      UserError: an unknown level.
    """
    if level not in ("token", "sequence"):
        raise UserError(f"The level of importance weights {level!r} must be token or sequence.")
    difference_BT = keep(log_probs_BT, mask_BT) - keep(sampler_log_probs_BT, mask_BT)
    if level == "sequence":
        total_B1 = jnp.sum(difference_BT, axis=-1, keepdims=True)
        difference_BT = jnp.broadcast_to(total_B1, difference_BT.shape)
    ratio_BT = jnp.exp(log_ratio(difference_BT, jnp.zeros_like(difference_BT)))
    return jax.lax.stop_gradient(keep(jnp.minimum(ratio_BT, cap), mask_BT))


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of the distribution over the next token: [..., V] -> [...] nats, in float32.

    Of logits already divided by the sampling temperature. log_z - sum_v p_v logit_v, shifted by the
    largest logit; a logit of -inf (a forbidden token) adds nothing.
    """
    logits = at_least_float32(logits)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1)
    finite = jnp.where(exponentials > 0, shifted, jnp.zeros_like(shifted))
    return jnp.log(total) - jnp.sum(exponentials * finite, axis=-1) / total


def explained_variance(
    values_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """1 - mean((V - R)^2) / var(R) over response tokens, a scalar (lm-human-preferences).

    1 is a perfect critic, 0 one that knows the mean alone, negative a worse one. 0 where all
    returns are equal: then there is nothing to explain.
    """
    returns_BT = keep(returns_BT, mask_BT)
    error = masked_mean(jnp.square(keep(values_BT, mask_BT) - returns_BT), mask_BT)
    spread = masked_mean(jnp.square(returns_BT - masked_mean(returns_BT, mask_BT)), mask_BT)
    safe = jnp.where(spread > 0, spread, jnp.ones_like(spread))
    return jnp.where(spread > 0, 1 - error / safe, jnp.zeros_like(spread))
