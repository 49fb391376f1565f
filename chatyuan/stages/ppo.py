"""Improve a tuned model by reinforcement learning (PPO, RLOO, GRPO, ...) on rewards of its answers.

1. A step is an iteration: draw answers to BATCH_SIZE prompts, score them, learn from them.
2. Prompts are the inputs of a cached mixture in the order of (SEED, step); each has a number, and
   what is drawn for it depends on that alone. A run that is stopped continues bitwise.
3. Rewards come from runs of `reward` (normalised as they store it) and from Python functions.
4. The policy and the reference start as INIT_FROM. The reference is not written again: the run
   remembers which checkpoint it was and refuses to go on with another one.
5. A checkpoint's weights are the policy's, so the run serves as a model wherever one is asked for.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan import checkpoints, configs, report, sharding
from chatyuan.align.config import AlignConfig
from chatyuan.align.iteration import NEXT, PTX, Iteration, Roles, Scored
from chatyuan.align.rewards import OpenSource, RewardSource, by_label, load_function
from chatyuan.align.roles import AlignState, Critic, Split, init_state, nothing_ahead
from chatyuan.align.rollout import RolloutConfig, prompts_of
from chatyuan.align.update import Learner
from chatyuan.checkpoint_files import committed_steps
from chatyuan.checkpoints import Checkpointer
from chatyuan.data.loader import DataConfig, EvalLoader, Loader, open_sources
from chatyuan.data.objectives import Objective, ObjectiveConfig
from chatyuan.errors import UserError
from chatyuan.metrics import Writer
from chatyuan.models import build
from chatyuan.models.loss import supervised_loss
from chatyuan.models.reward import Normalisation, RewardModel
from chatyuan.planning.memory import checkpoint_bytes
from chatyuan.stages import _rollouts, _run_folder, _samples, _supervised
from chatyuan.train.loop import fit
from chatyuan.train.optimizers import make_optimizer
from chatyuan.train.schedules import make_schedule

TRAINS = True  # takes the flags of several processes and of restarts
ROLLOUTS = "rollouts.jsonl"
# See `_supervised.MAY_CHANGE`; where roles come from may, since what they are is remembered.
MAY_CHANGE = (
    *_supervised.MAY_CHANGE,
    *("reward_from", "critic_from", "write_rollouts", "rollout_mesh"),
)


def _field(help_text: str, unit: str = "", **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text, "unit": unit}, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_supervised.RunConfig):
    """A run that learns from rewards."""

    data: DataConfig = _field("mixture whose inputs are the prompts; batch_size counts prompts")
    objective: ObjectiveConfig = _field(
        "seq2seq, as in sft: how prompts are cut", default=ObjectiveConfig(name="seq2seq")
    )
    align: AlignConfig = _field("method and its numbers", default=AlignConfig())
    rollout: RolloutConfig = _field("how answers are drawn", default=RolloutConfig())
    reward_from: str | None = _field("run or checkpoint of `reward` that scores", default=None)
    rewards: tuple[RewardSource, ...] = _field(
        "further sources of scores: functions and models, weighted", default=()
    )
    critic_from: str | None = _field(
        "run of `reward` that a separate critic starts as; None = the policy with a new head",
        default=None,
    )
    critic_learning_rate: float | None = _field(
        "peak of the critic's; None = the policy's", default=None
    )
    ptx: DataConfig | None = _field(
        "mixture for align.ptx_coef; batch_size counts rows of an iteration", default=None
    )
    ptx_objective: ObjectiveConfig = _field("what its texts become", default=ObjectiveConfig())
    rollout_mesh: dict[str, int] | None = _field(
        "axis -> parts of devices that only draw answers, the last ones; MESH has the others. "
        "None = all do both",
        default=None,
    )
    num_samples: int = _field("samples shown at each evaluation", "samples", default=8)
    write_rollouts: bool = _field(f"append every answer to MODEL_DIR/{ROLLOUTS}", default=False)

    def __post_init__(self) -> None:
        """Raises UserError for settings that cannot work."""
        self.align.check_samples(self.rollout.samples)
        if self.init_from is None:
            raise UserError("INIT_FROM must be the run that is improved: --gin.INIT_FROM=...")
        if self.objective.name != "seq2seq":
            raise UserError(f"ObjectiveConfig.name = {self.objective.name!r} should be 'seq2seq'.")
        for data in (self.data, self.ptx or self.data):
            if data.batch_ramp:
                raise UserError("DataConfig.batch_ramp does not apply to ppo; leave it out.")
        if self.data.pack:
            raise UserError("DataConfig.pack = True would join prompts; set it to False.")
        if self.sharding.zero_stage == 2:
            raise UserError(
                "ShardingConfig.zero_stage = 2 splits gradients between microbatches, which ppo "
                "does not; use 1."
            )
        self._check_critic()
        if (self.align.ptx_coef > 0) != (self.ptx is not None):
            raise UserError(
                f"AlignConfig.ptx_coef = {self.align.ptx_coef} and ppo.Config.ptx "
                f"{'are both needed' if self.ptx is None else '= a mixture go together'}; set both "
                "or none."
            )
        if max(self.align.min_length, self.align.overlong_buffer) > self.rollout.max_length:
            raise UserError(
                f"AlignConfig.min_length = {self.align.min_length} and overlong_buffer = "
                f"{self.align.overlong_buffer} should be within TARGET_LENGTH = "
                f"{self.rollout.max_length}."
            )

    def _check_critic(self) -> None:
        separate = self.align.has_critic and self.align.critic == "separate"
        if self.critic_from is not None and not separate:
            raise UserError(
                f"critic_from = {self.critic_from} needs AlignConfig.method = 'ppo' and "
                "AlignConfig.critic = 'separate'."
            )
        if self.model.adapter_rank and separate and self.critic_from is None:
            raise UserError(
                "A separate critic of a policy with adapters has no weights of its own to start "
                "from: name a run of reward as critic_from, or set AlignConfig.critic = 'shared'."
            )
        if self.critic_learning_rate is not None and not self.align.has_critic:
            raise UserError(f"critic_learning_rate: method = {self.align.method!r} has no critic.")

    @property
    def sources(self) -> tuple[RewardSource, ...]:
        """REWARD_FROM and the further ones."""
        first = () if self.reward_from is None else (RewardSource(model=self.reward_from),)
        return (*first, *self.rewards)

    @property
    def microbatches(self) -> int:
        """Parts that a minibatch is worked off in."""
        return self.align.microbatches

    @property
    def precompile(self) -> bool:
        """Not offered: an iteration is several programs."""
        return False


@dataclasses.dataclass(frozen=True)
class _Model:
    """A reward model that has been found: the STEP folder and what is in it."""

    folder: str
    model: RewardModel
    normalisation: Normalisation

    def params(self, mesh: jax.sharding.Mesh) -> Any:
        """Returns its weights, placed."""
        shapes = self.model.abstract_params()
        places = sharding.shardings(shapes, self.model.logical_axes(), mesh)
        return checkpoints.load_params(self.folder, sharding.with_shardings(shapes, places))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a configuration becomes before anything is computed or written.

    Attributes:
        drawing_mesh: of the devices that only draw, None where all do both.
        origin: the STEP folder of INIT_FROM.
        sources: where scores come from, by the name in metrics.
        reward_models: those of the sources that are models, in their order.
        critic_model: what `critic_from` means.
        origins: role -> fingerprint of the checkpoint that it is.
    """

    config: Config
    vocabulary: Any
    model: Any
    mesh: jax.sharding.Mesh
    drawing_mesh: jax.sharding.Mesh | None
    loader: Loader
    evaluation: EvalLoader | None
    ptx_loader: Loader | None
    origin: str
    sources: Mapping[str, OpenSource]
    reward_models: tuple[_Model, ...]
    critic_model: _Model | None
    origins: Mapping[str, str]

    @functools.cached_property
    def learner(self) -> Learner:
        """Everything static that an update needs."""
        config = self.config
        split = Split.of(self.model, config.align.reference_layers)
        schedule = make_schedule(config.schedule)
        trained = jax.eval_shape(split.trained, self.model.abstract_params())
        optimizer = make_optimizer(
            config.optimizer, schedule, trained, split.logical_axes(self.model.logical_axes())
        )
        critic, shapes, axes = None, {}, {}
        if config.align.has_critic:
            model = self.critic_model.model if self.critic_model else RewardModel(config.model)
            critic = Critic(model, separate=config.align.critic == "separate")
            shapes, axes = critic.abstract_params(), critic.logical_axes()
        if config.critic_learning_rate is not None:
            schedule = make_schedule(
                dataclasses.replace(config.schedule, learning_rate=config.critic_learning_rate)
            )
        ptx = None if self.ptx_loader is None else supervised_loss(self.model, mesh=self.mesh)
        return Learner(
            config.align,
            self.model,
            split,
            optimizer,
            critic,
            make_optimizer(config.optimizer, schedule, shapes, axes),
            eos_id=self.vocabulary.eos_id,
            temperature=config.rollout.temperature,
            seed=config.seed + 1,  # permutations share no key with what is drawn
            mesh=self.mesh,
            ptx_loss=ptx and (lambda params, batch: ptx(params, batch, None)[:2]),
        )

    def abstract_state(self) -> tuple[AlignState, sharding.Placement]:
        """Returns the shapes of the state, each with its place, and the places."""
        learner = self.learner
        critic = {} if learner.critic is None else learner.critic.abstract_params()
        shapes = jax.eval_shape(self._initialise(), self.model.abstract_params(), critic)
        places = sharding.place(shapes, self.model.logical_axes(), self.mesh, self.config.sharding)
        return sharding.with_shardings(shapes, places.state), places

    def _initialise(self) -> Callable[[Any, Any], AlignState]:
        learner, config, data = self.learner, self.config, self.config.data

        def initialise(params: Any, critic: Any) -> AlignState:
            ahead = None
            if config.align.lag:
                ahead = nothing_ahead(data.batch_size, data.input_length, config.rollout)
            return init_state(
                params,
                critic,
                optimizer=learner.optimizer,
                critic_optimizer=learner.critic_optimizer,
                split=learner.split,
                kl_coef=config.align.kl_coef,
                ahead=ahead,
            )

        return initialise

    def policy_weights(self, abstract: AlignState) -> Any:
        """Returns the weights of INIT_FROM, placed as the state's."""
        return _run_folder.load_weights(
            self.origin,
            self.model,
            abstract.params,
            self.mesh,
            use_ema=self.config.init_from_ema,
            seed=self.config.seed,
        )

    def fresh_state(self, weights: Any, places: sharding.Placement) -> AlignState:
        """Returns the state before the first iteration; the weights are donated to it."""
        learner, critic = self.learner, {}
        if learner.critic is not None:
            if self.critic_model is None:
                critic = learner.critic.init(jax.random.key(self.config.seed), weights)
            else:
                found = self.critic_model
                critic = learner.critic.from_reward_model(
                    found.params(self.mesh), found.normalisation
                )
            critic = jax.device_put(critic, places.state.critic)
        made = jax.jit(self._initialise(), out_shardings=places.state, donate_argnums=(0, 1))
        return made(weights, critic)

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of iterations from `start` on; with a lag, the next prompts too."""
        rows = self._batches(start)
        if not self.config.align.lag:
            yield from rows
            return
        for now, after in itertools.pairwise(rows):
            yield now | {f"{NEXT}{n}": x for n, x in after.items() if not n.startswith(PTX)}

    def _batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches of iterations; prompts are numbered by position."""
        size = self.config.data.batch_size
        ptx = None if self.ptx_loader is None else self.ptx_loader.iterate(start)
        for step, batch in enumerate(self.loader.iterate(start), start):
            rows = self.prompts(batch, step * size)
            if ptx is not None:
                rows |= {f"{PTX}{name}": value for name, value in next(ptx).items()}
            yield rows

    def prompts(self, batch: Mapping[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
        """Returns the prompts of a loader's batch, numbered from `first`."""
        prompts, lengths = prompts_of(batch, self.config.data.input_length)
        ids = (first + np.arange(len(prompts), dtype=np.uint64)).astype(np.uint32)
        return {"prompts": prompts, "prompt_lengths": lengths, "prompt_ids": ids}

    def iteration(
        self,
        reference: Any,
        placement: Any = None,
        record: Callable[[int, int, Scored], None] | None = None,
    ) -> Iteration:
        """Returns the step of the run; loads the reward models."""
        roles = Roles(
            reference,
            self.sources,
            [found.model for found in self.reward_models],
            [found.params(self.mesh) for found in self.reward_models],
        )
        return Iteration(
            self.learner,
            self.config.rollout,
            roles,
            vocabulary=self.vocabulary,
            pad_id=self.vocabulary.pad_id,
            seed=self.config.seed,
            placement=placement,
            drawing_mesh=self.drawing_mesh,
            record=record,
        )

    def facts(self) -> dict[str, Any]:
        """Returns derived numbers, printed once at the start."""
        align, drawn, data = self.config.align, self.config.rollout, self.config.data
        answers = data.batch_size * drawn.samples
        price = f"{align.kl_coef:g} per nat in the {align.kl_place} ({align.kl_estimator})"
        if align.kl_target is not None:
            price += f", adapted to {align.kl_target:g} nats an answer"
        layers, reference = align.reference_layers, "a copy"
        if layers is not None:
            reference = f"a copy of the last {layers} layers"
        elif self.config.model.adapter_rank:
            reference = f"a frozen adapter of rank {self.config.model.adapter_rank}"
        facts = {
            "method": align.method,
            "iteration": f"{data.batch_size} prompts of up to {data.input_length} tokens x "
            f"{drawn.samples} answers of up to {drawn.max_length} tokens, {align.epochs} epochs x "
            f"{align.minibatches} minibatches of {answers // align.minibatches} answers",
            "iterations": self.config.loop.train_steps,
            "rewards": ", ".join(
                f"{name} x {opened.source.weight:g}" for name, opened in self.sources.items()
            ),
            "KL": price,
            "reference": reference,
            "devices": _supervised.described(self.mesh),
        }
        if align.lag or self.drawing_mesh is not None:
            facts["answers drawn"] = "an iteration ahead" if align.lag else "between the updates"
            if self.drawing_mesh is not None:
                facts["answers drawn"] += f" by {_supervised.described(self.drawing_mesh)}"
        if align.has_critic:
            of = "a head on the policy" if align.critic == "shared" else "a model of its own"
            facts["critic"] = of + (
                f", alone in the first {align.critic_warmup}" if align.critic_warmup else ""
            )
        return facts

    def costs(self, abstract: AlignState, places: sharding.Placement) -> dict[str, str]:
        """Returns the memory of what is held during the whole run, and a checkpoint's size."""
        held = sharding.bytes_per_device(abstract, places.state)
        split = self.learner.split
        held += sharding.bytes_per_device(
            jax.eval_shape(split.trained, abstract.params),
            split.logical_axes(places.state.params),
        )
        for found in self.reward_models:
            shapes = found.model.abstract_params()
            at = sharding.shardings(shapes, found.model.logical_axes(), self.mesh)
            held += sharding.bytes_per_device(shapes, at)
        return {
            "memory per device": f"{held / 2**30:.2f} GiB for weights, optimizers, reference and "
            "reward models; activations and the answers' keys and values come on top",
            "disk per checkpoint": f"{checkpoint_bytes(abstract) / 2**20:,.0f} MiB",
        }

    def meta(self) -> dict[str, Any]:
        """Returns what every checkpoint says about its run."""
        model = _run_folder.model_meta(self.config.model, self.vocabulary)
        return {"seed": self.config.seed, "origins": dict(self.origins), **model}

    def report(self, step: int) -> None:
        """Writes report.md."""
        folder = pathlib.Path(self.config.model_dir)
        report.write_report(
            folder,
            title=f"Reinforcement learning ({self.config.align.method})",
            config_text=(folder / configs.GIN_NAME).read_text(encoding="utf-8"),
            data_table=_supervised.data_table(self.loader, step),
            facts=self.facts(),
        )


def assemble(config: Config) -> Parts:
    """Opens and checks everything. Writes nothing, allocates no parameters.

    Raises:
        UserError: anything that would stop the run later.
    """
    if not config.sources:
        raise UserError(
            "Nothing gives rewards: pass --gin.REWARD_FROM=... (a run of reward), or list sources "
            "in ppo.Config.rewards."
        )
    devices, drawing = _devices(config)
    vocabulary, mesh = _supervised.open_alone(config, devices)
    _check_sizes(config, mesh)
    meta = _run_folder.read_tuned_meta(
        config.init_from, "give the tuned model, and this as REWARD_FROM"
    )
    origins = {"policy and reference": _run_folder.identity(config.init_from)}
    found, models = [], []
    for source in config.sources:
        if source.function:
            found.append(OpenSource(source, load_function(source.function)))
            continue
        setting = "REWARD_FROM" if source.model == config.reward_from else "RewardSource.model"
        model = _reward_model(source.model, vocabulary, setting, raw=not source.normalise)
        models.append(model)
        found.append(OpenSource(source, None, model.normalisation))
        origins[f"reward model {len(models)}"] = _run_folder.identity(model.folder, setting)
    critic = None
    if config.critic_from is not None:
        critic = _reward_model(config.critic_from, vocabulary, "critic_from")
    _check_origins(config, origins)
    model = build(config.model)
    loader, evaluation = _open_prompts(config, vocabulary)
    ptx = None
    if config.ptx is not None:
        ptx_objective = Objective(config.ptx_objective, vocabulary, config.model.architecture)
        ptx = Loader(config.ptx, ptx_objective, open_sources(config.ptx, vocabulary))
    return Parts(
        config, vocabulary, model, mesh, drawing, loader, evaluation, ptx, meta["path"],
        by_label(found), tuple(models), critic, origins,
    )  # fmt: skip


def _devices(config: Config) -> tuple[list[jax.Device] | None, jax.sharding.Mesh | None]:
    """(devices of MESH, None = all; mesh of those that only draw)."""
    if config.rollout_mesh is None:
        return None, None
    devices, wanted = jax.devices(), math.prod(config.rollout_mesh.values())
    if not 1 <= wanted < len(devices):
        raise UserError(
            f"ppo.Config.rollout_mesh = {config.rollout_mesh} asks for {wanted} of {len(devices)} "
            "devices; leave at least one for MESH, or None for all to do both. -1 is not offered."
        )
    drawing = sharding.make_mesh(config.rollout_mesh, devices[-wanted:])
    sharding.check_batch(config.data.batch_size, drawing)
    return devices[:-wanted], drawing


def _open_prompts(config: Config, vocabulary: Any) -> tuple[Loader, EvalLoader | None]:
    """The loaders of training and held-out prompts. Raises UserError for empty prompts."""
    objective = Objective(config.objective, vocabulary, config.model.architecture)
    loader = Loader(config.data, objective, _with_prompts(config.data, vocabulary))
    if config.eval_split is None:
        return loader, None
    _supervised.check_eval_split(config)
    held_out = dataclasses.replace(config.data, split=config.eval_split)
    return loader, EvalLoader(held_out, objective, _with_prompts(held_out, vocabulary))


def _with_prompts(data: DataConfig, vocabulary: Any) -> list[Any]:
    """Opens the sources. Raises UserError where an input is empty."""
    sources = open_sources(data, vocabulary)
    for source in sources:
        empty = 0 if source.inputs is None else int((source.inputs.lengths == 0).sum())
        if empty:
            raise UserError(
                f"{source.name} ({data.split}): {empty} of {len(source.inputs)} prompts are empty, "
                "and there is nothing to answer; take these rows out and build the cache again."
            )
    return sources


def _reward_model(path: str, vocabulary: Any, setting: str, raw: bool = False) -> _Model:
    model, normalisation = _run_folder.read_reward_model(path, vocabulary, setting=setting, raw=raw)
    return _Model(checkpoints.read_meta(path)["path"], model, normalisation)


def _check_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless prompts divide into minibatches, microbatches and data shards."""
    align, size = config.align, config.data.batch_size
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    least = align.minibatches * align.microbatches * shards
    if size % least:
        raise UserError(
            f"BATCH_SIZE = {size} prompts do not divide into {align.minibatches} minibatches of "
            f"{align.microbatches} microbatches over {shards} data shards; use a multiple of "
            f"{least}: --gin.BATCH_SIZE={-(-size // least) * least}"
        )
    if config.ptx is not None and config.ptx.batch_size % (
        align.epochs * align.minibatches * shards
    ):
        raise UserError(
            f"The batch_size = {config.ptx.batch_size} of ppo.Config.ptx is for all {align.epochs} "
            f"epochs x {align.minibatches} minibatches over {shards} data shards; use a multiple "
            f"of {align.epochs * align.minibatches * shards}."
        )


def _check_origins(config: Config, origins: Mapping[str, str]) -> None:
    """Raises UserError where a run would go on with another reference or reward model."""
    folder = pathlib.Path(config.model_dir)
    if not committed_steps(folder / checkpoints.FOLDER):
        return
    before = checkpoints.read_meta(folder).get("origins", {})
    changed = [role for role in {**before, **origins} if before.get(role) != origins.get(role)]
    if changed:
        raise UserError(
            f"MODEL_DIR = {folder} was started with another checkpoint as {', '.join(changed)}: "
            "INIT_FROM, REWARD_FROM or a model in ppo.Config.rewards holds something else now "
            "(a run that has gone on?). Give the STEP folder it was, or use a new MODEL_DIR."
        )


def _start(
    parts: Parts, checkpointer: Checkpointer, abstract: AlignState, places: sharding.Placement
) -> tuple[AlignState, Any, dict[str, Any]]:
    """(state, reference, meta of the checkpoint that the run continues from)."""
    weights = parts.policy_weights(abstract)
    reference = parts.learner.split.trained(weights)
    if not checkpointer.steps():  # the weights themselves become the policy
        reference = jax.tree.map(jnp.copy, reference)
    state, resumed = checkpoints.restore_or_init(
        checkpointer, abstract, lambda: parts.fresh_state(weights, places)
    )
    return state, reference, resumed


def run(config: Config) -> None:
    """Trains in MODEL_DIR, or continues there."""
    configs.check_same_run(config, config.model_dir, MAY_CHANGE)
    parts = assemble(config)
    abstract, places = parts.abstract_state()
    with Checkpointer(config.model_dir, config.checkpoint) as checkpointer:
        state, reference, resumed = _start(parts, checkpointer, abstract, places)
        record = None
        if config.write_rollouts:
            record = _rollouts.Recorder(pathlib.Path(config.model_dir) / ROLLOUTS)
        iteration = parts.iteration(reference, places.state, record)
        configs.save_run(config, config.model_dir)
        _run_folder.keep_vocabulary(parts.vocabulary, config.model_dir)
        writer = Writer(
            config.model_dir, total_steps=config.loop.train_steps, tensorboard=config.tensorboard
        )
        with writer:
            fit(
                config.loop,
                state=state,
                train_step=iteration,
                batches=lambda step: sharding.shard_ahead(parts.batches(step), parts.mesh),
                writer=writer,
                checkpointer=checkpointer,
                evaluate=_rollouts.Evaluation(parts, iteration, writer),
                evaluate_first=True,
                report=parts.report,
                meta=parts.meta(),
                resumed=resumed,
                facts=parts.facts() | parts.costs(abstract, places) | places.facts(),
            )


def dry_run(config: Config) -> None:
    """Checks everything, shows two prompts and the costs. Compiles and writes nothing."""
    configs.check_same_run(config, config.model_dir, MAY_CHANGE)
    parts = assemble(config)
    abstract, places = parts.abstract_state()
    batch = parts.prompts(parts.loader.batch(0), 0)
    print("Two prompts:")
    for tokens, length in zip(batch["prompts"][:2], batch["prompt_lengths"], strict=False):
        print(f"  {_samples.show(parts.vocabulary, tokens[:length])}")
    facts = {"parameters": parts.model.num_params, **parts.facts()}
    _supervised.print_facts({**facts, **parts.costs(abstract, places)})
