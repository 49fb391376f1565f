"""Curves of a run as PNG files, drawn from metrics.jsonl. A helper of `chatyuan.report`.

matplotlib is imported here only, when something is drawn; never through pyplot, which keeps global
state. Texts inside the pictures are English: its default fonts have no Chinese glyphs.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chatyuan.metrics import METRICS, quantity, read_rows, unwritable

PLOTS = "plots"
BLUE, ORANGE, GREY, GREEN, RED = "#1f5fa8", "#d9730d", "#8a8f98", "#2e8540", "#b3261e"
CYCLE = (ORANGE, GREEN, RED, "#7b4fa3", "#0f8b8d", "#6b4f3a")
PANELS = 12  # evaluation figures drawn; the table in the report has them all

Series = tuple[list[float], list[float]]


@dataclasses.dataclass(frozen=True)
class Plot:
    """One picture: its file and what it shows, for the text beside it."""

    path: pathlib.Path
    caption: str


def draw(model_dir: str | os.PathLike[str]) -> list[Plot]:
    """Draws the curves of MODEL_DIR/metrics.jsonl into MODEL_DIR/plots/.

    Figures that were not reported give no picture; with fewer than two reports there is nothing to
    draw. Every file is replaced at once, so a viewer never sees half of one.

    Returns:
      The pictures in reading order: reward (of reinforcement learning), loss, learning rate,
      throughput, gradient norm, evaluation.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = pathlib.Path(model_dir) / PLOTS
    rows = read_rows(pathlib.Path(model_dir) / METRICS)
    makers: tuple[tuple[str, str, Callable[[Sequence[Mapping[str, Any]]], Any]], ...] = (
        ("reward.png", "Reward and what it costs", _reward),
        ("loss.png", "Loss", _loss),
        ("learning_rate.png", "Learning rate", _learning_rate),
        ("throughput.png", "Throughput", _throughput),
        ("grad_norm.png", "Gradient norm", _grad_norm),
        ("evaluation.png", "Evaluation", _evaluation),
    )
    made = []
    for name, caption, maker in makers:
        figure = maker(rows)
        if figure is not None:
            tmp = folder / (name + ".tmp")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(tmp, format="png", dpi=110)
                os.replace(tmp, folder / name)
            except OSError as error:
                raise unwritable(folder / name, error) from error
            made.append(Plot(folder / name, caption))
    return made


@dataclasses.dataclass(frozen=True)
class LawCurve:
    """Loss of one model size over training tokens.

    Attributes:
        label: for the legend.
        tokens: of the curve.
        losses: what the law says there, nats per target token.
        bounds: (low, high) of its interval there.
        runs: (tokens, loss) that were measured at this size.
    """

    label: str
    tokens: Sequence[float]
    losses: Sequence[float]
    bounds: Sequence[tuple[float, float]]
    runs: Sequence[tuple[float, float]]


def draw_law(
    path: str | os.PathLike[str],
    curves: Sequence[LawCurve],
    rest: Sequence[tuple[float, float]],
    predicted: tuple[float, float, float, float],
) -> None:
    """Draws a fitted scaling law beside the runs it was fitted to.

    Args:
      path: of the PNG file, which is replaced at once.
      curves: model sizes; the last is that of the predicted run.
      rest: (tokens, loss) of runs of other sizes.
      predicted: tokens, loss and its interval of the predicted run.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _figure("Scaling law", "cross entropy per target token (nats)")
    if rest:
        axes.plot(*zip(*rest, strict=True), "o", color=GREY, markersize=4, label="other sizes")
    colors = [BLUE, *CYCLE][: len(curves) - 1]
    for curve, color in zip(curves, [*colors, "black"], strict=True):
        low, high = zip(*curve.bounds, strict=True)
        axes.fill_between(curve.tokens, low, high, color=color, alpha=0.12, linewidth=0)
        style = "-" if curve is not curves[-1] else "--"
        axes.plot(curve.tokens, curve.losses, style, color=color, linewidth=1.6, label=curve.label)
        if curve.runs:
            axes.plot(*zip(*curve.runs, strict=True), "o", color=color, markersize=4)
    tokens, loss, low, high = predicted
    axes.errorbar(
        [tokens], [loss], yerr=[[max(0.0, loss - low)], [max(0.0, high - loss)]], fmt="*",
        color="black", markersize=10, capsize=4, label="this run, 90 % interval",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(float(x))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _plain_log(axes)
    axes.legend(frameon=False, fontsize=9)
    target = pathlib.Path(path)
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, target)
    except OSError as error:
        raise unwritable(target, error) from error


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Returns the (steps, values) of one figure, without the reports that lack it or have null."""
    pairs = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), int | float) and not isinstance(row[name], bool)
    ]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def evaluation_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the evaluation figures (names with a slash) in the order of first appearance."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(
            (name, None)
            for name, value in row.items()
            if "/" in name and (value is None or isinstance(value, int | float))
        )
    return list(names)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Returns centred moving means over `width` values, fewer at the ends (no lag, no bias)."""
    half, sums = width // 2, [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smoothed = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        smoothed.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return smoothed


def _figure(title: str, y_label: str, size: tuple[float, float] = (7.6, 4.2)) -> tuple[Any, Any]:
    """Returns (figure, axes) in the house style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _style(axes, title, y_label)
    return figure, axes


def _style(axes: Any, title: str, y_label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_ylabel(y_label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(round(x))))
    axes.grid(True, color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_log(axes: Any) -> None:
    """Makes the y axis logarithmic with plain numbers at round places instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(axes: Any, steps: list[float], values: list[float], label: str, color: str) -> None:
    """Draws raw values faintly under their smoothed curve; few values are shown as they are."""
    if len(values) < 20:
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3, label=label)
        return
    width = max(3, len(values) // 40) | 1
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth(values, width), color=color, linewidth=1.8, label=label)


def _loss(rows: Sequence[Mapping[str, Any]]) -> Any:
    steps, values = series(rows, "loss")
    held_out = [
        (name, *series(rows, name))
        for name in evaluation_names(rows)
        if name.rsplit("/", 1)[-1] == "loss"
    ]
    shown = [values, *(v for _, _, v in held_out)]
    if max(map(len, shown)) < 2:
        return None
    kinds = {"policy_loss": "of policy and critic", "reward_margin": "of pairs of answers",
             "score_margin": "of pairs of answers"}  # fmt: skip
    known = [label for name, label in kinds.items() if series(rows, name)[1]]
    label = known[0] if known else "cross entropy per target token (nats)"
    figure, axes = _figure("Loss", label)
    if len(values) >= 2:
        _curve(axes, steps, values, "training", BLUE)
    for (name, at, of), color in zip(held_out[: len(CYCLE)], CYCLE, strict=False):
        axes.plot(at, of, color=color, linewidth=1.6, marker="o", markersize=4, label=_ascii(name))
    everything = [value for part in shown for value in part]
    low, high = min(everything), max(everything)
    if low > 0 and high > 2.5 * low:  # the fall at the start would flatten all the rest
        axes.set_ylim(low / 1.07, high * 1.07)
        _plain_log(axes)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _reward(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draws score, divergence, entropy and length of a run of reinforcement learning."""
    from matplotlib.figure import Figure

    if len(series(rows, "score")[1]) < 2:
        return None
    figure = Figure(figsize=(9.6, 6), layout="constrained")
    panels = (
        ("score", "Score of answers", "mean; band: one deviation"),
        ("kl", "KL from the reference", "nats per answer"),
        ("entropy", "Entropy", "nats per token"),
        ("length", "Length of answers", "tokens"),
    )
    for place, (name, title, label) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, place)
        _style(axes, title, label)
        axes.title.set_fontsize(10)
        steps, values = series(rows, name)
        deviations = series(rows, f"{name}_std")[1]
        if len(deviations) == len(values):
            low, high = zip(*((v - d, v + d) for v, d in zip(values, deviations, strict=True)),
                            strict=True)  # fmt: skip
            axes.fill_between(steps, low, high, color=BLUE, alpha=0.12, linewidth=0)
        _curve(axes, steps, values, "training", BLUE)
        at, held_out = series(rows, f"eval/{name}")
        if held_out:
            axes.plot(at, held_out, color=ORANGE, marker="o", markersize=4, label="held out")
            axes.legend(frameon=False, fontsize=9)
    return figure


def _learning_rate(rows: Sequence[Mapping[str, Any]]) -> Any:
    steps, values = series(rows, "learning_rate")
    if len(values) < 2:
        return None
    figure, axes = _figure("Learning rate", "learning rate")
    axes.plot(steps, values, color=BLUE, linewidth=1.8)
    axes.set_ylim(bottom=0, top=max(values) * 1.08 or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    return figure


def _throughput(rows: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    steps, values = series(rows, "tokens_per_second")
    if len(values) < 2:
        return None
    figure, axes = _figure("Throughput", "tokens per second, without padding")
    _curve(axes, steps, values, "tokens per second", BLUE)
    axes.set_ylim(bottom=0, top=max(values) * 1.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity(round(y))))
    at, mfu = series(rows, "mfu")
    if len(mfu) >= 2:
        right = axes.twinx()
        right.plot(at, mfu, color=ORANGE, linewidth=1.4, label="MFU")
        right.set_ylim(0, max(mfu) * 1.6)
        right.set_ylabel("model FLOPs utilisation", color=ORANGE)
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.spines[["top"]].set_visible(False)
    middle = sorted(values)[len(values) // 2]
    axes.axhline(middle, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"median {quantity(round(middle))}",
        (1, middle),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -12),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#555a61",
    )
    return figure


def _grad_norm(rows: Sequence[Mapping[str, Any]]) -> Any:
    steps, values = series(rows, "grad_norm")
    if len(values) < 2:
        return None
    figure, axes = _figure("Gradient norm", "global norm before clipping")
    _curve(axes, steps, values, "gradient norm", BLUE)
    low, high = min(values), max(values)
    if low > 0 and high > 4 * low:
        axes.set_ylim(low / 1.2, high * 1.2)
        _plain_log(axes)
    else:
        axes.set_ylim(bottom=0)
    return figure


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draws one small panel for each evaluation figure with at least two values."""
    from matplotlib.figure import Figure

    drawn = [
        (name, steps, values)
        for name in evaluation_names(rows)
        for steps, values in [series(rows, name)]
        if len(values) >= 2
    ][:PANELS]
    if not drawn:
        return None
    columns = 2 if len(drawn) in (2, 4) else min(3, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    width = 7.6 if columns < 3 else 10.5
    figure = Figure(figsize=(width if columns > 1 else 6, 2.9 * lines), layout="constrained")
    for index, (name, steps, values) in enumerate(drawn):
        axes = figure.add_subplot(lines, columns, index + 1)
        _style(axes, _ascii(name), "")
        axes.title.set_fontsize(10)
        axes.plot(steps, values, color=BLUE, linewidth=1.6, marker="o", markersize=4)
        axes.margins(y=0.18)
        axes.locator_params(axis="x", nbins=4)
        axes.annotate(
            f"{values[-1]:.4g}",
            (steps[-1], values[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        if index + columns < len(drawn):
            axes.set_xlabel("")
    return figure


def accuracy_by_gap(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the accuracy of a reward model by the distance of the two scores of a pair.

    Args:
      path: the picture, replaced at once; its folder is made.
      rows: with smallest gap, largest gap, accuracy, low and high (its interval), pairs.
    """
    figure, axes = _figure("Accuracy by gap of scores", "accuracy")
    places = range(len(rows))
    right = [row["accuracy"] for row in rows]
    below = [max(0.0, row["accuracy"] - row["low"]) for row in rows]
    above = [max(0.0, row["high"] - row["accuracy"]) for row in rows]
    axes.errorbar(places, right, yerr=(below, above), color=BLUE, marker="o", capsize=3)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("gap of the two scores (pairs)")
    axes.set_xticks(list(places))
    axes.set_xticklabels(
        [f"{row['smallest gap']:.2g}-{row['largest gap']:.2g}\n({row['pairs']})" for row in rows]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}{path.suffix}")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


def against_reference(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Draws how much more likely answers have become than under the reference, and says if it did.

    Args:
      path: the picture, replaced at once; its folder is made.
      rows: of metrics.jsonl, with chosen_fall and rejected_fall, also with eval/ before the name.
    """
    figure, axes = _figure("Answers against the reference", "log-prob minus reference (nats)")
    drawn = False
    for prefix, label, style in (("", "training", "--"), ("eval/", "held out", "-")):
        for kind, color in (("chosen", GREEN), ("rejected", RED)):
            steps, falls = series(rows, f"{prefix}{kind}_fall")
            if steps:
                rises = [-fall for fall in falls]
                axes.plot(steps, rises, style, color=color, marker="o", markersize=3,
                          linewidth=1.6, label=f"{kind}, {label}")  # fmt: skip
                drawn = True
    if not drawn:
        return False
    axes.axhline(0.0, color=GREY, linewidth=1)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}{path.suffix}")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    return True


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
