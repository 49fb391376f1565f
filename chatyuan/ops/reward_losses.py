"""Losses of a reward model on the scores of several answers to each prompt.

Shapes: B prompts, K answers to each. `ranks` say which answer people preferred: a smaller rank is
better, 0 the best; equal ranks are a tie and are never compared. `mask` is 0 for answers that only
fill the array. A pair of answers is the case K = 2 with ranks [0, 1]. Arithmetic is float32,
float64 if given.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.masked import at_least_float32, keep, masked_mean, masked_sum

RANKINGS = ("pairwise", "plackett_luce")


class RewardSums(NamedTuple):
    """Sums over prompts, each multiplied by its weight; scalars. Divide by `weight` for the mean.

    Pairs are averaged within a prompt first, so that a prompt with K = 9 answers (36 pairs) weighs
    as much as one with two: InstructGPT found that pairs taken as separate examples overfit.
    """

    total: jax.Array  # ranking + centering: what training minimises
    ranking: jax.Array
    centering: jax.Array
    accuracy: jax.Array  # share of the prompt's pairs whose preferred answer scores higher
    margin: jax.Array  # mean over the prompt's pairs of score(preferred) - score(other)
    weight: jax.Array  # prompts (or their weights) with at least one pair that is no tie


def pairwise_loss(
    preferred: jax.Array, other: jax.Array, margin: jax.Array | float = 0.0
) -> jax.Array:
    """Bradley-Terry: -log sigma(preferred - other - margin), elementwise and never infinite.

    Margins as in Llama 2 (arXiv:2307.09288 eq. 2), larger for clearer preferences. By log_sigmoid,
    since the log of a float32 sigmoid is -inf from -89 on.

    Args:
      preferred: [...] scores of the better answers.
      other: [...] scores of the worse ones.
      margin: [...] or one number for all.
    """
    difference = at_least_float32(preferred) - at_least_float32(other)
    return -jax.nn.log_sigmoid(difference - margin)


def centering_loss(preferred: jax.Array, other: jax.Array) -> jax.Array:
    """(preferred + other)^2, elementwise: keeps scores near 0 (arXiv:2312.09244; TRL uses 1e-2)."""
    return jnp.square(at_least_float32(preferred) + at_least_float32(other))


def preference_pairs(ranks_BK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """Which answer beats which: [B, K, K], true at (i, j) where i ranks strictly before j.

    Each pair of answers appears once: C(K, 2) entries of a prompt without ties or padding.
    """
    real = mask_BK.astype(bool)
    both = real[:, :, None] & real[:, None, :]
    return both & (ranks_BK[:, :, None] < ranks_BK[:, None, :])


def plackett_luce_loss(scores_BK: jax.Array, ranks_BK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """-log of the probability that answers are drawn in the order of their ranks.

        loss = sum_i log(e^{s_i} + sum_{j ranked after i} e^{s_j}) - s_i

    (Plackett 1975; ListMLE, Xia et al. 2008.) Tied answers do not compete with each other.

    Args:
      scores_BK: [B, K] scores.
      ranks_BK: [B, K] smaller is better.
      mask_BK: [B, K] 0 for padding.

    Returns:
      [B] summed over the answers of each prompt, nats.
    """
    scores_BK = keep(scores_BK, mask_BK)
    itself = jnp.eye(scores_BK.shape[-1], dtype=bool)[None]
    rivals_BKK = preference_pairs(ranks_BK, mask_BK) | itself
    others_BKK = jnp.broadcast_to(scores_BK[:, None, :], rivals_BKK.shape)
    log_total = jax.nn.logsumexp(jnp.where(rivals_BKK, others_BKK, -jnp.inf), axis=-1)
    return masked_sum(log_total - scores_BK, mask_BK, axis=-1)


def reward_loss(
    scores_BK: jax.Array,
    ranks_BK: jax.Array,
    mask_BK: jax.Array,
    *,
    weights_B: jax.Array | None = None,
    ranking: str = "pairwise",
    margins_BKK: jax.Array | None = None,
    centering: float = 0.0,
) -> RewardSums:
    """Returns the sums over prompts of a reward model's loss and metrics.

    pairwise: per prompt the mean over its pairs of `pairwise_loss`, -1 / C(K, 2) sum log sigma(s_i
    - s_j) (InstructGPT, arXiv:2203.02155 eq. 1), all in one gradient; plackett_luce: the
    probability of the whole order. Both add `centering` * mean over pairs of (s_i + s_j)^2.

    Args:
      scores_BK: [B, K] scores of the answers; the gradient passes to them.
      ranks_BK: [B, K] smaller is better, equal is a tie; what padding holds does not matter.
      mask_BK: [B, K] 0 for padding.
      weights_B: [B] weight of each prompt, 1 by default.
      ranking: a name of RANKINGS.
      margins_BKK: [B, K, K] by how much i should beat j, at (i, j); pairwise only.
      centering: coefficient, 0 = off.

    Raises:
      UserError: an unknown ranking, or margins with plackett_luce.
    """
    if ranking not in RANKINGS:
        raise UserError(
            f"ranking = {ranking!r} must be one of {', '.join(RANKINGS)}."
            + did_you_mean(ranking, RANKINGS)
        )
    if margins_BKK is not None and ranking != "pairwise":
        raise UserError(f"margins need ranking = 'pairwise'; it is {ranking!r}.")
    scores_BK = keep(scores_BK, mask_BK)
    pairs_BKK = preference_pairs(ranks_BK, mask_BK)
    better_BKK, worse_BKK = jnp.broadcast_arrays(scores_BK[:, :, None], scores_BK[:, None, :])

    def mean_B(values_BKK: jax.Array) -> jax.Array:
        return masked_mean(values_BKK, pairs_BKK, axis=(1, 2))

    if ranking == "pairwise":
        margin = 0.0 if margins_BKK is None else keep(margins_BKK, pairs_BKK)
        ranking_B = mean_B(pairwise_loss(better_BKK, worse_BKK, margin))
    else:
        ranking_B = plackett_luce_loss(scores_BK, ranks_BK, mask_BK)
    centering_B = centering * mean_B(centering_loss(better_BKK, worse_BKK))
    usable_B = jnp.any(pairs_BKK, axis=(1, 2)).astype(scores_BK.dtype)
    weights_B = usable_B if weights_B is None else usable_B * at_least_float32(weights_B)
    sums = RewardSums(
        total=ranking_B + centering_B,
        ranking=ranking_B,
        centering=centering_B,
        accuracy=mean_B((better_BKK > worse_BKK).astype(scores_BK.dtype)),
        margin=mean_B(better_BKK - worse_BKK),
        weight=jnp.ones_like(weights_B),
    )
    return jax.tree.map(lambda values_B: jnp.sum(values_B * weights_B), sums)
