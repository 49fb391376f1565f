"""Memory of one device by kind, from shapes and shardings alone."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from chatyuan import sharding
from chatyuan.models import Model
from chatyuan.models.loss import LossConfig
from chatyuan.planning.activations import Activations, activations
from chatyuan.sharding import AnyMesh, Placement, ShardingConfig
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule
from chatyuan.train.state import init_state


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; the sum is an upper bound, as if all kinds were largest at once.

    Attributes:
        weights: float32 parameters.
        gradients: of one microbatch, and their sum where there are several microbatches.
        optimizer: its state.
        ema: the moving average of the weights.
        activations: see `chatyuan.planning.activations`.
        gathered: the largest parameter that fsdp splits, whole, with its gradient.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: Activations
    gathered: float

    @property
    def state(self) -> float:
        """Weights, gradients, optimizer state and average: what no smaller batch reduces."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> float:
        """Everything."""
        return self.state + self.activations.total + self.gathered

    def kinds(self) -> dict[str, float]:
        """Returns kind -> bytes; they add up to `total`."""
        parts = self.activations
        kinds = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "moving average": self.ema,
            "activations": parts.kept,
            "cast weights": parts.copies,
            "logits or layer": max(parts.loss_workspace, parts.layer_workspace),
            "gathered weights": self.gathered,
        }
        return {name: size for name, size in kinds.items() if size}


def abstract_state(model: Model, optimizer: OptimizerConfig, ema: bool = False) -> Any:
    """Returns the shapes of a TrainState.

    Args:
        model: of `chatyuan.models.build`.
        optimizer: which one.
        ema: whether there is a moving average.
    """
    params = model.abstract_params()
    schedule = make_schedule(ScheduleConfig(name="constant"))  # changes no shape
    made = make_optimizer(optimizer, schedule, params, model.logical_axes())
    return jax.eval_shape(functools.partial(init_state, optimizer=made, ema=ema), params)


def predict(
    model: Model,
    state: Any,
    mesh: AnyMesh,
    *,
    batch_size: int,
    lengths: tuple[int, int],
    platform: str,
    strategy: ShardingConfig | None = None,
    microbatches: int = 1,
    loss: LossConfig | None = None,
) -> tuple[Memory, Placement]:
    """Returns the memory of a training step on one device, and where its arrays are placed.

    Args:
        model: of `chatyuan.models.build`.
        state: of `abstract_state`.
        mesh: devices need not exist.
        batch_size: sequences of the global batch.
        lengths: (INPUT_LENGTH, TARGET_LENGTH).
        platform: "cpu", "gpu" or "tpu".
        strategy: what copies share.
        microbatches: parts of the batch.
        loss: its regularisers.

    Raises:
        UserError: something does not divide over the mesh.
    """
    placement = sharding.place(state, model.logical_axes(), mesh, strategy)
    held = functools.partial(_bytes, placement.state)
    gradients = sharding.bytes_per_device(state.params, placement.gradients)
    shape: Mapping[str, int] = mesh.shape
    shards = math.prod(shape[axis] for axis in sharding.RULES["batch"])
    memory = Memory(
        weights=held(state, "params"),
        gradients=gradients * (2 if microbatches > 1 else 1),
        optimizer=held(state, "opt_state"),
        ema=held(state, "ema") if state.ema is not None else 0,
        activations=activations(
            model.config,
            rows=batch_size / shards / microbatches,
            lengths=lengths,
            loss=loss or LossConfig(),
            platform=platform,
            tensor=shape["tensor"],
            sequence=shape["sequence"],
            stages=shape["stage"],
        ),
        gathered=2.0 * _largest_gathered(model, placement, mesh),
    )
    return memory, placement


def checkpoint_bytes(state: Any) -> int:
    """Returns the size of a checkpoint on disk: the whole state, uncompressed."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def device_limit() -> int | None:
    """Returns the bytes that one device of this process may hold; None = not known.

    On CPU that is the host's memory divided among the devices that share it.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // jax.local_device_count()
    return None


def too_little(needed: float, limit: float, *, state_alone: bool = False) -> str:
    """Returns what to tell where a device's memory does not suffice, with the remedies in order.

    Args:
        needed: bytes that one device would hold.
        limit: bytes that it has.
        state_alone: whether `needed` is without activations, so that no smaller batch helps.
    """
    what = "weights, gradients and optimizer state alone" if state_alone else "this run"
    remedies = (
        "split them: --gin_file=gin/sharding/zero1.gin, then zero3.gin with --gin.MESH on more "
        "devices; or take an optimizer with less state (gin/optimizers/adafactor.gin)"
        if state_alone
        else "in this order: raise --gin.MICROBATCHES, recompute (gin/sharding/remat_dots.gin, "
        "then remat_full.gin), split the state (gin/sharding/zero1.gin, zero3.gin)"
    )
    return (
        f"{what} would take {needed / 2**30:.3g} GiB of each device, which has "
        f"{limit / 2**30:.3g} GiB: {(needed - limit) / 2**30:.3g} GiB too much. "
        f"Remedies: {remedies}."
    )


def _bytes(places: Any, state: Any, field: str) -> int:
    return sharding.bytes_per_device(getattr(state, field), getattr(places, field))


def _largest_gathered(model: Model, placement: Placement, mesh: AnyMesh) -> float:
    """Bytes of the largest matrix as it is while it is used: one layer's, and not over fsdp."""
    if mesh.shape["fsdp"] == 1:
        return 0.0
    largest = 0.0
    leaves = zip(
        jax.tree.leaves(model.abstract_params()),
        jax.tree.leaves(model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(placement.state.params),
        strict=True,
    )
    for leaf, axes, place in leaves:
        split = [a for entry in place.spec if entry for a in _names(entry)]
        if "fsdp" not in split:
            continue
        size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize * mesh.shape["fsdp"]
        largest = max(largest, size / (leaf.shape[0] if axes[0] == "layers" else 1))
    return largest


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry
