"""A reward model, which is also a critic: the backbone of a language model and a scalar head.

1. The head reads the decoder's output: one number per position. An answer's reward is the number
   where the decoder's INPUT is its end token, so the row holds one input more than the answer.
2. The head starts as N(0, 1 / (D + 1)), bias 0 (Stiennon et al. 2020, arXiv:2009.01325; Huang et
   al. 2024, arXiv:2403.17031), in float32; it is trained in full whatever is frozen below it.
3. The backbone is that of the tuned model without its output matrix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError
from chatyuan.models.config import ModelConfig
from chatyuan.models.initializers import Initializer, normal
from chatyuan.models.language_model import Batch
from chatyuan.models.model import Model, Params, build
from chatyuan.ops.matmul import linear

Array = jax.Array
BACKBONE, HEAD = "backbone", "head"


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model without parameters: hashable, as `chatyuan.models.Model`.

    Parameters are {"backbone": ..., "head": {"kernel": [D], "bias": []}}.
    """

    config: ModelConfig

    @property
    def backbone(self) -> Model:
        """The language model below the head; tied, so that it has no output matrix."""
        return build(dataclasses.replace(self.config, tie_embeddings=True))

    @property
    def num_params(self) -> int:
        """The number of trained values."""
        return self.backbone.num_params + self.config.embed_dim + 1

    def abstract_params(self) -> Params:
        """Returns the parameters as `jax.ShapeDtypeStruct`s."""
        head = {
            "kernel": jax.ShapeDtypeStruct((self.config.embed_dim,), jnp.float32),
            "bias": jax.ShapeDtypeStruct((), jnp.float32),
        }
        return {BACKBONE: self.backbone.abstract_params(), HEAD: head}

    def logical_axes(self) -> Params:
        """Returns the tree of parameters with, at each leaf, the tuple of its axis names."""
        return {
            BACKBONE: self.backbone.logical_axes(),
            HEAD: {"kernel": ("embed",), "bias": ()},
        }

    def init(self, key: Array, shardings: Params | None = None) -> Params:
        """Returns random parameters; arguments as `Model.init`."""
        places = shardings or {BACKBONE: None, HEAD: None}
        return {
            BACKBONE: self.backbone.init(key, places[BACKBONE]),
            HEAD: self.init_head(key, places[HEAD]),
        }

    def init_head(self, key: Array, shardings: Params | None = None) -> Params:
        """Returns a fresh head, placed as told."""
        places = shardings or {"kernel": None, "bias": None}
        width = self.config.embed_dim
        draw = normal((width + 1) ** -0.5).draw
        return {
            "kernel": draw(key, "head/kernel", (width,), places["kernel"]),
            "bias": Initializer("ones", 0.0).draw(key, "head/bias", (), places["bias"]),
        }

    def on_language_model(self, params: Params, head: Params) -> Params:
        """Returns the parameters of a reward model on the weights of a language model.

        Args:
            params: of `build(config)`; its output matrix is left out.
            head: of `init_head`.
        """
        backbone = {name: value for name, value in params.items() if name != "logits_dense"}
        return {BACKBONE: backbone, HEAD: head}

    def values(
        self,
        params: Params,
        batch: Batch,
        *,
        dropout_key: Array | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Array:
        """Returns the head's number at every decoder position, float32 [R, T].

        As a critic, the value at position t is that of the state before token t + 1 of the answer.

        Args:
            params: see the class.
            batch: see `chatyuan.align.answers.batch_of` with `reads_end`.
            dropout_key: None when not training.
            mesh: over which parameters and batch are split; None = one device.
        """
        module = self.backbone.bind(params[BACKBONE])
        hidden_RTD = module.hidden(batch, dropout_key=dropout_key, mesh=mesh)
        return head_values(params[HEAD], hidden_RTD)

    def score(
        self,
        params: Params,
        batch: Batch,
        *,
        dropout_key: Array | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Array:
        """Returns one reward per answer, float32 [R], raw (see `Normalisation`).

        Arguments as `values`. Read at the last real input of each row, its end token; a row that is
        all padding has a finite score without meaning.
        """
        values_RT = self.values(params, batch, dropout_key=dropout_key, mesh=mesh)
        return jnp.take_along_axis(values_RT, last_inputs(batch)[:, None], axis=1)[:, 0]


def head_values(head: Params, hidden: Array) -> Array:
    """Returns the head's number at each state `[..., D]`, float32 `[...]`."""
    return linear(hidden.astype(jnp.float32), head["kernel"][:, None])[..., 0] + head["bias"]


def last_inputs(batch: Batch) -> Array:
    """Returns the index of each decoder row's last real input, int32 [R]."""
    live = batch["decoder_segment_ids"] > 0
    place = jnp.arange(live.shape[1], dtype=jnp.int32)[None, :]
    return jnp.max(jnp.where(live, place, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What brings rewards to mean 0 and deviation 1 on the answers of the model to be improved."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, scores: Array) -> Array:
        """Returns normalised rewards."""
        return (scores - self.mean) / self.std

    def figures(self) -> dict[str, float]:
        """Returns it as evaluation figures, which a checkpoint keeps."""
        return {"reward/mean": self.mean, "reward/std": self.std}


def read_normalisation(path: str, meta: dict[str, Any]) -> Normalisation:
    """Returns the normalisation in a checkpoint of a reward model.

    Args:
        path: the run or checkpoint, for the message.
        meta: of `chatyuan.checkpoints.read_meta`.

    Raises:
        UserError: the checkpoint has none, or a degenerate one.
    """
    figures = meta.get("metrics") or {}
    mean, std = figures.get("reward/mean"), figures.get("reward/std")
    if mean is None or std is None or not std > 0:
        found = "has no mean and deviation of its rewards" if std is None else f"has std = {std}"
        raise UserError(
            f"The reward model {path} {found}: a checkpoint between two evaluations, or "
            "normalisation was 'none'. Take the last checkpoint of `python run.py reward`, or use "
            "raw rewards on purpose (mean 0, std 1)."
        )
    return Normalisation(float(mean), float(std))
