"""The update: one compiled program from scored rollouts to the next policy.

1. Rewards and advantages are of the whole global batch; whitening and denominators are global.
2. Epochs, minibatches and microbatches are loops inside the program. Each epoch has a permutation
   of its own, of whole prompts, drawn on the device from (seed, iteration, epoch).
3. Losses of microbatches are sums over denominators of the whole minibatch: how a minibatch is cut
   changes nothing but memory.
4. A step whose gradient is not finite changes nothing; once the policy has moved by `stop_kl` the
   rest of the iteration is skipped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from chatyuan.align.answers import (
    Answers,
    answer_hidden,
    token_entropies,
    token_loss,
    token_scores,
)
from chatyuan.align.config import AlignConfig
from chatyuan.align.experience import Experience, critic_values, split_rows
from chatyuan.align.roles import AlignState, Critic, Split
from chatyuan.align.targets import (
    Rewards,
    Targets,
    make_targets,
    reward_answers,
    shaped_scores,
)
from chatyuan.ops import policy_losses
from chatyuan.ops.kl import adapt_kl_coefficient, kl_estimate
from chatyuan.ops.masked import masked_mean, masked_sum
from chatyuan.ops.preference_losses import PairLogProbs, PreferenceLoss, dpo
from chatyuan.train.updates import Optimizer, accepted, global_norm

Tree = Any
Metrics = dict[str, tuple[Array, Array]]
UpdateFn = Callable[..., tuple[AlignState, Metrics]]
PtxLoss = Callable[[Tree, Tree], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything static that an update needs.

    Attributes:
      config: method and numbers.
      model: of the policy.
      split: what of it is trained.
      optimizer: of the trained part.
      critic: None for methods without.
      critic_optimizer: of the critic; may be the policy's twin.
      eos_id: the end token.
      temperature: that of sampling.
      seed: of the permutations.
      mesh: None = one device.
      ptx_loss: `(params, batch) -> (loss sum, weight)` of the pretraining mixture, or None.
    """

    config: AlignConfig
    model: Any
    split: Split
    optimizer: Optimizer
    critic: Critic | None
    critic_optimizer: Optimizer
    eos_id: int
    temperature: float = 1.0
    seed: int = 0
    mesh: Mesh | None = None
    ptx_loss: PtxLoss | None = None

    @property
    def on(self) -> Mesh | None:
        """The mesh, or None where nothing is split."""
        return self.mesh if self.mesh is not None and self.mesh.size > 1 else None


def make_update(learner: Learner, placement: Tree | None = None) -> UpdateFn:
    """Returns the jitted `update(state, experience, scores, greedy, ptx)`.

    It gives (state, metrics); the old state is donated. scores are float32 `[B, G]`; greedy for
    remax the greedy answers `[B, 1, T]` and their scores `[B, 1]`, else None; ptx features
    `[epochs * minibatches * b, ...]`, else None. Metrics are (sum, weight) pairs.

    Args:
      learner: see `Learner`.
      placement: shardings of the state, kept by the new one; None = wherever they are.
    """
    pinned = {} if placement is None else {"out_shardings": (placement, None)}

    def update(
        state: AlignState,
        experience: Experience,
        scores: Array,
        greedy: tuple[Answers, Array] | None = None,
        ptx: Tree | None = None,
    ) -> tuple[AlignState, Metrics]:
        config = learner.config
        rewards = reward_answers(
            config, experience, scores, state.reward_moments, state.kl_coef, learner.eos_id
        )
        greedy_scores_B = None
        if greedy is not None:
            answers, scores_B1 = greedy
            greedy_scores_B = shaped_scores(
                config, scores_B1, answers, rewards.moments, learner.eos_id
            )[:, 0]
        targets = make_targets(config, experience, rewards, greedy_scores_B)
        state, steps = _optimize(learner, state, targets, ptx)
        metrics = _figures(learner, experience, scores, rewards, targets, state.kl_coef) | steps
        kl = jnp.mean(rewards.kl)
        bad = metrics["nonfinite_steps"][0] > 0
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            reward_moments=rewards.moments,
            kl_coef=adapt_kl_coefficient(
                state.kl_coef,
                kl,
                rewards.kl.size,
                target=config.kl_target,
                horizon=config.kl_horizon,
            ),
            nonfinite_streak=jnp.where(bad, state.nonfinite_streak + 1, 0),
        )
        return state, metrics

    return jax.jit(update, donate_argnums=0, **pinned)


def _optimize(
    learner: Learner, state: AlignState, targets: Targets, ptx: Tree | None
) -> tuple[AlignState, Metrics]:
    """All optimizer steps of an iteration."""
    config = learner.config
    count = targets.mask.shape[0]
    key = jax.random.fold_in(jax.random.key(learner.seed), state.step)

    def order(epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), count)

    orders = jax.vmap(order)(jnp.arange(config.epochs))
    orders = orders.reshape(config.epochs * config.minibatches, -1)
    if ptx is not None:
        ptx = jax.tree.map(lambda x: x.reshape(len(orders), -1, *x.shape[1:]), ptx)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, Metrics]:
        places, extra = inputs
        minibatch = jax.tree.map(lambda x: jnp.take(x, places, axis=0), targets)

        def learn(carry: tuple) -> tuple[tuple, Metrics]:
            return _step(learner, state, carry, minibatch, extra)

        def skip(carry: tuple) -> tuple[tuple, Metrics]:
            shapes = jax.eval_shape(learn, carry)[1]
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        if config.stop_kl is None:
            return learn(carry)
        return jax.lax.cond(carry[-1], skip, learn, carry)

    start = (
        *(learner.split.trained(state.params), state.opt_state),
        *(state.critic, state.critic_opt_state, state.updates, jnp.zeros((), bool)),
    )
    end, each = jax.lax.scan(step, start, (orders, ptx))
    trained, opt_state, critic, critic_opt_state, updates, _ = end
    metrics = {name: (jnp.sum(a), jnp.sum(b)) for name, (a, b) in each.items()}
    for name in ("approx_kl", "ratio"):  # of the first minibatch: 0 and 1 but for rounding
        metrics[f"first_{name}"] = tuple(x[0] for x in each[name])
    state = dataclasses.replace(
        state,
        params=learner.split.joined(state.params, trained),
        opt_state=opt_state,
        critic=critic,
        critic_opt_state=critic_opt_state,
        updates=updates,
    )
    return state, metrics


def _step(
    learner: Learner,
    state: AlignState,
    carry: tuple,
    minibatch: Targets,
    ptx: Tree | None,
) -> tuple[tuple, Metrics]:
    """One optimizer step of the policy and the critic."""
    config = learner.config
    trained, opt_state, critic, critic_opt_state, updates, _ = carry
    gradients, critic_gradients, metrics = minibatch_gradients(
        learner, state.params, trained, critic, minibatch, state.kl_coef
    )
    one = jnp.ones((), jnp.float32)
    if learner.ptx_loss is not None and ptx is not None:

        def pretraining(trained: Tree) -> Array:
            total, weight = learner.ptx_loss(learner.split.joined(state.params, trained), ptx)
            return total / jnp.maximum(weight, 1.0)

        loss, extra = jax.value_and_grad(pretraining)(trained)
        metrics |= {"ptx_loss": (loss, one), "ptx_grad_norm": (global_norm(extra), one)}
        gradients = jax.tree.map(lambda a, b: a + config.ptx_coef * b, gradients, extra)
    norm, critic_norm = global_norm(gradients), global_norm(critic_gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(critic_norm)
    approx_kl = metrics["approx_kl"][0] / jnp.maximum(metrics["approx_kl"][1], 1.0)
    far = jnp.zeros((), bool) if config.stop_kl is None else approx_kl > config.stop_kl
    go = finite & ~far
    warm = state.step >= config.critic_warmup  # until then only the critic learns
    new = _applied(learner.optimizer, gradients, opt_state, trained, updates, norm, go & warm)
    if learner.critic is not None:
        critic, critic_opt_state = _applied(
            learner.critic_optimizer,
            *(critic_gradients, critic_opt_state, critic, updates, critic_norm, go),
        )
        metrics["critic_grad_norm"] = (jnp.where(finite, critic_norm, 0.0), one)
    metrics["grad_norm"] = (jnp.where(finite, norm, 0.0), one)
    metrics["learning_rate"] = (jnp.float32(learner.optimizer.schedule(updates)), one)
    metrics["optimizer_steps"] = (go.astype(jnp.float32), one)
    metrics["nonfinite_steps"] = (1.0 - finite.astype(jnp.float32), one)
    updates = updates + go.astype(jnp.int32)
    return (*new, critic, critic_opt_state, updates, far), metrics


def _applied(
    optimizer: Optimizer,
    gradients: Tree,
    opt_state: Tree,
    params: Tree,
    step: Array,
    norm: Array,
    go: Array,
) -> tuple[Tree, Tree]:
    """(parameters, optimizer state) after a step, or unchanged."""
    updates, new_state = optimizer.update(
        gradients,
        opt_state,
        params,
        step=step,
        gradient_scale=jnp.ones((), jnp.float32),
        gradient_norm=norm,
        accept=go,
    )
    new = optax.apply_updates(params, updates)
    return accepted(go, new, params), new_state


def minibatch_gradients(
    learner: Learner, frozen: Tree, trained: Tree, critic: Tree, minibatch: Targets, kl_coef: Array
) -> tuple[Tree, Tree, Metrics]:
    """Returns (gradient of the trained part, of the critic, metrics) of a minibatch's mean loss.

    Worked off in `config.microbatches` parts of whole prompts; their number changes nothing.
    """
    config = learner.config
    learned, taken = _rows(minibatch.mask), _rows(minibatch.answers.mask)
    zeros = jnp.zeros(learned.shape, jnp.float32)
    policy_weight = policy_losses.aggregate(zeros, learned, config.aggregation)[1]
    weights = {
        "policy": jnp.maximum(policy_weight, 1.0),
        "value": jnp.maximum(jnp.sum(taken.astype(jnp.float32)), 1.0),
        "kl_coef": kl_coef,
        "pairs": jnp.maximum(jnp.sum(jnp.any(minibatch.mask, axis=(1, 2))), 1).astype(jnp.float32),
    }

    def one(part: Targets) -> tuple:
        def loss(trained: Tree, critic: Tree) -> tuple[Array, Metrics]:
            return _loss(learner, learner.split.joined(frozen, trained), critic, part, weights)

        (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            trained, critic
        )
        return value, metrics, gradients

    if config.microbatches == 1:
        value, metrics, gradients = one(minibatch)
    else:
        parts = split_rows(minibatch, config.microbatches, learner.on)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums: tuple, part: Targets) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, one(part)), None

        (value, metrics, gradients), _ = jax.lax.scan(add, start, parts)
    metrics["loss"] = (value, jnp.ones((), jnp.float32))
    return *gradients, metrics


def _loss(
    learner: Learner, params: Tree, critic: Tree, part: Targets, weights: dict[str, Array]
) -> tuple[Array, Metrics]:
    """A microbatch's share of the minibatch's mean loss."""
    config, on = learner.config, learner.on
    module = learner.model.bind(params)
    hidden = answer_hidden(module, part.answers, mesh=on)
    rows = _rows(part.mask)
    metrics: Metrics = {}

    def mean(values: Array) -> Array:
        total = policy_losses.aggregate(_rows(values), rows, config.aggregation)[0]
        return total / weights["policy"]

    if config.method == "online_dpo":
        log_probs = token_scores(module, hidden, part.answers, learner.temperature, on)
        policy = total = _preference(config, log_probs, part) / weights["pairs"]
        if config.kl_place == "loss":
            kl = kl_estimate(log_probs, part.reference_log_probs, config.kl_estimator)
            total += weights["kl_coef"] * mean(kl)
    else:
        # A mean is linear: its derivative is what the loss of each token counts for.
        shares = jax.grad(mean)(jnp.zeros(part.mask.shape, jnp.float32))
        of_tokens = (part.old_log_probs, part.advantages, part.reference_log_probs, part.mask)
        weight = () if part.importance is None else (part.importance,)
        total, log_probs = token_loss(
            functools.partial(_of_token, config),
            (*of_tokens, shares, weights["kl_coef"] * shares, *weight),
            *(module, hidden, part.answers, learner.temperature, on),
        )
    terms = _surrogate(
        config,
        *map(_rows, (log_probs, part.old_log_probs, part.advantages)),
        rows,
        jax.tree.map(_rows, part.importance),
    )
    count = jnp.sum(rows.astype(jnp.float32))
    for name in ("ratio", "approx_kl"):
        metrics[name] = (jnp.sum(getattr(terms, name)), count)
    metrics["clip_fraction"] = (jnp.sum(terms.clipped), count)
    if config.method != "online_dpo":
        policy = mean(-log_probs if config.method == "best_of_n" else terms.loss)
    if config.entropy_coef:
        total -= config.entropy_coef * mean(token_entropies(module, hidden, learner.temperature))
    one = jnp.ones((), jnp.float32) / config.microbatches
    metrics["policy_loss"] = (policy, one)
    if learner.critic is not None:
        values = critic_values(learner.critic, critic, part.answers, hidden, on)
        value = policy_losses.value_loss(
            *map(_rows, (values, part.old_values, part.returns, part.answers.mask)),
            clip=config.value_clip,
        )
        value_mean = jnp.sum(value.loss) / weights["value"]
        total += config.value_coef * value_mean
        metrics["value_loss"] = (value_mean, one)
    return total, metrics


def _surrogate(
    config: AlignConfig,
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    importance: Array | None,
) -> policy_losses.PolicyTerms:
    """The clipped loss of each token as configured."""
    return policy_losses.policy_loss(
        *(log_probs, old_log_probs, advantages, mask),
        clip_low=config.clip,
        clip_high=config.clip if config.clip_high is None else config.clip_high,
        dual_clip=config.dual_clip,
        weights_BT=importance,
    )


def _of_token(
    config: AlignConfig,
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    reference_log_probs: Array,
    mask: Array,
    shares: Array,
    kl_shares: Array,
    importance: Array | None = None,
) -> Array:
    """What each token adds to the loss of the policy."""
    if config.method == "best_of_n":
        losses = -shares * log_probs
    else:
        terms = _surrogate(config, log_probs, old_log_probs, advantages, mask, importance)
        losses = shares * terms.loss
    if config.kl_place == "loss":
        losses += kl_shares * kl_estimate(log_probs, reference_log_probs, config.kl_estimator)
    return jnp.where(mask, losses, 0.0)


def _preference(config: AlignConfig, log_probs: Array, part: Targets) -> Array:
    """Sum of DPO's losses; the first answer of a pair is the preferred one."""
    of_BC = (masked_sum(x, part.mask, axis=-1) for x in (log_probs, part.reference_log_probs))
    (chosen_B, rejected_B), references = (x_BC.T for x_BC in of_BC)
    losses_B = dpo(
        PairLogProbs(chosen_B, rejected_B, *references), PreferenceLoss(beta=config.dpo_beta)
    )
    return masked_sum(losses_B, jnp.any(part.mask, axis=(1, 2)))


def _figures(
    learner: Learner,
    experience: Experience,
    scores: Array,
    rewards: Rewards,
    targets: Targets,
    kl_coef: Array,
) -> Metrics:
    """What is reported of the rollouts; means over answers, or over tokens where it says so."""
    answers = experience.rollouts.answers
    one = jnp.ones((), jnp.float32)
    count = jnp.float32(scores.size)
    mask = answers.mask
    gap = jnp.exp(jnp.abs(experience.log_probs - experience.rollouts.log_probs))
    figures = {
        "score": (jnp.sum(scores), count),
        "score_std": (jnp.std(scores), one),
        "reward": (jnp.sum(rewards.totals), count),
        "kl": (jnp.sum(rewards.kl), count),
        "kl_coef": (kl_coef, one),
        "entropy": (masked_mean(experience.entropies, mask), one),
        "length": (jnp.sum(answers.lengths.astype(jnp.float32)), count),
        "ended": (jnp.sum(answers.ended(learner.eos_id).astype(jnp.float32)), count),
        "sampler_gap": (masked_mean(gap, mask), one),
        "zero_spread": (jnp.mean(jnp.std(scores, axis=-1) == 0), one),
        "prompt_tokens": (jnp.sum(answers.prompt_lengths).astype(jnp.float32), one),
        "answer_tokens": (jnp.sum(answers.lengths).astype(jnp.float32), one),
    }
    if targets.importance is not None:
        weights = targets.importance
        capped = (weights >= learner.config.importance_cap).astype(jnp.float32)
        figures["importance"] = (masked_mean(weights, targets.mask), one)
        figures["importance_capped"] = (masked_mean(capped, targets.mask), one)
    if learner.critic is not None:
        figures["explained_variance"] = (
            policy_losses.explained_variance(
                *map(_rows, (experience.values, targets.returns, mask))
            ),
            one,
        )
    return figures


def _rows(x: Array) -> Array:
    """`[B, G, T]` -> `[B * G, T]`; rows stay as they are."""
    return x.reshape(-1, x.shape[-1])
