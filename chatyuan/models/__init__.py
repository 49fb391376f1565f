"""The models: `build(config)` gives functions of a parameter dict."""

from chatyuan.models.cache import DecodeCache
from chatyuan.models.config import ModelConfig, flops_per_example, swiglu_mlp_dim
from chatyuan.models.model import Model, build

__all__ = [
    "DecodeCache",
    "Model",
    "ModelConfig",
    "build",
    "flops_per_example",
    "swiglu_mlp_dim",
]
