"""Whether Triton and ptxas compile the GPU attention kernels, ahead of time and without a GPU.

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
    python benchmarks/triton_compile.py [--devices "NVIDIA H100" ...] [--no_record]

The first two packages must have the version of jax. Each case is one call of `pallas_gpu` with its
gradients at the sizes of `block_sizes.BLOCK_SIZES`. Printed is what the compilers say of each
kernel: registers of a thread, bytes that it spills to memory, shared memory of a program, and how
many programs fit on a processor. Nothing is run, so nothing here is a speed.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import common

LENGTH, HEADS = 2048, 4
COLUMNS = (
    "date", "versions", "commit", "device", "case", "kernel", "blocks", "registers", "spilled B",
    "shared KiB", "programs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
    """What limits a kernel.

    Attributes:
        capability: compute capability, "9.0".
        target: as ptxas names it.
        program: KiB of shared memory that a program may have.
        processor: KiB that all programs on a processor share, with 1 KiB more for each.
    """

    capability: str
    target: str
    program: int
    processor: int


DEVICES = {
    "NVIDIA H100": Device("9.0", "sm_90a", 227, 228),
    "NVIDIA A100": Device("8.0", "sm_80", 163, 164),
    "NVIDIA L4": Device("8.9", "sm_89", 99, 100),
}
REGISTERS = 64 * 1024  # of a processor
# T5's bias, heads of a key head.
KINDS = {"t5": (True, 1), "none": (False, 1), "t5_grouped": (True, 2)}


def ptxas() -> pathlib.Path:
    """The assembler inside its wheel."""
    folder = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations[0]
    path = pathlib.Path(folder) / "bin" / "ptxas"
    path.chmod(0o755)  # pip may forget it
    return path


def kernels(kind: str, head_dim: int, dtype: str, device: str) -> list[dict[str, Any]]:
    """The kernels of one call as lowering hands them over: name, ir, num_warps, num_stages."""
    import jax
    import jax.numpy as jnp
    from jax._src.lib.mlir import ir

    from chatyuan.kernels import AttentionMask, RelativePositionBias
    from chatyuan.kernels.block_sizes import block_sizes_for
    from chatyuan.kernels.pallas_gpu import pallas_gpu_attention

    biased, group = KINDS[kind]
    sizes = block_sizes_for("pallas_gpu", device_kind=device, head_dim=head_dim, dtype=dtype)

    def loss(query: Any, key: Any, value: Any, table: Any, end: Any) -> Any:
        out = pallas_gpu_attention(
            query, key, value, scale=1.0, mask=AttentionMask(causal=True, key_end=end),
            bias=RelativePositionBias(table, True) if biased else None, block_sizes=sizes,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) ** 2)

    key = jax.ShapeDtypeStruct((1, LENGTH, HEADS // group, head_dim), dtype)
    arguments = (
        jax.ShapeDtypeStruct((1, LENGTH, HEADS, head_dim), dtype), key, key,
        jax.ShapeDtypeStruct((HEADS, 32), jnp.float32),
        jax.ShapeDtypeStruct((1, LENGTH), jnp.int32),
    )  # fmt: skip
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments)
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    forward = (sizes.biased or sizes) if biased else sizes
    found = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if "mhlo.backend_config" in operation.attributes:
            config = operation.attributes["mhlo.backend_config"]
            if "num_warps" in config:
                kernel = {entry.name: entry.attr for entry in config}
                name = kernel["name"].value.removeprefix("attention_").removesuffix("_kernel")
                used = forward if name == "forward" else sizes.backward or sizes
                blocks = f"{used.query} x {used.key}, {used.warps} warps, {used.stages} stages"
                found.append({**kernel, "name": name, "blocks": blocks})
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def compile_kernel(kernel: dict[str, Any], device: Device) -> tuple[list[str], str | None]:
    """Returns (registers, spilled, shared, programs) as text, and why it cannot run or None."""
    from jax._src.lib import triton

    warps = kernel["num_warps"].value
    compiled = triton.compile(
        "CUDA", kernel["ir"].value_bytes, device.capability, num_warps=warps, num_ctas=1,
        num_stages=kernel["num_stages"].value,
    )  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm if isinstance(compiled.asm, str) else compiled.asm.decode())
        file.flush()
        command = [ptxas(), "-v", f"-arch={device.target}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return ["-"] * 4, done.stderr.strip()
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill", done.stderr))
    shared = compiled.smem_bytes / 2**10
    programs = min(REGISTERS // (registers * 32 * warps), int(device.processor // (shared + 1)))
    error = None
    if shared > device.program:
        error = f"{shared:.0f} KiB of shared memory, a program may have {device.program}"
    return [str(registers), str(spilled), f"{shared:.1f}", str(programs)], error


def main() -> int:
    """Compiles, prints, records; exits with 1 where a kernel cannot run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["t5", "none"])
    parser.add_argument("--no_record", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    # The plugin registers Triton's compiler even so, and looks for no GPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from jax._src.lib import triton

    jax.devices()
    if not triton.has_compilation_handler("CUDA"):
        print("jax's CUDA plugin is not installed, so nothing was compiled: pip install --no-deps "
              "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12")  # fmt: skip
        return 0
    names, commit = common.versions("jax", "jax-cuda12-plugin"), common.commit()
    common.print_configuration(
        "GPU attention, compiled ahead of time", {"versions": names, "commit": commit}
    )
    rows, refused = [], 0
    for name, head_dim, dtype, kind in itertools.product(
        arguments.devices, arguments.head_dims, arguments.dtypes, arguments.kinds
    ):
        for kernel in kernels(kind, head_dim, dtype, name):
            figures, error = compile_kernel(kernel, DEVICES[name])
            refused += error is not None
            case = f"S {LENGTH}, D {head_dim}, {dtype}, {kind}"
            words = zip(COLUMNS[-4:], figures, strict=True)
            print(f"{name} {case}, {kernel['name']}, {kernel['blocks']}: "
                  f"{', '.join(' '.join(pair) for pair in words)}"
                  f"{f'; REFUSED: {error}' if error else ''}", flush=True)  # fmt: skip
            rows.append([
                common.today(), names, commit, name, case, kernel["name"], kernel["blocks"],
                *figures,
            ])  # fmt: skip
    if not arguments.no_record:
        common.append_rows("GPU compilation", COLUMNS, rows)
    print(f"{len(rows) - refused} of {len(rows)} kernels compiled and fit")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
