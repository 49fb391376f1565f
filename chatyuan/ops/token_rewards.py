"""From one score per response to a reward per token; running moments; what a bad ending costs.

Shapes: B responses, T response tokens. Index t of every [B, T] array belongs to the token y_{t+1}
that the policy chose at t: its log-prob, its reward, and the value V(s_t) read before it. The mask
is 1 on y_1 ... y_n, where y_n is EOS or the last token before the length limit, and 0 on padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from chatyuan.ops.masked import at_least_float32, keep, masked_count, masked_mean, masked_sum


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all values seen; scalars, saved with the run.

    Merging is exact up to rounding: any split of the values into batches gives the same moments
    (Chan, Golub and LeVeque 1979). The count is int32, so it never stops counting.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    def variance(self, *, ddof: int = 1) -> jax.Array:
        """squares / (count - ddof); 0 of fewer than two values."""
        return self.squares / jnp.maximum(self.count - ddof, 1).astype(self.squares.dtype)

    def std(self, *, ddof: int = 1) -> jax.Array:
        """Square root of the variance."""
        return jnp.sqrt(self.variance(ddof=ddof))


def no_moments() -> Moments:
    """Moments before any value, float32."""
    return Moments(jnp.int32(0), jnp.float32(0), jnp.float32(0))


def moments_of(values: jax.Array, mask: jax.Array | None = None) -> Moments:
    """Moments of the values under the mask, of all by default."""
    mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
    mean = masked_mean(values, mask)
    squares = masked_sum(jnp.square(keep(values, mask) - mean), mask)
    return Moments(jnp.sum(mask.astype(bool), dtype=jnp.int32), mean, squares)


def merge_moments(one: Moments, other: Moments) -> Moments:
    """Moments of the values of both."""
    count = one.count + other.count
    total = jnp.maximum(count, 1).astype(one.mean.dtype)
    share = other.count.astype(one.mean.dtype) / total
    delta = other.mean - one.mean
    between = jnp.square(delta) * one.count.astype(one.mean.dtype) * share
    return Moments(count, one.mean + delta * share, one.squares + other.squares + between)


def normalise_scores(
    scores: jax.Array,
    *,
    mean: jax.Array | float = 0.0,
    std: jax.Array | float = 1.0,
    clip: float | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """clip((scores - mean) / (std + eps), -clip, clip), elementwise.

    The clip comes last, so it is in units of the normalised score. Running scaling as in trlx is a
    running std and no mean, so that the sign of a score is kept.

    Args:
      scores: [...].
      mean: subtracted: of reference samples, or 0.
      std: of reference samples, or running.
      clip: in standard deviations; None = off.
      eps: added to std: before the second score a running std is 0.
    """
    scaled = (at_least_float32(scores) - mean) / (std + eps)
    return scaled if clip is None else jnp.clip(scaled, -clip, clip)


class Endings(NamedTuple):
    """How the end of a response changes its score; static. The defaults change nothing."""

    missing_eos_score: float | None = None  # replaces the score (-1 in N+ details); None = off
    missing_eos_penalty: float = 0.0  # subtracted instead (TRL's missing_eos_penalty)
    min_length: int = 0  # tokens with EOS; an earlier EOS counts as a missing one
    overlong_buffer: int = 0  # tokens before max_length over which the penalty grows; 0 = off
    overlong_penalty: float = 1.0  # at max_length


def shape_scores(
    scores_B: jax.Array,
    lengths_B: jax.Array,
    has_eos_B: jax.Array,
    max_length: int,
    endings: Endings,
) -> jax.Array:
    """Applies the endings to normalised scores.

    1. Without EOS, or with one before `min_length`, the score becomes `missing_eos_score`, or is
       lowered by `missing_eos_penalty` if that is None ("EOS trick", arXiv:2403.17031 detail 23).
    2. Every score is lowered by overlong_penalty * clip((length - start) / buffer, 0, 1), where
       start = max_length - buffer (soft overlong punishment, DAPO, arXiv:2503.14476 eq. 13).

    A minimum length by penalty rather than by forbidding EOS: the latter changes what is sampled
    but not what is scored, which shows as a negative KL.

    Args:
      scores_B: [B].
      lengths_B: [B] int32 tokens with EOS.
      has_eos_B: [B] whether EOS was generated.
      max_length: tokens at which generation stops, T.
      endings: what to apply.
    """
    scores_B = at_least_float32(scores_B)
    ended_B = has_eos_B.astype(bool) & (lengths_B >= endings.min_length)
    if endings.missing_eos_score is None:
        unended_B = scores_B - endings.missing_eos_penalty
    else:
        unended_B = jnp.full_like(scores_B, endings.missing_eos_score)
    scores_B = jnp.where(ended_B, scores_B, unended_B)
    if endings.overlong_buffer:
        excess_B = lengths_B - (max_length - endings.overlong_buffer)
        share_B = excess_B.astype(scores_B.dtype) / endings.overlong_buffer
        scores_B -= endings.overlong_penalty * jnp.clip(share_B, 0, 1)
    return scores_B


def last_token_mask(mask_BT: jax.Array) -> jax.Array:
    """[B, T] boolean, true at the last token of each response alone: EOS, or where it was cut.

    From the mask and not from the token ids, so that a padding id inside a response is harmless.
    """
    real_BT = mask_BT.astype(bool)
    remaining_BT = jnp.cumsum(real_BT[:, ::-1], axis=-1, dtype=jnp.int32)[:, ::-1]
    return real_BT & (remaining_BT == 1)


def token_rewards(
    scores_B: jax.Array,
    kl_BT: jax.Array,
    mask_BT: jax.Array,
    kl_coefficient: jax.Array | float,
) -> jax.Array:
    """Rewards of tokens: -beta * kl on each, plus the score once, on the last (EOS).

        sum_t rewards = score - beta * sum_t kl         of every response with a token

    The score stands at EOS (lm-human-preferences, OpenRLHF, verl) and not one later (TRL): a
    position after EOS has no value and no loss. Always at least float32: integer scores or tokens
    do not truncate it.

    Args:
      scores_B: [B] after normalising and shaping.
      kl_BT: [B, T] k1 per token; zeros where the KL is in the loss.
      mask_BT: [B, T] response mask.
      kl_coefficient: beta.

    Returns:
      [B, T], 0 on padding; constant, no gradient passes.
    """
    rewards_BT = -kl_coefficient * keep(kl_BT, mask_BT)
    scores_BT = jnp.broadcast_to(at_least_float32(scores_B)[:, None], rewards_BT.shape)
    rewards_BT += jnp.where(last_token_mask(mask_BT), scores_BT, jnp.zeros_like(scores_BT))
    return jax.lax.stop_gradient(rewards_BT)


def response_lengths(mask_BT: jax.Array) -> jax.Array:
    """Tokens of each response, EOS included: [B] float32."""
    return masked_count(jnp.zeros(mask_BT.shape, jnp.float32), mask_BT, axis=-1)
