"""What a training step sends between devices, as formulas over the sizes of model and mesh.

To the cost of parameters (`chatyuan.sharding.communication`) a model adds that of activations. With
A = one activation [rows, length, D] of a device, N = heads, K = key heads, H = width of a head:

- `tensor` (Shoeybi et al. 2019, arXiv:1909.08053): an all-reduce of A behind each last matrix of
  attention and feed-forward block, and one in the backward pass before their first matrices;
  further one for the embedding and one for the gradient that leaves the loss.
- with sequence parallelism (arXiv:2205.05198): each of them as reduce-scatter + all-gather of A,
  and one all-gather more per matrix block in the backward pass, because less is kept.
- `sequence` (context parallelism): all-gather of keys and values, [rows, length, K, H] each, and
  reduce-scatter of their gradients, in each attention.
- `fsdp` splits the features of the embedding: devices gather token ids and exchange features for
  rows by an all-to-all of A, which is less than the table where a batch is.
- `stage` (see `chatyuan.models.pipeline`), with M R + S - 1 steps of a schedule: as many hops of
  A / M per stack and direction, an all-reduce of A behind each stack, one of the gradient of what
  enters it and one of the encoder's output; what the layers of a stage send inside the loop is sent
  in the steps of the bubble too. With R > 1 stages exchange layers, and their gradients.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax

from chatyuan.models import pipeline
from chatyuan.models.attention import training_implementation
from chatyuan.models.config import ModelConfig
from chatyuan.models.model import Model
from chatyuan.sharding import RULES, AnyMesh, Collective, Placement, Use, parameter_communication

_FLOAT32 = 4


def step_communication(
    model: Model,
    placement: Placement,
    mesh: AnyMesh,
    *,
    rows: int,
    input_length: int,
    target_length: int,
    microbatches: int = 1,
    optimized: bool = True,
    platform: str | None = None,
) -> list[Collective]:
    """Returns the collectives of one training step. Scalars and vectors per token are left out.

    Args:
        model: of `chatyuan.models.build`.
        placement: of `sharding.place`.
        mesh: of the placement; devices need not exist.
        rows: sequences of a global batch.
        input_length: encoder tokens of a row; for prefix_lm the length of the whole row.
        target_length: decoder tokens of a row; 0 for prefix_lm.
        microbatches: parts of the batch.
        optimized: as the TPU and GPU backends leave it. False, as XLA's CPU backend does: an
            all-reduce where only a part of the result is used, and one for each matrix that reads
            the same input instead of one for their sum.
        platform: which attention implementation to assume; None = this process's.
    """
    config = model.config
    width = 2 if config.dtype == "bfloat16" else 4
    rematerialised = config.remat in ("full", "dots", "offload")
    uses = 2 if config.scan_layers or rematerialised else 1

    pipe = _Pipe.of(config, mesh)
    # A step of the schedule works with the layers of one repeat.
    steps = -(-pipe.steps // pipe.repeats)

    def use(path: str) -> Use:
        # Both tables sit in a `shard_map` that sums over all devices at once, in float32.
        if path == "token_embedder/embedding":
            return Use(int(config.tie_embeddings), _FLOAT32, joint=True)
        if path == "logits_dense/kernel":
            return Use(1, _FLOAT32, joint=True)
        if "/layers/" in path:
            return Use(uses * steps, width, sums=steps)
        return Use(1, width)

    found = parameter_communication(
        model.abstract_params(),
        placement,
        mesh,
        microbatches=microbatches,
        use=use,
        reduce_scatter=optimized,
    )
    passed = rows // microbatches
    outside = _Activations(config, mesh, passed, width, optimized, pipe)
    inside = dataclasses.replace(outside, rows=passed // pipe.microbatches)
    decoder, lengths = pipe.runs(config.num_decoder_layers), (input_length,)
    if config.architecture == "prefix_lm":
        one = [*inside.stack(decoder, input_length, platform)]
    else:
        lengths = (input_length, target_length)
        one = [*inside.stack(pipe.runs(config.num_encoder_layers), input_length, platform)]
        one += inside.stack(decoder, target_length, platform)
        one += inside.cross(decoder, input_length, target_length)
        if not optimized:
            one += outside.second_lookup()
    for length in lengths:
        one += outside.embedding(length)
    one += outside.loss(lengths[-1])
    one += outside.pipeline(lengths, model)
    found += [
        dataclasses.replace(c, times=c.times * microbatches)
        for c in one
        if c.devices > 1 and c.times
    ]
    return found


@dataclasses.dataclass(frozen=True)
class _Pipe:
    """The schedule of `chatyuan.models.pipeline`."""

    stages: int
    microbatches: int
    repeats: int

    @property
    def steps(self) -> int:
        return self.microbatches * self.repeats + self.stages - 1

    def runs(self, layers: int) -> int:
        """How often a stage runs one layer on one microbatch, the bubble included."""
        return self.steps * layers // (self.stages * self.repeats)

    @staticmethod
    def of(config: ModelConfig, mesh: AnyMesh) -> "_Pipe":
        """Without stages one step of one microbatch, with all layers."""
        stages = mesh.shape[pipeline.STAGE]
        if stages == 1:
            return _Pipe(1, 1, 1)
        return _Pipe(
            stages, pipeline.microbatches_of(config, stages), config.pipeline_repeats
        )


@dataclasses.dataclass(frozen=True)
class _Activations:
    """The collectives of one microbatch; those over a single device are dropped by the caller."""

    config: ModelConfig
    mesh: AnyMesh
    rows: int
    width: int
    optimized: bool
    pipe: _Pipe

    def pipeline(self, lengths: tuple[int, ...], model: Model) -> Iterator[Collective]:
        """What the stages send each other: rows, results, and the layers that they exchange."""
        pipe = self.pipe
        for length in lengths:
            stream = self._stream(length)
            hops = 2 * pipe.steps
            yield self._over("stage", "collective-permute", stream // pipe.microbatches, hops)
            yield self._over("stage", "all-reduce", stream, 2)
        yield self._over("stage", "all-reduce", self._stream(lengths[0]), len(lengths) - 1)
        if pipe.repeats > 1:
            exchanges = 2 * (pipe.stages - 1)
            yield self._over("stage", "collective-permute", self._dealt(model), exchanges)

    def _dealt(self, model: Model) -> int:
        """Bytes of layers, float32, that a stage sends to one other (`pipeline._deal`)."""
        repeats, stages = self.pipe.repeats, self.pipe.stages
        leaves = zip(
            jax.tree.leaves(model.abstract_params()),
            jax.tree.leaves(model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)),
            strict=True,
        )
        size = sum(
            leaf.size // math.prod(self.mesh.shape[a] for name in axes for a in RULES[name])
            for leaf, axes in leaves
            if axes[0] == "layers"
        )
        return size * _FLOAT32 * -(-repeats // stages) // repeats

    def embedding(self, length: int) -> Iterator[Collective]:
        """A lookup and its gradient."""
        yield from self._behind_matrix(length, 1)
        yield self._over("tensor", "all-gather", self._stream(length), self._sequence_parallel)
        yield self._over("fsdp", "all-to-all", self._stream(length), 2)

    def second_lookup(self) -> Iterator[Collective]:
        """The table's gradient from the decoder's side, which is added before it is summed."""
        size = self.config.vocab_size * self.config.embed_dim * _FLOAT32
        size //= self.mesh.shape["tensor"] * self.mesh.shape["fsdp"]
        axes = [a for a in (*RULES["batch"], *RULES["length"]) if a != "fsdp"]
        axes = tuple(a for a in axes if self.mesh.shape[a] > 1)
        yield Collective("all-reduce", axes, size, math.prod(self.mesh.shape[a] for a in axes))

    def loss(self, length: int) -> Iterator[Collective]:
        """The gradient of the hidden states, a sum over the columns of the head; float32."""
        stream = self._stream(length) // self.width * _FLOAT32
        yield self._over("tensor", "all-reduce", stream, 1)
        yield self._over("tensor", "all-gather", self._stream(length), self._sequence_parallel)

    def stack(self, layers: int, length: int, platform: str | None) -> Iterator[Collective]:
        """Self-attention and feed-forward of all layers, forward and backward."""
        config = self.config
        again = config.remat in ("full", "offload")
        # Rematerialisation repeats what is behind attention, but needs no result of the block.
        yield from self._behind_matrix(length, layers * (3 if again else 2))
        matrices = (3, len(config.mlp_activations))
        yield from self._before_matrices(length, layers * (2 if again else 1), layers, matrices)
        yield from self._keys_values(layers, length)
        platform = platform or jax.default_backend()
        if training_implementation(config, length, platform)[0] == "dense":
            yield from self._dense_bias(layers, length)

    def cross(self, layers: int, input_length: int, target_length: int) -> Iterator[Collective]:
        """Cross-attention of decoder layers: queries of the decoder, keys of the encoder."""
        again = 2 if self.config.remat in ("full", "offload") else 1
        yield from self._behind_matrix(target_length, layers * again)
        yield from self._before_matrices(target_length, layers * again, layers, (1,))
        encoded = self._stream(input_length)
        sums = layers * (1 if self.optimized else 2)
        yield self._over("tensor", "all-reduce", encoded, sums)
        yield self._over("tensor", "all-gather", encoded, self._sequence_parallel)
        yield from self._keys_values(layers, input_length)

    def _behind_matrix(self, length: int, times: int) -> Iterator[Collective]:
        """The sum over the parts of a matrix whose rows `tensor` splits."""
        scattered = self._sequence_parallel and self.optimized
        kind = "reduce-scatter" if scattered else "all-reduce"
        yield self._over("tensor", kind, self._stream(length), times)

    def _before_matrices(
        self, length: int, forward: int, layers: int, matrices: tuple[int, ...]
    ) -> Iterator[Collective]:
        """The gradient of what matrices with split columns read; `matrices` of them per group."""
        groups = len(matrices)
        yield from self._behind_matrix(
            length, layers * (groups if self.optimized else sum(matrices))
        )
        # Forward before the first, backward before the last matrix, and the first's input again.
        gathers = (forward + layers) * groups * self._sequence_parallel
        yield self._over("tensor", "all-gather", self._stream(length), gathers)

    def _keys_values(self, layers: int, length: int) -> Iterator[Collective]:
        """Keys and values of a split sequence, gathered; their gradients, summed in parts."""
        config = self.config
        heads = config.kv_heads
        if heads % self.mesh.shape["tensor"]:
            heads = config.num_heads
        heads //= self.mesh.shape["tensor"]
        size = self._local_rows * length * heads * config.head_dim * self.width
        again = 2 if config.remat in ("full", "offload", "selective") else 1
        kind = "reduce-scatter" if self.optimized else "all-reduce"
        yield self._over("sequence", "all-gather", size, 2 * layers * again)
        yield self._over("sequence", kind, size, 2 * layers)

    def _dense_bias(self, layers: int, length: int) -> Iterator[Collective]:
        """The gradient of a bias [N, T, S] that all rows share; block-wise kernels keep a table."""
        if not self.config.position.startswith("relative_bias"):
            return
        heads = self.config.num_heads // self.mesh.shape["tensor"]
        size = heads * length * length // self.mesh.shape["sequence"] * _FLOAT32
        # A pipeline adds up the layers of all stages before it sums.
        split = self.pipe.stages > 1
        axes = (*RULES["batch"], pipeline.STAGE) if split else RULES["batch"]
        axes = tuple(a for a in axes if self.mesh.shape[a] > 1)
        devices = math.prod(self.mesh.shape[a] for a in axes)
        yield Collective("all-reduce", axes, size, devices, 1 if split else layers)

    @property
    def _sequence_parallel(self) -> int:
        return int(self.config.sequence_parallel)

    @property
    def _local_rows(self) -> int:
        return self.rows // math.prod(self.mesh.shape[a] for a in RULES["batch"])

    def _stream(self, length: int) -> int:
        """Bytes of one activation that `tensor` does not split."""
        local = length // self.mesh.shape["sequence"]
        return self._local_rows * local * self.config.embed_dim * self.width

    def _over(self, axis: str, kind: str, payload: int, times: int) -> Collective:
        return Collective(kind, (axis,), payload, self.mesh.shape[axis], times)
