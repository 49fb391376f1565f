"""Estimators of KL(policy || reference) from sampled tokens, and the control of its coefficient.

Shapes: B responses, T response tokens. Log-probs are those of the sampled tokens, in nats; the mask
[B, T] is 1 on the tokens of the response, EOS included, and 0 on padding.
"""

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.masked import at_least_float32, masked_sum

# exp(20) is 4.9e8: beyond it a ratio says no more than "very different", and exp soon overflows.
MAX_LOG_RATIO = 20.0
ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")


def log_ratio(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """log_probs - reference in at least float32, clipped to +-20 (as verl, OpenRLHF and tunix)."""
    difference = at_least_float32(log_probs) - at_least_float32(reference)
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(log_probs: jax.Array, reference: jax.Array, estimator: str = "k1") -> jax.Array:
    """Estimates KL(policy || reference) from tokens drawn from the policy, elementwise.

    With d = log p(token) - log q(token), p the policy, q the reference
    (Schulman, "Approximating KL divergence", 2020):

        k1 = d                   unbiased; single values may be negative
        k2 = d^2 / 2             biased, low variance; the gradient of its mean is that of the KL
        k3 = e^-d - 1 + d        unbiased, never negative

    As a reward the value counts: k1. As a loss the gradient counts: the expected gradient of k1 is
    zero, that of k3 belongs to another divergence, that of k2 is right. `k1+` and `k3+` have the
    value of k1 and k3 and the gradient of k2 (straight-through, as verl's).

    Args:
      log_probs: [...] of the policy; gradients pass.
      reference: [...] of the reference; a constant.
      estimator: a name of ESTIMATORS.

    Returns:
      [...] nats, float32 (float64 if given).

    Raises:
      UserError: an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise UserError(
            f"The KL estimator {estimator!r} must be one of {', '.join(ESTIMATORS)}."
            + did_you_mean(estimator, ESTIMATORS)
        )
    d = log_ratio(log_probs, jax.lax.stop_gradient(reference))
    squared = 0.5 * jnp.square(d)
    values = {"k1": d, "k2": squared, "k3": jnp.expm1(-d) + d}
    value = values[estimator.removesuffix("+")]
    if estimator.endswith("+"):
        value = jax.lax.stop_gradient(value - squared) + squared
    return value


def sequence_kl(kl_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over the tokens of each response: [B] nats per response."""
    return masked_sum(kl_BT, mask_BT, axis=-1)


def adapt_kl_coefficient(
    coefficient: jax.Array,
    kl: jax.Array,
    episodes: int | jax.Array,
    *,
    target: float | None,
    horizon: float = 10_000.0,
) -> jax.Array:
    """Moves beta towards the KL wanted (Ziegler et al., arXiv:1909.08593 section 2.2).

        beta * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

    Call it once per batch of rollouts, not per minibatch.

    Args:
      coefficient: [] beta; all of the controller's state.
      kl: [] mean over responses of `sequence_kl` by k1: nats per response, not per token.
      episodes: responses in that batch.
      target: nats per response; None for a fixed coefficient.
      horizon: episodes in which beta moves by 20 % at most.
    """
    coefficient = at_least_float32(coefficient)
    if target is None:
        return coefficient
    error = jnp.clip(at_least_float32(kl) / target - 1, -0.2, 0.2)
    share = at_least_float32(episodes).astype(error.dtype) / horizon
    return coefficient * (1 + error * share)
