"""One iteration of reinforcement learning: draw answers, score them, learn from them.

    iteration = Iteration(learner, drawing, sources, ...)
    state, metrics = iteration(state, batch)

1. It has the form of a training step, so `train.loop.fit` runs, reports, saves and resumes it. All
   that it depends on is the state, the batch (whose prompts have numbers of their own) and what it
   was made of; a run that is stopped between two iterations goes on bitwise.
2. With `AlignConfig.lag` = 1 the answers to the next prompts are drawn while this iteration scores
   and learns, with the policy as it was before: one step off. They wait in the state, so that a run
   still goes on bitwise, and weights make up for their age. It pays with a `drawing_mesh`, devices
   of their own to draw on, or with reward functions that keep the host busy.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from chatyuan import sharding
from chatyuan.align.answers import Answers, all_reward_scores
from chatyuan.align.experience import Experience, make_score
from chatyuan.align.rewards import Decodes, HostAnswers, OpenSource, total_scores
from chatyuan.align.roles import Ahead, AlignState
from chatyuan.align.rollout import RolloutConfig, Rollouts, make_rollout, moved
from chatyuan.align.update import Learner, make_update
from chatyuan.models.reward import RewardModel

Tree = Any
Metrics = dict[str, tuple[Any, Any]]
PTX = "ptx/"  # how the names of the pretraining mixture's features begin in a batch
NEXT = "next/"  # and those of the next iteration's prompts, with a lag
PHASES = ("rollout", "score", "update")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Answers with everything that is known about them.

    Attributes:
      experience: on the devices.
      answers: on the host.
      scores: float32 `[B, G]`, the weighted sum of all sources.
      parts: the scores of each source.
    """

    experience: Experience
    answers: HostAnswers
    scores: np.ndarray
    parts: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Roles:
    """What does not change during a run: the reference and where scores come from.

    Attributes:
      reference: of the trained part of the policy.
      sources: by the name that they have in metrics.
      reward_models: those of the sources that are models, in their order.
      reward_params: their parameters.
    """

    reference: Tree
    sources: Mapping[str, OpenSource]
    reward_models: Sequence[RewardModel] = ()
    reward_params: Sequence[Tree] = ()


class Iteration:
    """`iteration(state, batch) -> (state, metrics)`; the old state is donated.

    Batches hold prompts int32 `[B, S]`, prompt_lengths int32 `[B]`, prompt_ids uint32 `[B]`; with a
    lag, those of the next iteration under names that begin with `next/`; and for a pretraining
    mixture its features under names that begin with `ptx/`. Metrics are
    (sum, weight) pairs: those of the update, and from the second call on (the first compiles) the
    tokens drawn over the seconds of each phase.
    """

    def __init__(
        self,
        learner: Learner,
        drawing: RolloutConfig,
        roles: Roles,
        *,
        vocabulary: Decodes | None = None,
        pad_id: int = 0,
        seed: int = 0,
        placement: Tree | None = None,
        drawing_mesh: Mesh | None = None,
        record: Callable[[int, int, Scored], None] | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          learner: method, policy, critic, optimizers.
          drawing: how answers are drawn.
          roles: reference and reward sources.
          vocabulary: for functions that ask for texts.
          pad_id: fills up answers.
          seed: of the draws.
          placement: shardings of the state; None = wherever it is.
          drawing_mesh: of devices that draw, apart from the learner's; None = the learner's draw.
          record: called with the number of the iteration, the version of the policy that drew, and
            the scored answers.
        """
        assert drawing.temperature == learner.temperature, "learned from what was drawn"
        self.learner, self.roles, self.vocabulary, self.record = learner, roles, vocabulary, record
        self._placement, self._apart = placement, drawing_mesh is not None
        common = {
            "eos_id": learner.eos_id, "pad_id": pad_id, "seed": seed, "apart": self._apart,
            "mesh": drawing_mesh if self._apart else learner.mesh,
        }  # fmt: skip
        self._draw = make_rollout(learner.model, drawing, **common)
        self._draw_greedy = None
        if learner.config.method == "remax":
            self._draw_greedy = make_rollout(learner.model, drawing, method="greedy", **common)
        self._score = make_score(
            learner.model,
            split=learner.split,
            critic=learner.critic,
            reward_models=roles.reward_models,
            temperature=drawing.temperature,
            microbatches=learner.config.microbatches,
            mesh=learner.mesh,
        )
        self._score_models = jax.jit(self._models)
        self._update = make_update(learner, _without_ahead(placement))
        self._compiled = False

    def __call__(self, state: AlignState, batch: Mapping[str, Array]) -> tuple[AlignState, Metrics]:
        """Runs one iteration; see the class.

        Raises:
          UserError, RunFailed: a reward function is wrong; the state is as it was.
        """
        seconds = [time.perf_counter()]
        rollouts, version = self._drawn(state, batch)
        ahead = self._draw_ahead(state, batch)
        greedy = None
        if self._draw_greedy is not None:
            greedy = self._draw_greedy(state.params, *_prompts(batch)).answers
        jax.block_until_ready((rollouts, greedy))
        seconds.append(time.perf_counter())
        scored = self.scored(state, rollouts)
        if greedy is not None:
            greedy = (greedy, self._on_devices(self._greedy_scores(greedy)))
        jax.block_until_ready(scored.experience)
        seconds.append(time.perf_counter())
        if self.record is not None:
            self.record(int(state.step), version, scored)
            seconds = [t + time.perf_counter() - seconds[-1] for t in seconds]
        lag = int(state.step) - version
        ptx = _named(batch, PTX)
        state, metrics = self._update(
            *(_without_ahead(state), scored.experience, self._on_devices(scored.scores)),
            *(greedy, ptx or None),
        )
        jax.block_until_ready(state)
        seconds.append(time.perf_counter())
        metrics = dict(metrics)
        if ahead is not None:
            state = dataclasses.replace(state, ahead=ahead)
            metrics["lag"] = (float(lag), 1.0)
        if len(scored.parts) > 1:
            for name, scores in scored.parts.items():
                metrics[f"score_{name}"] = (float(scores.sum(dtype=np.float64)), scores.size)
        if self._compiled:
            drawn = float(scored.answers.answers.lengths.sum())
            for phase, spent in zip(PHASES, np.diff(seconds), strict=True):
                metrics[f"{phase}_tokens_per_second"] = (drawn, float(spent))
        self._compiled = True
        return state, metrics

    def rollouts(self, state: AlignState, batch: Mapping[str, Array]) -> Rollouts:
        """Returns answers of the policy to a batch of prompts, on the learner's devices."""
        drawn = self._draw(state.params, *_prompts(batch))
        return moved(drawn, self.learner.mesh) if self._apart else drawn

    def _drawn(self, state: AlignState, batch: Mapping[str, Array]) -> tuple[Rollouts, int]:
        """What this iteration learns from, and the version of the policy that drew it."""
        if state.ahead is not None and int(state.ahead.version) >= 0:
            return moved(state.ahead.rollouts, self.learner.mesh), int(state.ahead.version)
        return self.rollouts(state, batch), int(state.step)

    def _draw_ahead(self, state: AlignState, batch: Mapping[str, Array]) -> Ahead | None:
        """Begins to draw for the next iteration; nothing waits for it here."""
        if state.ahead is None:
            return None
        ahead = Ahead(self.rollouts(state, _named(batch, NEXT)), jnp.copy(state.step))
        return ahead if self._placement is None else jax.device_put(ahead, self._placement.ahead)

    def scored(self, state: AlignState, rollouts: Rollouts) -> Scored:
        """Returns rollouts with log-probabilities, values and scores.

        Raises:
          UserError, RunFailed: see `chatyuan.align.rewards.total_scores`.
        """
        roles = self.roles
        experience = self._score(
            state.params, roles.reference, state.critic, roles.reward_params, rollouts
        )
        host = HostAnswers(jax.device_get(rollouts.answers), self.vocabulary)
        scores, parts = total_scores(roles.sources, host, jax.device_get(experience.model_scores))
        return Scored(experience, host, scores, parts)

    def _greedy_scores(self, answers: Answers) -> np.ndarray:
        """`[B, 1]`: the same sources on greedy answers."""
        raw = jax.device_get(self._score_models(tuple(self.roles.reward_params), answers))
        host = HostAnswers(jax.device_get(answers), self.vocabulary)
        return total_scores(self.roles.sources, host, raw)[0]

    def _models(self, trees: tuple[Tree, ...], answers: Answers) -> tuple[Array, ...]:
        return all_reward_scores(self.roles.reward_models, trees, answers, self.learner.on)

    def _on_devices(self, scores: np.ndarray) -> Array:
        if self.learner.mesh is None:
            return jax.device_put(scores)
        return jax.device_put(scores, sharding.batch_sharding(scores.shape, self.learner.mesh))


def _prompts(batch: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    return batch["prompts"], batch["prompt_lengths"], batch["prompt_ids"]


def _named(batch: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The features whose names begin so, without it."""
    return {n.removeprefix(prefix): x for n, x in batch.items() if n.startswith(prefix)}


def _without_ahead(tree: Tree) -> Tree:
    """A state, or its places, as the update takes it."""
    return None if tree is None else dataclasses.replace(tree, ahead=None)
