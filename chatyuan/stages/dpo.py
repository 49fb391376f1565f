"""Tune a model on preferences directly (DPO and its relatives), without a reward model.

1. The reference is INIT_FROM, the model the run starts from. What it says of every answer is
   computed once and kept beside the cache, so that only the policy is in memory (`_reference`).
2. The encoder runs once a prompt for both answers. Dropout is off unless asked for, as it is in the
   reference: at step 0 the loss of DPO is ln 2.
3. Plain DPO widens the margin by making both answers less likely. How far the chosen answers of
   held-out pairs have fallen is reported, with an alarm from `alarm_nats` on; nll_weight and the
   loss dpop are the cures.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan import checkpoints, plots, report
from chatyuan.align.pairs import answer_log_probs, pair_figures, pair_terms
from chatyuan.checkpoint_files import committed_steps
from chatyuan.data.loader import DataConfig, EvalLoader, open_sources
from chatyuan.data.objectives import Objective, ObjectiveConfig
from chatyuan.data.pairs import PAIRS, PairLoader
from chatyuan.decode.config import DecodeConfig
from chatyuan.errors import UserError, did_you_mean
from chatyuan.evaluate import preferences
from chatyuan.metrics import METRICS, Writer, read_rows
from chatyuan.models import build
from chatyuan.models.loss import LossFn
from chatyuan.ops.preference_losses import LOSSES, PreferenceLoss
from chatyuan.stages import _preferences, _reference, _run_folder, _samples, _supervised
from chatyuan.stages._preferences import answers_of
from chatyuan.text.vocabulary import Vocabulary
from chatyuan.train.state import TrainState

TRAINS = True  # takes the flags of several processes and of restarts
PLOT = "log_probs.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_supervised.TrainingConfig):
    """A run that learns to prefer what people prefer."""

    data: DataConfig = dataclasses.field(
        metadata={"help": "mixture of preferences, lengths; batch_size counts prompts"}
    )
    loss: PreferenceLoss = dataclasses.field(
        default=PreferenceLoss(), metadata={"help": "what is minimised"}
    )
    pairs: str = dataclasses.field(
        default="best_worst",
        metadata={"help": "of K ranked answers: best_worst, best_rest (the best against each "
                  "other) or all (any two of different rank)"},
    )  # fmt: skip
    alarm_nats: float | None = dataclasses.field(
        default=10.0,
        metadata={"help": "alarm when the chosen answers of held-out pairs are on average so much "
                  "less likely than under the reference; None = never",
                  "unit": "nats an answer"},
    )  # fmt: skip
    reference_dir: str | None = dataclasses.field(
        default=None,
        metadata={"help": "folder of the reference's log-probs; None = "
                  f"CACHE_DIR/{_reference.FOLDER}"},
    )  # fmt: skip
    sample_decoding: DecodeConfig = dataclasses.field(
        default=DecodeConfig(), metadata={"help": "how samples are generated"}
    )
    num_samples: int = dataclasses.field(
        default=8, metadata={"help": "samples shown at each evaluation", "unit": "samples"}
    )

    def __post_init__(self) -> None:
        """Raises UserError for settings that cannot work."""
        super().__post_init__()
        self.loss.check()
        if self.pairs not in PAIRS:
            raise UserError(
                f"dpo.Config.pairs = {self.pairs!r} must be one of {', '.join(PAIRS)}."
                f"{did_you_mean(self.pairs, PAIRS)}"
            )
        if self.alarm_nats is not None and self.alarm_nats <= 0:
            raise UserError(
                f"dpo.Config.alarm_nats = {self.alarm_nats} must be above 0; None turns it off."
            )
        if LOSSES[self.loss.loss].needs_kl and self.microbatches > 1:
            raise UserError(
                f"MICROBATCHES = {self.microbatches} does not go with the loss {self.loss.loss}: "
                "its reference point is a mean over the whole batch. Set it to 1 and lower "
                "BATCH_SIZE, or choose another loss."
            )
        _preferences.check_data(self.data)


@dataclasses.dataclass(frozen=True)
class Parts(_preferences.Parts):
    """A language model, preferences, a loss on pairs, and what the reference says of them."""

    reference: _reference.Reference | None = None  # None: the loss needs none
    prompts: EvalLoader | None = None  # of the samples

    @property
    def columns(self) -> int:
        """Answers that are computed for each prompt."""
        return self.loader.columns

    def prepare(self) -> None:
        """Reads the reference's log-probs, or computes and stores them."""
        if self.reference is None:
            return
        loaders = [loader for loader in (self.loader, self.evaluation) if loader is not None]
        _reference.fill(
            self.reference, loaders, self.model, self.mesh, answers_of, self.config.microbatches
        )

    def initial_weights(self, abstract: Any) -> Any:
        """Returns the weights of the reference: of the very checkpoint its log-probs are of."""
        if self.reference is None:
            return super().initial_weights(abstract)
        return _run_folder.load_weights(
            self.reference.checkpoint,
            self.model,
            abstract,
            self.mesh,
            use_ema=self.reference.use_ema,
        )

    def figures(
        self, log_probs_PC: Any, reference_PC: Any, lengths_PC: Any, ranks_PK: Any
    ) -> tuple[dict[str, jax.Array], jax.Array, Any]:
        """Returns figures as sums over prompts, their weight, and the terms of all pairs."""
        terms, weights = pair_terms(
            log_probs_PC,
            None if self.reference is None else reference_PC,
            lengths_PC,
            ranks_PK,
            self.config.loss,
            best_only=self.config.pairs == "best_rest",
        )
        return *pair_figures(terms, weights, self.config.alarm_nats), terms

    def loss_fn(self) -> LossFn:
        """Returns the loss over prompts, with its metrics as sums and weights."""

        def loss_fn(params: Any, batch: Mapping[str, jax.Array], dropout_key: Any) -> tuple:
            log_probs_PC = answer_log_probs(
                self.model, params, answers_of(batch), dropout_key=dropout_key, mesh=self.mesh
            )
            figures, weight, _ = self.figures(
                log_probs_PC, batch["reference"], batch["answer_lengths"], batch["ranks"]
            )
            one = jnp.ones((), jnp.float32)
            metrics = {name: (value, weight) for name, value in figures.items()}
            for name, lengths in (("target", "answer_lengths"), ("input", "prompt_lengths")):
                total = jnp.sum(batch[lengths]).astype(jnp.float32)
                metrics[f"{name}_tokens"] = (total, one)
            return figures["loss"], weight, metrics

        return loss_fn

    def evaluator(self, writer: Writer) -> Callable[[TrainState, int], Mapping[str, float]]:
        """Returns the `evaluate` of `fit`: figures, pairs.json, samples, and the alarm."""
        score = jax.jit(
            lambda params, batch: answer_log_probs(
                self.model, params, answers_of(batch), mesh=self.mesh
            )
        )
        samples = None
        if self.prompts is not None:
            samples = _samples.Samples(self.config, self.vocabulary, self.model, self.prompts)

        def evaluate(state: TrainState, step: int) -> Mapping[str, float]:
            found: dict[str, float] = {}
            if self.evaluation is not None:
                found, gaps = self.evaluation_figures(score, state.params)
                _preferences.write_gaps(self.config.model_dir, step, gaps)
                if found.get("eval/alarm"):
                    fall = found["eval/chosen_fall"]
                    writer.say(f"WARNING: step {step:,}: {alarm_text(fall, self.config)}")
            if samples is not None:
                writer.write_samples(step, samples(state.params))
            return found

        return evaluate

    def evaluation_figures(
        self, score: Callable[..., Any], params: Any
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Returns the figures of the held-out pairs, and the rows of accuracy by gap."""
        log_probs, reference, lengths, ranks = self.held_out(
            score, params, "reference", "answer_lengths", "ranks"
        )
        sums, weight, terms = jax.device_get(self.figures(log_probs, reference, lengths, ranks))
        found = {f"eval/{name}": float(value / weight) for name, value in sums.items()}
        # Of any pair (i, j) the chosen reward is that of i.
        pairs = preferences.pairs_of(
            np.asarray(terms.chosen_reward)[:, :, 0], ranks, lengths[:, : ranks.shape[1]]
        )
        found |= _preferences.pair_figures(pairs)
        limit = self.config.alarm_nats
        if limit is not None and "eval/chosen_fall" in found:
            found["eval/alarm"] = float(found["eval/chosen_fall"] > limit)
        return found, preferences.by_gap(pairs.gap)

    def facts(self) -> dict[str, Any]:
        """Returns derived numbers, printed once at the start."""
        if self.reference is None:
            return {**super().facts(), "reference": f"none: {self.config.loss.loss} needs none"}
        file, _ = self.reference.file(self.loader, self.config.model)
        state = "stored" if file.exists() else "not computed yet"
        return {
            **super().facts(),
            "reference": f"{self.reference.checkpoint}; its log-probs ({state}): {file}",
        }

    def meta(self) -> dict[str, Any]:
        """Returns what every checkpoint says about its run."""
        if self.reference is None:
            return super().meta()
        return {**super().meta(), "reference": self.reference.identity}

    def sections(self, folder: pathlib.Path) -> list[report.Section]:
        """What became of the chosen and rejected answers, with every alarm; accuracy by gap."""
        sections = _preferences.gap_sections(folder)
        if self.reference is None:
            return sections
        rows = read_rows(folder / METRICS)
        text = [
            "How much more likely (nats a whole answer) answers have become than under the "
            "reference. Below 0 they are less likely; the margin can grow while both fall."
        ]
        if plots.against_reference(folder / plots.PLOTS / PLOT, rows):
            text.insert(0, f"![log-probs against the reference]({plots.PLOTS}/{PLOT})")
        alarms = [row for row in rows if row.get("eval/alarm")]
        if alarms:
            steps = ", ".join(f"{row['step']:,}" for row in alarms)
            fall = alarms[-1]["eval/chosen_fall"]
            text.append(f"**Alarm** at step {steps}: {alarm_text(fall, self.config)}")
        return [report.Section("Chosen and rejected answers", text="\n\n".join(text)), *sections]


def alarm_text(fall: float, config: Config) -> str:
    """Returns what a fall of the chosen answers means and what helps."""
    return (
        f"the chosen answers of held-out pairs are {fall:.1f} nats less likely than under the "
        f"reference (alarm_nats = {config.alarm_nats:g}). The model is unlearning them, whatever "
        "the accuracy says: set preference_losses.PreferenceLoss.nll_weight = 1.0 or "
        "PreferenceLoss.loss = 'dpop', lower LEARNING_RATE, or train fewer steps."
    )


def assemble(config: Config) -> Parts:
    """Opens and checks everything. Writes nothing, allocates no parameters.

    Raises:
        UserError: anything that would stop the run later.
    """
    needs = LOSSES[config.loss.loss]

    def make_loader(data: DataConfig, vocabulary: Vocabulary, shuffle: bool = True) -> PairLoader:
        return PairLoader(
            data, vocabulary, pairs=config.pairs, foreign=needs.needs_kl, shuffle=shuffle
        )

    vocabulary, mesh, loader, evaluation = _preferences.open_data(config, make_loader)
    reference = None
    if needs.needs_reference:
        reference = _reference.open_reference(config)
        _check_same_reference(config, reference)
    prompts = None
    if config.num_samples:
        split = config.eval_split or config.data.split
        data = dataclasses.replace(config.data, split=split)
        objective = Objective(
            ObjectiveConfig(name="seq2seq", truncate_inputs="left"),
            vocabulary,
            config.model.architecture,
        )
        prompts = EvalLoader(data, objective, open_sources(data, vocabulary))
    return Parts(
        config, vocabulary, build(config.model), mesh, loader, evaluation, reference, prompts
    )


def _check_same_reference(config: Config, reference: _reference.Reference) -> None:
    """Raises UserError when the run in MODEL_DIR has been learning against another reference."""
    if not committed_steps(pathlib.Path(config.model_dir) / checkpoints.FOLDER):
        return
    before = checkpoints.read_meta(config.model_dir).get("reference")
    if before != reference.identity:
        raise UserError(
            f"INIT_FROM = {config.init_from} is not the reference that the run in MODEL_DIR = "
            f"{config.model_dir} began with (its newest checkpoint is another one now, or the path "
            "is). Give that checkpoint, INIT_FROM=.../checkpoints/STEP, or start in a new folder: "
            "--gin.MODEL_DIR=..."
        )


def run(config: Config) -> None:
    """Trains in MODEL_DIR, or continues there."""
    _supervised.run(config, title="Preference optimisation", assemble=assemble)


def dry_run(config: Config) -> None:
    """Checks everything, shows two prompts and the costs; writes nothing."""
    _supervised.dry_run(config, assemble=assemble)
