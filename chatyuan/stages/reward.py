"""Train a reward model on preferences: rows of a prompt and its ranked answers.

1. The backbone starts from INIT_FROM (a tuned model, or another reward model), the head afresh.
2. The encoder runs once a prompt for all its answers, and all pairs of a prompt are one gradient.
3. Each evaluation also measures mean and deviation of the rewards of held-out answers; they are
   stored in the checkpoint, and what reads the model later normalises by them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan import sharding
from chatyuan.align.answers import reward_scores
from chatyuan.data.loader import DataConfig
from chatyuan.errors import UserError, did_you_mean
from chatyuan.evaluate import preferences
from chatyuan.metrics import Writer
from chatyuan.models import Model, build
from chatyuan.models.loss import LossFn
from chatyuan.models.reward import BACKBONE, Normalisation, RewardModel
from chatyuan.ops.reward_losses import RANKINGS, reward_loss
from chatyuan.stages import _preferences, _run_folder, _supervised
from chatyuan.stages._preferences import answers_of
from chatyuan.train.state import TrainState

TRAINS = True  # takes the flags of several processes and of restarts
NORMALISATIONS = ("answers", "chosen", "none")


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
        _preferences.check_data(self.data)


class Parts(_preferences.Parts):
    """A reward model, its preferences and its loss."""

    reads_end: ClassVar[bool] = True

    @property
    def language_model(self) -> Model:
        """The backbone."""
        return self.model.backbone

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
        params = _run_folder.load_weights(
            origin,
            language,
            sharding.with_shardings(shapes, places),
            self.mesh,
            use_ema=self.config.init_from_ema,
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
            held_out = self.held_out(score, state.params, "ranks", "answer_lengths")
            found, gaps = evaluation_figures(self.config, *held_out)
            _preferences.write_gaps(self.config.model_dir, step, gaps)
            return found

        return evaluate

    def meta(self) -> dict[str, Any]:
        """Returns what every checkpoint says about its run."""
        return {**super().meta(), "kind": _run_folder.REWARD_MODEL}


def evaluation_figures(
    config: Config, scores_NK: np.ndarray, ranks_NK: np.ndarray, lengths_NK: np.ndarray
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns the figures of an evaluation, and the rows of accuracy by gap.

    Args:
      config: of the run.
      scores_NK, ranks_NK, lengths_NK: see `chatyuan.evaluate.preferences.pairs_of`.
    """
    pairs = preferences.pairs_of(scores_NK, ranks_NK, lengths_NK)
    loss = float(np.mean(np.logaddexp(0.0, -pairs.gap)))
    figures = {"eval/loss": loss, **_preferences.pair_figures(pairs)}
    if config.normalisation != "none":
        chosen = lengths_NK > 0
        if config.normalisation == "chosen":
            chosen &= ranks_NK == 0
        values = scores_NK[chosen].astype(np.float64)
        figures |= Normalisation(float(values.mean()), float(values.std())).figures()
    return figures, preferences.by_gap(pairs.gap)


def assemble(config: Config) -> Parts:
    """Opens and checks everything. Writes nothing, allocates no parameters.

    Raises:
        UserError: anything that would stop the run later.
    """
    vocabulary, mesh, loader, evaluation = _preferences.open_data(config)
    return Parts(config, vocabulary, RewardModel(config.model), mesh, loader, evaluation)


def run(config: Config) -> None:
    """Trains in MODEL_DIR, or continues there."""
    _supervised.run(config, title="Reward model", assemble=assemble)


def dry_run(config: Config) -> None:
    """Checks everything, shows two prompts and the costs; writes nothing."""
    _supervised.dry_run(config, assemble=assemble)
