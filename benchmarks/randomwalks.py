"""Random walks: the smallest task on which alignment can be seen to work, on one CPU core.

A graph of 21 nodes; a prompt is a start node, an answer the rest of a walk to node 0, and its score
the optimality of its length: 1 for a shortest path, 0 for a walk that never arrives or takes an
edge that does not exist. The generator is that of trlx (`examples/randomwalks`), whose regression
benchmark this is. A small encoder-decoder learns the walks first; then each method improves it
through the functions that the stages use. `--methods` takes any method of `AlignConfig`; `reward`,
a reward model on pairs of its samples; and preference losses on the same pairs: `dpo`, `dpo+nll`
and the other names of `preference_losses.LOSSES`.

    python benchmarks/randomwalks.py --check

Prints sampled and greedy optimality per seed and their means, and exits 1 where a bar is missed.
"""

import argparse
import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import ROOT, Check, finish

sys.path.insert(0, str(ROOT))

from chatyuan.align.answers import Answers, reward_scores  # noqa: E402
from chatyuan.align.config import GROUPED, AlignConfig  # noqa: E402
from chatyuan.align.experience import make_score  # noqa: E402
from chatyuan.align.pairs import answer_log_probs, pair_figures, pair_terms  # noqa: E402
from chatyuan.align.roles import Critic, Split, init_state  # noqa: E402
from chatyuan.align.rollout import RolloutConfig, make_rollout  # noqa: E402
from chatyuan.align.update import Learner, make_update  # noqa: E402
from chatyuan.models import ModelConfig, build  # noqa: E402
from chatyuan.models.loss import LossConfig, supervised_loss  # noqa: E402
from chatyuan.models.reward import RewardModel  # noqa: E402
from chatyuan.ops.preference_losses import LOSSES, PreferenceLoss  # noqa: E402
from chatyuan.ops.reward_losses import reward_loss  # noqa: E402
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer  # noqa: E402
from chatyuan.train.schedules import ScheduleConfig, make_schedule  # noqa: E402
from chatyuan.train.step import init_state as train_state  # noqa: E402
from chatyuan.train.step import make_train_step  # noqa: E402

PAD, EOS, FIRST = 0, 1, 2  # node n is token n + FIRST
NODES, LONGEST, GOAL = 21, 10, 0
MODEL = ModelConfig(
    vocab_size=32,
    embed_dim=64,
    mlp_dim=256,
    num_heads=4,
    head_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    mlp_activations=("relu",),
)


@dataclasses.dataclass(frozen=True)
class Walks:
    """The graph, and walks on it."""

    edges: np.ndarray  # bool [NODES, NODES]
    walks: list[list[int]]
    shortest: np.ndarray  # nodes of the shortest path of each start, at most LONGEST

    @property
    def starts(self) -> np.ndarray:
        """Every node but the goal."""
        return np.arange(1, NODES)

    def optimality(self, walk: list[int]) -> float:
        """trlx's metric: (longest - length) / (longest - shortest), 0 for walks that fail."""
        length = LONGEST
        for place, node in enumerate(walk):
            illegal = node >= NODES or node < 0
            if illegal or (place and not self.edges[walk[place - 1], node]):
                break
            if node == GOAL:
                length = place + 1
                break
        return (LONGEST - length) / (LONGEST - self.shortest[walk[0]])


def random_walks(seed: int = 1000, count: int = 1000, p_edge: float = 0.1) -> Walks:
    """trlx's generator: a random directed graph without dead ends, and walks from random starts."""
    rng = np.random.RandomState(seed)
    while True:
        edges = rng.rand(NODES, NODES) > (1 - p_edge)
        np.fill_diagonal(edges, 0)
        if np.all(edges.sum(1)):
            break
    edges[GOAL, :] = 0
    edges[GOAL, GOAL] = 1
    walks = []
    for _ in range(count):
        node = GOAL
        while node == GOAL:
            node = rng.randint(NODES)
        walk = [node]
        for _ in range(LONGEST - 1):
            node = rng.choice(np.nonzero(edges[node])[0])
            walk.append(node)
            if node == GOAL:
                break
        walks.append([int(n) for n in walk])
    return Walks(edges, walks, _shortest(edges))


def _shortest(edges: np.ndarray) -> np.ndarray:
    """Nodes on the shortest path to the goal, from every node, by breadth-first search."""
    found = np.full(NODES, LONGEST)
    found[GOAL], frontier, length = 1, [GOAL], 1
    while frontier:
        length += 1
        before = [n for n in range(NODES) if edges[n, frontier].any() and found[n] == LONGEST]
        frontier = [n for n in before if n != GOAL]
        found[frontier] = np.minimum(length, LONGEST)
    return found


def prompts_of(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[start node, end token] as prompts and their lengths."""
    tokens = np.stack([starts + FIRST, np.full(len(starts), EOS)], axis=1).astype(np.int32)
    return tokens, np.full(len(starts), 2, np.int32)


def scores_of(world: Walks, prompts: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> Any:
    """Optimality of answers `[B, G, T]`, float32 `[B, G]`; the reward function of the task."""
    scores = np.zeros(lengths.shape, np.float32)
    for row, sample in np.ndindex(lengths.shape):
        answer = tokens[row, sample, : lengths[row, sample]]
        answer = answer[:-1] if len(answer) and answer[-1] == EOS else answer
        walk = [int(prompts[row, 0]) - FIRST, *(int(t) - FIRST for t in answer)]
        scores[row, sample] = world.optimality(walk)
    return scores


def tune(world: Walks, seed: int, steps: int = 400, batch: int = 100) -> Any:
    """Supervised learning of the walks; returns the weights."""
    model = build(MODEL)
    schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=1e-3))
    optimizer = _adam(model.abstract_params(), model.logical_axes(), schedule)
    loss = supervised_loss(model, LossConfig(z_loss=0.0))
    step = make_train_step(loss, optimizer, schedule, seed=seed)
    state = train_state(model.init(jax.random.key(seed)), optimizer)
    rows = len(world.walks)
    prompts, _ = prompts_of(np.array([walk[0] for walk in world.walks]))
    targets = np.zeros((rows, LONGEST), np.int32)
    for row, walk in enumerate(world.walks):
        answer = [node + FIRST for node in walk[1:]] + [EOS]
        targets[row, : len(answer)] = answer[:LONGEST]
    real = targets != PAD
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    data = {
        "encoder_input_tokens": prompts,
        "encoder_segment_ids": np.ones_like(prompts),
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_segment_ids": real.astype(np.int32),
        "decoder_loss_weights": real.astype(np.float32),
    }
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        places = rng.integers(0, rows, batch)
        state, _ = step(state, {name: jnp.asarray(x[places]) for name, x in data.items()})
    return state.params


def _adam(shapes: Any, axes: Any, schedule: Any, clip: float | None = None) -> Any:
    adam = OptimizerConfig(name="adamw", b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=clip)
    return make_optimizer(adam, schedule, shapes, axes)


class Trainer:
    """One method's compiled programs, shared by all seeds."""

    def __init__(self, world: Walks, method: str, samples: int, rollouts: int = 128) -> None:
        """Prepares `rollouts` answers an iteration, `samples` of them to a prompt."""
        self.world, self.samples, self.rows = world, samples, rollouts // samples
        self.model, self.split = build(MODEL), Split()
        details = {"value_coef": 1.2} if method == "ppo" else {}
        self.config = AlignConfig(
            method=method, epochs=4, minibatches=2, kl_coef=0.0, clip=0.2, **details
        )
        assert samples > 1 or method not in GROUPED
        critic = Critic(RewardModel(MODEL), separate=False) if self.config.has_critic else None
        self.critic = critic
        schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=3e-4))
        self.optimizer = _adam(
            self.model.abstract_params(), self.model.logical_axes(), schedule, 1.0
        )
        shapes, axes = ({}, {}) if critic is None else (
            critic.abstract_params(), critic.logical_axes()
        )  # fmt: skip
        self.critic_optimizer = _adam(shapes, axes, schedule, 1.0)
        drawing = RolloutConfig(samples=samples, max_length=LONGEST)
        self.rollout = functools.cache(
            lambda seed: make_rollout(self.model, drawing, eos_id=EOS, seed=seed)
        )
        self.score = make_score(self.model, split=self.split, critic=critic)
        self.update = functools.cache(self._update)

    def _update(self, seed: int) -> Any:
        return make_update(
            Learner(
                self.config,
                self.model,
                self.split,
                self.optimizer,
                self.critic,
                self.critic_optimizer,
                eos_id=EOS,
                seed=seed,
            )  # fmt: skip
        )

    def run(self, params: Any, seed: int, marks: tuple[int, ...]) -> dict[int, tuple[float, float]]:
        """Returns {rollouts: (sampled, greedy) optimality} at the marks."""
        critic = {} if self.critic is None else self.critic.init(jax.random.key(seed))
        reference = params
        state = init_state(
            jax.tree.map(jnp.copy, params),
            critic,
            optimizer=self.optimizer,
            critic_optimizer=self.critic_optimizer,
            split=self.split,
            kl_coef=0.0,
        )
        results = {}
        rng = np.random.default_rng(seed)
        per_iteration = self.rows * self.samples
        for iteration in range(max(marks) // per_iteration):
            prompts, lengths = prompts_of(rng.choice(self.world.starts, self.rows))
            ids = np.arange(iteration * self.rows, (iteration + 1) * self.rows, dtype=np.uint32)
            rollouts = self.rollout(seed)(state.params, prompts, lengths, ids)
            experience = self.score(state.params, reference, state.critic, (), rollouts)
            answers = jax.device_get(rollouts.answers)
            scores = scores_of(self.world, prompts, answers.tokens, answers.lengths)
            state, _ = self.update(seed)(state, experience, jnp.asarray(scores))
            done = (iteration + 1) * per_iteration
            if done in marks:
                results[done] = evaluate(self.world, self.model, state.params, seed)
        return results


@functools.cache
def _judges(seed: int, samples: int) -> tuple[Any, Any]:
    model = build(MODEL)
    drawing = RolloutConfig(samples=samples, max_length=LONGEST)
    return (
        make_rollout(model, drawing, eos_id=EOS, seed=seed + 10_000),
        make_rollout(model, drawing, eos_id=EOS, method="greedy"),
    )


def answers_of(world: Walks, params: Any, seed: int, samples: int) -> tuple[Any, Any]:
    """Scores of `samples` draws of every start `[20, G]`, and of the greedy walks `[20]`."""
    prompts, lengths = prompts_of(world.starts)
    ids = np.arange(len(prompts), dtype=np.uint32)
    scores = []
    for draw in _judges(seed, samples):
        answers = jax.device_get(draw(params, prompts, lengths, ids).answers)
        scores.append(scores_of(world, prompts, answers.tokens, answers.lengths))
    return scores[0], scores[1][:, 0]


def evaluate(world: Walks, model: Any, params: Any, seed: int) -> tuple[float, float]:
    """(sampled, greedy) optimality, 64 draws a start."""
    del model
    sampled, greedy = answers_of(world, params, seed, 64)
    return float(sampled.mean()), float(greedy.mean())


def pairs_of(world: Walks, params: Any, seed: int, count: int, turn: int) -> dict[str, Any]:
    """`count` pairs of the model's samples for the same start, the one with the better score first.

    Args:
      world: the task.
      params: of the tuned model.
      seed: of the draws and of the choice.
      count: how many pairs, of 512 samples a start.
      turn: 1, 2, ...: other samples each time; those of 0 are evaluated.
    """
    prompts, lengths = prompts_of(world.starts)
    draw, drawn = _judges(seed, 64)[0], []
    for number in range(8 * turn, 8 * turn + 8):
        ids = np.arange(len(prompts), dtype=np.uint32) + np.uint32(number * len(prompts))
        drawn.append(jax.device_get(draw(params, prompts, lengths, ids).answers))
    tokens = np.concatenate([answers.tokens for answers in drawn], axis=1)
    counts = np.concatenate([answers.lengths for answers in drawn], axis=1)
    scores = scores_of(world, prompts, tokens, counts)
    rng = np.random.default_rng((seed, turn))
    starts = rng.integers(0, len(prompts), 8 * count)
    two = rng.integers(0, scores.shape[1], (8 * count, 2))
    gaps = scores[starts, two[:, 0]] - scores[starts, two[:, 1]]
    better = np.flatnonzero(gaps > 0)[:count]
    assert len(better) == count, "too few samples differ"
    start, two = starts[better][:, None], two[better]
    return {
        "prompts": prompts[start[:, 0]],
        "prompt_lengths": lengths[start[:, 0]],
        "tokens": tokens[start, two],
        "lengths": counts[start, two],
        "gaps": gaps[better].astype(np.float32),
    }


def _answers(pairs: Any) -> Answers:
    return Answers(*(pairs[name] for name in ("prompts", "prompt_lengths", "tokens", "lengths")))


class Preferences:
    """A reward model (`reward`) or a preference loss (`dpo`, `dpo+nll`, ...), for all seeds.

    300 steps of 64 pairs. The losses' rate and beta are those of the trial that set the bars.
    """

    def __init__(self, world: Walks, method: str, steps: int = 300, batch: int = 64) -> None:
        """Prepares the training step."""
        self.world, self.method, self.steps, self.batch = world, method, steps, batch
        self.language, self.scorer = build(MODEL), RewardModel(MODEL)
        self.model = self.scorer if method == "reward" else self.language
        rate = 1e-3 if method == "reward" else 3e-4
        schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=rate))
        shapes, axes = self.model.abstract_params(), self.model.logical_axes()
        self.optimizer = _adam(shapes, axes, schedule)
        name, _, nll = method.partition("+")
        self.loss = PreferenceLoss(name, nll_weight=1.0 if nll else 0.0)
        loss_fn = self._reward if method == "reward" else self._preference
        self.step = make_train_step(loss_fn, self.optimizer, schedule)
        self.log_probs = jax.jit(functools.partial(answer_log_probs, self.language))
        self.scores = jax.jit(functools.partial(reward_scores, self.scorer))

    def _reward(self, params: Any, pairs: Any, key: Any) -> Any:
        del key
        scores = reward_scores(self.scorer, params, _answers(pairs))
        ranks = jnp.broadcast_to(jnp.arange(2), scores.shape)
        sums = reward_loss(scores, ranks, pairs["lengths"] > 0, centering=0.01)
        return sums.total, sums.weight, {}

    def _preference(self, params: Any, pairs: Any, key: Any) -> Any:
        del key
        log_probs = answer_log_probs(self.language, params, _answers(pairs))
        figures, weight = self._figures(log_probs, pairs)
        return figures["loss"], weight, {}

    def _figures(self, log_probs: Any, pairs: Any) -> Any:
        ranks = jnp.broadcast_to(jnp.arange(2), log_probs.shape)
        terms, weights = pair_terms(
            log_probs, pairs["reference"], pairs["lengths"], ranks, self.loss
        )
        return pair_figures(terms, weights, None)

    def run(self, tuned: Any, seed: int) -> dict[str, float]:
        """Returns the figures of held-out pairs, by name; of a loss the optimality too."""
        pairs, held_out = (
            pairs_of(self.world, tuned, seed, count, turn)
            for turn, count in ((1, self.steps * self.batch), (2, 4096))
        )
        params = jax.tree.map(jnp.copy, tuned)
        if self.method == "reward":
            head = self.scorer.init_head(jax.random.key(seed))
            params = self.scorer.on_language_model(params, head)
        else:
            for some in (pairs, held_out):
                some["reference"] = np.asarray(self.log_probs(tuned, _answers(some)))
        state = train_state(params, self.optimizer)
        rng = np.random.default_rng(seed)
        for _ in range(self.steps):
            rows = rng.integers(0, len(pairs["gaps"]), self.batch)
            state, _ = self.step(state, {name: jnp.asarray(x[rows]) for name, x in pairs.items()})
        if self.method == "reward":
            return self._judged(self.scores(state.params, _answers(held_out)), held_out["gaps"])
        sums, weight = self._figures(self.log_probs(state.params, _answers(held_out)), held_out)
        found = {name: float(sums[name] / weight) for name in ("accuracy", "chosen_fall")}
        sampled, greedy = evaluate(self.world, self.language, state.params, seed)
        return {"optimality": sampled, "greedy": greedy, **found}

    def _judged(self, scores: Any, gaps: np.ndarray) -> dict[str, float]:
        """Accuracy of a reward model, overall and by fifths of the gap of the true scores."""
        right = np.asarray(scores[:, 0] > scores[:, 1])
        found = {"accuracy": float(right.mean())}
        for number in range(5):
            inside = (gaps > number / 5) & (gaps <= (number + 1) / 5)
            found[f"accuracy {number + 1}"] = float(right[inside].mean())
        return found


def aligned(world: Walks, method: str, tuned: Any, found: dict[str, list[float]]) -> None:
    """Improves every seed's model by rollouts; adds optimality to `found`."""
    trainer = Trainer(world, method, samples=4 if method in GROUPED else 1)
    for seed, params in tuned.items():
        start = time.perf_counter()
        results = trainer.run(params, seed, (640, 1280, 2560))
        for rollouts, (sampled, greedy) in results.items():
            found.setdefault(f"{method} {rollouts}", []).append(sampled)
            found.setdefault(f"{method} {rollouts} greedy", []).append(greedy)
        shown = ", ".join(f"{n}: {a:.3f} ({b:.3f})" for n, (a, b) in results.items())
        print(f"seed {seed} {method}: {shown}, {time.perf_counter() - start:.0f} s", flush=True)


def preferred(world: Walks, method: str, tuned: Any, found: dict[str, list[float]]) -> None:
    """Learns from preferences on every seed's samples; adds figures to `found`."""
    trainer = Preferences(world, method)
    for seed, params in tuned.items():
        start = time.perf_counter()
        figures = trainer.run(params, seed)
        for name, value in figures.items():
            found.setdefault(f"{method} {name}", []).append(value)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"seed {seed} {method}: {shown}, {time.perf_counter() - start:.0f} s", flush=True)


def checks_of(found: dict[str, list[float]]) -> list[Check]:
    """The bars, on means over seeds."""
    means = {name: float(np.mean(values)) for name, values in found.items()}
    if "reward accuracy" in means:
        by_gap = [means[f"reward accuracy {number}"] for number in range(1, 6)]
        means["reward accuracy, least rise by gap"] = float(np.diff(by_gap).min())
    bars = {
        "best of 8": 0.86, "ppo 1280": 0.90, "ppo 1280 greedy": 0.97, "ppo 2560": 0.94,
        "rloo 1280": 0.92, "reward accuracy": 0.97, "reward accuracy, least rise by gap": 0.0,
        "dpo+nll optimality": 0.80,
        # The known weakness of plain DPO must show, or the alarm has nothing to look at.
        "dpo chosen_fall": 10.0,
    }  # fmt: skip
    checks = [Check(name, means[name], bar) for name, bar in bars.items() if name in means]
    if "dpo+nll chosen_fall" in means:
        fall = means["dpo+nll chosen_fall"]
        checks.append(Check("dpo+nll chosen_fall", fall, 0.0, at_most=True, unit=" nats"))
    return checks


def main() -> int:
    """Runs all methods on all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="?", const="goal", choices=("goal", "floor"), default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="ppo,rloo,reward,dpo,dpo+nll", help="commas")
    arguments = parser.parse_args()
    world = random_walks()
    data = np.mean([world.optimality(walk) for walk in world.walks])
    model = build(MODEL)
    print(
        f"graph: {NODES} nodes, mean shortest path {world.shortest[1:].mean():.2f} nodes, walks "
        f"optimal to {data:.3f}; model: {model.num_params:,} parameters"
    )
    tuned = {}
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        tuned[seed] = tune(world, seed)
        sampled, greedy = evaluate(world, model, tuned[seed], seed)
        many, _ = answers_of(world, tuned[seed], seed, 64)
        best = many.reshape(len(many), 8, 8).max(-1).mean()
        found.setdefault("best of 8", []).append(float(best))
        print(
            f"seed {seed} tuned: {sampled:.3f} ({greedy:.3f}), best of 8 {best:.3f}, "
            f"{time.perf_counter() - start:.0f} s"
        )
    for method in arguments.methods.split(","):
        pairwise = method == "reward" or method.partition("+")[0] in LOSSES
        (preferred if pairwise else aligned)(world, method, tuned, found)
    return finish(checks_of(found), arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
