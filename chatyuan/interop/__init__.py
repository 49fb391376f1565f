"""Weights and configurations of other libraries."""

from chatyuan.interop.huggingface import config_from_huggingface, params_from_huggingface

__all__ = ["config_from_huggingface", "params_from_huggingface"]
