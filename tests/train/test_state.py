"""The train state: what it holds, abstractly and concretely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_problem as problem

from chatyuan.train.state import TrainState, init_state


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw_rms", "muon"])
def test_abstract_state_equals_the_real_one(name):
    _, optimizer = problem.make_parts(name)
    real = init_state(problem.init_params(), optimizer, ema=True)
    abstract = jax.eval_shape(lambda: init_state(problem.init_params(), optimizer, ema=True))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)


def test_first_state():
    _, optimizer = problem.make_parts()
    params = problem.init_params()
    state = init_state(params, optimizer)
    assert isinstance(state, TrainState)
    assert (int(state.step), int(state.nonfinite_streak), state.ema) == (0, 0, None)
    assert state.step.dtype == jnp.int32
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


def test_average_has_buffers_of_its_own():
    """Donating one buffer twice is an error."""
    _, optimizer = problem.make_parts()
    state = init_state(problem.init_params(), optimizer, ema=True)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(pointers)) == len(pointers)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_paths_name_the_fields():
    """Checkpoints and shardings find the parameters of the optimizer by their path."""
    _, optimizer = problem.make_parts("adafactor")
    state = jax.eval_shape(lambda: init_state(problem.init_params(), optimizer))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert {"step", "params/wi", "opt_state/count", "opt_state/moments/wi/full"} <= set(paths)
