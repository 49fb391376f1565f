"""Block sizes of every attention implementation: one table, the only place to tune."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How much of the score square one step holds.

    Attributes:
        query: queries of a block, at most.
        key: keys of a block, at most.
        together: of `xla`: a step takes all batch rows and heads; if not, one row and one key head.
        warps: of `pallas_gpu`: warps of 32 threads that share a block.
        stages: of `pallas_gpu`: blocks in flight between memory and the tensor cores.
        backward: sizes of the backward pass; None: the same ones.
        biased: sizes of the forward pass with a bias, whose tiles take memory; None: the same ones.
    """

    query: int
    key: int
    together: bool = False
    warps: int = 4
    stages: int = 2
    backward: "BlockSizes | None" = None
    biased: "BlockSizes | None" = None


# (implementation, start of the device kind, head_dim at most, dtype); None matches everything. The
# first match counts. `benchmarks/attention.py --tune` prints the entries of the device it runs on.
# Those of `pallas_gpu` are not measured: they are large blocks whose kernels, compiled for each
# device by `benchmarks/triton_compile.py`, keep nearly all values in registers and leave room for a
# second program on a processor where that is possible. "NVIDIA H" is Hopper, where a program may
# have 227 KiB of shared memory; on an A100 it may have 163 KiB, on the others 99.
BLOCK_SIZES: dict[tuple[str, str | None, int | None, str | None], BlockSizes] = {
    ("xla", "cpu", None, None): BlockSizes(512, 512),
    ("xla", None, None, None): BlockSizes(256, 256, together=True),
    ("pallas_gpu", None, 64, "float32"): BlockSizes(32, 32),
    ("pallas_gpu", None, 128, "float32"): BlockSizes(32, 16),
    ("pallas_gpu", None, None, "float32"): BlockSizes(16, 16, warps=8),
    ("pallas_gpu", None, 64, None): BlockSizes(
        128, 64, stages=3, backward=BlockSizes(64, 64), biased=BlockSizes(64, 64)
    ),
    ("pallas_gpu", "NVIDIA H", 128, None): BlockSizes(
        128,
        128,
        warps=8,
        stages=3,
        backward=BlockSizes(64, 64, warps=8),
        biased=BlockSizes(128, 64, warps=8),
    ),
    ("pallas_gpu", "NVIDIA A100", 128, None): BlockSizes(
        128, 64, warps=8, backward=BlockSizes(64, 64, warps=8)
    ),
    ("pallas_gpu", None, 128, None): BlockSizes(64, 64, backward=BlockSizes(64, 32)),
    ("pallas_gpu", "NVIDIA H", None, None): BlockSizes(64, 32, warps=8),
    ("pallas_gpu", None, None, None): BlockSizes(32, 32),
    ("pallas_tpu", None, None, None): BlockSizes(512, 512),
}


def block_sizes_for(
    implementation: str, *, device_kind: str, head_dim: int, dtype: str
) -> BlockSizes:
    """Returns the entry of `BLOCK_SIZES` for a call.

    Args:
        implementation: one that works in blocks.
        device_kind: as jax names it, "cpu", "NVIDIA H100 80GB HBM3", ...
        head_dim: H.
        dtype: of query, key and value, by name.

    Raises:
        KeyError: the implementation has no blocks.
    """
    for (name, device, largest, of_dtype), sizes in BLOCK_SIZES.items():
        if (
            name == implementation
            and (device is None or device_kind.startswith(device))
            and (largest is None or head_dim <= largest)
            and of_dtype in (None, dtype)
        ):
            return sizes
    raise KeyError(f"no block sizes of {implementation!r}")


def block_sizes_of(implementation: str, query_BTNH: jax.Array) -> BlockSizes:
    """Returns the entry of `BLOCK_SIZES` for queries [B, T, N, H] on the present device."""
    return block_sizes_for(
        implementation,
        device_kind=jax.devices()[0].device_kind,
        head_dim=query_BTNH.shape[3],
        dtype=query_BTNH.dtype.name,
    )
