"""Hugging Face T5, mT5 and umT5: their configuration and weights as ours. NumPy only, no torch.

Facts and traps: transformers keeps `Linear` weights as (out, in), ours are (in, out); its bias
table is (buckets, heads); transformers 5 writes `tie_word_embeddings: true` for every T5 it saves,
and says in `scale_decoder_outputs` whether the logits are scaled, so whether a head is tied is
decided by the weights, not by the configuration alone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from chatyuan.errors import UserError
from chatyuan.models import ModelConfig, build

_MODEL_TYPES = ("t5", "mt5", "umt5")
# transformers reads "gated-gelu" as the tanh approximation, but a plain "gelu" as the exact one.
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu", "swish": "silu"}


def config_from_huggingface(
    hf_config: Mapping[str, Any], state_dict: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Returns our configuration of a T5-like `config.json`.

    Args:
        hf_config: the parsed file.
        state_dict: the weights, if at hand: they decide whether the head is tied.

    Raises:
        UserError: not a T5-like model, or an activation that we do not have.
    """
    kind = hf_config.get("model_type", "t5")
    if kind not in _MODEL_TYPES:
        raise UserError(
            f"config.json: model_type = {kind!r} cannot be read; known are "
            f"{', '.join(_MODEL_TYPES)}."
        )
    layers = int(hf_config["num_layers"])
    tied = bool(hf_config.get("tie_word_embeddings", True))
    if state_dict is not None:
        tied = tied and _head_is_tied(state_dict)
    return ModelConfig(
        architecture="encoder_decoder",
        vocab_size=int(hf_config["vocab_size"]),
        embed_dim=int(hf_config["d_model"]),
        mlp_dim=int(hf_config["d_ff"]),
        num_heads=int(hf_config["num_heads"]),
        head_dim=int(hf_config["d_kv"]),
        num_encoder_layers=layers,
        num_decoder_layers=int(hf_config.get("num_decoder_layers") or layers),
        mlp_activations=_activations(hf_config),
        position="relative_bias_per_layer" if kind == "umt5" else "relative_bias",
        relative_attention_num_buckets=int(hf_config.get("relative_attention_num_buckets", 32)),
        relative_attention_max_distance=int(hf_config.get("relative_attention_max_distance", 128)),
        tie_embeddings=tied,
        scale_tied_logits=bool(hf_config.get("scale_decoder_outputs", True)),
        dropout_rate=float(hf_config.get("dropout_rate", 0.1)),
        norm_epsilon=float(hf_config.get("layer_norm_epsilon", 1e-6)),
    )


def params_from_huggingface(state_dict: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns our parameters, float32 NumPy arrays, of a T5-like `state_dict`.

    Args:
        state_dict: name -> array (or CPU tensor that NumPy can read).
        config: what the weights are for, usually of `config_from_huggingface`.

    Raises:
        UserError: a weight is missing, has another shape, belongs to no parameter, or the head is
            tied in one and not in the other.
    """
    if config.architecture != "encoder_decoder" or config.kv_heads != config.num_heads:
        raise UserError(
            f"ModelConfig.architecture = {config.architecture!r} with {config.kv_heads} key heads "
            "does not fit T5 weights; use the result of config_from_huggingface."
        )
    if config.tie_embeddings and not _head_is_tied(state_dict):
        raise UserError(
            "lm_head.weight differs from shared.weight, but ModelConfig.tie_embeddings = True; set "
            "it to False (transformers 5 writes tie_word_embeddings: true for untied models too)."
        )
    reader = _Reader(state_dict)
    params = {
        "token_embedder": {"embedding": reader.take("shared.weight")},
        "encoder": _stack(reader, config, "encoder", config.num_encoder_layers),
        "decoder": _stack(reader, config, "decoder", config.num_decoder_layers),
    }
    if not config.tie_embeddings:
        params["logits_dense"] = {"kernel": reader.take("lm_head.weight").T}
    reader.ignore("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    reader.check_nothing_left()
    _check_shapes(params, build(config).abstract_params())
    return params


class _Reader:
    """Takes weights by name and knows which were not asked for."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._weights = state_dict
        self._left = set(state_dict)

    def take(self, name: str) -> np.ndarray:
        if name not in self._weights:
            raise UserError(
                f"weight {name} is missing from the Hugging Face checkpoint; it holds "
                f"{len(self._weights)} weights. Check that config.json belongs to it."
            )
        self._left.discard(name)
        return np.asarray(self._weights[name]).astype(np.float32)

    def ignore(self, *names: str) -> None:
        self._left.difference_update(names)

    def check_nothing_left(self) -> None:
        if self._left:
            some = ", ".join(sorted(self._left)[:3])
            raise UserError(
                f"{len(self._left)} weights of the Hugging Face checkpoint belong to no parameter: "
                f"{some}, ... Check that config.json belongs to it."
            )


def _stack(reader: _Reader, config: ModelConfig, side: str, num_layers: int) -> dict[str, Any]:
    """Returns the encoder's or the decoder's parameters."""
    blocks = [_block(reader, config, side, i) for i in range(num_layers)]
    stack = {
        "layers": _stacked(blocks),
        "final_norm": {"scale": reader.take(f"{side}.final_layer_norm.weight")},
    }
    if config.position == "relative_bias":
        stack["relpos_bias"] = _bias(reader, f"{side}.block.0.layer.0")
    return stack


def _block(reader: _Reader, config: ModelConfig, side: str, index: int) -> dict[str, Any]:
    base = f"{side}.block.{index}.layer"
    mlp_layer = 2 if side == "decoder" else 1
    mlp = f"{base}.{mlp_layer}.DenseReluDense"
    count = len(config.mlp_activations)
    names = ["wi"] if count == 1 else [f"wi_{i}" for i in range(count)]
    block = {
        "pre_self_attention_layer_norm": {"scale": reader.take(f"{base}.0.layer_norm.weight")},
        "self_attention": _attention(reader, f"{base}.0.SelfAttention"),
        "pre_mlp_layer_norm": {"scale": reader.take(f"{base}.{mlp_layer}.layer_norm.weight")},
        "mlp": {name: {"kernel": reader.take(f"{mlp}.{name}.weight").T} for name in [*names, "wo"]},
    }
    if side == "decoder":
        norm = reader.take(f"{base}.1.layer_norm.weight")
        block["pre_cross_attention_layer_norm"] = {"scale": norm}
        block["encoder_decoder_attention"] = _attention(reader, f"{base}.1.EncDecAttention")
    if config.position == "relative_bias_per_layer":
        block["relpos_bias"] = _bias(reader, f"{base}.0")
    return block


def _attention(reader: _Reader, name: str) -> dict[str, Any]:
    letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return {
        ours: {"kernel": reader.take(f"{name}.{theirs}.weight").T}
        for ours, theirs in letters.items()
    }


def _bias(reader: _Reader, layer: str) -> dict[str, Any]:
    table = reader.take(f"{layer}.SelfAttention.relative_attention_bias.weight")
    return {"rel_embedding": table.T}


def _stacked(trees: list[Any]) -> Any:
    """Returns one tree whose arrays are those of the trees stacked on axis 0."""
    if isinstance(trees[0], dict):
        return {name: _stacked([tree[name] for tree in trees]) for name in trees[0]}
    shapes = {tree.shape for tree in trees}
    if len(shapes) > 1:
        raise UserError(f"layers of the Hugging Face checkpoint differ in shape: {sorted(shapes)}.")
    return np.stack(trees)


def _head_is_tied(state_dict: Mapping[str, Any]) -> bool:
    """Whether the weights have no head of their own."""
    if "lm_head.weight" not in state_dict or "shared.weight" not in state_dict:
        return True
    head, shared = (np.asarray(state_dict[n]) for n in ("lm_head.weight", "shared.weight"))
    return head.shape == shared.shape and bool(np.array_equal(head, shared))


def _check_shapes(params: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        for name in expected:
            _check_shapes(params[name], expected[name], f"{path}/{name}")
    elif params.shape != expected.shape:
        raise UserError(
            f"weight {path[1:]} has shape {params.shape}, the configuration needs "
            f"{expected.shape}. Check that config.json belongs to the checkpoint."
        )


def _activations(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    name = hf_config.get("feed_forward_proj", "relu")
    if name == "gated-gelu":
        return ("gelu", "linear")
    gated = name.startswith("gated-")
    activation = _ACTIVATIONS.get(name.removeprefix("gated-"))
    if activation is None:
        known = [*_ACTIVATIONS, "gated-gelu", *(f"gated-{a}" for a in _ACTIVATIONS)]
        raise UserError(
            f"config.json: feed_forward_proj = {name!r} is not supported; known are "
            f"{', '.join(known)}."
        )
    return (activation, "linear") if gated else (activation,)
