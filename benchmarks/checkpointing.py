"""What checkpoints cost a run: the 22.7M model with AdamW, saved every 10 or every 100 steps.

    python benchmarks/checkpointing.py [--check]

The model, its weights and its batch are those of `train_step.py`, and so is the step; what is saved
is its whole state (weights and two moments, float32) by `chatyuan.checkpoints.Checkpointer` with
its defaults: flushed to the disk, with checksums, the oldest removed. Blocks of ten steps take
turns: without a save, with one that is written while the steps go on, and with one that is waited
for. The save before has to be complete when a block ends, so nothing is left to the next one.

1. Blocked is the time inside `save`, and what the loop waits at the end of the block for the save
   to be complete.
2. Cost is how much longer a block takes than the one without a save of the same round. It is the
   larger figure: the threads that write compete with the step for the cores.
3. A save every 100 steps costs what one every 10 steps costs, as it is complete within ten steps:
   its share of the time is derived from that.
"""

import argparse
import dataclasses
import gc
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import common
import numpy as np
import train_step

STEPS = 10  # of a block
KINDS = ("none", "background", "waited for")
PERIODS = (10, 100)  # steps from save to save
GOALS = {10: {"blocked": 2.0, "cost": 10.0}, 100: {"cost": 1.0}}  # percent of the run's time
COLUMNS = (
    "date", "device", "versions", "commit", "shape", "state MiB", "save", "period", "step",
    "blocked a save", "cost a save", "blocked %", "cost %", "goal %",
)  # fmt: skip


@dataclasses.dataclass
class Block:
    """Ten steps, and the save before them."""

    seconds: float
    blocked: float
    cpu_seconds: float


def run_block(system: train_step.System, checkpointer: Any, number: int, kind: str) -> Block:
    """Saves as `kind` says, takes ten steps and waits until the save is complete."""
    begin, cpu = time.perf_counter(), time.process_time()
    blocked = 0.0
    if kind != "none":
        checkpointer.save(number, system.state(), {"seed": 0})
        if kind == "waited for":
            checkpointer.wait()
        blocked = time.perf_counter() - begin
    for _ in range(STEPS):
        system.step()
    stepped = time.perf_counter()
    checkpointer.wait()
    end = time.perf_counter()
    return Block(end - begin, blocked + end - stepped, time.process_time() - cpu)


def measure(system: train_step.System, folder: str, runs: int) -> dict[str, list[Block]]:
    """`runs` rounds of blocks of every kind, each round in the reverse order of the last."""
    from chatyuan.checkpoints import Checkpointer

    blocks: dict[str, list[Block]] = {kind: [] for kind in KINDS}
    with Checkpointer(folder) as checkpointer:
        kept = checkpointer.config.keep
        for number in range(kept + 1):  # from here on every save also removes one
            run_block(system, checkpointer, number, "waited for")
        for turn in range(runs):
            for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
                number += 1
                block = run_block(system, checkpointer, number, kind)
                blocks[kind].append(block)
                print(
                    f"  {kind}: {block.seconds:.3f} s, blocked {block.blocked:.3f} s, "
                    f"CPU {block.cpu_seconds:.2f} s",
                    flush=True,
                )
    return blocks


def summarise(blocks: dict[str, list[Block]]) -> tuple[common.Timing, dict[str, dict]]:
    """The step without saves, and of each kind of save what it blocks and costs (seconds)."""
    step = common.Timing(tuple(block.seconds / STEPS for block in blocks["none"]))
    saves = {}
    for kind in KINDS[1:]:
        pairs = list(zip(blocks[kind], blocks["none"], strict=True))
        saves[kind] = {
            "blocked": [block.blocked for block, _ in pairs],
            "cost": [block.seconds - without.seconds for block, without in pairs],
            "cpu": [block.cpu_seconds - without.cpu_seconds for block, without in pairs],
        }
    return step, saves


def main() -> int:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.add_argument("--shape", choices=train_step.SHAPES, default="8x256/64")
    parser.add_argument("--folder", help="where to save; its disk is measured too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        weights = pathlib.Path(folder) / "weights.npz"
        train_step.make_weights(weights)
        batch = train_step.make_batch(*train_step.SHAPES[arguments.shape])
        system = train_step.make_ours(dict(np.load(weights)), batch, "adamw", {})
        import jax

        size = sum(leaf.nbytes for leaf in jax.tree.leaves(system.state())) / 2**20
        device = common.device_name()
        names = common.versions("jax", "orbax-checkpoint", "tensorstore")
        common.print_configuration(
            "checkpoints of the 22.7M T5 1.1 with AdamW",
            {"device": device, "versions": names, "commit": common.commit(), "folder": folder,
             "shape": arguments.shape, "state": f"{size:.0f} MiB", "runs": arguments.runs},
        )  # fmt: skip
        for _ in range(3):
            system.step()
        gc.collect()
        gc.disable()  # as the training loop does
        step, saves = summarise(measure(system, folder, arguments.runs))
    print(f"step without saves: {step}")
    checks, rows = [], []
    for kind, save in saves.items():
        texts = {name: common.spread(values) for name, values in save.items()}
        print(f"{kind}: " + ", ".join(f"{name} {text}" for name, text in texts.items()))
        for period in PERIODS:
            share = {
                name: 100 * statistics.median(save[name]) / (period * step.median)
                for name in ("blocked", "cost")
            }
            goals = GOALS[period] if kind == "background" else {}
            checks += [
                common.Check(f"{name} every {period} steps", share[name], goal, at_most=True,
                             unit=" %")
                for name, goal in goals.items()
            ]  # fmt: skip
            rows.append([
                common.today(), device, names, common.commit(), arguments.shape, f"{size:.0f}",
                kind, period, str(step), texts["blocked"], texts["cost"], f"{share['blocked']:.2f}",
                f"{share['cost']:.2f}", ", ".join(f"{n} <= {g:g}" for n, g in goals.items()) or "-",
            ])  # fmt: skip
    if not arguments.no_record:
        common.append_rows("Checkpoints", COLUMNS, rows)
    return common.finish(checks, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
