"""The supervised loss of any model: what the train step differentiates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError
from chatyuan.ops import losses

Metrics = dict[str, tuple[jax.Array, jax.Array]]
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


def supervised_loss(model: Any, loss_config: LossConfig | None = None) -> LossFn:
    """Returns `loss_fn(params, batch, dropout_key) -> (loss_sum, weight_sum, metrics)`.

    The gradient of a batch is that of `loss_sum / weight_sum`. `metrics` maps a name to
    (sum, weight): loss (negative log likelihood alone, nats per target token), accuracy, z_loss,
    max_z_loss where it is on, and the counts (n, 1) target_tokens (those with a loss weight) and
    input_tokens (all other real tokens of the encoder and the decoder).

    Args:
      model: a model of `chatyuan.models.build`.
      loss_config: the regularisers; None = LossConfig().
    """
    config = loss_config or LossConfig()

    def loss_fn(
        params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        module = model.bind(params)
        hidden_BTD = module.hidden(batch, dropout_key=dropout_key)
        weights_BT = batch["decoder_loss_weights"].astype(jnp.float32)
        sums = losses.cross_entropy(
            module.logits(hidden_BTD),
            batch["decoder_target_tokens"],
            weights_BT,
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


def eval_loss(model: Any, loss_config: LossConfig | None = None) -> Callable[..., Any]:
    """Returns `loss_fn(params, batch) -> (loss_sum, weight_sum, metrics)` without dropout."""
    loss_fn = supervised_loss(model, loss_config)

    def without_dropout(params: Any, batch: Mapping[str, jax.Array]) -> tuple:
        return loss_fn(params, batch, None)

    return without_dropout


def _token_counts(batch: Mapping[str, jax.Array]) -> Metrics:
    """Counts (n, 1) whose sum is every token that is not padding."""
    one = jnp.ones((), jnp.float32)
    target_count = jnp.sum((batch["decoder_loss_weights"] > 0).astype(jnp.float32))
    real_count = jnp.sum((batch["decoder_segment_ids"] > 0).astype(jnp.float32))
    if "encoder_segment_ids" in batch:
        real_count += jnp.sum((batch["encoder_segment_ids"] > 0).astype(jnp.float32))
    return {"target_tokens": (target_count, one), "input_tokens": (real_count - target_count, one)}
