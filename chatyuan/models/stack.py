"""One transformer block, and the one place where blocks are stacked, scanned and rematerialised."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from chatyuan.errors import UserError
from chatyuan.kernels import AlibiBias, AttentionMask, Bias, RelativePositionBias, prepare
from chatyuan.models import pipeline
from chatyuan.models.attention import Attention
from chatyuan.models.config import ModelConfig
from chatyuan.models.initializers import uniform
from chatyuan.models.layers import Mlp, RMSNorm, dropout, fold_in, param, row_keys
from chatyuan.ops.positions import alibi_slopes
from chatyuan.sharding import constrain_activation

Array = jax.Array

_STREAM = "stream"
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # As "full", and what it keeps, the input of each block, waits in the host's memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_STREAM],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class RelativeBiasTable(nnx.Module):
    """T5's learned bias per (head, bucket)."""

    def __init__(self, config: ModelConfig) -> None:
        """Creates the table, uniform with variance 1 / mean(heads, buckets) as in T5X."""
        shape = (config.num_heads, config.relative_attention_num_buckets)
        limit = (3.0 / (sum(shape) / 2)) ** 0.5
        self.rel_embedding = param(
            shape, ("heads", "relpos_buckets"), uniform(limit)
        )


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What every block of a stack receives unchanged.

    Attributes:
        mask: of self-attention.
        bias: of self-attention, None if each block has its own table.
        positions: [B, T] for rotary embedding.
        query_offset: key index of query 0 (see `RelativePositionBias`).
        cross_mask: of cross-attention.
        dropout_key: [B], of this stack and step for each row, or None.
        mesh: over which rows, heads and lengths are split; None = one device.
    """

    mask: AttentionMask
    bias: Bias | None
    positions: Array
    query_offset: Array | int = 0
    cross_mask: AttentionMask | None = None
    dropout_key: Array | None = None
    mesh: Mesh | None = None


class Block(nnx.Module):
    """Pre-norm self-attention, optional cross-attention, feed-forward; each added to the stream."""

    def __init__(self, config: ModelConfig, *, cross: bool, bidirectional: bool) -> None:
        """Creates the modules under T5X's decoder names, encoder blocks too."""
        self.config = config
        self.bidirectional = bidirectional
        features, epsilon = config.embed_dim, config.norm_epsilon
        self.pre_self_attention_layer_norm = RMSNorm(features, epsilon)
        self.self_attention = Attention(config, cross=False)
        if config.position == "relative_bias_per_layer":
            self.relpos_bias = RelativeBiasTable(config)
        if cross:
            self.pre_cross_attention_layer_norm = RMSNorm(features, epsilon)
            self.encoder_decoder_attention = Attention(config, cross=True)
        self.pre_mlp_layer_norm = RMSNorm(features, epsilon)
        self.mlp = Mlp(config)

    def __call__(
        self,
        x_BTD: Array,
        shared: LayerInputs,
        dropout_key: Array | None,
        *,
        update_cache: Callable[[Array, Array], tuple[Array, Array]] | None = None,
        cross_keys_values: Callable[[Attention], tuple[Array, Array]] | None = None,
    ) -> Array:
        """Returns the new stream [B, T, D].

        Args:
            x_BTD: the stream.
            shared: see `LayerInputs`.
            dropout_key: of this layer.
            update_cache: takes the new keys and values, returns those to attend to.
            cross_keys_values: gives keys and values of the encoder, [B', S, K, H]. With B = B' * G
                rows the G rows of a prompt become queries of one row: nothing is repeated.
        """
        rate, mesh = self.config.dropout_rate, shared.mesh
        stream = functools.partial(_stream, mesh=mesh, config=self.config)
        whole = functools.partial(_whole, mesh=mesh)
        if self.config.remat == "offload":
            x_BTD = checkpoint_name(x_BTD, _STREAM)
        attention = self.self_attention
        h = whole(self.pre_self_attention_layer_norm(x_BTD))
        query = attention.queries(h, shared.positions)
        key, value = attention.keys_values(h, shared.positions)
        if update_cache is not None:
            key, value = update_cache(key, value)
        bias = self._bias(shared, query.shape[1], key.shape[1])
        h = attention.attend(query, key, value, shared.mask, bias, shared.mesh)
        x_BTD = stream(x_BTD + dropout(stream(whole(h)), rate, dropout_key, 1))
        if cross_keys_values is not None:
            attention = self.encoder_decoder_attention
            h = whole(self.pre_cross_attention_layer_norm(x_BTD))
            key, value = cross_keys_values(attention)
            # positions are not used: cross-attention has none.
            query = attention.queries(h, shared.positions)
            folded = query.reshape(key.shape[0], -1, *query.shape[2:])
            h = attention.attend(folded, key, value, shared.cross_mask, None, shared.mesh)
            h = stream(whole(h.reshape(x_BTD.shape)))
            x_BTD = stream(x_BTD + dropout(h, rate, dropout_key, 2))
        h = self.mlp(whole(self.pre_mlp_layer_norm(x_BTD)), dropout_key)
        return stream(x_BTD + dropout(stream(whole(h)), rate, dropout_key, 3))

    def _bias(self, shared: LayerInputs, q_len: int, kv_len: int) -> Bias | None:
        if self.config.position != "relative_bias_per_layer":
            return shared.bias
        return RelativePositionBias(
            self.relpos_bias.rel_embedding[...],
            bidirectional=self.bidirectional,
            max_distance=self.config.relative_attention_max_distance,
            query_offset=shared.query_offset,
        )


class Stack(nnx.Module):
    """Blocks with parameters stacked on axis 0, the bias they share and the final norm."""

    def __init__(
        self, config: ModelConfig, num_layers: int, *, cross: bool, bidirectional: bool
    ) -> None:
        """Creates `layers`, `relpos_bias` if shared, `final_norm`.

        Args:
            config: the model.
            num_layers: X.
            cross: blocks have cross-attention.
            bidirectional: the relative bias distinguishes keys after the query.
        """
        self.config = config
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        graph, state = nnx.split(Block(config, cross=cross, bidirectional=bidirectional))
        is_param = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        add_axis = functools.partial(_add_layer_axis, num_layers)
        self.layers = nnx.merge(graph, jax.tree.map(add_axis, state, is_leaf=is_param))
        if config.position == "relative_bias":
            self.relpos_bias = RelativeBiasTable(config)
        self.final_norm = RMSNorm(config.embed_dim, config.norm_epsilon)

    def run(
        self,
        body: Callable[[Block, Any, Array, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any = None,
        *,
        unroll: bool = False,
        layer_params: Sequence[Any] = (),
    ) -> tuple[Any, Any]:
        """Runs `body(block, carry, layer_index, x) -> (carry, y)` over the layers.

        Args:
            body: one layer; `x` is the layer's slice of `xs`.
            carry: what goes from layer to layer.
            xs: pytree of arrays stacked on axis 0, or None.
            unroll: a Python loop whatever the configuration says; `xs` may then be a list, one item
                per layer, and the ys come back as a list.
            layer_params: of `layer_params()`, so that a loop around this does not slice; only with
                `unroll`.

        Returns:
            The last carry, and the ys: stacked on axis 0 when scanned or unrolled by configuration.
        """
        graph, stacked = nnx.split(self.layers)
        stacked = nnx.as_pure(stacked)

        def layer(carry: Any, inputs: tuple[Any, Array, Any]) -> tuple[Any, Any]:
            params, index, x = inputs
            return body(nnx.merge(graph, params), carry, index, x)

        if self.config.remat in _POLICIES:
            _check_memory(self.config)
            layer = jax.checkpoint(layer, policy=_POLICIES[self.config.remat])
        if self.config.scan_layers and not unroll:
            indices = jnp.arange(self.num_layers, dtype=jnp.int32)
            return jax.lax.scan(layer, carry, (stacked, indices, xs))
        # Traced, differentiated and lowered once for all layers; the compiler inlines the calls.
        layer = jax.jit(layer)
        ys = []
        for i in range(self.num_layers):
            params = layer_params[i] if layer_params else _slice(stacked, i)
            x = xs[i] if isinstance(xs, list) else _slice(xs, i)
            carry, y = layer(carry, (params, jnp.int32(i), x))
            ys.append(y)
        if unroll:
            return carry, ys
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

    def layer_params(self) -> tuple[Any, ...]:
        """Returns the parameters of each layer apart."""
        stacked = nnx.to_pure_dict(nnx.split(self.layers)[1])
        return tuple(_slice(stacked, i) for i in range(self.num_layers))

    def inputs(
        self,
        *,
        mask: AttentionMask,
        positions: Array,
        q_len: int,
        kv_len: int,
        query_offset: Array | int = 0,
        dropout_key: Array | None = None,
        mesh: Mesh | None = None,
    ) -> LayerInputs:
        """Returns what the blocks share, with mask and bias resolved once for all layers."""
        config = self.config
        bias = None
        if config.position == "relative_bias":
            bias = RelativePositionBias(
                self.relpos_bias.rel_embedding[...],
                bidirectional=self.bidirectional,
                max_distance=config.relative_attention_max_distance,
                query_offset=query_offset,
            )
        elif config.position == "alibi":
            bias = AlibiBias(jnp.asarray(alibi_slopes(config.num_heads)), query_offset)
        mask, bias = prepare(
            mask,
            bias,
            batch=positions.shape[0],
            q_len=q_len,
            kv_len=kv_len,
            implementation=config.attention_implementation,
        )
        keys = row_keys(dropout_key if config.dropout_rate else None, positions.shape[0])
        return LayerInputs(mask, bias, positions, query_offset, None, keys, mesh)

    def __call__(
        self,
        x_BTD: Array,
        shared: LayerInputs,
        encoded_BSD: Array | None = None,
    ) -> Array:
        """Returns the normalised output of the last block, [B, T, D].

        Args:
            x_BTD: embedded tokens.
            shared: see `inputs`.
            encoded_BSD: the encoder's output, for blocks with cross-attention.
        """
        rate, key = self.config.dropout_rate, shared.dropout_key
        if encoded_BSD is not None:
            encoded_BSD = _whole(encoded_BSD, mesh=shared.mesh)

        def body(block: Block, x: Array, index: Array, _: None) -> tuple[Array, None]:
            return _layer(block, x, index, shared, encoded_BSD), None

        # Sites beyond the layers' indices, so that no two dropouts share a key.
        x_BTD = _stream(x_BTD, mesh=shared.mesh, config=self.config)
        x_BTD = dropout(x_BTD, rate, key, self.num_layers)
        if pipeline.stages_of(shared.mesh) > 1:
            x_BTD = self._run_pipeline(x_BTD, shared, encoded_BSD)
        else:
            x_BTD, _ = self.run(body, x_BTD)
        return dropout(self.final_norm(x_BTD), rate, key, self.num_layers + 1)

    def _run_pipeline(self, x_BTD: Array, shared: LayerInputs, encoded_BSD: Array | None) -> Array:
        """Returns the output of the last block, computed on the stages of the mesh.

        Rematerialisation is of a stage's layers together: only its input is
        kept of each microbatch, and the layers' inputs exist for one microbatch at a time.
        """
        config, mesh = self.config, shared.mesh
        graph, stacked = nnx.split(self.layers)
        rows = (
            shared.mask, shared.positions, shared.cross_mask, encoded_BSD, shared.dropout_key
        )  # fmt: skip
        units = x_BTD.shape[0] if encoded_BSD is None else encoded_BSD.shape[0]
        pipeline.check_pipeline(config, units, mesh)

        def group(params: Any, first: Array, x: Array, rows: tuple, bias: Bias | None) -> Array:
            mask, positions, cross_mask, encoded, keys = rows
            here = LayerInputs(mask, bias, positions, shared.query_offset, cross_mask, keys, mesh)

            def layer(x: Array, inputs: tuple[Any, Array]) -> tuple[Array, None]:
                return _layer(nnx.merge(graph, inputs[0]), x, inputs[1], here, encoded), None

            indices = first + jnp.arange(jax.tree.leaves(params)[0].shape[0], dtype=jnp.int32)
            if config.scan_layers:
                return jax.lax.scan(layer, x, (params, indices))[0]
            for i in range(len(indices)):
                x, _ = layer(x, _slice((params, indices), i))
            return x

        _check_memory(config)
        if config.remat in _POLICIES:
            group = jax.checkpoint(group, policy=_POLICIES[config.remat])
        return pipeline.circulate(
            group,
            nnx.as_pure(stacked),
            x_BTD,
            rows,
            shared.bias,
            mesh=mesh,
            microbatches=pipeline.microbatches_of(config, pipeline.stages_of(mesh)),
            repeats=config.pipeline_repeats,
            units=units,
        )


def _layer(
    block: Block, x_BTD: Array, index: Array, shared: LayerInputs, encoded_BSD: Array | None
) -> Array:
    """Returns the stream after one block, with the dropout key of its index."""
    cross = None
    if encoded_BSD is not None:
        cross = lambda attention: attention.keys_values(encoded_BSD, None)  # noqa: E731
    return block(x_BTD, shared, fold_in(shared.dropout_key, index), cross_keys_values=cross)


def _check_memory(config: ModelConfig) -> None:
    """Raises UserError where activations would wait in a memory that the backend does not have."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.remat == "offload" and "pinned_host" not in kinds:
        raise UserError(
            f"ModelConfig.remat = 'offload' needs a backend with pinned_host memory; "
            f"{device.device_kind} has {', '.join(kinds) or 'none'}. Use 'full', which keeps the "
            "same activations on the device."
        )


def _stream(x_BTD: Array, *, mesh: Mesh | None, config: ModelConfig) -> Array:
    """The residual stream on its devices: rows, lengths, whole features.

    Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2) splits lengths
    over `tensor` as well; the all-reduce behind a block's last matrix becomes a reduce-scatter, and
    the all-gather before the next one's first (`_whole`) completes it: the same volume.
    """
    length = "norm_length" if config.sequence_parallel else "length"
    return constrain_activation(x_BTD, ("batch", length, None), mesh)


def _whole(x_BTD: Array, *, mesh: Mesh | None) -> Array:
    """The input of a block's matrices: each device of `tensor` has it all."""
    return constrain_activation(x_BTD, ("batch", "length", None), mesh)


def _slice(tree: Any, index: int) -> Any:
    """Returns element `index` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _add_layer_axis(num_layers: int, variable: nnx.Variable) -> nnx.Variable:
    """Returns the abstract parameter of all layers, stacked on an axis "layers"."""
    one = variable.get_value()
    stacked = jax.ShapeDtypeStruct((num_layers, *one.shape), one.dtype)
    axes = ("layers", *variable.get_metadata("out_sharding"))
    return variable.replace(stacked, out_sharding=axes)
