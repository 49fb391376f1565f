"""Train a reward model on preferences: rows of a prompt and its ranked answers.

1. The backbone starts from INIT_FROM (a tuned model, or another reward model), the head afresh.
2. The encoder runs once a prompt for all its answers, and all pairs of a prompt are one gradient.
3. Each evaluation also measures mean and deviation of the rewards of held-out answers; they are
   stored in the checkpoint, and what reads the model later normalises by them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan import checkpoints, configs, plots, report, sharding
from chatyuan.align.answers import Answers, reward_scores
from chatyuan.data.loader import DataConfig
from chatyuan.data.preferences import PreferenceLoader
from chatyuan.errors import UserError, did_you_mean
from chatyuan.evaluate import preferences
from chatyuan.metrics import Writer, quantity
from chatyuan.models import build
from chatyuan.models.config import flops_per_example
from chatyuan.models.loss import LossFn
from chatyuan.models.reward import BACKBONE, Normalisation, RewardModel
from chatyuan.ops.platform import target_platform
from chatyuan.ops.reward_losses import RANKINGS, reward_loss
from chatyuan.planning import memory
from chatyuan.stages import _run_folder, _supervised
from chatyuan.train.state import TrainState

TRAINS = True  # takes the flags of several processes and of restarts
NORMALISATIONS = ("answers", "chosen", "none")
PAIRS_FILE, PLOT = "pairs.json", "accuracy_by_gap.png"


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """What training minimises; see `chatyuan.ops.reward_losses.reward_loss`."""

    ranking: str = dataclasses.field(
        default="pairwise",
        metadata={"help": "pairwise (Bradley-Terry over all pairs) or plackett_luce (the order)"},
    )
    margin: float = dataclasses.field(
        default=0.0,
        metadata={"help": "times the difference of the data's scores (the margin of a pair): by "
                  "how much the better answer must win; pairwise only"},
    )  # fmt: skip
    centering: float = dataclasses.field(
        default=0.0, metadata={"help": "weight of (sum of a pair's scores)^2, 0.01 say; 0 = off"}
    )

    def __post_init__(self) -> None:
        """Raises UserError for what does not go together."""
        if self.ranking not in RANKINGS:
            raise UserError(
                f"RewardLossConfig.ranking = {self.ranking!r} must be one of "
                f"{', '.join(RANKINGS)}.{did_you_mean(self.ranking, RANKINGS)}"
            )
        if self.margin < 0 or self.centering < 0:
            raise UserError("RewardLossConfig.margin and .centering must be at least 0.")
        if self.margin and self.ranking != "pairwise":
            raise UserError("RewardLossConfig.margin needs ranking = 'pairwise'; set it to 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_supervised.TrainingConfig):
    """A run that learns what people prefer."""

    data: DataConfig = dataclasses.field(
        metadata={"help": "mixture of preferences, lengths; batch_size counts prompts"}
    )
    loss: RewardLossConfig = dataclasses.field(
        default=RewardLossConfig(), metadata={"help": "what is minimised"}
    )
    normalisation: str = dataclasses.field(
        default="answers",
        metadata={"help": "held-out rewards whose mean and deviation are stored: of all answers, "
                  "of the chosen ones (best of a prompt), or none"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises UserError for settings that cannot work."""
        super().__post_init__()
        if self.normalisation not in NORMALISATIONS:
            raise UserError(
                f"normalisation = {self.normalisation!r} must be one of "
                f"{', '.join(NORMALISATIONS)}.{did_you_mean(self.normalisation, NORMALISATIONS)}"
            )
        if self.eval_split is None and self.normalisation != "none":
            raise UserError(
                "eval_split = None leaves nothing to measure the normalisation on; name a split, "
                "or set reward.Config.normalisation = 'none'."
            )
        for name in ("batch_ramp", "concatenate"):
            if getattr(self.data, name):
                raise UserError(f"DataConfig.{name} does not apply to preferences; leave it out.")


def answers_of(batch: Mapping[str, jax.Array]) -> Answers:
    """Returns the prompts and answers of a batch of `PreferenceLoader`."""
    return Answers(
        batch["prompts"], batch["prompt_lengths"], batch["answers"], batch["answer_lengths"]
    )


class Parts(_supervised.Parts):
    """A reward model, its preferences and its loss."""

    def loss_fn(self) -> LossFn:
        """Returns the loss over prompts, with its metrics as sums and weights."""
        loss, model, mesh = self.config.loss, self.model, self.mesh

        def loss_fn(params: Any, batch: Mapping[str, jax.Array], dropout_key: Any) -> tuple:
            scores_PK = reward_scores(
                model, params, answers_of(batch), dropout_key=dropout_key, mesh=mesh
            )
            given_PK = batch["scores"]
            margins = loss.margin * (given_PK[:, :, None] - given_PK[:, None, :])
            sums = reward_loss(
                scores_PK,
                batch["ranks"],
                batch["answer_lengths"] > 0,
                ranking=loss.ranking,
                margins_BKK=margins if loss.margin else None,
                centering=loss.centering,
            )
            one = jnp.ones((), jnp.float32)
            metrics = {
                "loss": (sums.ranking, sums.weight),
                "accuracy": (sums.accuracy, sums.weight),
                "score_margin": (sums.margin, sums.weight),
                "target_tokens": (jnp.sum(batch["answer_lengths"]).astype(jnp.float32), one),
                "input_tokens": (jnp.sum(batch["prompt_lengths"]).astype(jnp.float32), one),
            }
            if loss.centering:
                metrics["centering"] = (sums.centering, sums.weight)
            return sums.total, sums.weight, metrics

        return loss_fn

    def initial_weights(self, abstract: Any) -> Any:
        """Returns the weights of INIT_FROM below a fresh head, or all of a reward model's."""
        origin = self.config.init_from
        if origin is None or _run_folder.read_meta(origin).get("kind") == _run_folder.REWARD_MODEL:
            return super().initial_weights(abstract)
        language = build(self.config.model)
        shapes = language.abstract_params()
        places = sharding.shardings(shapes, language.logical_axes(), self.mesh)
        places |= jax.tree.map(lambda leaf: leaf.sharding, abstract[BACKBONE])
        params = checkpoints.load_params(
            origin, sharding.with_shardings(shapes, places), use_ema=self.config.init_from_ema
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract["head"])
        head = self.model.init_head(jax.random.key(self.config.seed), places)
        return self.model.on_language_model(params, head)

    def evaluator(self, writer: Writer) -> Callable[[TrainState, int], Mapping[str, float]]:
        """Returns the `evaluate` of `fit`: figures, and the table by gap in pairs.json."""
        score = jax.jit(
            lambda params, batch: reward_scores(
                self.model, params, answers_of(batch), mesh=self.mesh
            )
        )

        def evaluate(state: TrainState, step: int) -> Mapping[str, float]:
            if self.evaluation is None:
                return {}
            found, gaps = evaluation_figures(self.config, *self._held_out(score, state.params))
            text = json.dumps({"step": step, "by_gap": gaps}, indent=1) + "\n"
            _run_folder.write_whole(pathlib.Path(self.config.model_dir) / PAIRS_FILE, text)
            return found

        return evaluate

    def _held_out(self, score: Callable[..., Any], params: Any) -> tuple[np.ndarray, ...]:
        """(scores, ranks, lengths), each [N, K], of the held-out prompts."""
        columns = []
        for batch in _supervised.spread(self.evaluation, self.config.eval_batches):
            scores = np.asarray(score(params, sharding.shard_batch(batch, self.mesh)))
            real = batch["rows"] >= 0
            columns.append([scores[real], batch["ranks"][real], batch["answer_lengths"][real]])
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))

    def flops_per_step(self, step: int = 0) -> float:
        """Returns the FLOPs of one optimizer step: each prompt once, each of its answers."""
        data, model = self.config.data, self.config.model
        prompts, reads = data.input_length, data.target_length + 1
        head = 6.0 * model.embed_dim * model.vocab_size
        if model.architecture == "prefix_lm":
            length = prompts + reads
            row = flops_per_example(model, prompts, reads) - head * length
            return data.batch_size * self.loader.answers * row
        encoder = flops_per_example(model, prompts, 0)
        answer = flops_per_example(model, prompts, reads) - encoder - head * reads
        return data.batch_size * (encoder + self.loader.answers * answer)

    def facts(self) -> dict[str, Any]:
        """Returns derived numbers, printed once at the start."""
        data, loader = self.config.data, self.loader
        left_out = ", ".join(f"{n} {why}" for why, n in sorted(loader.dropped.items())) or "none"
        return {
            "parameters": self.model.num_params,
            "preferences": f"{len(loader.kept):,} prompts of up to {loader.answers} answers; "
            f"left out: {left_out}",
            "batch": f"{data.batch_size} prompts x ({data.input_length} + {loader.answers} x "
            f"{data.target_length}) tokens, {self.config.microbatches} microbatch(es)",
            "FLOPs per step": quantity(self.flops_per_step()),
            "steps": self.config.loop.train_steps,
            "devices": _supervised.described(self.mesh),
        }

    def predicted(self, state: Any) -> memory.Memory:
        """As a language model with a row per answer; more than is needed for shared prompts."""
        backbone = self.model.backbone
        state = memory.abstract_state(
            backbone, self.config.optimizer, self.config.ema_decay is not None
        )
        data = self.config.data
        return memory.predict(
            backbone,
            state,
            self.mesh,
            batch_size=data.batch_size * self.loader.answers,
            lengths=(data.input_length, data.target_length + 1),
            platform=target_platform(),
            strategy=self.config.sharding,
            microbatches=self.config.microbatches,
        )[0]

    def meta(self) -> dict[str, Any]:
        """Returns what every checkpoint says about its run."""
        return {**super().meta(), "kind": _run_folder.REWARD_MODEL}

    def report(self, title: str, step: int) -> None:
        """Writes report.md with the accuracy by gap."""
        folder = pathlib.Path(self.config.model_dir)
        rows = [
            {"source": str(cache.path), "prompts": len(cache.features["ranks"].lengths)}
            for cache in self.loader.caches
        ]
        report.write_report(
            folder,
            title=title,
            config_text=(folder / configs.GIN_NAME).read_text(encoding="utf-8"),
            data_table=rows,
            facts=self.facts(),
            sections=_gap_sections(folder),
        )

    def rendered(self, count: int) -> list[str]:
        """Returns the first prompts of the first batch, their answers with ranks."""
        batch, decode = self.loader.batch(0), self.vocabulary.decode
        texts = []
        for p in range(min(count, len(batch["prompts"]))):
            lines = [f"prompt: {decode(batch['prompts'][p][: batch['prompt_lengths'][p] - 1])}"]
            for k in np.flatnonzero(batch["answer_lengths"][p]):
                tokens = batch["answers"][p, k][: batch["answer_lengths"][p, k] - 1]
                lines.append(f"  rank {batch['ranks'][p, k]}: {decode(tokens)}")
            texts.append("\n".join(lines))
        return texts


def evaluation_figures(
    config: Config, scores_NK: np.ndarray, ranks_NK: np.ndarray, lengths_NK: np.ndarray
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns the figures of an evaluation, and the rows of accuracy by gap.

    Args:
      config: of the run.
      scores_NK, ranks_NK, lengths_NK: see `chatyuan.evaluate.preferences.pairs_of`.
    """
    pairs = preferences.pairs_of(scores_NK, ranks_NK, lengths_NK)
    count, right = len(pairs.gap), preferences.accuracy(pairs.gap)
    low, high = preferences.wilson(right * count, count)
    figures = {
        "eval/loss": float(np.mean(np.logaddexp(0.0, -pairs.gap))),
        "eval/accuracy": right,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/pairs": float(count),
        "eval/calibration_error": preferences.calibration_error(pairs.gap),
        "eval/length_accuracy": preferences.length_accuracy(pairs.length_gap),
    }
    if config.normalisation != "none":
        chosen = lengths_NK > 0
        if config.normalisation == "chosen":
            chosen &= ranks_NK == 0
        values = scores_NK[chosen].astype(np.float64)
        figures |= Normalisation(float(values.mean()), float(values.std())).figures()
    return figures, preferences.by_gap(pairs.gap)


def _gap_sections(folder: pathlib.Path) -> list[report.Section]:
    """The table and the picture of the newest evaluation; nothing before the first."""
    path = folder / PAIRS_FILE
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["by_gap"]
    plots.accuracy_by_gap(folder / plots.PLOTS / PLOT, rows)
    text = (
        f"![accuracy by gap]({plots.PLOTS}/{PLOT})\n\nHeld-out pairs by the distance of their two "
        "scores, equally many in each row; low and high bound the 95% interval of Wilson."
    )
    shown = [
        {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
        for row in rows
    ]
    return [report.Section("Accuracy by gap of scores", text=text, table=shown)]


def assemble(config: Config) -> Parts:
    """Opens and checks everything. Writes nothing, allocates no parameters.

    Raises:
        UserError: anything that would stop the run later.
    """
    if jax.process_count() > 1:
        raise UserError("reward runs in one process, on any number of its devices.")
    vocabulary, mesh = _supervised.open_common(config, config.data.batch_size)
    split = [axis for axis in ("sequence", "stage") if mesh.shape[axis] > 1]
    if split:
        raise UserError(
            f"MESH splits {' and '.join(split)}, which reward cannot; use data, fsdp and tensor."
        )
    if config.model.sequence_parallel:
        raise UserError("ModelConfig.sequence_parallel does not apply to reward; set it to False.")
    loader = PreferenceLoader(config.data, vocabulary)
    evaluation = None
    if config.eval_split is not None:
        _supervised.check_eval_split(config)
        held_out = dataclasses.replace(config.data, split=config.eval_split)
        evaluation = PreferenceLoader(held_out, vocabulary, shuffle=False)
    return Parts(config, vocabulary, RewardModel(config.model), mesh, loader, evaluation)


def run(config: Config) -> None:
    """Trains in MODEL_DIR, or continues there."""
    _supervised.run(config, title="Reward model", assemble=assemble)


def dry_run(config: Config) -> None:
    """Checks everything, shows two prompts and the costs; writes nothing."""
    _supervised.dry_run(config, assemble=assemble)
