"""Predicted memory against XLA's own analysis, and large models on meshes that do not exist."""

import dataclasses
import functools
import types

import pytest

from chatyuan import configs, main, sharding
from chatyuan.data.loader import DataConfig
from chatyuan.errors import UserError
from chatyuan.models import build
from chatyuan.models.config import ModelConfig
from chatyuan.models.loss import supervised_loss
from chatyuan.planning import memory
from chatyuan.planning.activations import abstract_batch
from chatyuan.planning.memory import abstract_state, predict
from chatyuan.stages import _supervised
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.step import make_train_step

SIZES = dict(
    embed_dim=64, mlp_dim=128, num_heads=2, head_dim=32, num_encoder_layers=3,
    num_decoder_layers=3, vocab_size=1024, scan_layers=True,
)  # fmt: skip
CASES = {
    "encoder_decoder": (ModelConfig(**SIZES), (128, 32)),
    "prefix_lm_full": (
        ModelConfig(
            **SIZES, architecture="prefix_lm", causal_only=True, position="rope", remat="full"
        ),
        (128, 0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_xla_allocates(name):
    """CPU backend. State: the arguments of the step. Activations: its temporaries - gradients."""
    config, lengths = CASES[name]
    rows, model = 16, build(config)
    optimizer_config = OptimizerConfig(name="adamw")
    state = abstract_state(model, optimizer_config)
    mesh = sharding.abstract_mesh({"data": 1}, 1)
    found, _ = predict(
        model, state, mesh, batch_size=rows, lengths=lengths, platform="cpu",
    )  # fmt: skip
    schedule = make_schedule(ScheduleConfig(name="constant"))
    optimizer = make_optimizer(
        optimizer_config, schedule, model.abstract_params(), model.logical_axes()
    )
    step = make_train_step(supervised_loss(model), optimizer, schedule)
    batch = abstract_batch(config, rows, lengths)
    measured = step.lower(state, batch).compile().memory_analysis()
    of_batch = sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values())
    held = measured.argument_size_in_bytes - of_batch
    assert found.weights + found.optimizer == pytest.approx(held, rel=0.01)
    temporaries = measured.temp_size_in_bytes - found.gradients
    assert found.activations.total == pytest.approx(temporaries, rel=0.25)


@pytest.mark.parametrize(
    ("leaf", "parameters"),
    [("t5_1_1/xxl", 11_135_332_352), ("llama/baichuan2_13b", 13_896_668_160)],
)
def test_large_models_shard_over_256_devices_that_do_not_exist(leaf, parameters):
    config = configs.load("plan", [f"gin/models/{leaf}.gin"], {"TARGET_LENGTH": 114})
    model = build(config.model)
    assert model.num_params == parameters
    state = abstract_state(model, OptimizerConfig(name="adamw"))
    mesh = sharding.abstract_mesh({"fsdp": 256}, 256)
    found, _ = predict(
        model, state, mesh, batch_size=256, lengths=(512, 114), platform="tpu"
    )  # fmt: skip
    assert found.weights == pytest.approx(4 * parameters / 256, rel=0.02)
    assert found.optimizer == pytest.approx(2 * found.weights, rel=0.02)
    assert sum(found.kinds().values()) == pytest.approx(found.total)


def test_rematerialisation_and_tensor_parallelism_keep_less():
    config, lengths = CASES["encoder_decoder"]

    def kept(mesh: dict[str, int], **changes) -> float:
        model = build(dataclasses.replace(config, **changes))
        state = abstract_state(model, OptimizerConfig())
        abstract = sharding.abstract_mesh(mesh, 2)
        return predict(
            model, state, abstract, batch_size=8, lengths=lengths, platform="cpu"
        )[0].activations.kept  # fmt: skip

    whole = kept({"data": 2})
    assert kept({"data": 2}, remat="full") < kept({"data": 2}, remat="dots") < whole
    assert whole < kept({"tensor": 2}) < 2 * whole  # twice the rows, half of the heads


def test_plan_compares_meshes_and_recommends(capsys):
    argv = ["plan", "--gin_file=gin/recipes/pretrain_t5_1_1_small.gin"]
    argv += ["--gin.plan.Config.device=v5e", "--gin.BATCH_SIZE=64"]
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("yes") >= 3
    for words in ("parameters", "Chinchilla", "Recommended", "Assumed: MFU 40%", "$"):
        assert words in out
    assert main.main([*argv, "--gin.plan.Config.device=v5"]) == 2
    assert "v5e" in capsys.readouterr().err


def test_too_little_memory_is_told_before_compiling(monkeypatch, capsys):
    model = build(CASES["encoder_decoder"][0])
    optimizer = OptimizerConfig(name="adamw")
    state = abstract_state(model, optimizer)
    mesh = sharding.abstract_mesh({"data": 1}, 1)
    places = sharding.place(state, model.logical_axes(), mesh)
    parts = types.SimpleNamespace(
        model=model,
        mesh=mesh,
        config=types.SimpleNamespace(microbatches=1, sharding=None, optimizer=optimizer),
        loader=types.SimpleNamespace(config=DataConfig(batch_size=16, target_length=64)),
    )
    parts.predicted = functools.partial(_supervised._predicted, parts)
    held = sharding.bytes_per_device(state, places.state)
    held += sharding.bytes_per_device(state.params, places.gradients)

    monkeypatch.setattr(memory, "device_limit", lambda: held - 1)
    with pytest.raises(UserError, match="weights, gradients and optimizer state alone"):
        _supervised._check_memory(parts, state, places)
    monkeypatch.setattr(memory, "device_limit", lambda: held + 1)
    _supervised._check_memory(parts, state, places)
    told = capsys.readouterr().err
    assert "GiB too much" in told
    assert told.index("MICROBATCHES") < told.index("remat_dots") < told.index("zero1")
    monkeypatch.setattr(memory, "device_limit", lambda: 2**40)
    _supervised._check_memory(parts, state, places)
    assert capsys.readouterr().err == ""


def test_this_hosts_devices_share_its_memory():
    assert 2**27 < memory.device_limit() < 2**45
