"""The supervised loss of any model: what the train step differentiates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.linear_cross_entropy import linear_cross_entropy, token_log_probs

Metrics = dict[str, tuple[jax.Array, jax.Array]]
NORMALIZATIONS = ("token", "sequence")
LossFn = Callable[[Any, Mapping[str, jax.Array], Any], tuple[jax.Array, jax.Array, Metrics]]


@dataclass(frozen=True)
class LossConfig:
    """Regularisers of the token loss; see `chatyuan.ops.losses.cross_entropy`."""

    z_loss: float = field(
        default=1e-4,
        metadata={"help": "coefficient of logsumexp(logits)^2 per token, as T5X; 0 = off"},
    )
    max_z_loss: float = field(
        default=0.0,
        metadata={"help": "coefficient of max(logits)^2 per token, as Baichuan 2 (2e-4); 0 = off"},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "probability moved from the target to the other pieces, in [0, 1)"},
    )
    normalization: str = field(
        default="token",
        metadata={
            "help": "what counts alike: every target token, or every sequence (T5X's "
            "AVERAGE_PER_SEQUENCE: short answers are not drowned by long ones)"
        },
    )

    def __post_init__(self) -> None:
        """Raises UserError for coefficients outside their range."""
        for name in ("z_loss", "max_z_loss"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"LossConfig.{name} = {getattr(self, name)} is negative; use 0 to turn it off."
                )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"LossConfig.label_smoothing = {self.label_smoothing} is outside [0, 1); "
                "use 0 to turn it off or 0.1 as in machine translation."
            )
        if self.normalization not in NORMALIZATIONS:
            raise UserError(
                f"LossConfig.normalization = {self.normalization!r} must be one of "
                f"{', '.join(NORMALIZATIONS)}.{did_you_mean(self.normalization, NORMALIZATIONS)}"
            )


def supervised_loss(
    model: Any, loss_config: LossConfig | None = None, mesh: Mesh | None = None
) -> LossFn:
    """Returns `loss_fn(params, batch, dropout_key) -> (loss_sum, weight_sum, metrics)`.

    The gradient of a batch is that of `loss_sum / weight_sum`. `metrics` maps a name to
    (sum, weight): loss (negative log likelihood alone, nats per target token), accuracy, z_loss,
    max_z_loss where it is on, and the counts (n, 1) target_tokens (those with a loss weight) and
    input_tokens (all other real tokens of the encoder and the decoder).

    The logits of a batch never exist together: see `chatyuan.ops.linear_cross_entropy`.

    Args:
      model: a model of `chatyuan.models.build`.
      loss_config: the regularisers; None = LossConfig().
      mesh: over which parameters and batch are split; None = one device.
    """
    config = loss_config or LossConfig()
    mesh = _split(mesh)

    def loss_fn(
        params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        module = model.bind(params)
        hidden_BTD = module.hidden(batch, dropout_key=dropout_key, mesh=mesh)
        weights_BT = batch["decoder_loss_weights"].astype(jnp.float32)
        if config.normalization == "sequence":
            weights_BT = per_sequence(weights_BT, batch["decoder_segment_ids"])
        sums = linear_cross_entropy(
            module.head_inputs(hidden_BTD),
            module.head_kernel(),
            batch["decoder_target_tokens"],
            weights_BT,
            norm_head=model.config.norm_head,
            mesh=mesh,
            z_loss=config.z_loss,
            max_z_loss=config.max_z_loss,
            label_smoothing=config.label_smoothing,
        )
        metrics = {
            "loss": (sums.nll, sums.weight),
            "accuracy": (sums.correct, sums.weight),
            "z_loss": (sums.z_loss, sums.weight),
            **_token_counts(batch),
        }
        if config.max_z_loss:
            metrics["max_z_loss"] = (sums.max_z_loss, sums.weight)
        return sums.total, sums.weight, metrics

    return loss_fn


def per_sequence(weights_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the weights divided by their sum over the sequence, so that each sequence counts 1.

    Args:
      weights_BT: float32 [B, T], 0 where nothing is learned.
      segment_ids_BT: int32 [B, T], contiguous from 1, 0 for padding; at most T sequences a row.
    """
    batch, length = weights_BT.shape
    rows_BT = jnp.arange(batch, dtype=jnp.int32)[:, None] * jnp.int32(length + 1) + segment_ids_BT
    totals = jax.ops.segment_sum(
        weights_BT.reshape(-1), rows_BT.reshape(-1), num_segments=batch * (length + 1)
    )
    total_BT = totals[rows_BT]
    return weights_BT / jnp.where(total_BT > 0, total_BT, jnp.float32(1))


def eval_loss(
    model: Any, loss_config: LossConfig | None = None, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """Returns `loss_fn(params, batch) -> (loss_sum, weight_sum, metrics)` without dropout."""
    loss_fn = supervised_loss(model, loss_config, mesh)

    def without_dropout(params: Any, batch: Mapping[str, jax.Array]) -> tuple:
        return loss_fn(params, batch, None)

    return without_dropout


def target_log_probs(model: Any, mesh: Mesh | None = None) -> Callable[..., jax.Array]:
    """Returns `score(params, batch, dropout_key=None)`: how likely the model finds each target.

    The score is the log-probability of `decoder_target_tokens` given what is before them, float32
    [B, T] in nats, 0 where `decoder_loss_weights` is 0: summed over a row, that of the answer. It
    is differentiable by the parameters with a cotangent per token, and no logits are kept.

    Args:
      model: a model of `chatyuan.models.build`.
      mesh: as in `supervised_loss`.
    """
    mesh = _split(mesh)

    def score(
        params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None
    ) -> jax.Array:
        module = model.bind(params)
        log_probs_BT = token_log_probs(
            module.head_inputs(module.hidden(batch, dropout_key=dropout_key, mesh=mesh)),
            module.head_kernel(),
            batch["decoder_target_tokens"],
            norm_head=model.config.norm_head,
            mesh=mesh,
        )
        return jnp.where(batch["decoder_loss_weights"] > 0, log_probs_BT, 0.0)

    return score


def _split(mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh, or None where it has one device and nothing is split."""
    return mesh if mesh is not None and mesh.size > 1 else None


def _token_counts(batch: Mapping[str, jax.Array]) -> Metrics:
    """Counts (n, 1) whose sum is every token that is not padding."""
    one = jnp.ones((), jnp.float32)
    target_count = jnp.sum((batch["decoder_loss_weights"] > 0).astype(jnp.float32))
    real_count = jnp.sum((batch["decoder_segment_ids"] > 0).astype(jnp.float32))
    if "encoder_segment_ids" in batch:
        real_count += jnp.sum((batch["encoder_segment_ids"] > 0).astype(jnp.float32))
    return {"target_tokens": (target_count, one), "input_tokens": (real_count - target_count, one)}
