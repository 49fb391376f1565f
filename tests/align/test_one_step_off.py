"""Drawing ahead: the same run without a lag, an older policy's answers and weights with one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_models import prompts
from test_update import SMALL, B, World, assert_equal_trees

from chatyuan import sharding
from chatyuan.align.config import AlignConfig
from chatyuan.align.iteration import NEXT, Iteration, Roles
from chatyuan.align.rewards import OpenSource, RewardSource
from chatyuan.align.roles import nothing_ahead
from chatyuan.align.rollout import RolloutConfig
from chatyuan.errors import UserError

DRAWING = RolloutConfig(samples=2, max_length=7, temperature=0.8)


def likes_small(answer_tokens):
    return [sum(token < 12 for token in tokens) / len(tokens) for tokens in answer_tokens]


SOURCES = {"small": OpenSource(RewardSource(function="test:likes_small"), likes_small)}


def features(step, mesh):
    tokens, lengths = prompts(B, seed=step)
    ids = np.arange(step * B, (step + 1) * B, dtype=np.uint32)
    batch = {"prompts": tokens, "prompt_lengths": lengths, "prompt_ids": ids}
    return batch if mesh is None else sharding.shard_batch(batch, mesh)


class Run:
    """An `Iteration`, and everything that it learned from."""

    def __init__(self, lag=0, mesh=None, drawing_mesh=None):
        self.world = World(AlignConfig(lag=lag, **SMALL), mesh=mesh)
        self.lag, self.mesh, self.seen = lag, mesh, []
        self.iteration = Iteration(
            self.world.learner, DRAWING, Roles(self.world.reference, SOURCES), seed=3,
            drawing_mesh=drawing_mesh, record=lambda *what: self.seen.append(what),
        )  # fmt: skip

    def fresh(self):
        state = self.world.fresh()
        if self.lag:
            width = features(0, None)["prompts"].shape[1]
            state = dataclasses.replace(state, ahead=nothing_ahead(B, width, DRAWING))
        return state

    def __call__(self, count, state=None):
        state = self.fresh() if state is None else state
        first = int(state.step)
        for step in range(first, first + count):
            batch = features(step, self.mesh)
            if self.lag:
                batch |= {f"{NEXT}{n}": x for n, x in features(step + 1, self.mesh).items()}
            state, metrics = self.iteration(state, batch)
        return state, {name: float(a) / max(float(b), 1e-9) for name, (a, b) in metrics.items()}


def one_device(number):
    return sharding.make_mesh({"data": 1}, jax.devices()[number : number + 1])


@functools.cache
def late():
    """Three iterations, one step off."""
    run = Run(lag=1)
    return run, *run(3)


def test_devices_that_only_draw_change_nothing():
    plain, apart = Run(), Run(mesh=one_device(0), drawing_mesh=one_device(1))
    (want, figures), (got, theirs) = plain(3), apart(3)
    assert_equal_trees(jax.device_get(got), jax.device_get(want))
    for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm"):
        assert figures[name] == theirs[name], name
    placed = {d for leaf in jax.tree.leaves(got) for d in leaf.devices()}
    assert placed == {jax.devices()[0]}


def test_answers_are_an_iteration_old_and_weighted():
    run, _, figures = late()
    assert [(step, version) for step, version, _ in run.seen] == [(0, 0), (1, 0), (2, 1)]
    assert figures["lag"] == 1 and figures["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert 0.5 < figures["importance"] < 1.5 and 0 <= figures["importance_capped"] < 0.5
    assert abs(figures["importance"] - 1) > 1e-4
    for step, _, scored in run.seen:
        answers = scored.answers.answers
        np.testing.assert_array_equal(answers.prompts, features(step, None)["prompts"])
        experience = scored.experience
        older = np.abs(np.asarray(experience.log_probs - experience.rollouts.log_probs))
        assert (older[np.asarray(answers.mask)].max() > 1e-3) == (step > 0)


def test_the_first_iteration_is_that_of_a_run_without_a_lag():
    ours, theirs = Run(lag=1), Run()
    state, figures = ours(1)
    want, expected = theirs(1)
    # The weights are 1 but for the rounding between drawing and scoring.
    assert_equal_trees(state.params, want.params, atol=2e-5, rtol=1e-4)
    assert figures["importance"] == pytest.approx(1, abs=1e-5) and figures["lag"] == 0
    for name in ("score", "kl", "value_loss"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    # What it drew ahead is what the policy it began with answers.
    drawn = theirs.iteration.rollouts(theirs.fresh(), features(1, None))
    assert_equal_trees(state.ahead.rollouts, drawn)
    assert int(state.ahead.version) == 0


def test_a_stopped_run_goes_on_bitwise():
    run, whole, figures = late()
    half, _ = run(2)
    stored = jax.tree.map(np.asarray, half)  # what a checkpoint keeps
    again, resumed = run(1, jax.tree.map(jnp.asarray, stored))
    assert_equal_trees(again, whole)
    untimed = {n for n in figures if not n.endswith("per_second")}
    assert {n: resumed[n] for n in untimed} == {n: figures[n] for n in untimed}


def test_two_meshes_do_what_one_device_does():
    devices = jax.devices()
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, devices[:4])
    drawing = sharding.make_mesh({"data": 4}, devices[4:8])
    split = Run(lag=1, mesh=mesh, drawing_mesh=drawing)
    state, figures = split(1)
    _, want, expected = (single := Run(lag=1)), *single(1)
    assert_equal_trees(jax.device_get(state.params), want.params, atol=2e-4)
    drawn, alone = (x.ahead.rollouts for x in (state, want))
    np.testing.assert_array_equal(drawn.answers.tokens, alone.answers.tokens)
    np.testing.assert_allclose(drawn.log_probs, alone.log_probs, atol=1e-5)
    for name in ("score", "kl", "length", "value_loss"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    split(1, state)  # and goes on from what was drawn there


def test_settings_that_make_no_sense_are_told():
    for settings, words in (
        ({"lag": 2}, "should be 0 or 1"),
        ({"lag": 1, "method": "remax"}, "greedy one of the same policy"),
        ({"importance_cap": 0.0}, "importance_cap = 0.0 should be above 0"),
    ):
        with pytest.raises(UserError, match=words):
            AlignConfig(**settings)
