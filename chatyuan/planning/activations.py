"""What the backward pass keeps, from the loss function itself: traced, never compiled.

1. `jax.vjp` of the very loss that is trained says which arrays lie between the forward and the
   backward pass, under the rematerialisation policy and with the attention that the device would
   get. Parameters among them are not counted again.
2. Their bytes are a linear function of rows and of layers, so traces of two row counts and of one
   and two layers give all sizes; tracing costs the same for 2 layers as for 96.
3. Tensor parallelism is the same model with fewer heads and a narrower feed-forward block.
4. While one layer is differentiated, what its policy did not keep is computed again, and gradients
   flow through its feed-forward block, in the places of what they have used: the larger of both is
   `layer_workspace`. The loss has one chunk of logits
   and the gradient of the hidden states: `loss_workspace`. Both are estimates of what XLA
   allocates; the rest is a count.
5. On CPU, XLA stores bfloat16 temporaries as float32: they count 4 bytes there.

XLA unrolls nothing here: with `scan_layers = False` it recomputes cheap elementwise results instead
of keeping them, and needs less than this (measured: by a fifth on CPU).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from chatyuan.models import build
from chatyuan.models.config import ModelConfig
from chatyuan.models.loss import LossConfig, supervised_loss
from chatyuan.ops.platform import targeting
from chatyuan.ops.vocabulary_chunks import chunk_of

_ROWS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that lie between forward and backward pass, per row of a device and whatever the rows.

    Attributes:
        row: of a row, outside the layers (embedded tokens, norms, the gradient of the last layer's
            output).
        encoder_row: of a row in an encoder layer.
        decoder_row: of a row in a decoder layer.
        encoder_copies: of a layer's weights in the compute dtype, independent of rows.
        decoder_copies: likewise.
    """

    row: float
    encoder_row: float
    decoder_row: float
    encoder_copies: float
    decoder_copies: float


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one device.

    Attributes:
        kept: what the backward pass needs of the forward pass.
        copies: weights in the compute dtype, kept with it.
        layer_workspace: the most that is alive while one layer is differentiated.
        loss_workspace: the most that is alive while the loss is computed.
    """

    kept: float
    copies: float
    layer_workspace: float
    loss_workspace: float

    @property
    def total(self) -> float:
        """All of it: both workspaces are never alive together."""
        return self.kept + self.copies + max(self.layer_workspace, self.loss_workspace)


def activations(
    config: ModelConfig,
    *,
    rows: float,
    lengths: tuple[int, int],
    loss: LossConfig,
    platform: str,
    tensor: int = 1,
    sequence: int = 1,
    stages: int = 1,
) -> Activations:
    """Returns the activations of one device in one microbatch.

    Args:
        config: the model.
        rows: of the microbatch on this device.
        lengths: (INPUT_LENGTH, TARGET_LENGTH).
        loss: its regularisers.
        platform: "cpu", "gpu" or "tpu": it decides the attention and the chunks of the loss.
        tensor: parts that heads, feed-forward block and vocabulary are split into.
        sequence: parts that every row is split into; keys and values are gathered.
        stages: parts that the layers are split into.
    """
    local = _local(config, tensor)
    policy = kept_of(local, lengths, loss, platform)
    everything = kept_of(dataclasses.replace(local, remat="none"), lengths, loss, platform)
    encoder, decoder = _layers(config)
    encoder, decoder = math.ceil(encoder / stages), math.ceil(decoder / stages)
    width = _width(config, platform)
    of_encoder, of_decoder = row_lengths(config, lengths)
    gathered = 0.0
    if sequence > 1 and config.remat != "full":
        keys = 2 * local.kv_heads * local.head_dim * width * (1 - 1 / sequence)
        gathered = rows * keys * (encoder * of_encoder + decoder * (of_decoder + of_encoder))
    per_row = policy.row + encoder * policy.encoder_row + decoder * policy.decoder_row
    copies = encoder * policy.encoder_copies + decoder * policy.decoder_copies
    of_layer = 0.0
    for all_of, some_of, length, layers in (
        (everything.encoder_row, policy.encoder_row, of_encoder, encoder),
        (everything.decoder_row, policy.decoder_row, of_decoder, decoder),
    ):
        if layers:
            flowing = (
                length
                * width
                * ((len(local.mlp_activations) + 1) * local.mlp_dim + 2 * local.embed_dim)
            )
            of_layer = max(of_layer, rows / sequence * max(all_of - some_of, flowing))
    tokens = max(1, math.ceil(rows * of_decoder / sequence))
    return Activations(
        kept=rows * per_row / sequence + gathered,
        copies=copies,
        layer_workspace=of_layer,
        loss_workspace=_loss_workspace(config, tokens, config.vocab_size // tensor, platform),
    )


@functools.lru_cache(maxsize=256)
def kept_of(config: ModelConfig, lengths: tuple[int, int], loss: LossConfig, platform: str) -> Kept:
    """Returns what autodiff keeps of this model's loss; see the module's text.

    Args:
        config: the model, or one device's part of it.
        lengths: (INPUT_LENGTH, TARGET_LENGTH).
        loss: its regularisers.
        platform: as in `activations`.
    """

    def of(encoder: int, decoder: int) -> tuple[float, float]:
        """(bytes of a row, bytes whatever the rows) of a model of so many layers."""
        small = dataclasses.replace(
            config, num_encoder_layers=encoder, num_decoder_layers=decoder, scan_layers=True
        )
        few, more = (_kept_bytes(small, rows, lengths, loss, platform) for rows in _ROWS)
        row = (more - few) / (_ROWS[1] - _ROWS[0])
        return row, few - _ROWS[0] * row

    row, fixed = of(1, 1)
    decoder_row, decoder_fixed = of(1, 2)
    encoder_row, encoder_fixed = (row, fixed)
    if config.architecture == "encoder_decoder":
        encoder_row, encoder_fixed = of(2, 1)
    return Kept(
        row=row - (encoder_row - row) - (decoder_row - row),
        encoder_row=encoder_row - row,
        decoder_row=decoder_row - row,
        encoder_copies=encoder_fixed - fixed,
        decoder_copies=decoder_fixed - fixed,
    )


def row_lengths(config: ModelConfig, lengths: tuple[int, int]) -> tuple[int, int]:
    """Returns the tokens of a row in the (encoder, decoder): one stack has all of them."""
    return (0, sum(lengths)) if config.architecture == "prefix_lm" else lengths


def abstract_batch(
    config: ModelConfig, rows: int, lengths: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch as the loader makes them.

    Args:
        config: the model.
        rows: B.
        lengths: (INPUT_LENGTH, TARGET_LENGTH).
    """
    sides = {"decoder": (*_DECODER, *_PREFIX)} if config.architecture == "prefix_lm" else _SIDES
    of_encoder, of_decoder = row_lengths(config, lengths)
    batch = {}
    for side, names in sides.items():
        length = of_encoder if side == "encoder" else of_decoder
        for name in names:
            dtype = jnp.float32 if name == "loss_weights" else jnp.int32
            batch[f"{side}_{name}"] = jax.ShapeDtypeStruct((rows, length), dtype)
    return batch


_DECODER = ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")
_PREFIX = ("causal_attention",)
_SIDES = {"encoder": ("input_tokens", "segment_ids", "positions"), "decoder": _DECODER}


def _kept_bytes(
    config: ModelConfig, rows: int, lengths: tuple[int, int], loss: LossConfig, platform: str
) -> float:
    """The bytes of all distinct results of the forward pass that the backward pass reads."""
    model = build(config)
    function = supervised_loss(model, loss)

    def residuals(params: Any, batch: Any, key: jax.Array) -> Any:
        def total(params: Any) -> Any:
            loss_sum, weight, metrics = function(params, batch, key)
            return loss_sum, (weight, dict(metrics))

        _, backward, _ = jax.vjp(total, params, has_aux=True)
        return backward  # a pytree, whose leaves are what was kept

    with targeting(platform):
        jaxpr = jax.make_jaxpr(residuals)(
            model.abstract_params(),
            abstract_batch(config, rows, lengths),
            jax.eval_shape(lambda: jax.random.key(0)),
        ).jaxpr
    seen = {id(variable) for variable in jaxpr.invars}
    total = 0.0
    for variable in jaxpr.outvars:
        if id(variable) not in seen and not hasattr(variable, "val"):  # literals take no memory
            seen.add(id(variable))
            total += _bytes(variable.aval, platform)
    return total


def _bytes(aval: Any, platform: str) -> float:
    if "host" in str(getattr(aval, "memory_space", "")).lower():  # offloaded
        return 0.0
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return 8.0 * math.prod(aval.shape)  # PRNG keys
    wide = platform == "cpu" and aval.dtype == jnp.bfloat16
    return math.prod(aval.shape) * (4.0 if wide else aval.dtype.itemsize)


def _width(config: ModelConfig, platform: str) -> int:
    """Bytes of a number in the compute dtype, as the platform stores it."""
    return 2 if config.dtype == "bfloat16" and platform != "cpu" else 4


def _loss_workspace(config: ModelConfig, tokens: int, columns: int, platform: str) -> float:
    """One chunk of float32 logits, in 16 bits also their gradient, and that of the hidden states.

    In float32 the gradient of the logits takes their place.
    """
    with targeting(platform):
        chunk = chunk_of(tokens, columns)
    half = 2 if config.dtype == "bfloat16" else 0
    head = half * config.embed_dim * columns
    return chunk * columns * (4.0 + half) + head + 4.0 * tokens * config.embed_dim


def _local(config: ModelConfig, tensor: int) -> ModelConfig:
    """One device's part of a model that is split over `tensor` devices."""
    kv_heads = config.kv_heads
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // tensor,
        # Key heads that do not divide are repeated, one for each query head.
        num_kv_heads=(config.num_heads if kv_heads % tensor else kv_heads) // tensor,
        mlp_dim=config.mlp_dim // tensor,
    )


def _layers(config: ModelConfig) -> tuple[int, int]:
    encoder = config.num_encoder_layers if config.architecture == "encoder_decoder" else 0
    return encoder, config.num_decoder_layers
