"""Pipeline parallelism: groups of layers on the mesh axis `stage`, rows streaming by.

1. A batch is cut into M microbatches. Stage s of S works on one of them, hands it to stage s + 1
   (`jax.lax.ppermute`) and takes the next: GPipe's schedule (Huang et al. 2019, arXiv:1811.06965).
2. It is circular (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): with R repeats the layers
   are R * S groups and stage s owns the groups s, S + s, 2 S + s, ... A microbatch goes round the
   ring R times; the first stage keeps those that arrive until it is their turn.
3. Every step of the loop is the same on all stages, M * R + S - 1 in all. S - 1 of them are the
   bubble, in which a stage works on rows that nobody will read.
4. The backward schedule is the derivative of this loop: rows go back along the ring.

`stage` and `data` are manual in the `jax.shard_map`: fsdp, tensor and sequence stay with XLA's
partitioner. `data` is, so that the copies of a stage sum their gradients once, behind the loop: the
partitioner would sum them in every step of it. What belongs to a microbatch (mask, positions, the
encoder's output) is on all stages and looked up by its number, not carried: carrying an encoder's
output would add it to every hop, each of which the next step waits for, and keep one copy per step
for the backward pass.

Stored parameters are [X, ...] in the order of the layers, of which a stage has X / S neighbours.
With R = 1 these are its group. With R > 1 they are exchanged at the start of a pass, and their
gradients at its end: `_deal`, in which a stage sends to each of the S - 1 others ceil(R / S) groups
of X / (R * S) layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from chatyuan.errors import UserError
from chatyuan.models.config import ModelConfig
from chatyuan.ops.platform import target_platform

Array = jax.Array
Tree = Any
STAGE = "stage"
DATA = "data"


def stages_of(mesh: Mesh | None) -> int:
    """Returns S, the size of the mesh axis `stage`; 1 = no pipeline."""
    return 1 if mesh is None else mesh.shape[STAGE]


def microbatches_of(config: ModelConfig, stages: int) -> int:
    """Returns M: what is configured, by default S, the fewest that occupy all stages.

    More make the bubble smaller and every product of matrices smaller too, so that it is a choice
    to be made with the batch.
    """
    return config.pipeline_microbatches or stages


def bubble_fraction(stages: int, microbatches: int, repeats: int = 1) -> float:
    """Returns the share of a pass's time in which a stage does nothing useful, in [0, 1).

    (S - 1) / (M R + S - 1), forward and backward alike: of M R + S - 1 steps M R are useful. Steps
    count alike, communication is not counted.

    Args:
        stages: S.
        microbatches: M.
        repeats: R.
    """
    return (stages - 1) / (microbatches * repeats + stages - 1)


def check_pipeline(config: ModelConfig, rows: int, mesh: Mesh | None) -> None:
    """Checks that a pass over `rows` sequences can be pipelined; nothing to check without stages.

    Args:
        config: of the model.
        rows: of the pass: the global batch over MICROBATCHES.
        mesh: of `make_mesh`.

    Raises:
        UserError: layers or rows that do not divide, too few microbatches to go round.
    """
    stages = stages_of(mesh)
    if stages == 1:
        return
    repeats, count = config.pipeline_repeats, microbatches_of(config, stages)
    sides = {"num_decoder_layers": config.num_decoder_layers}
    if config.architecture == "encoder_decoder":
        sides["num_encoder_layers"] = config.num_encoder_layers
    for name, layers in sides.items():
        if layers % (stages * repeats):
            fitting = [n for n in range(2, layers + 1) if layers % (n * repeats) == 0]
            remedy = f"set MESH stage to {_either(fitting)}" if fitting else "set MESH stage to 1"
            if layers % stages == 0:
                remedy += f" or pipeline_repeats to a divisor of {layers // stages}"
            raise UserError(
                f"ModelConfig.{name} = {layers} does not divide over {stages} stages (MESH "
                f"stage={stages}) times {repeats} repeats (ModelConfig.pipeline_repeats); {remedy}."
            )
    if repeats > 1 and count < stages:
        raise UserError(
            f"ModelConfig.pipeline_microbatches = {count} is less than MESH stage={stages}: with "
            f"pipeline_repeats = {repeats} a microbatch would be due at the first stage before it "
            f"has come round; set pipeline_microbatches to {stages} or more."
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (count * shards):
        raise UserError(
            f"A pass over {rows} sequences does not divide into {count} pipeline microbatches "
            f"(ModelConfig.pipeline_microbatches) over {shards} data shards; make BATCH_SIZE / "
            f"MICROBATCHES a multiple of {count * shards}."
        )


def circulate(
    group: Callable[[Tree, Array, Array, Tree, Tree], Array],
    params: Tree,
    x: Array,
    rows: Tree,
    common: Tree,
    *,
    mesh: Mesh,
    microbatches: int,
    repeats: int = 1,
    units: int | None = None,
) -> Array:
    """Returns `x` [B, T, D] after all layers; on one device it would be `group` over all of them.

    Microbatch m has the rows m, M + m, 2 M + m, ...: those of a data shard are spread over all
    microbatches, so that no row leaves its device.

    Args:
        group: `(params [X / (S R), ...], index of the first layer, x, rows, common) -> x` for one
            microbatch of a data shard.
        params: stacked over all layers, [X, ...].
        x: [B, T, D].
        rows: pytree of arrays with a leading dimension of rows, cut as `x` is.
        common: what is the same for all microbatches. Python numbers in it stay what they are.
        mesh: with stages.
        microbatches: M.
        repeats: R.
        units: rows of `x` that belong together are B / units neighbours (the answers of a prompt);
            default B.
    """
    stages, units = stages_of(mesh), units or x.shape[0]
    layers = jax.tree.leaves(params)[0].shape[0] // (stages * repeats)
    passes = microbatches * repeats
    streamed = jax.tree.map(lambda leaf: _cut(leaf, microbatches, units), (x, rows))
    leaves, structure = jax.tree.flatten(common)
    arrays = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, (streamed, arrays))
    ring = [(stage, (stage + 1) % stages) for stage in range(stages)]

    def local(params: Tree, streamed: Tree, arrays: Tree, stage: Array) -> Array:
        stage = stage[0]
        (slots, rows), arrays = jax.tree.map(_narrow, (streamed, arrays), dtypes)
        filled = [
            leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)
        ]
        common = structure.unflatten(filled)
        params = _deal(params, stage, stages, repeats)

        def step(carry: tuple[Array, Array], tick: Array) -> tuple[tuple[Array, Array], None]:
            slots, arrived = carry
            number = jnp.clip(tick - stage, 0, passes - 1)  # of its pieces of work
            microbatch, repeat = number % microbatches, number // microbatches
            own = jax.tree.map(lambda leaf: _at(leaf, repeat), params)
            x = jnp.where(stage == 0, _at(slots, microbatch), arrived)
            first = (repeat * stages + stage) * layers
            here = jax.tree.map(lambda leaf: _at(leaf, microbatch), rows)
            x = group(own, first, x, here, common)
            arrived = jax.lax.ppermute(x, STAGE, ring)
            # Of what comes from the last stage the first one keeps everything, in place of the
            # input that it has used: work for the next repeat, or results.
            done = tick - (stages - 1)
            slot = jnp.maximum(done, 0) % microbatches
            kept = jnp.where(done >= 0, arrived, _at(slots, slot))
            return (jax.lax.dynamic_update_index_in_dim(slots, kept, slot, 0), arrived), None

        ticks = jnp.arange(passes + stages - 1, dtype=jnp.int32)
        (slots, _), _ = jax.lax.scan(step, (slots, jnp.zeros_like(slots[0])), ticks)
        return slots[None]  # those of the first stage are the results

    split, cut = PartitionSpec(STAGE), PartitionSpec(None, DATA)
    out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, cut, PartitionSpec(), split),
        out_specs=PartitionSpec(STAGE, None, DATA),
        axis_names={STAGE, DATA},
        check_vma=False,  # as the kernels inside, which do not say where their results differ
    )(params, *jax.tree.map(_wide, (streamed, arrays)), jnp.arange(stages, dtype=jnp.int32))
    return _joined(out[0], units)


def _deal(params: Tree, stage: Array, stages: int, repeats: int) -> Tree:
    """This stage's groups in the order of the repeats, [R, X / (S R), ...].

    Group g of all is stored as the (g % R)-th of stage g // R and wanted as the (g // S)-th of
    stage g % S.
    """
    if repeats == 1:
        return jax.tree.map(lambda leaf: leaf[None], params)
    most = -(-repeats // stages)
    nth = np.arange(most, dtype=np.int32)
    wanted = np.arange(repeats, dtype=np.int32) * stages + stage
    source, place = wanted // repeats, wanted % repeats // stages

    def one(leaf: Array) -> Array:
        groups = leaf.reshape(repeats, -1, *leaf.shape[1:])
        received = []
        # An all-to-all; XLA makes whole what `tensor` splits before it runs one of those.
        for shift in range(stages):
            to = (stage + shift) % stages
            # Of the own groups, the nth that stage `to` wants; the last where there is none.
            sent = jnp.minimum((to - stage * repeats) % stages + nth * stages, repeats - 1)
            ring = [(s, (s + shift) % stages) for s in range(stages)]
            chosen = _chosen(groups, sent)
            received.append(jax.lax.ppermute(chosen, STAGE, ring) if shift else chosen)
        return _chosen(jnp.concatenate(received), (stage - source) % stages * most + place)

    return jax.tree.map(one, params)


def _chosen(groups: Array, indices: Array) -> Array:
    """`groups[indices]`, by slices: of a gather XLA would make whole what `tensor` splits."""
    return jnp.stack([_at(groups, indices[i]) for i in range(indices.shape[0])])


def _cut(leaf: Array, microbatches: int, units: int) -> Array:
    """[B, ...] -> [M, B / M, ...]; see `circulate`."""
    together = leaf.shape[0] // units
    cut = leaf.reshape(units // microbatches, microbatches, together, *leaf.shape[1:])
    cut = cut.swapaxes(0, 1)
    return cut.reshape(microbatches, -1, *leaf.shape[1:])


def _joined(cut: Array, units: int) -> Array:
    """The inverse of `_cut`."""
    microbatches, rows = cut.shape[:2]
    together = microbatches * rows // units
    joined = cut.reshape(microbatches, rows // together, together, *cut.shape[2:]).swapaxes(0, 1)
    return joined.reshape(microbatches * rows, *cut.shape[2:])


def _at(leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)


def _wide(leaf: Array) -> Array:
    """What is summed over stages, forwards or backwards, where XLA cannot do it in bfloat16.

    On CPU the compiler aborts on such an all-reduce inside a partly manual region (jaxlib 0.10.2).
    """
    if leaf.dtype == jnp.bfloat16 and target_platform() == "cpu":
        return leaf.astype(jnp.float32)
    return leaf


def _narrow(leaf: Array, dtype: Any) -> Array:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def _either(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + " or " * (len(numbers) > 1) + str(numbers[-1])
