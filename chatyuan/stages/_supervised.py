"""What the supervised stages share: build everything from the configuration, then `train.loop.fit`.

pretrain and sft are this with other defaults; reward and dpo bring their own `Parts` (data, model,
loss, evaluation). The order matters: every mistake is found before the first file is written.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from chatyuan import checkpoints, configs, distributed, report, sharding
from chatyuan.checkpoint_files import committed_steps
from chatyuan.checkpoints import CheckpointConfig, Checkpointer
from chatyuan.data.cache import list_splits, read_mixture
from chatyuan.data.loader import DataConfig, EvalLoader, Loader, open_sources
from chatyuan.data.objectives import Objective, ObjectiveConfig
from chatyuan.decode.config import DecodeConfig
from chatyuan.errors import UserError, did_you_mean
from chatyuan.metrics import Writer, quantity
from chatyuan.models import build
from chatyuan.models.attention import training_implementation
from chatyuan.models.config import ModelConfig, flops_per_example
from chatyuan.models.loss import LossConfig, LossFn, eval_loss, supervised_loss
from chatyuan.models.pipeline import bubble_fraction, check_pipeline, microbatches_of, stages_of
from chatyuan.ops.platform import target_platform
from chatyuan.planning import memory
from chatyuan.sharding import ShardingConfig
from chatyuan.stages import _precompile, _run_folder, _samples
from chatyuan.text.vocabulary import Vocabulary
from chatyuan.train.loop import LoopConfig, fit
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.state import TrainState
from chatyuan.train.step import TrainStep, init_state, make_train_step

Batch = Mapping[str, Any]
# What may differ when a run goes on in its folder: how long, how often and where, never what is
# learned from what in which order.
MAY_CHANGE = (
    "vocabulary", "init_from", "init_from_ema", "mesh", "sharding", "checkpoint", "loop",
    "model.scan_layers", "model.remat", "model.sequence_parallel", "model.attention_implementation",
    "model.pipeline_microbatches", "model.pipeline_repeats",
    "schedule.train_steps", "data.cache_dir", "data.threads", "data.prefetch", "eval_split",
    "eval_batches", "sample_decoding", "num_samples", "tensorboard", "precompile", "alarm_nats",
    "reference_dir",
)  # fmt: skip


def _field(help_text: str, unit: str = "", **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text, "unit": unit}, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run of `fit` is told, whatever one of its steps is."""

    model_dir: str = _field("folder of the run; starting again in it continues the run")
    vocabulary: str = _field("SentencePiece .model file that the caches were made with")
    model: ModelConfig = _field("architecture")
    optimizer: OptimizerConfig = _field("optimizer")
    schedule: ScheduleConfig = _field("learning rate")
    loop: LoopConfig = _field("how long, how often to report")
    checkpoint: CheckpointConfig = _field("what is saved", default=CheckpointConfig())
    mesh: dict[str, int] = _field(
        "devices per axis (data, fsdp, tensor, sequence, stage; dcn_data, ... across slices); "
        "-1 = the rest",
        default_factory=lambda: {"data": -1},
    )
    sharding: ShardingConfig = _field("what copies share", default=ShardingConfig())
    seed: int = _field("of the weights and of everything drawn", default=0)
    init_from: str | None = _field("run or checkpoint whose weights to start from", default=None)
    init_from_ema: bool = _field("start from its moving average", default=False)
    eval_split: str | None = _field("split that is evaluated; None = nothing", default="validation")
    eval_batches: int | None = _field(
        "batches of each evaluation, evenly spread; None = all", "batches", default=None
    )
    tensorboard: bool = _field("write MODEL_DIR/tensorboard too", default=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """What every run is told whose step is one batch, one gradient."""

    microbatches: int = _field(
        "parts that a batch is processed in, to save memory", "microbatches", default=1
    )
    ema_decay: float | None = _field("moving average of the weights, 0.999 say", default=None)
    precompile: bool | str = _field(
        "compile the training step, show what it costs and end; a name such as v5e:2x4: for a TPU "
        "topology that is not attached",
        default=False,
    )

    def __post_init__(self) -> None:
        """Checks what has no room of its own to check it."""
        if self.precompile == "":
            raise UserError("--precompile= has no value; write --precompile, or =v5e:2x4 say.")
        if self.model.adapter_rank:
            raise UserError("ModelConfig.adapter_rank: only ppo trains adapters; set it to 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """A run that learns targets, token by token."""

    data: DataConfig = _field("mixture, lengths, batch")
    objective: ObjectiveConfig = _field("what a text becomes")
    loss: LossConfig = _field("regularisers of the loss", default=LossConfig())
    sample_decoding: DecodeConfig = _field("how samples are generated", default=DecodeConfig())
    num_samples: int = _field("samples shown at each evaluation", "samples", default=8)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a configuration becomes before anything is computed or written.

    Another kind of supervised run overrides what differs.
    """

    config: Any
    vocabulary: Vocabulary
    model: Any
    mesh: jax.sharding.Mesh
    loader: Any
    evaluation: Any

    def loss_fn(self) -> LossFn:
        """Returns what `make_train_step` differentiates."""
        return supervised_loss(self.model, self.config.loss, self.mesh)

    def prepare(self) -> None:
        """Makes what must exist before the first step; every mistake has been looked for."""

    def initial_weights(self, abstract: Any) -> Any:
        """Returns the weights a new run starts from, placed as `abstract` says."""
        if self.config.init_from is None:
            places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            return self.model.init(jax.random.key(self.config.seed), places)
        config = self.config
        return _run_folder.load_weights(
            config.init_from, self.model, abstract, self.mesh, use_ema=config.init_from_ema
        )

    def evaluator(self, writer: Writer) -> Callable[[TrainState, int], Mapping[str, float]]:
        """Returns the `evaluate` of `fit`."""
        return _Evaluation(self, writer)

    def facts(self) -> dict[str, Any]:
        """Returns derived numbers, printed once at the start."""
        return facts(self)

    def flops_per_step(self, step: int = 0) -> float:
        """Returns the FLOPs of one optimizer step."""
        return flops_per_step(self, step)

    def predicted(self, state: Any) -> memory.Memory:
        """Returns the memory of one device; `state` as `planning.memory.abstract_state`."""
        return _predicted(self, state)

    def meta(self) -> dict[str, Any]:
        """Returns what every checkpoint says about its run."""
        model = _run_folder.model_meta(self.config.model, self.vocabulary)
        return {"seed": self.config.seed, **model}

    def report(self, title: str, step: int) -> None:
        """Writes report.md."""
        _write_report(self, title, step)

    def rendered(self, count: int) -> list[str]:
        """Returns the first rows of the first batch as text."""
        batch = self.loader.batch(0)
        count = min(count, len(batch["decoder_target_tokens"]))
        return [_samples.render_row(self.vocabulary, batch, row) for row in range(count)]


def open_common(
    config: Any, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> tuple[Vocabulary, jax.sharding.Mesh]:
    """Checks what does not depend on the data; returns the vocabulary and the mesh.

    Args:
        config: the run: a RunConfig that also knows `microbatches` and `precompile`.
        batch_size: rows (or groups of rows) of the global batch that are split over the mesh.
        devices: of the mesh; None = all.

    Raises:
        UserError: anything that would stop the run later.
    """
    vocabulary = Vocabulary(config.vocabulary)
    if vocabulary.size > config.model.vocab_size:
        raise UserError(
            f"VOCABULARY = {config.vocabulary} has {vocabulary.size:,} pieces and "
            f"ModelConfig.vocab_size = {config.model.vocab_size:,} rows; set vocab_size to at "
            f"least {-(-vocabulary.size // 128) * 128:,} (a multiple of 128)."
        )
    if config.microbatches < 1:
        raise UserError(f"MICROBATCHES = {config.microbatches} must be at least 1.")
    if devices is None:
        devices = _precompile.devices(config.precompile)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(batch_size, mesh, config.microbatches)
    check_pipeline(config.model, batch_size // config.microbatches, mesh)
    if config.init_from is not None:
        meta = _run_folder.read_meta(config.init_from)
        _run_folder.check_vocabulary(config.init_from, meta, vocabulary)
    if committed_steps(_checkpoints(config)):
        meta = checkpoints.read_meta(config.model_dir)
        _run_folder.check_vocabulary(config.model_dir, meta, vocabulary, "MODEL_DIR")
    return vocabulary, mesh


def open_alone(
    config: Any, devices: Sequence[jax.Device] | None = None
) -> tuple[Vocabulary, jax.sharding.Mesh]:
    """As `open_common`, for stages that batch prompts: one process, no lengths or stages split."""
    stage = type(config).__module__.rpartition(".")[2]
    if jax.process_count() > 1:
        raise UserError(f"{stage} runs in one process, on any number of its devices.")
    vocabulary, mesh = open_common(config, config.data.batch_size, devices)
    split = [axis for axis in ("sequence", "stage") if mesh.shape[axis] > 1]
    if split:
        raise UserError(
            f"MESH splits {' and '.join(split)}, which {stage} cannot; use data, fsdp and tensor."
        )
    if config.model.sequence_parallel:
        raise UserError(
            f"ModelConfig.sequence_parallel does not apply to {stage}; set it to False."
        )
    return vocabulary, mesh


def assemble(config: Config) -> Parts:
    """Opens and checks everything. Writes nothing, allocates no parameters.

    Raises:
        UserError: anything that would stop the run later.
    """
    vocabulary, mesh = open_common(config, config.data.batch_size)
    objective = Objective(config.objective, vocabulary, config.model.architecture)
    rows = sharding.process_rows(mesh, config.data.batch_size)
    loader = Loader(config.data, objective, open_sources(config.data, vocabulary), rows=rows)
    if config.data.batch_ramp:
        loader.active_microbatches(0, config.microbatches)  # raises for sizes that do not divide
    evaluation = None
    if config.eval_split is not None:
        check_eval_split(config)
        held_out = dataclasses.replace(loader.config, split=config.eval_split, batch_ramp=())
        sources = open_sources(held_out, vocabulary)
        evaluation = EvalLoader(held_out, objective, sources, rows=rows)
    return Parts(config, vocabulary, build(config.model), mesh, loader, evaluation)


def _checkpoints(config: TrainingConfig) -> pathlib.Path:
    return pathlib.Path(config.model_dir) / checkpoints.FOLDER


def check_eval_split(config: Any) -> None:
    """Raises UserError unless every task of `config.data` has the split that is evaluated."""
    for task, rate in read_mixture(config.data.cache_dir, config.data.mixture):
        splits = list_splits(config.data.cache_dir, task)
        if rate > 0 and splits and config.eval_split not in splits:
            stage = type(config).__module__.rpartition(".")[2]
            raise UserError(
                f"Task {task} has no split {config.eval_split!r} in the cache "
                f"{config.data.cache_dir}; it has {', '.join(splits)}."
                f"{did_you_mean(config.eval_split, splits)} Choose the one to evaluate on, or "
                f"none: --gin.{stage}.Config.eval_split=None"
            )


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is compiled, from shapes alone.

    Attributes:
        initialise: weights -> TrainState.
        state: abstract, each leaf with its sharding.
        places: of everything in a step.
        train_step: not compiled yet.
    """

    initialise: Callable[[Any], TrainState]
    state: Any
    places: sharding.Placement
    train_step: TrainStep


def _program(parts: Parts) -> _Program:
    config = parts.config
    schedule = make_schedule(config.schedule)
    abstract_params, axes = parts.model.abstract_params(), parts.model.logical_axes()
    optimizer = make_optimizer(config.optimizer, schedule, abstract_params, axes)
    initialise = functools.partial(
        init_state, optimizer=optimizer, ema=config.ema_decay is not None
    )
    abstract = jax.eval_shape(initialise, abstract_params)
    places = sharding.place(abstract, axes, parts.mesh, config.sharding)
    train_step = make_train_step(
        parts.loss_fn(),
        optimizer,
        schedule,
        microbatches=config.microbatches,
        seed=config.seed,
        ema_decay=config.ema_decay,
        placement=places,
    )
    state = sharding.with_shardings(abstract, places.state)
    return _Program(initialise, state, places, train_step)


def _step_arguments(parts: Parts, program: _Program) -> tuple[Any, Any, int | None]:
    """What the training step is called with, abstract."""
    batch = sharding.abstract_batch(parts.loader.padding(), parts.mesh)
    ramp = bool(parts.loader.config.batch_ramp)
    return program.state, batch, parts.config.microbatches if ramp else None


def _compile_only(config: TrainingConfig, assemble: Callable[[Any], Parts]) -> None:
    """Does what `--precompile` asks for; writes nothing."""
    with _precompile.target(config.precompile):
        parts = assemble(config)
        _check_lengths(parts)
        program = _program(parts)
        predicted = {f"predicted {name}": value for name, value in _costs(parts).items()}
        facts = {**parts.facts(), **program.places.facts(), **predicted}
        if jax.process_index() == 0:
            print_facts(facts)
        lowered = program.train_step.lower(*_step_arguments(parts, program))
    _precompile.show(lowered, parts.mesh)


def run(
    config: TrainingConfig, *, title: str, assemble: Callable[[Any], Parts] = assemble
) -> TrainState | None:
    """Trains to the end, or continues to it; see the module's text. None: it only compiled.

    Args:
        config: the run.
        title: of its report.
        assemble: opens and checks everything.
    """
    configs.check_same_run(config, config.model_dir, MAY_CHANGE)
    if config.precompile:
        return _compile_only(config, assemble)
    parts = assemble(config)
    _check_lengths(parts)
    program = _program(parts)
    abstract, places, train_step = program.state, program.places, program.train_step
    _check_memory(parts, abstract, places)

    def fresh() -> TrainState:
        # Donated: the weights must not stay in memory beside the state.
        weights = parts.initial_weights(abstract.params)
        made = jax.jit(program.initialise, out_shardings=places.state, donate_argnums=0)
        return made(weights)

    ramp = bool(parts.loader.config.batch_ramp)
    newest = max(committed_steps(_checkpoints(config)), default=0)

    with (
        Checkpointer(config.model_dir, config.checkpoint) as checkpointer,
        ThreadPoolExecutor(1, "restore") as reader,
    ):
        restore = checkpoints.restore_or_init
        restored = reader.submit(restore, checkpointer, abstract, lambda: None)
        if newest < config.loop.train_steps:  # traced meanwhile
            parts.loader.warm_up(newest)
            train_step.compile_ahead(*_step_arguments(parts, program))
            parts.prepare()
        state, resumed = restored.result()
        if state is None:
            state = fresh()
        if jax.process_index() == 0:
            configs.save_run(config, config.model_dir)
            _run_folder.keep_vocabulary(parts.vocabulary, config.model_dir)
        writer = Writer(
            config.model_dir, total_steps=config.loop.train_steps, tensorboard=config.tensorboard
        )
        if jax.process_count() > 1:
            # Collectives wait less long for a process than it may take to compile.
            train_step.wait_compiled()
            distributed.exchange()
        with writer:
            return fit(
                config.loop,
                state=state,
                train_step=train_step,
                batches=lambda step: sharding.shard_ahead(parts.loader.iterate(step), parts.mesh),
                writer=writer,
                checkpointer=checkpointer,
                evaluate=parts.evaluator(writer),
                report=functools.partial(parts.report, title),
                meta=parts.meta(),
                resumed=resumed,
                flops_per_step=parts.flops_per_step,
                active_microbatches=(
                    functools.partial(
                        parts.loader.active_microbatches, microbatches=config.microbatches
                    )
                    if ramp
                    else None
                ),
                facts=parts.facts() | places.facts(),
            )


def flops_per_step(parts: Parts, step: int = 0) -> float:
    """FLOPs of one optimizer step, as the architecture counts them (no recomputation)."""
    lengths = parts.loader.config.input_length, parts.loader.config.target_length
    return parts.loader.size(step) * flops_per_example(parts.config.model, *lengths)


def facts(parts: Parts) -> dict[str, Any]:
    """Derived numbers, printed once at the start."""
    config, data = parts.config, parts.loader.config
    tokens = data.batch_size * (data.input_length + data.target_length)
    first, second = parts.loader.utilisation()
    used = f"{first:.1%}" if parts.loader.objective.decoder_only else f"{first:.1%} / {second:.1%}"
    # A prefix LM attends over the joined row; of an encoder-decoder's two, the longer says more.
    join = sum if parts.loader.objective.decoder_only else max
    implementation, reason = training_implementation(
        config.model, join((data.input_length, data.target_length)), target_platform()
    )
    return {
        "parameters": parts.model.num_params,
        "batch": f"{data.batch_size} x ({data.input_length} + {data.target_length}) = "
        f"{tokens:,} tokens, {used} used, {config.microbatches} microbatch(es)",
        "FLOPs per step": quantity(flops_per_step(parts)),
        "FLOPs per token": quantity(flops_per_step(parts) / tokens),
        "steps": config.loop.train_steps,
        "attention": f"{implementation} ({reason})",
        "devices": described(parts.mesh),
        **_pipeline_facts(config.model, parts.mesh),
    }


def described(mesh: jax.sharding.Mesh) -> str:
    """Returns how many devices of what kind a mesh has, and its axes."""
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}"


def print_facts(facts: Mapping[str, Any]) -> None:
    """Prints derived numbers, one a line."""
    for name, value in facts.items():
        print(f"  {name}: {value:,}" if isinstance(value, int) else f"  {name}: {value}")


def _pipeline_facts(model: ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, str]:
    stages, repeats = stages_of(mesh), model.pipeline_repeats
    if stages == 1:
        return {}
    count = microbatches_of(model, stages)
    return {
        "pipeline": f"{stages} stages, {count} microbatches, {repeats} repeat(s): bubble "
        f"{bubble_fraction(stages, count, repeats):.1%} of a pass"
    }


class _Evaluation:
    """Loss on held-out data, and samples; the compiled functions live as long as the run."""

    def __init__(self, parts: Parts, writer: Writer) -> None:
        self.parts, self.writer = parts, writer
        self.loss = jax.jit(eval_loss(parts.model, parts.config.loss, parts.mesh))
        self.samples = _samples.Samples(
            parts.config, parts.vocabulary, parts.model, (parts.evaluation or parts.loader).whole()
        )

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns eval/loss and eval/accuracy; writes samples.jsonl."""
        figures = {}
        if self.parts.evaluation is not None:
            figures = self._figures(state.params)
        if self.parts.config.num_samples:
            self.writer.write_samples(step, self.samples(state.params))
        return figures

    def _figures(self, params: Any) -> dict[str, float]:
        pending = [
            self.loss(params, sharding.shard_batch(batch, self.parts.mesh))[2]
            for batch in spread(self.parts.evaluation, self.parts.config.eval_batches)
        ]
        sums = jax.tree.map(lambda *values: float(np.sum(values)), *jax.device_get(pending))
        return {f"eval/{name}": sums[name][0] / sums[name][1] for name in ("loss", "accuracy")}


def spread(loader: Any, limit: int | None) -> Iterator[Batch]:
    """Yields the batches of a held-out loader, or `limit` of them, evenly spread."""
    count = min(limit or len(loader), len(loader))
    for index in np.linspace(0, len(loader) - 1, count).astype(int) if count > 1 else [0]:
        yield loader.batch(int(index))


def _write_report(parts: Parts, title: str, step: int) -> None:
    if jax.process_index() != 0:
        return
    folder = pathlib.Path(parts.config.model_dir)
    report.write_report(
        folder,
        title=title,
        config_text=(folder / configs.GIN_NAME).read_text(encoding="utf-8"),
        data_table=data_table(parts.loader, step),
        facts=facts(parts),
    )


def data_table(loader: Loader, step: int) -> list[dict[str, Any]]:
    """Returns what the steps before `step` took of each source, for the report."""
    return [
        {
            "source": source.source,
            "documents": source.documents,
            "tokens": source.tokens,
            "epochs seen": round(source.epochs, 2),
        }
        for source in loader.stats(step)
    ]


def dry_run(config: TrainingConfig, *, assemble: Callable[[Any], Parts] = assemble) -> None:
    """Validates everything, shows two examples and the costs. Compiles and writes nothing."""
    configs.check_same_run(config, config.model_dir, MAY_CHANGE)
    parts = assemble(config)
    _check_lengths(parts)
    batch = sharding.abstract_batch(parts.loader.padding(), parts.mesh)
    jax.eval_shape(parts.loss_fn(), parts.model.abstract_params(), batch, jax.random.key(0))
    print("Two rows as the model sees them:")
    for text in parts.rendered(2):
        print(text)
    print_facts({**parts.facts(), **_costs(parts)})


def _check_lengths(parts: Parts) -> None:
    sharding.check_lengths(
        parts.loader.padding(),
        parts.mesh,
        sequence_parallel=parts.config.model.sequence_parallel,
    )


def _costs(parts: Parts) -> dict[str, str]:
    """Memory of one device by kind and disk of one checkpoint, from shapes alone."""
    state = memory.abstract_state(
        parts.model, parts.config.optimizer, parts.config.ema_decay is not None
    )
    predicted = parts.predicted(state)
    kinds = " + ".join(f"{n} {size / 2**30:.2f}" for n, size in predicted.kinds().items())
    return {
        "memory per device": f"{predicted.total / 2**30:.2f} GiB = {kinds}",
        "disk per checkpoint": f"{memory.checkpoint_bytes(state) / 2**20:,.0f} MiB",
    }


def _predicted(parts: Parts, state: Any) -> memory.Memory:
    data = parts.loader.config
    return memory.predict(
        parts.model,
        state,
        parts.mesh,
        batch_size=data.batch_size,
        lengths=(data.input_length, data.target_length),
        platform=target_platform(),
        strategy=parts.config.sharding,
        microbatches=parts.config.microbatches,
    )[0]


def _check_memory(parts: Parts, state: Any, places: sharding.Placement) -> None:
    """Predicts, before anything is compiled, whether a device's memory suffices.

    Raises:
        UserError: weights, gradients and optimizer state alone exceed it.
    """
    limit = memory.device_limit()
    if limit is None:
        return
    sums = 2 if parts.config.microbatches > 1 else 1
    held = sharding.bytes_per_device(state, places.state)
    held += sums * sharding.bytes_per_device(state.params, places.gradients)
    if held > limit:
        raise UserError(memory.too_little(held, limit, state_alone=True))
    # Tracing takes a second, which a small model on a CPU need not wait for.
    if jax.default_backend() == "cpu" and held < limit / 4:
        return
    total = parts.predicted(state).total
    if total > limit and jax.process_index() == 0:
        print(f"Warning: {memory.too_little(total, limit)}", file=sys.stderr, flush=True)
