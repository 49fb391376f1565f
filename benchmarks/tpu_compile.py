"""Whether libtpu compiles the TPU attention kernels, ahead of time and without a TPU.

    pip install libtpu
    python benchmarks/tpu_compile.py [--topologies v5e:2x2 ...] [--lengths 512 ...] [--json]

Each case is one call of `pallas_tpu` with a causal run-time mask, 1 row and 4 heads, compiled for
the first chip of a described topology: forward alone, then with all gradients. Printed is what the
compiler says: VMEM that each kernel uses, and HBM for temporaries of the whole call (0 where XLA
keeps them in VMEM). Nothing is run, so nothing here is a speed.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import sys
from typing import Any

import common

# The memory of each custom call, as the compiled module names it.
KERNEL = re.compile(
    r'attention_(\w+?)_*\.\d+ = .*tpu_custom_call.*"used_scoped_memory_configs":'
    r'\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)
# (name, T5's bias, key heads of 4)
KINDS = {"t5": (True, 4), "none": (False, 4), "t5_grouped": (True, 2)}
COLUMNS = ("date", "versions", "commit", "device", "case", "VMEM KiB", "temp MiB")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and what became of it.

    Attributes:
        device: as jax names the chip.
        call: in words.
        gradients: whether the backward pass is part of it.
        error: the compiler's message; None: it compiled.
        vmem: bytes of VMEM by kernel.
        temp: bytes of HBM for temporaries.
    """

    device: str
    call: str
    gradients: bool
    error: str | None
    vmem: dict[str, int]
    temp: int


def configure() -> None:
    """Tells libtpu, before jax starts, not to look for a TPU or for a machine that has one.

    Nor is a program taken from a cache: the compiler's answer is what is asked for.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", JAX_ENABLE_COMPILATION_CACHE="false",
    )  # fmt: skip


def compile_call(
    device: Any, *, length: int, head_dim: int, dtype: str, kind: str, gradients: bool
) -> Case:
    """Compiles one call.

    Args:
        device: of a described topology.
        length: T = S.
        head_dim: H.
        dtype: of query, key and value.
        kind: of `KINDS`.
        gradients: of query, key, value and table, too.
    """
    import jax
    import jax.numpy as jnp

    from chatyuan.kernels import AttentionMask, RelativePositionBias
    from chatyuan.kernels.pallas_tpu import pallas_tpu_attention

    biased, kv_heads = KINDS[kind]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def spec(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(query: Any, key: Any, value: Any, table: Any, end: Any) -> Any:
        out = pallas_tpu_attention(
            query, key, value, scale=1.0, mask=AttentionMask(causal=True, key_end=end),
            bias=RelativePositionBias(table, True) if biased else None,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) ** 2)

    key = spec(1, length, kv_heads, head_dim)
    arguments = (
        spec(1, length, 4, head_dim), key, key, spec(4, 32, dtype="float32"),
        spec(1, length, dtype="int32"),
    )  # fmt: skip
    function = jax.value_and_grad(loss, argnums=(0, 1, 2, 3)) if gradients else loss
    call = f"S {length}, D {head_dim}, {dtype}, {kind}"
    try:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Case(device.device_kind, call, gradients, str(error), {}, 0)
    vmem = {name: int(size) for name, size in KERNEL.findall(compiled.as_text())}
    temp = compiled.memory_analysis().temp_size_in_bytes
    return Case(device.device_kind, call, gradients, None, vmem, temp)


def main() -> int:
    """Compiles, prints, records; exits with 1 where a case was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2"], metavar="NAME",
                        help="such as v4:2x2x1 v5e:2x2 v5p:2x2x1 v6e:2x2")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", action="store_true", help="end with all cases on one line")
    parser.add_argument("--no_record", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed, so nothing was compiled for a TPU: pip install libtpu")
        return 0
    configure()
    from jax.experimental import topologies

    names, commit = common.versions("jax", "jaxlib", "libtpu"), common.commit()
    common.print_configuration(
        "TPU attention, compiled ahead of time",
        {"versions": names, "commit": commit, "topologies": " ".join(arguments.topologies)},
    )
    cases, rows = [], []
    for topology in arguments.topologies:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        for length, head_dim, dtype, kind, gradients in itertools.product(
            arguments.lengths, arguments.head_dims, arguments.dtypes, arguments.kinds, (False, True)
        ):
            case = compile_call(
                described.devices[0], length=length, head_dim=head_dim, dtype=dtype, kind=kind,
                gradients=gradients,
            )  # fmt: skip
            cases.append(case)
            which = "forward and backward" if gradients else "forward"
            vmem = ", ".join(f"{name} {size / 2**10:.0f}" for name, size in case.vmem.items())
            if gradients:  # whose kernels include the forward pass's
                rows.append([
                    common.today(), names, commit, case.device, case.call, vmem or "REFUSED",
                    f"{case.temp / 2**20:.2f}",
                ])  # fmt: skip
            verdict = "compiled" if case.error is None else f"REFUSED: {case.error}"
            print(f"{case.device} {case.call}, {which}: {verdict}; VMEM KiB {vmem}; "
                  f"temp {case.temp / 2**20:.2f} MiB", flush=True)  # fmt: skip
    if not arguments.no_record:
        common.append_rows("TPU compilation", COLUMNS, rows)
    refused = sum(case.error is not None for case in cases)
    print(f"{len(cases) - refused} of {len(cases)} calls compiled")
    if arguments.json:
        print(json.dumps([dataclasses.asdict(case) for case in cases]))
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
