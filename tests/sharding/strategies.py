"""Every strategy on 8 fake devices with a tiny model, compiled once for all tests of it."""

import dataclasses
import functools
import pathlib
import sys

import jax
import numpy as np

from chatyuan import sharding
from chatyuan.models import ModelConfig, build
from chatyuan.models.loss import supervised_loss
from chatyuan.train import step as step_module
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.state import init_state
from chatyuan.train.step import make_train_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "models"))
import model_kinds  # noqa: E402

ROWS, LENGTH = 16, 32
# The programs run once: time spent on making them fast is lost.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ARCHITECTURES = ("encoder_decoder", "prefix_lm")
TINY = ModelConfig(
    vocab_size=256, embed_dim=32, mlp_dim=64, num_heads=4, head_dim=8, num_encoder_layers=2,
    num_decoder_layers=2, relative_attention_num_buckets=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A mesh, what is split, and by which factors (parameters, gradients, optimizer state) fall."""

    mesh: dict[str, int]
    falls: tuple[float, float, float] | None
    config: sharding.ShardingConfig = sharding.ShardingConfig()
    microbatches: int = 1
    model: dict = dataclasses.field(default_factory=dict)


Zero = sharding.ShardingConfig
SCANNED = {"scan_layers": True}
STRATEGIES = {
    "one device": Strategy({"data": 1}, (1, 1, 1)),
    "data_parallel": Strategy({"data": 8}, (1, 1, 1)),
    "zero1": Strategy({"data": 8}, (1, 1, 8), Zero(1)),
    "zero2": Strategy({"data": 8}, (1, 8, 8), Zero(2), microbatches=2),
    "zero3": Strategy({"fsdp": 8}, (8, 8, 8), model=SCANNED),
    "hybrid": Strategy({"dcn_data": 2, "fsdp": 4}, (4, 4, 4), model=SCANNED),
    "hybrid_zero2": Strategy({"data": 2, "fsdp": 4}, (4, 8, 8), Zero(2), model=SCANNED),
    "tensor": Strategy({"data": 2, "tensor": 4}, (4, 4, 4)),
    "sequence": Strategy({"data": 2, "tensor": 4}, (4, 4, 4), model={"sequence_parallel": True}),
    "context": Strategy({"data": 2, "sequence": 4}, (1, 1, 1)),
    "pipeline": Strategy({"data": 4, "stage": 2}, None, microbatches=2),
    "pipeline_context": Strategy({"data": 2, "sequence": 2, "stage": 2}, None),
    "pipeline_circular": Strategy(
        {"data": 2, "tensor": 2, "stage": 2}, None,
        model={"pipeline_repeats": 2, "num_encoder_layers": 4, "num_decoder_layers": 4},
    ),
    "adaptive": Strategy({"fsdp": 8}, None, Zero(memory_budget=300e3 / 2**30)),
    "everything": Strategy(
        {"data": 2, "fsdp": 2, "tensor": 2}, (4, 8, 8), Zero(2), 2,
        {"sequence_parallel": True, "remat": "offload", "scan_layers": True},
    ),
}  # fmt: skip


@dataclasses.dataclass
class Result:
    """One step of a strategy."""

    strategy: Strategy
    model: object
    mesh: jax.sharding.Mesh
    placement: sharding.Placement
    loss: float
    gradients: dict
    state: object
    hlo: str


def batch(architecture: str) -> dict[str, np.ndarray]:
    """Rows that are padded differently."""
    if architecture == "prefix_lm":
        return model_kinds.prefix_batch(rows=ROWS, length=LENGTH)
    return model_kinds.encoder_decoder_batch(rows=ROWS, inputs=LENGTH, targets=LENGTH)


@functools.cache
def weights(architecture: str, layers: int = 2) -> dict:
    """The same parameters for every strategy, on the host."""
    changes = {"num_encoder_layers": layers, "num_decoder_layers": layers}
    model = build(dataclasses.replace(TINY, architecture=architecture, **changes))
    return jax.device_get(model.init(jax.random.key(0)))


@functools.cache
def run(name: str, architecture: str, microbatches: int | None = None) -> Result:
    """Compiles and takes a step; `microbatches` instead of the strategy's for its reference."""
    strategy = STRATEGIES[name]
    microbatches = microbatches or strategy.microbatches
    model = build(dataclasses.replace(TINY, architecture=architecture, **strategy.model))
    count = 1 if name == "one device" else 8
    mesh = sharding.make_mesh(strategy.mesh, jax.devices()[:count])
    axes, params = model.logical_axes(), model.abstract_params()
    schedule = make_schedule(ScheduleConfig("constant", learning_rate=0.01))
    # A large epsilon: where a gradient is all rounding, its sign is not asked for.
    optimizer = make_optimizer(OptimizerConfig("adamw", eps=1e-2), schedule, params, axes)
    initialise = functools.partial(init_state, optimizer=optimizer, ema=True)
    placement = sharding.place(jax.eval_shape(initialise, params), axes, mesh, strategy.config)
    host = weights(architecture, model.config.num_decoder_layers)
    start = jax.device_put(host, placement.state.params)
    state = jax.jit(initialise, out_shardings=placement.state, compiler_options=QUICK)(start)
    rows = sharding.shard_batch(batch(architecture), mesh)
    loss_fn = supervised_loss(model, mesh=mesh)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(params, rows):
        parts = step_module._split(rows, microbatches, mesh)
        key = jax.random.fold_in(jax.random.key(0), 0)
        total, weight, _, grads = step_module._sum_gradients(
            loss_fn, params, parts, key, None, placement.gradients
        )
        return total / weight, jax.tree.map(lambda g: g / weight, grads)

    loss, grads = gradients(state.params, rows)
    step = make_train_step(
        loss_fn, optimizer, schedule, microbatches=microbatches, ema_decay=0.9, placement=placement
    )
    compiled = step.lower(state, rows).compile(compiler_options=QUICK)
    state, _ = compiled(state, rows, None)
    return Result(strategy, model, mesh, placement, float(loss), grads, state, compiled.as_text())
