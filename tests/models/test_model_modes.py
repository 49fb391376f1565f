"""One function in other modes: bfloat16 compute, and both ways of flax nnx to see a module."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import KINDS, loss_and_gradients


@pytest.mark.parametrize("kind", ["unilm_bias", "llama"])
def test_bfloat16_runs_close_to_float32(kind):
    loss, gradients = loss_and_gradients(dataclasses.replace(KINDS[kind], dtype="bfloat16"))
    expected, expected_gradients = loss_and_gradients(KINDS[kind])
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    for got, want in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert got.dtype == jnp.float32, "master weights get float32 gradients"
        assert float(jnp.abs(got - want).max()) <= 0.15 * float(jnp.abs(want).max()) + 1e-3


def digest():
    """Loss and gradients of an encoder-decoder with scanned layers as one array of bits."""
    leaves = jax.tree.leaves(loss_and_gradients(KINDS["rope_gqa_encoder_decoder"]))
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves])


def test_graph_mode_and_tree_mode_are_bitwise_equal(tmp_path):
    """flax nnx has two ways to see a module; nothing here may depend on which one is on."""
    path = tmp_path / "tree.npy"
    here = pathlib.Path(__file__).resolve()
    code = f"""
import sys; sys.path.insert(0, {str(here.parent)!r})
import flax, numpy, test_model_modes as tests
assert not flax.config.nnx_graph_mode and not flax.config.nnx_graph_updates
numpy.save({str(path)!r}, tests.digest())
"""
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    environment["PYTHONPATH"] = str(here.parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    np.testing.assert_array_equal(np.load(path).view(np.int32), digest().view(np.int32))
