"""The architecture as numbers, and the FLOPs that follow from them.

One `ModelConfig` describes T5 1.0, T5 1.1, mT5, umT5, ChatYuan, UniLM and LLaMA/Baichuan-like
models; `gin/models/` holds the published ones.
"""

import dataclasses
from typing import Any

from chatyuan.errors import UserError, did_you_mean

ARCHITECTURES = ("encoder_decoder", "prefix_lm")
POSITIONS = ("relative_bias", "relative_bias_per_layer", "rope", "alibi")
ACTIVATIONS = ("relu", "gelu", "silu", "linear")
REMAT_POLICIES = ("none", "full", "dots", "selective", "offload")
COMPUTE_DTYPES = ("float32", "bfloat16")


def _field(default: Any, text: str, unit: str = "") -> Any:
    """Returns a dataclass field that `--help` can describe."""
    return dataclasses.field(default=default, metadata={"help": text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides parameter shapes and the function they compute.

    Raises:
        UserError: a value is unknown, or sizes do not fit together.
    """

    architecture: str = _field("encoder_decoder", "encoder_decoder (T5), prefix_lm (UniLM, LLaMA)")
    vocab_size: int = _field(32128, "rows of the embedding, padding rows included", "tokens")
    embed_dim: int = _field(512, "width of the residual stream")
    mlp_dim: int = _field(1024, "width inside the feed-forward block")
    num_heads: int = _field(6, "query heads")
    num_kv_heads: int | None = _field(None, "key/value heads (GQA, MQA); None means num_heads")
    head_dim: int = _field(64, "width of one head; heads * head_dim need not equal embed_dim")
    num_encoder_layers: int = _field(8, "encoder layers (ignored by prefix_lm)", "layers")
    num_decoder_layers: int = _field(8, "decoder layers", "layers")
    mlp_activations: tuple[str, ...] = _field(
        ("gelu", "linear"), "one activation per input matrix; their product feeds the output matrix"
    )
    position: str = _field("relative_bias", "relative_bias, relative_bias_per_layer, rope or alibi")
    relative_attention_num_buckets: int = _field(32, "rows of T5's relative bias table")
    relative_attention_max_distance: int = _field(128, "where the buckets saturate", "tokens")
    rope_theta: float = _field(10000.0, "base of the rotary frequencies")
    causal_only: bool = _field(
        False, "prefix_lm reads everything left to right, prompts too (LLaMA, Baichuan)"
    )
    tie_embeddings: bool = _field(False, "the head is the embedding table")
    scale_tied_logits: bool = _field(True, "tied logits are multiplied by embed_dim**-0.5 (T5 1.0)")
    norm_head: bool = _field(False, "each column of the head has unit length (Baichuan 2)")
    qk_norm: bool = _field(False, "RMS-normalise queries and keys per head")
    attention_scale: float | None = _field(
        None,
        "factor on scores; None: 1 for T5's biases without qk_norm, else head_dim**-0.5",
    )
    adapter_rank: int = _field(
        0, "rank of the adapter (LoRA) beside each matrix of the blocks; 0 = none; see ppo"
    )
    adapter_alpha: float = _field(16.0, "adapters count alpha / rank times")
    dropout_rate: float = _field(0.0, "probability that a feature is dropped while training")
    norm_epsilon: float = _field(1e-6, "added to the mean square in RMSNorm")
    dtype: str = _field("float32", "compute dtype, float32 or bfloat16; parameters stay float32")
    scan_layers: bool = _field(
        False, "one compiled layer in a loop: faster to compile, slower to run"
    )
    remat: str = _field(
        "none", "what the backward pass recomputes: none, full, dots, selective, offload"
    )
    sequence_parallel: bool = _field(
        False, "norm and dropout regions split the length over the mesh axis tensor"
    )
    attention_implementation: str | None = _field(None, "attention kernel; None: by platform")
    pipeline_microbatches: int | None = _field(
        None, "parts of a pass that stream through MESH stage; None: as many as stages"
    )
    pipeline_repeats: int = _field(
        1, "groups of layers on each stage: divides the bubble, moves parameters every pass"
    )

    def __post_init__(self) -> None:
        """Checks every value; see the class."""
        _check_choice("architecture", self.architecture, ARCHITECTURES)
        _check_choice("position", self.position, POSITIONS)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("dtype", self.dtype, COMPUTE_DTYPES)
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for activation in self.mlp_activations:
            _check_choice("mlp_activations", activation, ACTIVATIONS)
        if not self.mlp_activations:
            raise UserError("ModelConfig.mlp_activations is empty; give for example ('relu',).")
        sizes = (
            "vocab_size embed_dim mlp_dim num_heads head_dim num_encoder_layers num_decoder_layers "
            "relative_attention_max_distance"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise UserError(f"ModelConfig.{name} = {getattr(self, name)} must be at least 1.")
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 4:
            raise UserError(
                "ModelConfig.relative_attention_num_buckets = "
                f"{self.relative_attention_num_buckets} must be a positive multiple of 4."
            )
        if self.num_kv_heads is not None and (
            self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads
        ):
            raise UserError(
                f"ModelConfig.num_kv_heads = {self.num_kv_heads} must divide num_heads = "
                f"{self.num_heads}."
            )
        for name in ("pipeline_microbatches", "pipeline_repeats"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"ModelConfig.{name} = {getattr(self, name)} must be at least 1.")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"ModelConfig.head_dim = {self.head_dim} must be even for rope.")
        if self.adapter_rank < 0:
            raise UserError(f"ModelConfig.adapter_rank = {self.adapter_rank} must be at least 0.")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(
                f"ModelConfig.dropout_rate = {self.dropout_rate} must be in [0, 1): it is the "
                "probability that a feature is dropped."
            )
        if self.causal_only and self.architecture != "prefix_lm":
            raise UserError("ModelConfig.causal_only = True needs architecture = 'prefix_lm'.")

    @property
    def adapter_scale(self) -> float:
        """The factor of what adapters add."""
        return self.adapter_alpha / self.adapter_rank if self.adapter_rank else 0.0

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def score_scale(self) -> float:
        """The factor on attention scores, resolved."""
        if self.attention_scale is not None:
            return float(self.attention_scale)
        if self.position.startswith("relative_bias") and not self.qk_norm:
            return 1.0
        return self.head_dim**-0.5


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"ModelConfig.{name} = {value!r} must be one of {', '.join(choices)}."
            + did_you_mean(str(value), choices)
        )


def swiglu_mlp_dim(embed_dim: int, multiple: int = 128) -> int:
    """Returns 8/3 * embed_dim rounded up to a multiple: a gated block as large as 4 * embed_dim.

    Source: Shazeer 2020 (arXiv:2002.05202); the rounding is LLaMA's, with Baichuan 2's 128.
    """
    return multiple * -(-8 * embed_dim // (3 * multiple))


def _matrix_parameters(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the weights of (query + output, key + value, feed-forward) in one layer."""
    query_out = 2 * config.embed_dim * config.num_heads * config.head_dim
    key_value = 2 * config.embed_dim * config.kv_heads * config.head_dim
    mlp = (len(config.mlp_activations) + 1) * config.embed_dim * config.mlp_dim
    return query_out, key_value, mlp


def flops_per_example(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Returns the FLOPs of one forward and backward pass over one row.

    6 * (weights * tokens they are applied to) + attention over the full T x S square (not halved
    for causality), cross keys and values counted on the encoder side, no embedding lookup.

    Args:
        config: the model.
        input_length: encoder tokens; for prefix_lm the prefix part of the row.
        target_length: decoder tokens; prefix_lm rows hold input_length + target_length tokens.
    """
    query_out, key_value, mlp = _matrix_parameters(config)
    head = config.embed_dim * config.vocab_size
    attention = 12.0 * config.num_heads * config.head_dim
    layers = config.num_decoder_layers
    if config.architecture == "prefix_lm":
        length = input_length + target_length
        weights = layers * (query_out + key_value + mlp) + head
        return 6.0 * weights * length + attention * layers * length**2
    encoder = config.num_encoder_layers * (query_out + key_value + mlp) + layers * key_value
    decoder = layers * (2 * query_out + key_value + mlp) + head
    squares = config.num_encoder_layers * input_length**2
    squares += layers * target_length * (target_length + input_length)
    return 6.0 * (encoder * input_length + decoder * target_length) + attention * squares
