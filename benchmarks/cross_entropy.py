"""The vocabulary loss in chunks of tokens beside the loss that has the logits in memory.

    python benchmarks/cross_entropy.py [--check]

Forward and backward of one loss, with gradients of the hidden states and of the head: `naive` is
`ops.losses.cross_entropy` of `ops.matmul.linear`, what a train step does that keeps its logits;
`ours` is `ops.linear_cross_entropy`. Both run in processes of their own on the same arrays and take
turns. The gradients must agree to 1e-6 of the largest entry, or the check fails.

Temporary memory is what the compiler says that the program needs beside its inputs and results;
the results are the loss and both gradients.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

import common
import numpy as np

SYSTEMS = ("naive", "ours")
Z_LOSS = 1e-4
TEMPORARY_SHARE, TIME_RATIO, GRADIENT_ERROR = 1 / 20, 1.05, 1e-6
COLUMNS = (
    "date", "device", "versions", "commit", "N x D x V", "dtype", "chunk", "naive", "ours",
    "ours / naive", "temp MiB naive/ours/logits", "gradient error",
)  # fmt: skip


def make_problem(tokens: int, embed: int, vocab: int, dtype: str) -> tuple[Any, ...]:
    """Hidden states, head, targets and weights; one token in eight is padding."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, embed), np.float32)
    head = rng.standard_normal((embed, vocab), np.float32) * np.float32(embed**-0.5)
    targets = rng.integers(0, vocab, tokens).astype(np.int32)
    weights = (rng.random(tokens) < 7 / 8).astype(np.float32)
    arrays = (jnp.asarray(hidden, dtype), jnp.asarray(head), jnp.asarray(targets), weights)
    return jax.device_put(arrays)


def make_step(system: str, chunk: int | None) -> Any:
    """The jitted (hidden, head, targets, weights) -> (loss, (d_hidden, d_head))."""
    import jax

    from chatyuan.ops import losses
    from chatyuan.ops.linear_cross_entropy import linear_cross_entropy
    from chatyuan.ops.matmul import linear

    def naive(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
        logits = linear(hidden, head.astype(hidden.dtype), "float32")
        return losses.cross_entropy(logits, targets, weights, z_loss=Z_LOSS).total

    def ours(*arrays: Any) -> Any:
        return linear_cross_entropy(*arrays, z_loss=Z_LOSS, chunk_tokens=chunk).total

    loss = {"naive": naive, "ours": ours}[system]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def serve(options: argparse.Namespace) -> int:
    """One system as a worker: compiles, says what it needs, then runs when told to."""
    from chatyuan.stages import _host

    _host.configure()  # as run.py does
    import jax

    _host.imported()
    arrays = make_problem(options.tokens, options.embed, options.vocab, options.dtype)
    step = make_step(options.worker, options.chunk).lower(*arrays).compile()
    common.reply(temporary=step.memory_analysis().temp_size_in_bytes, device=common.device_name())
    for command in common.commands():
        start = time.perf_counter()
        result = jax.block_until_ready(step(*arrays))
        seconds = time.perf_counter() - start
        if command["command"] == "gradients":
            loss, gradients = jax.tree.map(lambda x: np.asarray(x, np.float32), result)
            np.savez(command["path"], loss=loss, d_hidden=gradients[0], d_head=gradients[1])
        common.reply(seconds=[seconds])
    return 0


def gradient_error(folder: pathlib.Path) -> float:
    """The largest difference of loss and gradients, each relative to its largest entry."""
    naive, ours = (np.load(folder / f"{system}.npz") for system in SYSTEMS)
    return max(
        float(np.abs(ours[name] - naive[name]).max() / np.abs(naive[name]).max())
        for name in naive.files
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both systems in turns; the first, untimed call of each gives its gradients."""
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "embed", "vocab")]
    sizes += [f"--dtype={arguments.dtype}"]
    sizes += [f"--chunk={arguments.chunk}"] if arguments.chunk else []
    workers: list[common.Worker] = []
    try:
        with tempfile.TemporaryDirectory() as name:
            folder, answers = pathlib.Path(name), {}
            for system in SYSTEMS:
                command = [sys.executable, __file__, f"--worker={system}", *sizes]
                workers.append(common.Worker(system, command))
                answers[system] = workers[-1].answer()
                workers[-1].ask("gradients", path=str(folder / f"{system}.npz"))
            error = gradient_error(folder)
        timings = common.take_turns(workers, runs=arguments.runs)
    finally:
        for worker in workers:
            worker.close()
    return {
        "timings": timings,
        "error": error,
        "device": answers["ours"]["device"],
        "temporary": {system: answers[system]["temporary"] for system in SYSTEMS},
    }


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> list[common.Check]:
    """Prints the measurement, appends it to the results, and returns its goals."""
    timings, temporary = result["timings"], result["temporary"]
    logits = arguments.tokens * arguments.vocab * 4
    ratio = timings["ours"].median / timings["naive"].median
    pairs = zip(timings["ours"].seconds, timings["naive"].seconds, strict=True)
    ratios = sorted(ours / naive for ours, naive in pairs)
    for system in SYSTEMS:
        print(f"{system}: {timings[system]}, temporary {temporary[system] / 2**20:.1f} MiB")
    print(f"ours / naive by round: {', '.join(f'{r:.3f}' for r in ratios)}")
    if not arguments.no_record:
        memory = [temporary["naive"], temporary["ours"], logits]
        row = [
            common.today(), result["device"], common.versions("jax"), common.commit(),
            f"{arguments.tokens} x {arguments.embed} x {arguments.vocab}", arguments.dtype,
            arguments.chunk or "default", timings["naive"], timings["ours"], f"{ratio:.3f}",
            "/".join(f"{size / 2**20:.0f}" for size in memory), f"{result['error']:.1e}",
        ]  # fmt: skip
        common.append_rows("Vocabulary loss", COLUMNS, [row])
    share = temporary["ours"] / logits
    found = [
        common.Check("temporary memory / logits", share, TEMPORARY_SHARE, at_most=True),
        common.Check("time / naive", ratio, TIME_RATIO, at_most=True, unit="x"),
    ]
    if arguments.dtype == "float32":  # bfloat16 gradients differ by their own rounding
        goal = GRADIENT_ERROR
        found.append(common.Check("gradient error", result["error"], goal, at_most=True))
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--worker` is for this program's own processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--embed", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk; left out: the default")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> int:
    """Measures one shape and prints the verdict."""
    common.print_configuration(
        "vocabulary loss, forward and backward",
        {
            "host": common.cpu_name(), "versions": common.versions("jax"),
            "commit": common.commit(), "runs": arguments.runs, "tokens": arguments.tokens,
            "embed": arguments.embed, "vocab": arguments.vocab, "dtype": arguments.dtype,
            "chunk": arguments.chunk or "default", "z_loss": Z_LOSS,
        },
    )  # fmt: skip
    return common.finish(report(arguments, measure(arguments)), arguments.check)


if __name__ == "__main__":
    settings = parse()
    sys.exit(serve(settings) if settings.worker else main(settings))
