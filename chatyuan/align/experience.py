"""Scoring: one compiled program gives all that the update needs to know about rollouts.

The log-probabilities of policy and reference, the entropy, the critic's values and the scores of
reward models come from one call, without dropout, part by part to save memory. The policy's are
computed again rather than taken from the sampler: the first minibatch then has ratio 1 exactly, and
how far the two lie apart is reported.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from chatyuan import sharding
from chatyuan.align.answers import (
    Answers,
    all_reward_scores,
    answer_hidden,
    token_scores,
    token_scores_and_entropies,
)
from chatyuan.align.roles import Critic, Split
from chatyuan.align.rollout import Rollouts
from chatyuan.models.reward import RewardModel

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Rollouts and what the roles make of them; `[B, G, T]` float32, 0 past the end of an answer.

    Attributes:
      rollouts: answers as drawn.
      log_probs: of the policy before the update.
      reference_log_probs: of the reference.
      entropies: of the policy's distribution of each token, nats.
      values: of the critic at the state before each token; zeros without a critic.
      model_scores: one `[B, G]` per reward model, raw.
    """

    rollouts: Rollouts
    log_probs: Array
    reference_log_probs: Array
    entropies: Array
    values: Array
    model_scores: tuple[Array, ...]


ScoreFn = Callable[[Tree, Tree, Tree, Sequence[Tree], Rollouts], Experience]


def make_score(
    model: Any,
    *,
    split: Split,
    critic: Critic | None = None,
    reward_models: Sequence[RewardModel] = (),
    temperature: float = 1.0,
    microbatches: int = 1,
    mesh: Mesh | None = None,
) -> ScoreFn:
    """Returns `score(params, reference, critic, reward_params, rollouts) -> Experience`, jitted.

    Args:
      model: the policy's.
      split: what of it is trained; the reference is a tree of that part.
      critic: None for methods without.
      reward_models: scored on the device; their parameters come in the same order.
      temperature: that of sampling.
      microbatches: parts of the batch that are scored one after the other.
      mesh: over which parameters and batch are split; None = one device.
    """
    models = tuple(reward_models)
    on = mesh if mesh is not None and mesh.size > 1 else None

    def part(
        params: Tree, reference: Tree, critic_params: Tree, reward_params: tuple, answers: Answers
    ) -> tuple:
        module = model.bind(params)
        hidden = answer_hidden(module, answers, mesh=on)
        log_probs, entropies = token_scores_and_entropies(module, hidden, answers, temperature, on)
        frozen = model.bind(split.joined(params, reference))
        reference_hidden = answer_hidden(frozen, answers, mesh=on)
        reference_log_probs = token_scores(frozen, reference_hidden, answers, temperature, on)
        values = jnp.zeros_like(log_probs)
        if critic is not None:
            values = critic_values(critic, critic_params, answers, hidden, on)
        scores = all_reward_scores(models, reward_params, answers, on)
        return log_probs, reference_log_probs, entropies, values, scores

    @jax.jit
    def score(
        params: Tree, reference: Tree, critic_params: Tree, reward_params: tuple, rollouts: Rollouts
    ) -> Experience:
        def one(answers: Answers) -> tuple:
            return part(params, reference, critic_params, reward_params, answers)

        return Experience(rollouts, *in_parts(one, rollouts.answers, microbatches, on))

    def call(
        params: Tree, reference: Tree, critic_params: Tree, reward_params: Sequence, rollouts: Any
    ) -> Experience:
        return score(params, reference, critic_params, tuple(reward_params), rollouts)

    return call


def critic_values(
    critic: Critic,
    params: Tree,
    answers: Answers,
    policy_hidden: Array,
    mesh: Mesh | None,
    dropout_key: Array | None = None,
) -> Array:
    """Returns the values of the states before each token, float32 `[B, G, T]`, 0 past the end.

    Args:
      critic: shared or separate.
      params: its parameters.
      answers: see `Answers`.
      policy_hidden: `[B, G, T, D]`, which a shared critic reads.
      mesh: None = one device.
      dropout_key: None: critics learn without dropout.
    """
    hidden = policy_hidden
    if critic.separate:
        module = critic.model.backbone.bind(params["backbone"])
        hidden = answer_hidden(module, answers, mesh=mesh, dropout_key=dropout_key)
    return jnp.where(answers.mask, critic.values(params, hidden), 0.0)


def in_parts(function: Callable[[Tree], Tree], tree: Tree, count: int, mesh: Mesh | None) -> Tree:
    """Applies a function of rows `[B, ...]` to `count` parts in turn, and joins the results."""
    if count == 1:
        return function(tree)
    results = jax.lax.map(function, split_rows(tree, count, mesh))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def split_rows(tree: Tree, count: int, mesh: Mesh | None, leading: int = 0) -> Tree:
    """Leaves `[..., B, ...]` -> `[..., count, B / count, ...]`, each part over all data shards.

    Args:
      tree: arrays.
      count: parts.
      mesh: None = one device.
      leading: axes before B.
    """

    def one(x: Array) -> Array:
        before, rows = x.shape[:leading], x.shape[leading]
        x = x.reshape(*before, count, rows // count, *x.shape[leading + 1 :])
        axes = (*(None,) * (leading + 1), "batch", *(None,) * (x.ndim - leading - 2))
        return sharding.constrain_activation(x, axes, mesh)

    return jax.tree.map(one, tree)
