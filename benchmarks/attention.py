"""Attention forward and backward: blocked (`xla`) beside dense; kernels and jax.nn's on request.

    python benchmarks/attention.py [--check] [--shapes NAME ...] [--systems dense xla jax]
    python benchmarks/attention.py --tune

Each system runs in a process of its own with the settings of run.py; they take turns. What is timed
is one compiled call that returns the gradients of query, key and value, and of T5's table where the
shape has one; masks are run-time data. Temporary bytes are those that XLA plans for that call.
`--blocks 256 512` times `xla` with other square blocks, too.

`--tune` times candidate blocks of the present device's kernel (on a CPU, of `xla`) and prints the
fastest as entries to paste into `chatyuan/kernels/block_sizes.py`.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common

TEMP_GOAL = 1 / 20
COLUMNS = (
    "date", "device", "versions", "commit", "shape", "dtype", "system", "seconds", "x dense",
    "temp MiB",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A self-attention call and the most time `xla` may take, as a share of dense."""

    batch: int
    length: int
    mask: str
    bias: bool = False
    goal: float | None = None
    heads: int = 8
    head_dim: int = 64


SHAPES = {
    "512": Shape(4, 512, "full", goal=1.1),
    "512_t5": Shape(4, 512, "full", bias=True),
    "1024_causal": Shape(4, 1024, "causal"),
    "4096_causal": Shape(1, 4096, "causal", goal=0.5),
    "4096_packed": Shape(1, 4096, "packed", goal=0.5),
    "4096_packed_t5": Shape(1, 4096, "packed", bias=True, goal=0.5),
}
DEFAULT = ("512", "4096_causal", "4096_packed")
PACKED = 8  # segments of a packed row


def describe(name: str) -> str:
    """The shape in words."""
    shape = SHAPES[name]
    bias = ", T5 bias" if shape.bias else ""
    size = f"B {shape.batch}, S {shape.length}, H {shape.heads}, D {shape.head_dim}"
    return f"{size}, {shape.mask}{bias}"


# ----------------------------------------------------------------------------------------- worker


def system_call(system: str, shape: Shape, block_sizes: Any = None) -> Callable[..., Any]:
    """Returns attention(query, key, value, table, mask) of an implementation or of `jax`."""
    import jax

    from chatyuan.kernels import RelativePositionBias, dot_product_attention

    def ours(query: Any, key: Any, value: Any, table: Any, mask: Any) -> Any:
        return dot_product_attention(
            query, key, value, scale=1.0, mask=mask, implementation=system,
            bias=RelativePositionBias(table, True) if shape.bias else None,
            block_sizes=block_sizes,
        )  # fmt: skip

    def theirs(query: Any, key: Any, value: Any, table: Any, mask: Any) -> Any:
        bias = visible = None
        if shape.bias:
            bias = RelativePositionBias(table, True).dense(shape.length, shape.length)[None]
        if shape.mask == "packed":
            start, end = mask.intervals(shape.batch, shape.length, shape.length)
            index = jax.numpy.arange(shape.length)
            visible = (index >= start[..., None]) & (index < end[..., None])
            visible = visible[:, None]
        return jax.nn.dot_product_attention(
            query, key, value, bias, visible, scale=1.0, is_causal=shape.mask == "causal",
            implementation="xla",
        )  # fmt: skip

    return theirs if system == "jax" else ours


def build(
    system: str, shape: Shape, dtype: str, block_sizes: Any = None, *, forward_only: bool = False
) -> tuple[Any, tuple]:
    """Returns the compiled call and its arguments; the call returns gradients, or the output."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from chatyuan.kernels import AttentionMask

    rng = np.random.default_rng(0)
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    query, key, value, weight = (jnp.asarray(0.3 * rng.normal(size=size), dtype) for _ in range(4))
    table = jnp.asarray(rng.normal(size=(shape.heads, 32)), jnp.float32)
    # Cut at other places in every row.
    cuts = np.sort(rng.integers(1, shape.length, (shape.batch, PACKED - 1)), axis=1)
    index = np.arange(shape.length)
    segments = 1 + (index[None, :, None] >= cuts[:, None, :]).sum(2).astype(np.int32)
    mask = {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "packed": AttentionMask(causal=True, query_segment_ids=segments, key_segment_ids=segments),
    }[shape.mask]
    if system != "cudnn":  # It knows masks by name only.
        start, end = mask.intervals(shape.batch, shape.length, shape.length)
        mask = AttentionMask(key_start=start, key_end=end)
    attention = system_call(system, shape, block_sizes)

    def loss(query: Any, key: Any, value: Any, table: Any, mask: Any) -> Any:
        out = attention(query, key, value, table, mask)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32))

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3) if shape.bias else (0, 1, 2))
    arguments = (query, key, value, table, mask)
    call = jax.jit(attention if forward_only else gradient)
    return call.lower(*arguments).compile(), arguments


def work(system: str, name: str, dtype: str) -> None:
    """A worker: answers with its temporary bytes, then with seconds per `run`."""
    from chatyuan.stages import _host

    _host.configure()
    import jax

    _host.imported()
    from chatyuan.kernels import BlockSizes

    system, _, block = system.partition(":")
    sizes = BlockSizes(int(block), int(block)) if block else None
    call, arguments = build(system, SHAPES[name], dtype, sizes)
    for _ in range(2):
        jax.block_until_ready(call(*arguments))
    common.reply(temp=call.memory_analysis().temp_size_in_bytes)
    for _ in common.commands():
        begin = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        common.reply(seconds=[time.perf_counter() - begin])


# ----------------------------------------------------------------------------------------- tuning

# Platform -> what is tuned there; blocks of queries, blocks of keys, warps, stages; calls tried.
TUNED = {
    "cpu": ("xla", (256, 512), (256, 512), (4,), (2,), ((64, "float32"),)),
    "gpu": (
        "pallas_gpu", (32, 64, 128), (32, 64, 128), (4, 8), (2, 3),
        tuple(itertools.product((64, 128), ("bfloat16", "float32"))),
    ),
    "tpu": (
        "pallas_tpu", (128, 256, 512), (128, 256, 512, 1024), (4,), (2,),
        tuple(itertools.product((64, 128), ("bfloat16", "float32"))),
    ),
}  # fmt: skip


def entry(name: str, kind: str, head_dim: int, dtype: str, sizes: Any) -> str:
    """The line of `BLOCK_SIZES`, without what is a default."""

    def text(sizes: Any) -> str:
        more = [
            f"{field.name}={text(value) if field.name == 'backward' else value}"
            for field in dataclasses.fields(sizes)[2:]
            if (value := getattr(sizes, field.name)) != field.default
        ]
        return f"BlockSizes({', '.join([str(sizes.query), str(sizes.key), *more])})"

    return f'("{name}", "{kind}", {head_dim}, "{dtype}"): {text(sizes)},'


def fastest(
    name: str, shape: Shape, dtype: str, candidates: list[Any], runs: int, *, forward_only: bool
) -> Any:
    """Returns the candidate of the lowest median; those that do not compile are named."""
    import jax

    medians = {}
    for sizes in candidates:
        try:
            call, arguments = build(name, shape, dtype, sizes, forward_only=forward_only)
            jax.block_until_ready(call(*arguments))
        except Exception as error:  # Too much shared memory, for example: a kernel's own limits.
            print(f"  {sizes}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds.append(time.perf_counter() - begin)
        medians[sizes] = statistics.median(seconds)
        print(f"  {sizes}: {1e3 * medians[sizes]:.3f} ms", flush=True)
    if not medians:
        sys.exit(f"No candidate of {name} compiled for head_dim {shape.head_dim}, {dtype}.")
    return min(medians, key=medians.get)


def tune(runs: int) -> int:
    """Times candidates on the present device and prints the entries to paste."""
    import jax

    from chatyuan.kernels import BlockSizes

    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    others = [tuned[0] for key, tuned in TUNED.items() if key != platform]
    print(f"{', '.join(others)} cannot be tuned on this {platform} ({kind}).")
    if platform not in TUNED:
        return 1
    name, queries, keys, warps, stages, calls = TUNED[platform]
    candidates = list(itertools.starmap(
        lambda query, key, warps, stages: BlockSizes(query, key, warps=warps, stages=stages),
        itertools.product(queries, keys, warps, stages),
    ))  # fmt: skip
    entries = []
    for head_dim, dtype in calls:
        small = platform == "cpu"
        shape = Shape(1 if small else 8, 1024 if small else 2048, "causal", True, None,
                      8, head_dim)  # fmt: skip
        print(f"{name}, head_dim {head_dim}, {dtype}, {shape.length} tokens, causal, T5 bias")
        if name == "pallas_gpu":
            print(" forward")
            forward = fastest(name, shape, dtype, candidates, runs, forward_only=True)
            candidates_backward = [
                dataclasses.replace(forward, backward=sizes) for sizes in candidates
            ]
            print(" forward and backward")
            best = fastest(name, shape, dtype, candidates_backward, runs, forward_only=False)
        else:
            best = fastest(name, shape, dtype, candidates, runs, forward_only=False)
        entries.append(entry(name, kind, head_dim, dtype, best))
    print("Entries for BLOCK_SIZES, before those that match more:", *entries, sep="\n    ")
    return 0


# -------------------------------------------------------------------------------------- benchmark


def measure(
    name: str, systems: list[str], dtype: str, runs: int
) -> tuple[dict[str, common.Timing], dict[str, int]]:
    """Timings and temporary bytes of every system at one shape."""
    workers, temp = [], {}
    try:
        for system in systems:
            command = [sys.executable, __file__, "--worker", system, name, dtype]
            workers.append(common.Worker(system, command))
            temp[system] = workers[-1].answer()["temp"]
        return common.take_turns(workers, runs=runs), temp
    finally:
        for worker in workers:
            worker.close()


def main() -> int:
    """Measures, prints, records, checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(DEFAULT))
    parser.add_argument(
        "--systems", nargs="+", default=["dense", "xla"],
        choices=("dense", "xla", "pallas_gpu", "pallas_tpu", "cudnn", "jax"),
    )  # fmt: skip
    parser.add_argument("--tune", action="store_true", help="print block sizes for this device")
    parser.add_argument("--blocks", nargs="+", type=int, default=[], metavar="SIZE")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return 0
    if arguments.tune:
        return tune(arguments.runs)
    systems = [*arguments.systems, *(f"xla:{block}" for block in arguments.blocks)]
    device, names, commit = common.device_name(), common.versions("jax"), common.commit()
    common.print_configuration(
        "attention, forward and backward",
        {
            "device": device, "versions": names, "commit": commit, "dtype": arguments.dtype,
            "systems": " ".join(systems), "runs": arguments.runs,
            **{name: describe(name) for name in arguments.shapes},
        },
    )  # fmt: skip
    checks, rows = [], []
    for name in arguments.shapes:
        timings, temp = measure(name, systems, arguments.dtype, arguments.runs)
        ratio = {}
        for system, timing in timings.items():
            known = "dense" in timings
            ratio[system] = timing.median / timings["dense"].median if known else float("nan")
            text = f"{ratio[system]:.2f}" if known else "-"
            mib = f"{temp[system] / 2**20:.1f}"
            print(f"{name} {system}: {timing}, {text} x dense, {mib} MiB", flush=True)
            rows.append([
                common.today(), device, names, commit, describe(name), arguments.dtype, system,
                str(timing), text, mib,
            ])  # fmt: skip
        goal = SHAPES[name].goal
        if "xla" in ratio and "dense" in ratio:
            if goal is not None and arguments.dtype == "float32":
                checks.append(common.Check(f"{name} time", ratio["xla"], goal, at_most=True,
                                           unit=" x dense"))  # fmt: skip
            if SHAPES[name].length >= 4096:
                share = temp["xla"] / temp["dense"]
                checks.append(common.Check(f"{name} temp", share, TEMP_GOAL, at_most=True,
                                           unit=" x dense"))  # fmt: skip
    if not arguments.no_record:
        common.append_rows("Attention", COLUMNS, rows)
    return common.finish(checks, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
