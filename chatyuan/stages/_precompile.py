"""`--precompile`: compile the training step, show what it costs, and end before training.

1. Alone it compiles for the attached devices, which fills the compilation cache: the run that
   follows starts at once.
2. With the name of a TPU topology, `--precompile=v5e:2x4`, it compiles for devices that are not
   attached. libtpu is the compiler; no TPU is looked for.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from chatyuan import sharding
from chatyuan.errors import RunFailed, UserError
from chatyuan.ops.platform import targeting

MIB = 2**20
# libtpu reads these when it is loaded: neither ask a metadata server nor wait for other hosts.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip


def devices(precompile: bool | str) -> Sequence[jax.Device] | None:
    """Returns the devices of a named topology; None where none is named: the attached ones.

    Args:
        precompile: the setting of that name.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    return None if isinstance(precompile, bool) else _described(precompile)


@functools.cache
def _described(name: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--precompile={name} compiles for TPUs that are not attached, which needs the package "
            "libtpu: pip install libtpu; or --precompile alone, for the attached devices."
        )
    from jax.experimental import topologies

    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is attached is left to others
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--precompile={name} is not a topology that libtpu knows ({reason}); it should be a "
            "generation and the chips along each side, such as v5e:2x4, v6e:4x4 or v5p:2x2x2."
        ) from None


@contextlib.contextmanager
def target(precompile: bool | str) -> Iterator[None]:
    """Inside a `with`, kernels and sizes are chosen for the devices of `devices(precompile)`."""
    described = devices(precompile)
    with targeting(described[0].platform if described else None):
        yield


def show(lowered: jax.stages.Lowered, mesh: Mesh) -> None:
    """Compiles; prints the memory of one device and the collectives of one step.

    Args:
        lowered: the training step.
        mesh: that it was lowered for.

    Raises:
        RunFailed: it does not fit into the memory of a device.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunFailed(
            f"The training step does not fit on {mesh.devices.flat[0].device_kind}: "
            f"{str(error).splitlines()[0]}\nRaise --gin.MICROBATCHES, lower BATCH_SIZE, or split "
            "the weights: --gin.MESH=\"{'fsdp': -1}\"."
        ) from None
    collectives = sharding.read_collectives(compiled.as_text(), mesh)
    if jax.process_index() == 0:
        for line in (*_memory_lines(compiled.memory_analysis()), *_collective_lines(collectives)):
            print(line)
        print("Compiled; nothing was trained or written.")


def _memory_lines(analysis: Any) -> Iterator[str]:
    """The compiler's account of one device; what is donated is counted once."""
    parts: Mapping[str, int] = {
        "state and batch": analysis.argument_size_in_bytes,
        "results beside them": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    yield f"Memory per device, as compiled: {sum(parts.values()) / MIB:,.1f} MiB"
    for name, size in parts.items():
        yield f"  {name:<20} {size / MIB:>12,.1f} MiB"


def _collective_lines(collectives: Sequence[sharding.Collective]) -> Iterator[str]:
    """One line for each kind of exchange over the same mesh axes."""
    groups: dict[tuple[str, tuple[str, ...]], list[sharding.Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.axes), []).append(one)
    total = sum(one.wire_bytes for one in collectives)
    yield f"Collectives of a step: a device sends {total / MIB:,.2f} MiB"
    for (kind, axes), group in sorted(groups.items()):
        times = sum(one.times for one in group)
        sent = sum(one.wire_bytes for one in group) / MIB
        yield f"  {kind:<20} over {'+'.join(axes):<16} {times:>6,} x {sent:>12,.2f} MiB sent"
