"""Scanned or unrolled, rematerialised or not: the same loss and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import PREFIX, TINY, batch_for, loss_and_gradients

from chatyuan.errors import UserError
from chatyuan.models import build
from chatyuan.models.loss import supervised_loss

DROPPING = dataclasses.replace(PREFIX, dropout_rate=0.3)
KEY = 3


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients(DROPPING, KEY)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "none"), (True, "full"), (True, "dots"), (True, "selective"), (True, "offload"),
        (False, "full"), (False, "offload"),
    ],
)  # fmt: skip
def test_scanned_and_rematerialised_are_equal(plain, scan, remat):
    """The dropout is the same too: keys come from the layer's index, however it is run."""
    config = dataclasses.replace(DROPPING, scan_layers=scan, remat=remat)
    assert_close(loss_and_gradients(config, KEY), plain, 1e-5)


def test_dropout_needs_a_key(plain):
    without = loss_and_gradients(DROPPING)[0]
    assert abs(float(without - plain[0])) > 1e-3
    np.testing.assert_array_equal(without, loss_and_gradients(PREFIX)[0])


def test_both_stacks_of_an_encoder_decoder_scan():
    scanned = dataclasses.replace(TINY, scan_layers=True)
    assert_close(loss_and_gradients(scanned), loss_and_gradients(TINY), 1e-5)


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


@pytest.mark.parametrize("scan", [False, True])
def test_offloaded_activations_wait_on_the_host(scan):
    """One input for each block, and nothing else of its size."""
    config = dataclasses.replace(PREFIX, remat="offload", scan_layers=scan)
    loss_fn = supervised_loss(build(config))
    batch = jax.tree.map(jnp.asarray, batch_for(config, rows=2, length=12))
    gradient = jax.grad(lambda params: loss_fn(params, batch, None)[0])
    jaxpr = str(jax.make_jaxpr(gradient)(build(config).abstract_params()))
    one = "f32<host>[2,12,16]"
    assert ("f32<host>[2,2,12,16]" if scan else one) in jaxpr
    assert "<host>" not in str(
        jax.make_jaxpr(jax.grad(lambda p: supervised_loss(build(PREFIX))(p, batch, None)[0]))(
            build(PREFIX).abstract_params()
        )
    )


def test_offload_needs_a_place_to_offload_to(monkeypatch):
    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    config = dataclasses.replace(PREFIX, remat="offload")
    with pytest.raises(UserError, match="pinned_host memory; abacus has none. Use 'full'"):
        jax.eval_shape(
            lambda params: supervised_loss(build(config))(params, batch_for(config), None),
            build(config).abstract_params(),
        )
