"""A T5 1.1 learns the same with every implementation of attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import KINDS, encoder_decoder_batch

from chatyuan.kernels import BlockSizes, attention_on
from chatyuan.models import attention, build
from chatyuan.models.loss import supervised_loss
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.state import init_state
from chatyuan.train.step import make_train_step

STEPS, INPUTS, TARGETS = 50, 40, 24
# Several blocks each way. Kernels run as ordinary operations: there is no accelerator.
OPTIONS = {
    "xla": {"block_sizes": BlockSizes(16, 16)},
    "pallas_gpu": {"block_sizes": BlockSizes(16, 16), "interpret": True},
    "pallas_tpu": {"block_sizes": BlockSizes(16, 16), "interpret": True},
}


def losses(implementation, monkeypatch):
    """Mean loss of each of 50 steps on four batches in turn."""

    def with_options(mesh):
        return functools.partial(attention_on(mesh), **OPTIONS.get(implementation, {}))

    monkeypatch.setattr(attention, "attention_on", with_options)
    config = dataclasses.replace(KINDS["t5_1_1"], attention_implementation=implementation)
    model = build(config)
    schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=3e-3))
    optimizer = make_optimizer(
        OptimizerConfig(name="adafactor"), schedule, model.abstract_params(), model.logical_axes()
    )
    step = make_train_step(supervised_loss(model), optimizer, schedule)
    state = init_state(model.init(jax.random.key(0)), optimizer)
    batches = [
        jax.tree.map(jnp.asarray, encoder_decoder_batch(seed, 4, INPUTS, TARGETS))
        for seed in range(4)
    ]
    found = []
    for index in range(STEPS):
        state, metrics = step(state, batches[index % len(batches)])
        total, weight = metrics["loss"]
        found.append(float(total) / float(weight))
    return found


@functools.cache
def of_the_reference():
    with pytest.MonkeyPatch.context() as patch:
        return losses("reference", patch)


@pytest.mark.parametrize("implementation", ["dense", *OPTIONS])
def test_fifty_steps_have_the_losses_of_the_reference(implementation, monkeypatch):
    expected = of_the_reference()
    assert expected[-1] < expected[0] - 0.2, "it learns"
    np.testing.assert_allclose(losses(implementation, monkeypatch), expected, rtol=1e-5)
