"""From scored answers to what is learned from them: advantages, returns and who takes part."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from chatyuan.align.answers import Answers
from chatyuan.align.config import GROUPED, AlignConfig
from chatyuan.align.experience import Experience
from chatyuan.ops import advantages as maths
from chatyuan.ops.kl import kl_estimate
from chatyuan.ops.masked import keep, masked_whiten
from chatyuan.ops.policy_losses import truncated_importance_weights
from chatyuan.ops.token_rewards import (
    Moments,
    merge_moments,
    moments_of,
    normalise_scores,
    shape_scores,
    token_rewards,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the optimizer steps of an iteration read; constant over all epochs.

    Attributes:
      answers: those that are learned from, G' a prompt (1 for best_of_n, 2 for online_dpo, whose
        first answer is the preferred one).
      old_log_probs, reference_log_probs: float32 `[B, G', T]`.
      advantages, returns, old_values: float32 `[B, G', T]`.
      mask: bool `[B, G', T]`, the tokens that are learned from.
      importance: float32 `[B, G', T]`, what a token counts for since an older policy drew it; None
        without a lag.
    """

    answers: Answers
    old_log_probs: Array
    reference_log_probs: Array
    advantages: Array
    returns: Array
    old_values: Array
    mask: Array
    importance: Array | None = None


class Rewards(NamedTuple):
    """Scores on their way to advantages.

    scores: `[B, G]` scaled, clipped, endings applied.
    kl: `[B, G]` k1 summed over each answer, nats.
    totals: `[B, G]` the reward of each answer: score - beta * kl where the price is in the reward.
    tokens: `[B, G, T]` the same spread over tokens; sums to `totals`.
    moments: of all scores so far.
    """

    scores: Array
    kl: Array
    totals: Array
    tokens: Array
    moments: Moments


def reward_answers(
    config: AlignConfig,
    experience: Experience,
    scores_BG: Array,
    moments: Moments,
    kl_coef: Array,
    eos_id: int,
) -> Rewards:
    """Returns the rewards of an iteration's answers.

    Args:
      config: how scores are scaled, where the price of divergence belongs.
      experience: log-probabilities of policy and reference.
      scores_BG: what the reward sources gave, float32 `[B, G]`.
      moments: of the scores of earlier iterations.
      kl_coef: beta.
      eos_id: the end token.
    """
    answers = experience.rollouts.answers
    mask = answers.mask
    moments = merge_moments(moments, moments_of(scores_BG))
    rows = shaped_scores(config, scores_BG, answers, moments, eos_id).reshape(-1)
    k1 = keep(kl_estimate(experience.log_probs, experience.reference_log_probs, "k1"), mask)
    beta = kl_coef if config.kl_place == "reward" else jnp.zeros_like(kl_coef)
    tokens = token_rewards(rows, _rows(k1), _rows(mask), beta).reshape(mask.shape)
    kl = jnp.sum(k1, axis=-1)
    return Rewards(rows.reshape(kl.shape), kl, jnp.sum(tokens, axis=-1), tokens, moments)


def shaped_scores(
    config: AlignConfig, scores_BG: Array, answers: Answers, moments: Moments, eos_id: int
) -> Array:
    """Returns scores scaled, clipped and with their endings applied, float32 `[B, G]`.

    Args:
      config: how.
      scores_BG: of the reward sources.
      answers: what was scored.
      moments: of all scores so far.
      eos_id: the end token.
    """
    scale = 1.0
    if config.scale_rewards == "running":
        std = moments.std()
        scale = jnp.where(std > 0, std, 1.0)  # scores that have all been the same stay as they are
    scaled_BG = normalise_scores(scores_BG, std=scale, clip=config.clip_reward, eps=0.0)
    lengths, ended = answers.lengths.reshape(-1), answers.ended(eos_id).reshape(-1)
    longest = answers.tokens.shape[-1]
    rows = shape_scores(scaled_BG.reshape(-1), lengths, ended, longest, config.endings)
    return rows.reshape(scores_BG.shape)


def make_targets(
    config: AlignConfig,
    experience: Experience,
    rewards: Rewards,
    greedy_scores_B: Array | None = None,
) -> Targets:
    """Returns what is learned from; see `AlignConfig` for the methods.

    Args:
      config: the method and its details.
      experience: of `make_score`.
      rewards: of `reward_answers`.
      greedy_scores_B: remax: `shaped_scores` of the greedy answers.
    """
    answers = experience.rollouts.answers
    mask = answers.mask
    gained, returns = _advantages(config, experience, rewards, greedy_scores_B)
    if config.zero_spread == "drop" and config.method in GROUPED:
        mask = mask & maths.informative_groups(rewards.scores)[:, None, None]
    targets = Targets(
        answers,
        experience.log_probs,
        experience.reference_log_probs,
        jnp.where(mask, gained, 0.0),
        returns,
        experience.values,
        mask,
        _importance(config, experience),
    )
    best_B = maths.best_of_n(rewards.scores)
    if config.method == "best_of_n":
        return _chosen(targets, best_B[:, None])
    if config.method == "online_dpo":
        worst_B = jnp.argmin(rewards.scores, axis=-1).astype(jnp.int32)
        differ = maths.informative_groups(rewards.scores)[:, None, None]
        chosen = _chosen(targets, jnp.stack([best_B, worst_B], axis=-1))
        return dataclasses.replace(chosen, mask=chosen.mask & differ)
    return targets


def _importance(config: AlignConfig, experience: Experience) -> Array | None:
    """`[B, G, T]` truncated p(token) of the policy before the update over that of its drawer."""
    if not config.lag:
        return None
    rollouts = experience.rollouts
    return truncated_importance_weights(
        experience.log_probs, rollouts.log_probs, rollouts.answers.mask, cap=config.importance_cap
    )


def _advantages(
    config: AlignConfig, experience: Experience, rewards: Rewards, greedy_scores_B: Array | None
) -> tuple[Array, Array]:
    """(advantages, returns) `[B, G, T]`; returns only mean something to a critic."""
    mask = experience.rollouts.answers.mask
    zeros = jnp.zeros(mask.shape, jnp.float32)
    method, mask_RT, tokens_RT = config.method, _rows(mask), _rows(rewards.tokens)
    if method in ("best_of_n", "online_dpo"):
        return jnp.where(mask, 1.0, 0.0), zeros
    if method == "ppo":
        if config.whiten_rewards:
            tokens_RT = masked_whiten(tokens_RT, mask_RT, shift_mean=False)
        values_RT = _rows(experience.values)
        gained_RT, returns_RT = maths.gae(
            tokens_RT, values_RT, mask_RT, gamma=config.gamma, lam=config.lam
        )
    elif method.startswith("reinforce_pp"):
        if method == "reinforce_pp_baseline":
            # The mean is taken off where the score stands, at the last token.
            off_RT = jnp.repeat(jnp.mean(rewards.scores, axis=-1), mask.shape[1])
            tokens_RT = tokens_RT - token_rewards(off_RT, jnp.zeros_like(tokens_RT), mask_RT, 0.0)
        gained_RT = maths.discounted_returns(tokens_RT, mask_RT, gamma=config.gamma)
        returns_RT = jnp.zeros_like(gained_RT)
    else:
        gained_BG = maths.group_advantages(
            rewards.totals,
            method,
            ddof=config.group_ddof,
            eps=config.group_eps,
            scale=config.group_scale,
            greedy_scores_B=greedy_scores_B,
        )
        gained_RT = maths.spread_over_tokens(gained_BG.reshape(-1), mask_RT)
        returns_RT = jnp.zeros_like(gained_RT)
    if config.whiten_advantages:
        gained_RT = maths.whiten_advantages(gained_RT, mask_RT)
    return gained_RT.reshape(mask.shape), returns_RT.reshape(mask.shape)


def _chosen(targets: Targets, places_BC: Array) -> Targets:
    """The same for C of the G answers of each prompt."""

    def take(x: Array) -> Array:
        places = places_BC.reshape(*places_BC.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, places, axis=1)

    answers = targets.answers
    chosen = dataclasses.replace(
        answers, tokens=take(answers.tokens), lengths=take(answers.lengths)
    )
    rest = {
        field.name: jax.tree.map(take, getattr(targets, field.name))  # None stays
        for field in dataclasses.fields(targets)
        if field.name != "answers"
    }
    return Targets(chosen, **rest)


def _rows(x: Array) -> Array:
    """`[B, G, T]` -> `[B * G, T]`."""
    return x.reshape(-1, x.shape[-1])
