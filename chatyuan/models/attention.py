"""Multi-head attention: projections, rotary positions, QK-norm; the kernel does the scores."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from chatyuan.kernels import (
    AlibiBias,
    AttentionMask,
    Bias,
    RelativePositionBias,
    attention_on,
    select_implementation,
)
from chatyuan.models.config import ModelConfig
from chatyuan.models.initializers import normal
from chatyuan.models.layers import Linear, RMSNorm
from chatyuan.ops.positions import rope

Array = jax.Array


class Attention(nnx.Module):
    """Self- or cross-attention. Heads are joined in the matrices ([D, N*H]): plain matmuls."""

    def __init__(self, config: ModelConfig, *, cross: bool) -> None:
        """Creates the four matrices; `cross` leaves out rotary positions."""
        self.config = config
        self.rotary = config.position == "rope" and not cross
        embed, joined = config.embed_dim, config.num_heads * config.head_dim
        joined_kv = config.kv_heads * config.head_dim
        # T5 leaves scores unscaled and starts the queries smaller instead: one rule for any scale.
        query_init = normal((embed * config.head_dim) ** -0.5 / config.score_scale)
        self.query = Linear((embed, joined), ("embed", "heads"), query_init, config)
        kv_shape, kv_axes, kv_init = (embed, joined_kv), ("embed", "kv_heads"), normal(embed**-0.5)
        self.key = Linear(kv_shape, kv_axes, kv_init, config)
        self.value = Linear(kv_shape, kv_axes, kv_init, config)
        self.out = Linear((joined, embed), ("heads", "embed"), normal(joined**-0.5), config)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_epsilon, axis="kv")
            self.key_norm = RMSNorm(config.head_dim, config.norm_epsilon, axis="kv")

    def queries(self, x_BTD: Array, positions_BT: Array) -> Array:
        """Returns the queries [B, T, N, H]."""
        query = self._split_heads(self.query(x_BTD))
        if self.config.qk_norm:
            query = self.query_norm(query)
        return rope(query, positions_BT, self.config.rope_theta) if self.rotary else query

    def keys_values(self, x_BSD: Array, positions_BS: Array) -> tuple[Array, Array]:
        """Returns keys and values, each [B, S, K, H]."""
        key = self._split_heads(self.key(x_BSD))
        if self.config.qk_norm:
            key = self.key_norm(key)
        if self.rotary:
            key = rope(key, positions_BS, self.config.rope_theta)
        return key, self._split_heads(self.value(x_BSD))

    def attend(
        self,
        query_BTNH: Array,
        key_BSKH: Array,
        value_BSKH: Array,
        mask: AttentionMask | None,
        bias: Bias | None,
        mesh: Mesh | None = None,
    ) -> Array:
        """Returns the attended and projected values, [B, T, D]; `mesh` is that of all of them."""

        def core(query: Array, key: Array, value: Array, bias: Bias | None) -> Array:
            return attention_on(mesh)(
                query,
                key,
                value,
                mask=mask,
                bias=bias,
                scale=self.config.score_scale,
                implementation=self.config.attention_implementation,
            )

        if self.config.remat == "selective":
            core = jax.checkpoint(core)
        attended = core(query_BTNH, key_BSKH, value_BSKH, bias)
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)


def training_implementation(config: ModelConfig, length: int, platform: str) -> tuple[str, str]:
    """Returns (name, why) of the self-attention of rows of `length` tokens, packed or padded.

    Args:
        config: of the model.
        length: tokens of a row.
        platform: as jax names it.
    """
    heads, bias = config.num_heads, None
    if config.position.startswith("relative_bias"):
        table = np.zeros((heads, config.relative_attention_num_buckets), np.float32)
        far = config.relative_attention_max_distance
        bias = RelativePositionBias(table, bidirectional=True, max_distance=far)
    elif config.position == "alibi":
        bias = AlibiBias(np.zeros((heads,), np.float32))
    segments = np.ones((1, length), np.int32)
    return select_implementation(
        config.attention_implementation,
        platform=platform,
        q_len=length,
        kv_len=length,
        head_dim=config.head_dim,
        dtype=config.dtype,
        mask=AttentionMask(query_segment_ids=segments, key_segment_ids=segments),
        bias=bias,
    )
