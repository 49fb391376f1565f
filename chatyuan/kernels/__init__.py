"""Attention: one function, its mask and bias specifications."""

from chatyuan.kernels.attention import (
    IMPLEMENTATIONS,
    dot_product_attention,
    prepare,
    select_implementation,
)
from chatyuan.kernels.block_sizes import BlockSizes
from chatyuan.kernels.masks import AttentionMask
from chatyuan.kernels.relative_bias import (
    AlibiBias,
    Bias,
    DenseBias,
    RelativePositionBias,
    relative_position_bucket,
)
from chatyuan.kernels.sharded import attention_on, sharded_attention

__all__ = [
    "IMPLEMENTATIONS",
    "AlibiBias",
    "AttentionMask",
    "Bias",
    "BlockSizes",
    "DenseBias",
    "RelativePositionBias",
    "attention_on",
    "dot_product_attention",
    "prepare",
    "relative_position_bucket",
    "select_implementation",
    "sharded_attention",
]
