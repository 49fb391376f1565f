"""The mesh: from a MESH setting to devices with five named axes, also across slices and hosts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from chatyuan.errors import UserError, did_you_mean

# data: copies of the model. fsdp: copies that share its memory (ZeRO-3). tensor: slices of every
# matrix. sequence: slices of every sequence. stage: slices of the stack of layers.
MESH_AXES = ("data", "fsdp", "tensor", "sequence", "stage")
# `dcn_data` = how much of `data` lies across slices (TPU) or hosts (GPU), whose network is slow.
ACROSS = "dcn_"


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a MESH setting, with all of MESH_AXES (those not named have size 1).

    Without `dcn_` axes jax lays the mesh over the devices as their network suggests. With them
    (what T5X and MaxText call the DCN mesh, beside the ICI mesh of one slice), an axis has
    `dcn_NAME * NAME` parts, those across slices outermost: `{"dcn_data": 2, "fsdp": 8}` makes 2
    copies of the model, each split inside one slice of 8 devices. Several TPU slices without a
    `dcn_` axis become `dcn_data`.

    Args:
      shape: mesh axis -> number of parts, such as `{"data": -1, "tensor": 2}`; one of them may be
        -1, all the devices that the others leave, and one of the `dcn_` axes too.
      devices: default, all devices of all hosts.

    Raises:
      UserError: an axis that does not exist, sizes that do not multiply to the number of devices
        or slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = _slices(devices)
    within, across = mesh_sizes(shape, len(devices), slices)
    if math.prod(across.values()) == 1:
        return jax.make_mesh(
            tuple(within.values()),
            MESH_AXES,
            axis_types=(AxisType.Auto,) * len(MESH_AXES),
            devices=devices,
        )
    grid = _hybrid_grid(tuple(within.values()), tuple(across.values()), devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(shape: Mapping[str, int], device_count: int) -> AbstractMesh:
    """Returns the mesh of a MESH setting on devices that need not exist.

    It serves everything here that computes shapes, bytes and communication.

    Args:
      shape: as for `make_mesh`.
      device_count: all devices of all slices.

    Raises:
      UserError: see `make_mesh`.
    """
    within, across = mesh_sizes(shape, device_count)
    sizes = tuple(within[axis] * across[axis] for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(
    shape: Mapping[str, int], device_count: int, slices: int | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the parts of every axis (inside a slice, across slices) of a MESH setting.

    Args:
      shape: as for `make_mesh`.
      device_count: all devices of all slices.
      slices: how many there are; None = as many as the `dcn_` axes say.

    Raises:
      UserError: see `make_mesh`.
    """
    _check_names(shape)
    across = {name: shape.get(ACROSS + name, 1) for name in MESH_AXES}
    within = {name: shape.get(name, 1) for name in MESH_AXES}
    if slices is not None and slices > 1 and not any(name.startswith(ACROSS) for name in shape):
        across["data"] = slices
        if within["data"] > 1:
            within["data"] = max(1, within["data"] // slices)
    fixed = math.prod(size for size in across.values() if size != -1)
    free = [name for name, size in across.items() if size == -1]
    if free:
        if slices is None or slices % fixed:
            raise UserError(_wrong_slices(shape, slices or 1))
        across[free[0]] = slices // fixed
    count = math.prod(across.values())
    if (slices is not None and count != slices) or device_count % count:
        raise UserError(_wrong_slices(shape, slices, device_count))
    inside = device_count // count
    fixed = math.prod(size for size in within.values() if size != -1)
    free = [name for name, size in within.items() if size == -1]
    if inside % fixed or (not free and fixed != inside):
        raise UserError(_wrong_product(shape, fixed * count, device_count, count))
    if free:
        within[free[0]] = inside // fixed
    return within, across


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Returns the axes that split anything, `data=2 tensor=4`, or `one device`."""
    parts = [f"{name}={size}" for name, size in mesh.shape.items() if size > 1]
    return " ".join(parts) or "one device"


def _check_names(shape: Mapping[str, int]) -> None:
    names = (*MESH_AXES, *(ACROSS + name for name in MESH_AXES))
    for name, size in shape.items():
        if name not in names:
            raise UserError(
                f"MESH has the axis {name!r}; the axes are {', '.join(MESH_AXES)}, and the same "
                f"with {ACROSS} before them across slices.{did_you_mean(name, names)}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise UserError(
                f"MESH {name} = {size!r} must be a positive number, or -1 for the rest."
            )
    for group in (False, True):
        free = [n for n, size in shape.items() if size == -1 and n.startswith(ACROSS) == group]
        if len(free) > 1:
            raise UserError(
                f"MESH has -1 for {' and '.join(free)}; only one axis can take the rest."
            )


def _wrong_product(shape: Mapping[str, int], needed: int, count: int, slices: int) -> str:
    written = " ".join(f"{name}={size}" for name, size in shape.items())
    kept = {n: s for n, s in shape.items() if n != "data" and s != -1}
    others = math.prod(size for name, size in kept.items() if not name.startswith(ACROSS))
    if (count // slices) % others:
        kept = {name: size for name, size in kept.items() if name.startswith(ACROSS)}
    suggestion = {"data": -1, **kept}
    return (
        f"MESH {written} needs {'a multiple of ' if -1 in shape.values() else ''}{needed} devices "
        f'but there are {count}; use --gin.MESH="{suggestion}" (-1 = all the rest).'
    )


def _wrong_slices(shape: Mapping[str, int], slices: int | None, devices: int = 0) -> str:
    written = " ".join(f"{n}={size}" for n, size in shape.items() if n.startswith(ACROSS))
    needed = math.prod(s for n, s in shape.items() if n.startswith(ACROSS) and s != -1)
    rest = {name: size for name, size in shape.items() if not name.startswith(ACROSS)}
    if slices is None:
        return (
            f"MESH {written} cuts {devices} devices into {needed} slices, which is not even; use a "
            f"divisor of {devices}, or none where there is one slice: "
            f'--gin.MESH="{rest or {"data": -1}}".'
        )
    suggestion = {f"{ACROSS}data": slices, **rest} if slices > 1 else rest or {"data": -1}
    return (
        f"MESH {written or 'without a dcn_ axis'} needs {needed} slices but the devices form "
        f'{slices}; use --gin.MESH="{suggestion}".'
    )


def _slices(devices: Sequence[Any]) -> int | None:
    """How many slices the devices say they form; None = they do not say (CPU, GPU)."""
    indices = {getattr(device, "slice_index", None) for device in devices}
    return None if None in indices or len(indices) == 1 else len(indices)


def _hybrid_grid(
    within: tuple[int, ...], across: tuple[int, ...], devices: Sequence[Any]
) -> np.ndarray:
    """Devices [sizes of all axes], those of one slice together; the slices are the outer parts.

    Slices are what the devices call so, else processes (hosts of a GPU cluster), else equal runs of
    the list: that is how the layout is tried out without a cluster.
    """
    count = math.prod(across)
    processes = {device.process_index for device in devices}
    if _slices(devices) or (len(processes) > 1 and len(processes) == count):
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=not _slices(devices)
        )
    grid = np.asarray(devices, dtype=object).reshape(*across, *within)
    order = [axis + part for axis in range(len(across)) for part in (0, len(across))]
    sizes = [a * w for a, w in zip(across, within, strict=True)]
    return grid.transpose(order).reshape(sizes)
