"""Advantages: GAE for a critic; RLOO, GRPO, REINFORCE++ and ReMax without one.

Shapes: B responses (or prompts), T response tokens, G responses to each prompt. Index t of every
[B, T] array belongs to the token y_{t+1} chosen at t; the value there, V(s_t), was read before it.
The mask is 1 on response tokens, EOS included. Nothing here passes a gradient.
"""

import math

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.masked import at_least_float32, keep, masked_variance, masked_whiten

GROUP_ESTIMATORS = ("rloo", "grpo", "dr_grpo", "remax")
GROUP_SCALES = ("group", "batch")


def gae(
    rewards_BT: jax.Array,
    values_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438), from the last token.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        returns = A + V             of the advantages before any whitening

    After the last token V and A are 0: EOS ends the episode. A masked position is skipped: the next
    unmasked V and A are carried over it, so padding never bootstraps and a gap costs no discount.

    Args:
      rewards_BT: [B, T] from `token_rewards`.
      values_BT: [B, T] V(s_t) from the time of the rollout.
      mask_BT: [B, T] response mask; what stands under its zeros does not matter.
      gamma: discount per token.
      lam: lambda.

    Returns:
      (advantages [B, T], returns [B, T]), both 0 on padding.
    """
    rewards_BT, values_BT = keep(rewards_BT, mask_BT), keep(values_BT, mask_BT)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        next_value_B, next_advantage_B = carry
        reward_B, value_B, real_B = inputs
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * next_advantage_B
        carried = (
            jnp.where(real_B, value_B, next_value_B),
            jnp.where(real_B, advantage_B, next_advantage_B),
        )
        return carried, advantage_B

    zeros_B = jnp.zeros_like(values_BT[:, 0])
    by_time = (rewards_BT.T, values_BT.T, mask_BT.astype(bool).T)
    _, advantages_TB = jax.lax.scan(step, (zeros_B, zeros_B), by_time, reverse=True)
    advantages_BT = keep(advantages_TB.T, mask_BT)
    return jax.lax.stop_gradient((advantages_BT, advantages_BT + values_BT))


def whiten_advantages(advantages_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the response tokens of the whole batch; see `masked_whiten`.

    Of the global batch, before it is cut into minibatches. The returns stay as they are.
    """
    return jax.lax.stop_gradient(masked_whiten(advantages_BT, mask_BT))


def discounted_returns(
    rewards_BT: jax.Array, mask_BT: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
    """sum_{s >= t} gamma^{s - t} r_s over the response's tokens: [B, T], 0 on padding.

    This is GAE with lambda 1 and no critic; a masked position is skipped in the same way.
    """
    rewards_BT = at_least_float32(rewards_BT)
    zeros_BT = jnp.zeros_like(rewards_BT)
    return gae(rewards_BT, zeros_BT, mask_BT, gamma=gamma, lam=1.0)[0]


def reinforce_plus_plus(
    rewards_BT: jax.Array, mask_BT: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
    """REINFORCE++ (Hu et al., arXiv:2501.03262): returns to go, whitened over the global batch.

    REINFORCE++-baseline is the same on token rewards whose scores were centred by
    `center_scores` first.

    Args:
      rewards_BT: [B, T] token rewards: score at EOS, -beta * k1 on each token.
      mask_BT: [B, T] response mask.
      gamma: discount per token.

    Returns:
      [B, T], 0 on padding.
    """
    return whiten_advantages(discounted_returns(rewards_BT, mask_BT, gamma=gamma), mask_BT)


def center_scores(scores_BG: jax.Array) -> jax.Array:
    """scores - mean over the G responses to the same prompt: [B, G]."""
    scores_BG = at_least_float32(scores_BG)
    return scores_BG - jnp.mean(scores_BG, axis=-1, keepdims=True)


def group_advantages(
    scores_BG: jax.Array,
    estimator: str,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
    scale: str = "group",
    greedy_scores_B: jax.Array | None = None,
) -> jax.Array:
    """One advantage per response, from the scores of the other responses to its prompt.

        rloo     r - mean of the G - 1 others = G / (G - 1) (r - mean)     (arXiv:2402.14740)
        grpo     (r - mean) / (std + eps)                                 (arXiv:2402.03300)
        dr_grpo  r - mean                                                 (arXiv:2503.20783)
        remax    r - r of the greedy response                             (arXiv:2310.10505)

    A group whose scores are all equal has advantage 0: it adds nothing to a gradient, but its
    tokens count in the denominator of a loss unless `informative_groups` takes them out.

    Args:
      scores_BG: [B, G], a KL penalty already subtracted where it belongs into the reward.
      estimator: a name of GROUP_ESTIMATORS.
      ddof: grpo: 1 divides squares by G - 1 (TRL, tunix), 0 by G.
      eps: grpo: added to the standard deviation; 1e-6 in TRL and tunix.
      scale: grpo: the standard deviation of each `group`, or of the whole `batch`.
      greedy_scores_B: remax: [B] scores of the greedy responses.

    Returns:
      [B, G] at least float32.

    Raises:
      UserError: an unknown estimator or scale, or G = 1 where others are needed.
      ValueError: greedy_scores_B is missing for remax, or given to another estimator.
    """
    for name, value, known in (
        ("estimator", estimator, GROUP_ESTIMATORS),
        ("scale", scale, GROUP_SCALES),
    ):
        if value not in known:
            raise UserError(
                f"{name} = {value!r} must be one of {', '.join(known)}."
                + did_you_mean(value, known)
            )
    if (greedy_scores_B is not None) != (estimator == "remax"):
        raise ValueError(f"greedy_scores_B belongs to remax and to it alone, not to {estimator}.")
    samples = scores_BG.shape[-1]
    if samples < 2 and estimator != "remax":
        raise UserError(
            f"{estimator} compares the responses to one prompt; with {samples} of them there is "
            "nothing to compare. Sample at least 2 per prompt."
        )
    scores_BG = jax.lax.stop_gradient(at_least_float32(scores_BG))
    if estimator == "remax":
        return scores_BG - jax.lax.stop_gradient(at_least_float32(greedy_scores_B))[:, None]
    centered_BG = center_scores(scores_BG)
    if estimator == "rloo":
        return centered_BG * (samples / (samples - 1))
    if estimator == "dr_grpo":
        return centered_BG
    if scale == "group":
        std = jnp.std(scores_BG, axis=-1, keepdims=True, ddof=ddof)
    else:
        every_BG = jnp.ones(scores_BG.shape, bool)
        std = jnp.sqrt(masked_variance(scores_BG, every_BG, ddof=ddof))
    return centered_BG / (std + eps)


def informative_groups(scores_BG: jax.Array) -> jax.Array:
    """[B] whether the scores of a prompt's responses differ at all.

    Dropping the others is DAPO's dynamic sampling (arXiv:2503.14476): they only dilute the mean.
    """
    return jnp.max(scores_BG, axis=-1) > jnp.min(scores_BG, axis=-1)


def spread_over_tokens(advantages_B: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Gives every token of a response the response's advantage: [B, T], 0 on padding."""
    advantages_BT = jnp.broadcast_to(advantages_B[:, None], mask_BT.shape)
    return keep(advantages_BT, mask_BT)


def best_of_n(scores_BG: jax.Array) -> jax.Array:
    """Index of the highest score of each prompt, the first of equals: [B] int32."""
    return jnp.argmax(scores_BG, axis=-1).astype(jnp.int32)


def expected_best_of_n(scores_BG: jax.Array, n: int) -> jax.Array:
    """Expected highest score of n responses drawn from the G without replacement: [B].

        sum_k C(k, n - 1) / C(G, n) * s_(k),   s_(0) <= ... <= s_(G-1) sorted

    Unbiased for the best of n fresh samples, and one set of G serves every n <= G (as the pass@k
    estimator of arXiv:2107.03374 does for yes-or-no scores).

    Raises:
      ValueError: n outside 1 ... G.
    """
    samples = scores_BG.shape[-1]
    if not 1 <= n <= samples:
        raise ValueError(f"The best of n = {n} needs 1 <= n <= {samples} responses a prompt.")
    ordered_BG = jnp.sort(at_least_float32(scores_BG), axis=-1)
    shares = [math.comb(k, n - 1) / math.comb(samples, n) for k in range(samples)]
    return jnp.sum(ordered_BG * jnp.asarray(shares, ordered_BG.dtype)[None], axis=-1)
