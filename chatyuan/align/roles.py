"""The roles of reinforcement learning as parameter trees: policy, reference, critic.

1. The policy splits into what is trained and what is frozen. With everything trained the frozen
   part is empty. With `reference_layers` = k only the last k decoder layers, the final norm and an
   untied head are trained (hydra); position tables and embeddings belong to the frozen layers. A
   model with adapters trains these alone.
2. The reference is a copy of the trained part from before the first step; joined with the frozen
   part of the policy it is the whole model that training started from. It costs what is trained.
   Of a model with adapters it is therefore a frozen adapter of its own, with the values that
   INIT_FROM gave, not the model with its adapter off: where INIT_FROM had an adapter already, that
   would be another policy.
3. A separate critic is a reward model (`chatyuan.models.reward`): backbone and head. A shared one
   is a head alone, which reads the policy's states.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from chatyuan.align.answers import Answers
from chatyuan.align.rollout import RolloutConfig, Rollouts
from chatyuan.errors import UserError
from chatyuan.models import adapters
from chatyuan.models.reward import Normalisation, RewardModel, head_values
from chatyuan.ops.token_rewards import Moments, no_moments
from chatyuan.train.updates import Optimizer

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Answers drawn for the next iteration while this one learned.

    Attributes:
      rollouts: see `Rollouts`.
      version: int32, the policy that drew them by its finished iterations; -1 = nothing is drawn.
    """

    rollouts: Rollouts
    version: Array


def nothing_ahead(prompts: int, input_length: int, config: RolloutConfig) -> Ahead:
    """Returns the `Ahead` of a run's beginning: the right shapes, nothing in them."""
    rows = (prompts, config.samples)
    answers = Answers(
        jnp.zeros((prompts, input_length), jnp.int32),
        jnp.zeros(prompts, jnp.int32),
        jnp.zeros((*rows, config.max_length), jnp.int32),
        jnp.zeros(rows, jnp.int32),
    )
    log_probs = jnp.zeros(answers.tokens.shape, jnp.float32)
    ids = jnp.zeros(prompts, jnp.uint32)
    return Ahead(Rollouts(answers, log_probs, ids), jnp.full((), -1, jnp.int32))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("step", "params", "opt_state", "updates", "critic", "critic_opt_state"),
        *("kl_coef", "reward_moments", "nonfinite_streak", "ahead"),
    ),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class AlignState:
    """All that an iteration reads and replaces; with seed, data and reference it decides the rest.

    step: int32, finished iterations, and so the version of the policy.
    params: the whole policy.
    opt_state: of the trained part of the policy.
    updates: int32, finished optimizer steps.
    critic: {"head": ...}, {"backbone": ..., "head": ...}, or {} without a critic.
    critic_opt_state: of the critic.
    kl_coef: float32, beta.
    reward_moments: of all scores so far.
    nonfinite_streak: int32, iterations in a row in which a step was skipped.
    ahead: with a lag, the answers that the next iteration learns from; else None.
    """

    step: Array
    params: Tree
    opt_state: Tree
    updates: Array
    critic: Tree
    critic_opt_state: Tree
    kl_coef: Array
    reward_moments: Moments
    nonfinite_streak: Array
    ahead: Ahead | None = None


def init_state(
    params: Tree,
    critic: Tree,
    *,
    optimizer: Optimizer,
    critic_optimizer: Optimizer,
    split: "Split",
    kl_coef: float,
    ahead: Ahead | None = None,
) -> AlignState:
    """Returns the state before the first iteration; `ahead` is `nothing_ahead` with a lag."""
    return AlignState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(split.trained(params)),
        updates=jnp.zeros((), jnp.int32),
        critic=critic,
        critic_opt_state=critic_optimizer.init(critic),
        kl_coef=jnp.float32(kl_coef),
        reward_moments=no_moments(),
        nonfinite_streak=jnp.zeros((), jnp.int32),
        ahead=ahead,
    )


@dataclasses.dataclass(frozen=True)
class Split:
    """Which part of a model's parameters is trained.

    Attributes:
      upper_layers: the last decoder layers that are trained; None = everything.
      adapters: the adapters of the model are trained, and nothing else.
    """

    upper_layers: int | None = None
    adapters: bool = False

    @classmethod
    def of(cls, model: Any, upper_layers: int | None) -> "Split":
        """Checks the count against the model.

        Raises:
          UserError: more layers than it has, or layers of a model with adapters.
        """
        layers = model.config.num_decoder_layers
        if upper_layers is not None and model.config.adapter_rank:
            raise UserError(
                f"reference_layers = {upper_layers} and ModelConfig.adapter_rank = "
                f"{model.config.adapter_rank} both say what is trained; set one of them."
            )
        if upper_layers is not None and upper_layers > layers:
            raise UserError(
                f"reference_layers = {upper_layers} is more than the {layers} decoder layers of "
                "the model; None trains everything."
            )
        return cls(upper_layers, adapters=model.config.adapter_rank > 0)

    def trained(self, params: Tree) -> Tree:
        """Returns the trained part: the same names, layers cut to the upper ones."""

        def upper(leaf: Array) -> Array:
            return leaf[leaf.shape[0] - self.upper_layers :]

        return self._pick(params, lambda layers: jax.tree.map(upper, layers))

    def logical_axes(self, axes: Tree) -> Tree:
        """Returns the axis names of the trained part, from those of the whole."""
        return self._pick(axes, lambda layers: layers)

    def _pick(self, tree: Tree, cut: Callable[[Tree], Tree]) -> Tree:
        if self.adapters:
            return adapters.adapters_of(tree)
        if self.upper_layers is None:
            return tree
        decoder = tree["decoder"]
        kept = {"layers": cut(decoder["layers"]), "final_norm": decoder["final_norm"]}
        head = {name: tree[name] for name in ("logits_dense",) if name in tree}
        return {"decoder": kept, **head}

    def joined(self, params: Tree, trained: Tree) -> Tree:
        """Returns `params` with its trained part replaced; the frozen part is not copied."""
        if self.adapters:
            return adapters.joined(params, trained)
        if self.upper_layers is None:
            return trained

        def layer(whole: Array, upper: Array) -> Array:
            return jnp.concatenate([whole[: whole.shape[0] - self.upper_layers], upper])

        new = trained["decoder"]
        decoder = {
            **params["decoder"],
            "layers": jax.tree.map(layer, params["decoder"]["layers"], new["layers"]),
            "final_norm": new["final_norm"],
        }
        return {**params, **trained, "decoder": decoder}


@dataclasses.dataclass(frozen=True)
class Critic:
    """A value of each state of an answer before its next token.

    Attributes:
      model: the reward model that a separate critic is; of a shared one only the head is used.
      separate: whether it has a backbone of its own.
    """

    model: RewardModel
    separate: bool

    def init(self, key: Array, params: Tree | None = None) -> Tree:
        """Returns fresh parameters: a head, on a copy of the policy's weights if separate.

        A head on an untrained critic starts at zero (Ziegler et al. 2019): values of 0 are a better
        guess than random ones.

        Args:
          key: unused by the zero head; kept by callers that draw.
          params: of a language model of the same shape; needed if separate.
        """
        head = jax.tree.map(jnp.zeros_like, self.model.init_head(key))
        if not self.separate:
            return {"head": head}
        copied = jax.tree.map(jnp.copy, params)
        return self.model.on_language_model(copied, head)

    def from_reward_model(self, params: Tree, normalisation: Normalisation) -> Tree:
        """Returns the parameters of a separate critic that starts as a reward model.

        Its value at the end of an answer is the model's normalised score (N+ implementation
        details, arXiv:2403.17031).

        Args:
          params: of the reward model.
          normalisation: of its scores.
        """
        head = params["head"]
        kernel = head["kernel"] / normalisation.std
        return {**params, "head": {"kernel": kernel, "bias": normalisation(head["bias"])}}

    def abstract_params(self) -> Tree:
        """Returns the shapes of its parameters."""
        params = self.model.abstract_params()
        return params if self.separate else {"head": params["head"]}

    def logical_axes(self) -> Tree:
        """Returns the axis names of its parameters."""
        axes = self.model.logical_axes()
        return axes if self.separate else {"head": axes["head"]}

    def values(self, critic: Tree, hidden: Array) -> Array:
        """Returns the head's number at each state `[..., D]`, float32 `[...]`."""
        return head_values(critic["head"], hidden)
