"""One function, several ways to run it: scanned, rematerialised, bfloat16, both modes of nnx."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import KINDS, TINY, batch_for, random_params

from chatyuan.models import build
from chatyuan.models.loss import supervised_loss

DROPPING = dataclasses.replace(TINY, dropout_rate=0.3)
REMATS = ["full", "dots", "selective"]


def loss_and_gradients(config, key=None):
    loss_fn = supervised_loss(build(config))

    def mean(params, batch):
        total, weight, _ = loss_fn(params, batch, key)
        return total / weight

    batch = jax.tree.map(jnp.asarray, batch_for(config))
    return jax.jit(jax.value_and_grad(mean))(random_params(config), batch)


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients(DROPPING, jax.random.key(3))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", *REMATS])
def test_scanned_and_rematerialised_are_equal(plain, scan, remat):
    """The dropout is the same too: keys come from the layer's index, however it is run."""
    if not scan and remat == "none":
        without = loss_and_gradients(dataclasses.replace(DROPPING, dropout_rate=0.0))
        assert abs(float(without[0] - plain[0])) > 1e-3, "dropout does something"
        return
    config = dataclasses.replace(DROPPING, scan_layers=scan, remat=remat)
    assert_close(loss_and_gradients(config, jax.random.key(3)), plain, 1e-5)


def test_rematerialisation_saves_less():
    """Residuals kept between the passes: none > selective > dots > full."""

    def saved(remat):
        config = dataclasses.replace(TINY, remat=remat)
        loss_fn = supervised_loss(build(config))
        batch = jax.tree.map(jnp.asarray, batch_for(config, inputs=32, targets=32))

        def residuals(params):
            return jax.vjp(lambda p: loss_fn(p, batch, None)[0], params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, build(config).abstract_params()))
        return sum(int(np.prod(leaf.shape)) for leaf in leaves)

    sizes = [saved(remat) for remat in ("none", "selective", "dots", "full")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4, sizes


@pytest.mark.parametrize("kind", ["t5_1_1", "llama"])
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
    """Loss and gradients of two kinds as one array of bits."""
    parts = []
    for kind in ("t5_1_1", "rope_gqa_encoder_decoder"):
        for leaf in jax.tree.leaves(loss_and_gradients(KINDS[kind])):
            parts.append(np.asarray(leaf, np.float32).ravel())
    return np.concatenate(parts)


def test_graph_mode_and_tree_mode_are_bitwise_equal(tmp_path):
    """flax nnx has two ways to see a module; nothing here may depend on which one is on."""
    path = tmp_path / "tree.npy"
    here = pathlib.Path(__file__).resolve()
    code = f"""
import sys; sys.path.insert(0, {str(here.parent)!r})
import flax, numpy, test_model_equivalence as tests
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
