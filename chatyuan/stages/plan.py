"""Say what a run needs before it starts: memory, time, money, mesh; or fit a scaling law.

1. `plan --gin_file=RECIPE` takes a recipe or saved config.gin of pretrain or sft; no data is read.
2. Memory is counted from shardings and from what autodiff keeps of the loss; nothing is compiled.
3. `plan --fit RUN/metrics.jsonl ...` fits Chinchilla's law to finished runs and predicts this one.
"""

import dataclasses
import pathlib
from typing import Any, ClassVar

import jax
import numpy as np

from chatyuan import configs, plots
from chatyuan.errors import UserError
from chatyuan.metrics import METRICS, duration, quantity, read_rows
from chatyuan.models import Model, build
from chatyuan.models.config import ModelConfig
from chatyuan.planning import meshes, scaling_law
from chatyuan.planning.devices import PRICES_OF, device
from chatyuan.planning.memory import abstract_state, checkpoint_bytes
from chatyuan.stages import _supervised, pretrain, sft

FLAGS = {"fit": "fit L(N, D) to the runs whose metrics.jsonl are the arguments"}
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3
# T5's span corruption: 114 target tokens to 512 inputs (noise density 0.15, mean span 3).
_SPAN_CORRUPTION = 114 / 512
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Config(_supervised.Config):
    """A planned training run."""

    # Recipes and saved config.gin files of these may be given: their settings are read as ours.
    STANDS_FOR: ClassVar[tuple[type, ...]] = (pretrain.Config, sft.Config)

    arguments: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"help": "with --fit: metrics.jsonl files of finished runs"}
    )
    fit: bool = dataclasses.field(default=False, metadata={"help": FLAGS["fit"]})
    device: str = dataclasses.field(default="h100", metadata={"help": "kind of accelerator"})
    devices: int = dataclasses.field(default=8, metadata={"help": "how many", "unit": "devices"})
    mfu: float = dataclasses.field(
        default=0.4, metadata={"help": "share of the peak FLOP/s that the model reaches"}
    )
    price_per_hour: float | None = dataclasses.field(
        default=None,
        metadata={"help": "of one device; None = its list price", "unit": "US dollars"},
    )
    plot: str = dataclasses.field(
        default="scaling_law.png", metadata={"help": "with --fit: file of the picture"}
    )


def run(config: Config) -> None:
    """Prints the plan, or the fit and its picture."""
    if config.fit:
        _draw(config, _fit(config))
        return
    _check_and_plan(config)


def dry_run(config: Config) -> None:
    """The same, without the picture."""
    if config.fit:
        _fit(config)
        return
    _check_and_plan(config)


def _check_and_plan(config: Config) -> None:
    if config.arguments:
        raise UserError(f"plan takes files only with --fit, got {' '.join(config.arguments)}.")
    if not 0 < config.mfu <= 1:
        raise UserError(f"plan.Config.mfu = {config.mfu} must be in (0, 1]; 0.4 is common.")
    if config.devices < 1:
        raise UserError(f"plan.Config.devices = {config.devices} must be at least 1.")
    model, kind = build(config.model), device(config.device)
    job = meshes.Job(
        model=model,
        state=abstract_state(model, config.optimizer, config.ema_decay is not None),
        device=kind,
        count=config.devices,
        batch_size=config.data.batch_size,
        lengths=_lengths(config),
        microbatches=config.microbatches,
        mfu=config.mfu,
    )
    _print_run(config, job)
    tried = meshes.candidates(job.count, kind.group)
    if config.mesh:
        tried = {"MESH": (dict(config.mesh), config.sharding), **tried}
    choices = [meshes.evaluate(name, *what, job) for name, what in tried.items()]
    _print_table(choices, kind.memory)
    best, reason = meshes.recommend(choices)
    if best is None:
        print(f"No recommendation: {reason}.")
    else:
        _print_best(config, job, best, reason)
    print(
        f"Assumed: MFU {config.mfu:.0%} of {kind.peak / 1e12:,.0f} TFLOP/s (data sheet, bfloat16); "
        "a step takes the longer of computation and communication; links run at their full rate; "
        f"{meshes.USABLE:.0%} of {kind.memory:,.0f} GiB is usable; all kinds of memory are largest "
        f"at once; prices are list prices of {PRICES_OF} unless given."
    )


def _lengths(config: Config) -> tuple[int, int]:
    data = config.data
    if config.model.architecture == "encoder_decoder" and not data.target_length:
        target = round(data.input_length * _SPAN_CORRUPTION)
        print(f"TARGET_LENGTH is left to the data; {target} assumed, as in T5's span corruption.")
        return data.input_length, target
    return data.input_length, data.target_length


def _print_run(config: Config, job: meshes.Job) -> None:
    total, embedding = job.model.num_params, embedding_parameters(job.model)
    tokens = job.batch_size * sum(job.lengths)
    seen = tokens * config.loop.train_steps
    best = TOKENS_PER_PARAMETER * total
    rows = {
        "parameters": f"{total:,} = {embedding:,} embedding and head + {total - embedding:,}",
        "FLOPs per token": quantity(job.flops / tokens),
        "tokens per step": f"{job.batch_size} x ({job.lengths[0]} + {job.lengths[1]}) = {tokens:,}",
        "tokens of the run": f"{quantity(seen)} in {config.loop.train_steps:,} steps",
        "Chinchilla": f"{quantity(best)} tokens ({TOKENS_PER_PARAMETER} per parameter) = "
        f"{-(-best // tokens):,} steps",
        "checkpoint": f"{checkpoint_bytes(job.state) / GIB:,.2f} GiB",
        "devices": f"{job.count} x {job.device.name} ({job.device.kind}, {job.device.memory:,.0f} "
        "GiB)",
    }
    for name, value in rows.items():
        print(f"  {name:<18} {value}")


def embedding_parameters(model: Model) -> int:
    """Returns the parameters of the token table and of the head: those that have a vocabulary."""
    pairs = zip(
        jax.tree.leaves(model.abstract_params()),
        jax.tree.leaves(model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    )
    return sum(leaf.size for leaf, axes in pairs if "vocab" in axes)


def _print_table(choices: list[meshes.Choice], memory: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Memory per device in GiB (of {memory:,.0f}), communication per step")
    for name in ("strategy", "MESH"):
        table.add_column(name)
    for name in ("weights", "grads", "optim.", "activ.", "total", "fits", "sent", "comp.", "comm.",
                 "step", "batch <="):  # fmt: skip
        table.add_column(name, justify="right")
    for choice in choices:
        mesh = " ".join(f"{axis}={size}" for axis, size in choice.mesh.items())
        if choice.error:
            table.add_row(choice.name, mesh, *[""] * 4, "-", "no")
            continue
        held = choice.memory
        table.add_row(
            choice.name,
            mesh,
            *(
                f"{size / GIB:,.2f}"
                for size in (
                    held.weights,
                    held.gradients,
                    held.optimizer + held.ema,
                    held.activations.total + held.gathered,
                    held.total,
                )  # fmt: skip
            ),
            "yes" if choice.fits else "no",
            f"{sum(choice.sent.values()) / GIB:,.2f} GiB",
            f"{choice.compute:.3g} s",
            f"{choice.communication:.3g} s",
            f"{choice.seconds:.3g} s",
            f"{choice.largest_batch:,}" if choice.largest_batch else "none",
        )
    Console(width=None if Console().is_terminal else 150).print(table)
    for choice in choices:
        if choice.error:
            print(f"  {choice.name}: {choice.error}")


def _print_best(config: Config, job: meshes.Job, best: meshes.Choice, reason: str) -> None:
    kinds = ", ".join(f"{k} {v / GIB:.2f}" for k, v in best.memory.kinds().items())
    sent = ", ".join(f"{k} {v / GIB:.2f}" for k, v in best.sent.items()) or "nothing"
    seconds = best.seconds * config.loop.train_steps
    price = job.device.dollars if config.price_per_hour is None else config.price_per_hour
    cost = price * job.count * seconds / 3600
    print(f'Recommended: {best.name}, --gin.MESH="{best.mesh}": {reason}.')
    print(f"  memory per device  {best.memory.total / GIB:.2f} GiB: {kinds}")
    print(f"  sent per step      GiB a device: {sent}")
    print(
        f"  time               {duration(seconds)} for {config.loop.train_steps:,} steps of "
        f"{best.seconds:.3g} s"
    )
    print(f"  cost               ${cost:,.2f} at ${price:g} per device and hour")


def read_run(path: str) -> scaling_law.Run:
    """Returns the (N, D, L) of a finished run.

    N is the number of parameters of its config.json, D its last `tokens_seen`, L its last
    `eval/loss`, or else its training loss.

    Args:
        path: its metrics.jsonl, or its folder.

    Raises:
        UserError: something of it is missing.
    """
    folder = pathlib.Path(path)
    folder = folder.parent if folder.name == METRICS else folder
    if not (folder / METRICS).exists():
        raise UserError(f"{folder / METRICS} does not exist; --fit takes metrics.jsonl of runs.")
    rows = read_rows(folder / METRICS)
    model = build(configs.load_saved(folder, "model", ModelConfig))

    def last(name: str) -> Any:
        return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)

    loss = last("eval/loss")
    loss = last("loss") if loss is None else loss
    tokens = last("tokens_seen")
    if loss is None or tokens is None:
        raise UserError(f"{folder / METRICS} has no loss or no tokens_seen; leave it out of --fit.")
    return scaling_law.Run(folder.name, model.num_params, tokens, loss)


def _fit(config: Config) -> scaling_law.Fit:
    fitted = scaling_law.fit([read_run(path) for path in config.arguments])
    law = fitted.law
    print(
        f"L(N, D) = {law.e:.4g} + {law.a:.4g} / N^{law.alpha:.4g} + {law.b:.4g} / D^{law.beta:.4g}"
        f"  ({len(fitted.runs)} runs)"
    )
    for one in fitted.runs:
        print(
            f"  {one.name}: N {quantity(one.parameters)}, D {quantity(one.tokens)}, loss "
            f"{one.loss:.4f}, law {float(law.loss(one.parameters, one.tokens)):.4f}"
        )
    n, d = _size(config)
    low, high = fitted.interval(n, d)
    print(
        f"This run: N {quantity(n)}, D {quantity(d)} tokens: loss {float(law.loss(n, d)):.4f}, "
        f"90 % of such runs between {low:.4f} and {high:.4f}."
    )
    best_n, best_d = law.optimum(6.0 * n * d)
    print(
        f"Best for the same {quantity(6.0 * n * d)} FLOPs (6 N D): N {quantity(float(best_n))}, D "
        f"{quantity(float(best_d))}, loss {float(law.loss(best_n, best_d)):.4f}."
    )
    return fitted


def _size(config: Config) -> tuple[int, int]:
    """N and D of the planned run."""
    tokens = config.data.batch_size * sum(_lengths(config)) * config.loop.train_steps
    return build(config.model).num_params, tokens


def _draw(config: Config, fitted: scaling_law.Fit) -> None:
    """Draws loss over tokens, one curve for each model size, six at most, and this run."""
    n, d = _size(config)
    sizes = sorted({run.parameters for run in fitted.runs})
    picked = sorted({sizes[round(i)] for i in np.linspace(0, len(sizes) - 1, 6)})
    tokens = [run.tokens for run in fitted.runs] + [d]
    along = np.geomspace(min(tokens) / 1.3, max(tokens) * 1.3, 60)
    curves = []
    for size in (*picked, n):
        own = [run for run in fitted.runs if run.parameters == size and size in picked]
        bounds = [fitted.interval(size, x, new_run=False) for x in along]
        curves.append(
            plots.LawCurve(
                label=f"N {quantity(float(size))}",
                tokens=along.tolist(),
                losses=fitted.law.loss(size, along).tolist(),
                bounds=bounds,
                runs=[(run.tokens, run.loss) for run in own],
            )
        )
    rest = [(run.tokens, run.loss) for run in fitted.runs if run.parameters not in picked]
    predicted = (d, float(fitted.law.loss(n, d)), *fitted.interval(n, d))
    plots.draw_law(config.plot, curves, rest, predicted)
    print(f"Picture: {config.plot}")
