"""PPO and its relatives: identities that hold whatever is learned, and bitwise continuation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_models import EOS, model_and_params, prompts

from chatyuan import sharding
from chatyuan.align.answers import reward_scores
from chatyuan.align.config import GROUPED, METHODS, AlignConfig
from chatyuan.align.experience import critic_values, make_score
from chatyuan.align.roles import Critic, Split, init_state
from chatyuan.align.rollout import RolloutConfig, make_rollout
from chatyuan.align.targets import make_targets, reward_answers
from chatyuan.align.update import Learner, make_update, minibatch_gradients
from chatyuan.errors import UserError
from chatyuan.models import adapters, build
from chatyuan.models.reward import RewardModel
from chatyuan.ops.token_rewards import no_moments
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule

B, T = 8, 6
SMALL = {"epochs": 2, "minibatches": 2, "kl_coef": 0.1}


def samples_of(config):
    return 4 if config.method in GROUPED else 2


class World:
    """One configuration with its compiled programs."""

    def __init__(
        self, config, kind="encoder_decoder", mesh=None, separate=False, layers=None, rank=0
    ):
        self.config, self.mesh = config, mesh
        self.model, self.params = model_and_params(kind)
        if rank:
            self.model = build(dataclasses.replace(self.model.config, adapter_rank=rank))
            self.params = self.model.init(jax.random.key(0))
        self.split = Split.of(self.model, layers)
        self.reward_model = RewardModel(self.model.config)
        critic = Critic(self.reward_model, separate) if config.has_critic else None
        self.critic = critic
        schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=0.01))
        adam = OptimizerConfig(name="adamw", weight_decay=0.1, clip_norm=1.0)
        trained = jax.eval_shape(self.split.trained, self.model.abstract_params())
        axes = self.split.logical_axes(self.model.logical_axes())
        self.optimizer = make_optimizer(adam, schedule, trained, axes)
        self.critic_params = {} if critic is None else critic.init(jax.random.key(1), self.params)
        self.critic_optimizer = make_optimizer(
            adam,
            schedule,
            {} if critic is None else critic.abstract_params(),
            {} if critic is None else critic.logical_axes(),
        )
        drawing = RolloutConfig(samples=samples_of(config), max_length=T, temperature=0.8)
        self.rollout = make_rollout(self.model, drawing, eos_id=EOS, mesh=mesh)
        self.score = make_score(
            self.model,
            split=self.split,
            critic=critic,
            temperature=0.8,
            microbatches=config.microbatches,
            mesh=mesh,
        )
        self.learner = Learner(
            config, self.model, self.split, self.optimizer, critic, self.critic_optimizer,
            eos_id=EOS, temperature=0.8, mesh=mesh,
        )  # fmt: skip
        self.placement = None
        self.reference = jax.tree.map(jnp.copy, self.split.trained(self.params))
        state = self.fresh()
        if mesh is not None:
            axes = self.model.logical_axes()
            self.placement = sharding.state_shardings(state, axes, mesh)
        self.update = make_update(self.learner, self.placement)

    def fresh(self):
        state = init_state(
            *jax.tree.map(jnp.copy, (self.params, self.critic_params)),
            optimizer=self.optimizer,
            critic_optimizer=self.critic_optimizer,
            split=self.split,
            kl_coef=self.config.kl_coef,
        )
        return state if self.mesh is None else jax.device_put(state, self.placement)

    def experience(self, state):
        tokens, lengths = prompts(B)
        first = int(state.step) * B
        batch = {"t": tokens, "n": lengths, "i": np.arange(first, first + B, dtype=np.uint32)}
        if self.mesh is not None:
            batch = sharding.shard_batch(batch, self.mesh)
        rollouts = self.rollout(state.params, *batch.values())
        return self.score(state.params, self.reference, state.critic, (), rollouts)

    def iterate(self, state):
        experience = self.experience(state)
        scores = likes_fives(experience)
        greedy = None
        if self.config.method == "remax":
            answers = experience.rollouts.answers
            first = {name: getattr(answers, name)[:, :1] for name in ("tokens", "lengths")}
            greedy = (dataclasses.replace(answers, **first), jnp.full((B, 1), 0.3))
        return self.update(state, experience, scores, greedy)

    def run(self, count, state=None):
        state = self.fresh() if state is None else state
        for _ in range(count):
            state, metrics = self.iterate(state)
        return state, {name: float(a) / max(float(b), 1e-9) for name, (a, b) in metrics.items()}


def likes_fives(experience):
    """The share of an answer's tokens that are below 12."""
    answers = experience.rollouts.answers
    return jnp.sum((answers.tokens < 12) & answers.mask, -1) / answers.lengths


@functools.cache
def world(method="ppo", kind="encoder_decoder", separate=False, layers=None, rank=0, **more):
    config = AlignConfig(method=method, **SMALL, **dict(more))
    return World(config, kind, None, separate, layers, rank)


def assert_equal_trees(ours, theirs, **tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(a, b, err_msg=name, **tolerance)
        else:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@pytest.mark.parametrize("kind", ["encoder_decoder", "prefix_lm"])
def test_the_first_minibatch_has_ratio_one(kind):
    ours = world(kind=kind)
    state, metrics = ours.run(1)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["first_ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["first_approx_kl"] == pytest.approx(0, abs=1e-6)
    assert 1 <= metrics["sampler_gap"] <= 1.001
    assert metrics["approx_kl"] > 1e-4 and int(state.updates) == 4
    _, second = ours.run(1, state)
    assert second["kl"] != pytest.approx(0, abs=1e-3), "the policy has left its reference"
    assert second["first_ratio"] == pytest.approx(1, abs=1e-6)


def test_rewards_of_tokens_sum_to_score_minus_price():
    ours = world()
    state, _ = ours.run(1)
    experience = ours.experience(state)
    scores = likes_fives(experience)
    rewards = reward_answers(ours.config, experience, scores, no_moments(), jnp.float32(0.3), EOS)
    mask = np.asarray(experience.rollouts.answers.mask)
    kl = (np.asarray(experience.log_probs) - np.asarray(experience.reference_log_probs)) * mask
    want = np.asarray(scores) - 0.3 * kl.sum(-1)
    assert np.abs(kl.sum(-1)).max() > 0.01
    np.testing.assert_allclose(np.asarray(rewards.tokens).sum(-1), want, atol=1e-5)
    np.testing.assert_allclose(rewards.totals, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder_decoder", "prefix_lm"])
def test_a_critic_from_the_reward_model_equals_it_at_the_end(kind):
    ours = world(kind=kind)
    model = ours.reward_model
    params = model.on_language_model(ours.params, model.init_head(jax.random.key(5)))
    answers = ours.experience(ours.fresh()).rollouts.answers
    scores = np.asarray(jax.jit(lambda: reward_scores(model, params, answers))())
    assert scores.std() > 0.1
    # The value of the state after the end token is that of an answer with one more token.
    longer = dataclasses.replace(
        answers,
        tokens=jnp.pad(answers.tokens, ((0, 0), (0, 0), (0, 1)), constant_values=3),
        lengths=answers.lengths + 1,
    )
    critic = Critic(model, separate=True)
    values = jax.jit(lambda: critic_values(critic, params, longer, None, None))()
    last = np.take_along_axis(np.asarray(values), np.asarray(answers.lengths)[..., None], -1)
    np.testing.assert_allclose(last[..., 0], scores, atol=1e-5)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_microbatches_change_no_gradient(method):
    ours = world(method)
    state, _ = ours.run(1)
    experience = ours.experience(state)
    scores = likes_fives(experience)
    rewards = reward_answers(ours.config, experience, scores, no_moments(), jnp.float32(0.3), EOS)
    targets = make_targets(ours.config, experience, rewards)
    # As after some steps: the policy differs from the one that drew.
    moved = jax.tree.map(lambda x: x * 1.01, ours.split.trained(state.params))
    results = []
    for parts in (1, 2, 8):
        config = dataclasses.replace(ours.config, microbatches=parts)
        learner = dataclasses.replace(ours.learner, config=config)
        gradients = jax.jit(functools.partial(minibatch_gradients, learner))
        results.append(gradients(state.params, moved, state.critic, targets, jnp.float32(0.3)))
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(results[0][0])))
    assert norm > 1e-3
    for other in results[1:]:
        assert_equal_trees(other[:2], results[0][:2], atol=1e-6 * max(norm, 1), rtol=1e-5)
        for name, pair in results[0][2].items():
            got = [float(x) for x in other[2][name]]
            assert got == pytest.approx([float(x) for x in pair], rel=1e-4, abs=1e-5), name


def test_resumed_equals_uninterrupted_bitwise():
    ours = world(kl_target=2.0, scale_rewards="running")
    whole, figures = ours.run(4)
    half, _ = ours.run(2)
    stored = jax.tree.map(np.asarray, half)  # what a checkpoint keeps
    again, resumed = ours.run(2, jax.tree.map(jnp.asarray, stored))
    assert_equal_trees(again, whole)
    assert resumed == figures and int(whole.step) == 4
    assert float(whole.kl_coef) != SMALL["kl_coef"] and int(whole.reward_moments.count) == 4 * B * 2


def test_eight_devices_learn_what_one_does():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    config = dataclasses.replace(world().config, minibatches=1, microbatches=1)
    eight, figures = World(config, mesh=mesh).run(1)
    single, want = World(config).run(1)
    assert_equal_trees(jax.device_get(eight.params), single.params, atol=2e-4)
    for name in ("score", "kl", "length", "policy_loss", "value_loss", "grad_norm"):
        assert figures[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "method",
    [m if m in ("ppo", "rloo") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_every_method_raises_the_score(method):
    ours = world(method)
    _, first = ours.run(1)
    state, last = ours.run(8)
    assert last["score"] > first["score"] + 0.05, (first["score"], last["score"])
    assert last["nonfinite_steps"] == 0 and int(state.updates) == 8 * 4


def test_a_frozen_lower_part_stays_and_the_reference_is_small():
    ours = world(layers=1)
    state, metrics = ours.run(2)
    size = sum(x.size for x in jax.tree.leaves(ours.params))
    assert sum(x.size for x in jax.tree.leaves(ours.reference)) < size / 2
    assert metrics["first_ratio"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(
        state.params["token_embedder"]["embedding"], ours.params["token_embedder"]["embedding"]
    )
    for old, new in zip(
        jax.tree.leaves(ours.params["decoder"]["layers"]),
        jax.tree.leaves(state.params["decoder"]["layers"]),
        strict=True,
    ):
        np.testing.assert_array_equal(old[0], new[0])
        assert (np.asarray(old[1]) != np.asarray(new[1])).any()
    _, first = ours.run(1)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="reference_layers = 3"):
        Split.of(ours.model, 3)


@pytest.mark.slow
def test_adapters_alone_learn_and_the_reference_is_an_adapter():
    ours = world(rank=2)
    base = adapters.without_adapters(ours.params)
    start = ours.fresh()
    assert ours.reference.keys() == {"encoder", "decoder"}
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (ours.reference, base)]
    assert sizes[0] < sizes[1] / 2
    moments = [x for x in jax.tree.leaves(start.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sizes[0]
    state, first = ours.run(1)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert_equal_trees(adapters.without_adapters(state.params), base)
    state, last = ours.run(8, state)
    assert last["score"] > first["score"] + 0.05 and last["kl"] > 0.01
    assert_equal_trees(adapters.without_adapters(state.params), base)
    # A policy that begins with an adapter: its reference is that, not the model without.
    reference = jax.tree.map(jnp.copy, ours.split.trained(state.params))
    experience = ours.experience(state)
    again = ours.score(state.params, reference, state.critic, (), experience.rollouts)
    np.testing.assert_array_equal(again.log_probs, again.reference_log_probs)
    off = jax.tree.map(jnp.zeros_like, reference)
    without = ours.score(state.params, off, state.critic, (), experience.rollouts)
    assert np.abs(without.log_probs - without.reference_log_probs).max() > 0.01
    with pytest.raises(UserError, match="both say what is trained"):
        Split.of(ours.model, 1)


@pytest.mark.slow
def test_a_separate_critic_learns_while_the_policy_waits():
    ours = world(separate=True, critic_warmup=2)
    state, _ = ours.run(2)
    assert_equal_trees(state.params, ours.params)
    assert float(jnp.abs(state.critic["head"]["kernel"]).max()) > 0
    _, metrics = ours.run(6, state)
    assert metrics["explained_variance"] > 0


@pytest.mark.slow
def test_steps_stop_once_the_policy_has_moved():
    ours = world(stop_kl=1e-6)
    state, metrics = ours.run(1)
    assert int(state.updates) == 1 and metrics["optimizer_steps"] < 1


def test_a_gradient_that_is_not_finite_changes_nothing():
    ours = world()
    state = ours.fresh()
    experience = ours.experience(state)
    scores = likes_fives(experience).at[0, 0].set(jnp.nan)
    state, metrics = ours.update(state, experience, scores)
    assert_equal_trees(state.params, ours.params)
    assert int(state.nonfinite_streak) == 1 and int(state.updates) == 0
    assert float(metrics["nonfinite_steps"][0]) == 4


def test_settings_that_make_no_sense_are_told():
    for settings, words in (
        ({"method": "ppoo"}, "Did you mean ppo"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_coef = 0 stays 0"),
        ({"method": "rloo", "critic_warmup": 3}, "critic_warmup = 3"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"gamma": 1.1}, "gamma"),
    ):
        with pytest.raises(UserError, match=words):
            AlignConfig(**settings)
    with pytest.raises(UserError, match="at least 2"):
        AlignConfig(method="grpo").check_samples(1)
