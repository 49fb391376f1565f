"""The seeded bugs: one exact snippet of a pure function each, and what a mistake makes of it.

Most are bugs of published libraries or of people's first PPO. A new pure function of alignment
brings its mutants here; a snippet that no longer occurs exactly once in its module is an error, so
the list cannot rot.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug.

    name: what is wrong.
    module: file under chatyuan/ops, without `.py`; its tests are tests/ops/test_<module>.py.
    before: the snippet, once in the file.
    after: what stands there instead.
    """

    name: str
    module: str
    before: str
    after: str


MUTANTS = (
    # Token rewards.
    Mutant(
        "rewards take the integer type of the tokens",
        "token_rewards",
        "rewards_BT += jnp.where(last_token_mask(mask_BT), scores_BT, jnp.zeros_like(scores_BT))",
        "rewards_BT += jnp.where(last_token_mask(mask_BT), scores_BT.astype(jnp.int32), 0)",
    ),
    Mutant(
        "the score stands one position after EOS",
        "token_rewards",
        "jnp.where(last_token_mask(mask_BT), scores_BT",
        "jnp.where(jnp.roll(last_token_mask(mask_BT), 1, axis=-1), scores_BT",
    ),
    Mutant(
        "the score stands on every token",
        "token_rewards",
        "jnp.where(last_token_mask(mask_BT), scores_BT",
        "jnp.where(mask_BT.astype(bool), scores_BT",
    ),
    Mutant(
        "the KL is rewarded instead of charged",
        "token_rewards",
        "rewards_BT = -kl_coefficient * keep(kl_BT, mask_BT)",
        "rewards_BT = kl_coefficient * keep(kl_BT, mask_BT)",
    ),
    Mutant(
        "the KL mask is shifted: EOS is free",
        "token_rewards",
        "rewards_BT = -kl_coefficient * keep(kl_BT, mask_BT)",
        "rewards_BT = -kl_coefficient * keep(kl_BT, jnp.roll(mask_BT, -1, axis=-1))",
    ),
    Mutant(
        "padding pays KL",
        "token_rewards",
        "rewards_BT = -kl_coefficient * keep(kl_BT, mask_BT)",
        "rewards_BT = -kl_coefficient * at_least_float32(kl_BT)",
    ),
    Mutant(
        "rewards pass a gradient",
        "token_rewards",
        "return jax.lax.stop_gradient(rewards_BT)",
        "return rewards_BT",
    ),
    Mutant(
        "scores are clipped before they are scaled",
        "token_rewards",
        "return scaled if clip is None else jnp.clip(scaled, -clip, clip)",
        "return (jnp.clip(scores, -(clip or 1e9), clip or 1e9) - mean) / (std + eps)",
    ),
    Mutant(
        "merged moments forget the distance of the means",
        "token_rewards",
        "one.squares + other.squares + between",
        "one.squares + other.squares",
    ),
    Mutant(
        "an end before the minimum length counts as an end",
        "token_rewards",
        "has_eos_B.astype(bool) & (lengths_B >= endings.min_length)",
        "has_eos_B.astype(bool)",
    ),
    Mutant(
        "overlong answers gain",
        "token_rewards",
        "scores_B -= endings.overlong_penalty",
        "scores_B += endings.overlong_penalty",
    ),
    # Masked reductions and whitening.
    Mutant(
        "padding is in the mean",
        "masked",
        "return masked_sum(values, mask, axis) / jnp.maximum(count, jnp.ones_like(count))",
        "return jnp.mean(keep(values, mask), axis=axis)",
    ),
    Mutant(
        "variance without Bessel's correction",
        "masked",
        "jnp.maximum(count - ddof, jnp.ones_like(count))",
        "jnp.maximum(count, jnp.ones_like(count))",
    ),
    Mutant(
        "whitened rewards lose their mean",
        "masked",
        "    if not shift_mean:\n        whitened += mean\n",
        "",
    ),
    Mutant(
        "bfloat16 stays bfloat16",
        "masked",
        "return values if wide else values.astype(jnp.float32)",
        "return values",
    ),
    # Advantages.
    Mutant(
        "the value index is shifted",
        "advantages",
        "delta_B = reward_B + gamma * next_value_B - value_B",
        "delta_B = reward_B + gamma * value_B - next_value_B",
    ),
    Mutant(
        "values are not discounted",
        "advantages",
        "delta_B = reward_B + gamma * next_value_B - value_B",
        "delta_B = reward_B + next_value_B - value_B",
    ),
    Mutant(
        "lambda without gamma",
        "advantages",
        "advantage_B = delta_B + gamma * lam * next_advantage_B",
        "advantage_B = delta_B + lam * next_advantage_B",
    ),
    Mutant(
        "padding bootstraps",
        "advantages",
        "jnp.where(real_B, value_B, next_value_B)",
        "value_B",
    ),
    Mutant(
        "a gap cuts the advantage off",
        "advantages",
        "jnp.where(real_B, advantage_B, next_advantage_B)",
        "jnp.where(real_B, advantage_B, jnp.zeros_like(advantage_B))",
    ),
    Mutant(
        "advantages pass a gradient",
        "advantages",
        "return jax.lax.stop_gradient((advantages_BT, advantages_BT + values_BT))",
        "return advantages_BT, advantages_BT + values_BT",
    ),
    Mutant(
        "returns forget the values",
        "advantages",
        "return jax.lax.stop_gradient((advantages_BT, advantages_BT + values_BT))",
        "return jax.lax.stop_gradient((advantages_BT, advantages_BT))",
    ),
    Mutant(
        "RLOO leaves nobody out",
        "advantages",
        "return centered_BG * (samples / (samples - 1))",
        "return centered_BG",
    ),
    Mutant(
        "GRPO always divides by G",
        "advantages",
        "std = jnp.std(scores_BG, axis=-1, keepdims=True, ddof=ddof)",
        "std = jnp.std(scores_BG, axis=-1, keepdims=True)",
    ),
    Mutant(
        "groups are centred over the batch",
        "advantages",
        "scores_BG - jnp.mean(scores_BG, axis=-1, keepdims=True)",
        "scores_BG - jnp.mean(scores_BG)",
    ),
    Mutant(
        "the worst of n",
        "advantages",
        "jnp.argmax(scores_BG, axis=-1)",
        "jnp.argmin(scores_BG, axis=-1)",
    ),
    # KL and its control.
    Mutant(
        "the log-ratio is upside down",
        "kl",
        "at_least_float32(log_probs) - at_least_float32(reference)",
        "at_least_float32(reference) - at_least_float32(log_probs)",
    ),
    Mutant("k3 with the wrong sign", "kl", "jnp.expm1(-d) + d", "jnp.expm1(d) - d"),
    Mutant(
        "k2 without its half", "kl", "squared = 0.5 * jnp.square(d)", "squared = jnp.square(d)"
    ),
    Mutant(
        "the straight-through has no gradient",
        "kl",
        "jax.lax.stop_gradient(value - squared) + squared",
        "jax.lax.stop_gradient(value)",
    ),
    Mutant(
        "log-ratios are not clipped",
        "kl",
        "jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "difference",
    ),
    Mutant(
        "the KL of a response is its mean",
        "kl",
        "return masked_sum(kl_BT, mask_BT, axis=-1)",
        "return masked_sum(kl_BT, mask_BT, axis=-1) / jnp.float32(mask_BT.shape[-1])",
    ),
    Mutant(
        "the controller moves the wrong way",
        "kl",
        "return coefficient * (1 + error * share)",
        "return coefficient * (1 - error * share)",
    ),
    Mutant(
        "the controller's error is not clipped",
        "kl",
        "jnp.clip(at_least_float32(kl) / target - 1, -0.2, 0.2)",
        "at_least_float32(kl) / target - 1",
    ),
    # Policy and value losses.
    Mutant(
        "the optimistic side of the clip",
        "policy_losses",
        "loss_BT = jnp.maximum(plain_BT, clipped_BT)",
        "loss_BT = jnp.minimum(plain_BT, clipped_BT)",
    ),
    Mutant(
        "the advantage's sign",
        "policy_losses",
        "plain_BT = -advantages_BT * ratio_BT",
        "plain_BT = advantages_BT * ratio_BT",
    ),
    Mutant(
        "clip-higher is ignored",
        "policy_losses",
        "jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)",
        "jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_low)",
    ),
    Mutant(
        "the dual clip meets good tokens too",
        "policy_losses",
        "dual_BT = (advantages_BT < 0) & (loss_BT > ceiling_BT)",
        "dual_BT = loss_BT > ceiling_BT",
    ),
    Mutant(
        "old log-probs and advantages pass a gradient",
        "policy_losses",
        """    old_log_probs_BT, advantages_BT = jax.lax.stop_gradient(
        (keep(old_log_probs_BT, mask_BT), keep(advantages_BT, mask_BT))
    )
""",
        """    old_log_probs_BT = keep(old_log_probs_BT, mask_BT)
    advantages_BT = keep(advantages_BT, mask_BT)
""",
    ),
    Mutant(
        "values are clipped around the returns",
        "policy_losses",
        "jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)",
        "jnp.clip(values_BT, returns_BT - clip, returns_BT + clip)",
    ),
    Mutant(
        "the smaller value error",
        "policy_losses",
        "0.5 * jnp.maximum(plain_BT, clipped_BT)",
        "0.5 * jnp.minimum(plain_BT, clipped_BT)",
    ),
    Mutant(
        "local denominators: a mean of microbatches' means",
        "policy_losses",
        "return masked_sum(values_BT, mask_BT), jnp.sum(tokens_B)",
        "return masked_mean(values_BT, mask_BT), jnp.ones_like(tokens_B[0])",
    ),
    Mutant(
        "empty rows count as responses",
        "policy_losses",
        "responses = jnp.sum(tokens_B > 0).astype(tokens_B.dtype)",
        "responses = jnp.float32(tokens_B.shape[0])",
    ),
    Mutant(
        "importance weights are not truncated",
        "policy_losses",
        "keep(jnp.minimum(ratio_BT, cap), mask_BT)",
        "keep(ratio_BT, mask_BT)",
    ),
    # Preference losses.
    Mutant(
        "DPO without its reference",
        "preference_losses",
        "return pair.chosen - pair.reference_chosen, pair.rejected - pair.reference_rejected",
        "return pair.chosen, pair.rejected",
    ),
    Mutant(
        "DPO prefers the rejected answer",
        "preference_losses",
        "return -jax.nn.log_sigmoid(options.beta * (chosen - rejected))",
        "return -jax.nn.log_sigmoid(options.beta * (rejected - chosen))",
    ),
    Mutant(
        "IPO averages over the wrong answer's tokens",
        "preference_losses",
        "gap = chosen / pair.chosen_tokens - rejected / pair.rejected_tokens",
        "gap = chosen / pair.rejected_tokens - rejected / pair.chosen_tokens",
    ),
    Mutant(
        "DPOP punishes a rise",
        "preference_losses",
        "options.dpop_lambda * jax.nn.relu(-chosen)",
        "options.dpop_lambda * jax.nn.relu(chosen)",
    ),
    Mutant(
        "the NLL is not per token",
        "preference_losses",
        "    return -pair.chosen / pair.chosen_tokens\n",
        "    return -pair.chosen\n",
    ),
    Mutant(
        "KTO's reference point may be negative",
        "preference_losses",
        "jax.lax.stop_gradient(jax.nn.relu(masked_mean(log_ratio, weights)))",
        "jax.lax.stop_gradient(masked_mean(log_ratio, weights))",
    ),
    Mutant(
        "the fall of the chosen answer is a rise",
        "preference_losses",
        "tuple(-jax.lax.stop_gradient(value) for value in _h(pair))",
        "tuple(jax.lax.stop_gradient(value) for value in _h(pair))",
    ),
    # Reward model.
    Mutant(
        "log of a sigmoid: infinite from -89 on",
        "reward_losses",
        "return -jax.nn.log_sigmoid(difference - margin)",
        "return -jnp.log(jax.nn.sigmoid(difference - margin))",
    ),
    Mutant(
        "margins make it easier",
        "reward_losses",
        "return -jax.nn.log_sigmoid(difference - margin)",
        "return -jax.nn.log_sigmoid(difference + margin)",
    ),
    Mutant(
        "ties are compared",
        "reward_losses",
        "return both & (ranks_BK[:, :, None] < ranks_BK[:, None, :])",
        "return both & (ranks_BK[:, :, None] <= ranks_BK[:, None, :])",
    ),
    Mutant(
        "padding is compared",
        "reward_losses",
        "both = real[:, :, None] & real[:, None, :]",
        "both = real[:, :, None] | real[:, None, :]",
    ),
    Mutant(
        "each pair counts alike, not each prompt",
        "reward_losses",
        "return masked_mean(values_BKK, pairs_BKK, axis=(1, 2))",
        "return masked_sum(values_BKK, pairs_BKK, axis=(1, 2))",
    ),
    Mutant(
        "centering of differences",
        "reward_losses",
        "jnp.square(at_least_float32(preferred) + at_least_float32(other))",
        "jnp.square(at_least_float32(preferred) - at_least_float32(other))",
    ),
)
