"""Arrays of a checkpoint: their names, whether they fit, how Orbax reads them.

A helper of `chatyuan.checkpoints`.
"""

import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from chatyuan.checkpoint_files import STATE, DamagedCheckpoint, first_few
from chatyuan.errors import UserError

PyTree = Any


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns `{"params/encoder/...": leaf}` in flattening order, for any registered pytree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turns slash-separated names into nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def check_arrays(
    folder: pathlib.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], exact_dtype: bool
) -> None:
    """Raises one UserError that names everything in which a checkpoint does not fit the model."""
    problems = []
    for text, names in (
        ("missing in the checkpoint", [n for n in wanted if n not in stored]),
        ("only in the checkpoint", [n for n in stored if n not in wanted]),
    ):
        if names:
            problems.append(f"{len(names)} {text}: {first_few(names)}")
    different = []
    for name in (n for n in wanted if n in stored):
        shape, dtype = tuple(stored[name][0]), stored[name][1]
        if shape != tuple(wanted[name].shape):
            different.append(f"{name} is {shape}, the model wants {tuple(wanted[name].shape)}")
        elif exact_dtype and dtype != str(wanted[name].dtype):
            different.append(f"{name} is {dtype}, the model wants {wanted[name].dtype}")
    if different:
        problems.append(f"{len(different)} different: {first_few(different, '; ')}")
    if problems:
        raise UserError(
            f"checkpoint {folder} does not fit this model: {'. '.join(problems)}. Use the model "
            "configuration it was trained with (config.gin in its MODEL_DIR), or another folder."
        )


def read_arrays(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the named arrays on the shardings of `wanted`. Raises DamagedCheckpoint."""
    ocp = orbax()
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = {
        name: ocp.ArrayRestoreArgs(
            sharding=getattr(leaf, "sharding", None) or default,
            global_shape=tuple(leaf.shape),
            dtype=leaf.dtype,
        )
        for name, leaf in wanted.items()
    }
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=restore_args[name].sharding)
        for name, leaf in wanted.items()
    }
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(
                folder / STATE,
                args=ocp.args.PyTreeRestore(
                    item=nest(structs), restore_args=nest(restore_args), partial_restore=True
                ),
            )
    except Exception as error:
        # Orbax and TensorStore report damaged bytes as ValueError, KeyError, FileNotFoundError, ...
        raise DamagedCheckpoint(f"{type(error).__name__}: {str(error)[:300]}") from error
    return named_leaves(tree)


def orbax() -> Any:
    """Returns the module orbax.checkpoint, imported when it is needed."""
    # Half a second of imports that help, dry runs and errors do not need.
    import orbax.checkpoint

    # It logs a traceback for failures that are raised again here as one message.
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)
    return orbax.checkpoint


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
