"""report.md: what a run was, what it saw, how it went and what it says, for people.

1. `write_report` describes one MODEL_DIR. It is written again at each evaluation, from the files in
   the folder and what the stage passes, so a report of a resumed run is complete.
2. `combine_reports` describes several runs on one page (quickstart: tokenizer, pretrain, sft, ...).
3. Texts of models and corpora are escaped: nothing in them can become markup.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from chatyuan import __version__, plots
from chatyuan.metrics import METRICS, SAMPLES, duration, quantity, read_rows, unwritable

REPORT = "report.md"
_SHORT = 60  # characters up to which a sample's texts share a table row
_MAX_SAMPLES = 20
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a report. Every field but the title may be left out.

    Attributes:
      title: heading, plain text.
      text: markdown, put there as it is.
      table: a mapping (name -> value) or rows of mappings with the same keys.
      model_dir: a run whose summary, curves and evaluation figures are shown.
      samples: rows with input, output and optionally target, task, step; None takes those in
        model_dir's samples.jsonl.
      config_text: shown as code, folded away.
    """

    title: str
    text: str = ""
    table: Row | Sequence[Row] = ()
    model_dir: str | os.PathLike[str] | None = None
    samples: Sequence[Row] | None = None
    config_text: str = ""


def write_report(
    model_dir: str | os.PathLike[str],
    *,
    title: str,
    config_text: str = "",
    data_table: Sequence[Row] = (),
    samples: Sequence[Row] | None = None,
    evaluation: Row | Sequence[Row] = (),
    facts: Row | None = None,
    sections: Sequence[Section] = (),
) -> pathlib.Path:
    """Draws the curves of a run and writes MODEL_DIR/report.md.

    Args:
      model_dir: MODEL_DIR, with metrics.jsonl and perhaps samples.jsonl.
      title: the heading.
      config_text: the operative configuration.
      data_table: one row per source: source, documents, tokens, epochs (seen), ...
      samples: see Section; None shows the first and the newest of samples.jsonl.
      evaluation: final figures beyond those in metrics.jsonl.
      facts: further rows of the summary (parameters, devices, ...).
      sections: put at the end.

    Returns:
      The path of the report.
    """
    folder = pathlib.Path(model_dir)
    run = Section("", model_dir=folder, samples=samples)
    parts = [f"# {escape(title)}"]
    if facts or not evaluation or read_rows(folder / METRICS):  # an evaluation has no curves
        parts.append(_summary(folder, facts or {}))
    if data_table:
        parts += ["## Data", table(data_table)]
    parts += _curves(folder, folder, "## Curves")
    parts += _evaluation(folder, evaluation, "## Evaluation")
    parts += _samples(run, "## Samples")
    for section in sections:
        parts += _section(section, folder)
    if config_text:
        parts += ["## Configuration", _code(config_text)]
    parts += ["---", _origin()]
    return _write(folder, parts)


def combine_reports(
    folder: str | os.PathLike[str], *, title: str, text: str = "", sections: Sequence[Section]
) -> pathlib.Path:
    """Writes one report.md in `folder` over several runs.

    Args:
      folder: where report.md goes; pictures are linked relative to it.
      title: the heading.
      text: markdown under the heading.
      sections: in order; one with a model_dir shows that run's summary, curves, figures, samples.

    Returns:
      The path of the report.
    """
    folder = pathlib.Path(folder)
    parts = [f"# {escape(title)}"]
    if text:
        parts.append(text)
    if len(sections) > 2:
        parts.append("\n".join(f"- [{escape(s.title)}](#{_anchor(s.title)})" for s in sections))
    for section in sections:
        parts += _section(section, folder)
    parts += ["---", _origin()]
    return _write(folder, parts)


def _section(section: Section, base: pathlib.Path) -> list[str]:
    parts = [f"## {escape(section.title)}"]
    if section.text:
        parts.append(section.text)
    if section.table:
        parts.append(table(section.table))
    if section.model_dir is not None:
        run = pathlib.Path(section.model_dir)
        parts.append(_summary(run, {}))
        parts += _curves(run, base, None)
        parts += _evaluation(run, (), None)
    alone = section.model_dir is None and not section.table
    parts += _samples(section, None if alone else "### Samples")
    if section.config_text:
        parts.append(_folded("Configuration", _code(section.config_text)))
    return parts


def _summary(folder: pathlib.Path, facts: Row) -> str:
    """Returns the table at the top: how far, how good, how fast."""
    rows = read_rows(folder / METRICS)
    summary: dict[str, Any] = dict(facts)
    if not rows:
        return "\n\n".join([table(summary)] * bool(summary) + ["No figures were reported yet."])
    summary["steps"] = rows[-1]["step"]
    steps, losses = plots.series(rows, "loss")
    if losses:
        summary["training loss, first report"] = f"{losses[0]:.4f} (step {steps[0]:,.0f})"
        summary["training loss, last report"] = f"{losses[-1]:.4f} (step {steps[-1]:,.0f})"
    tokens = plots.series(rows, "tokens_seen")[1]
    if tokens:
        summary["tokens seen, without padding"] = quantity(int(tokens[-1]))
    skipped = sum(plots.series(rows, "nonfinite_steps")[1])
    if skipped:
        summary["steps skipped (gradient not finite)"] = int(skipped)
    for name, label, show in (
        ("seconds_per_step", "seconds per step, median", "{:.3g}"),
        ("tokens_per_second", "tokens per second, median", "{:,.0f}"),
        ("mfu", "model FLOPs utilisation, median", "{:.1%}"),
    ):
        values = plots.series(rows, name)[1]
        if values:
            summary[label] = show.format(statistics.median(values))
    seconds = plots.series(rows, "seconds_per_step")[1]
    if seconds:
        total = statistics.median(seconds) * rows[-1]["step"]
        summary["training time, without evaluation"] = f"about {duration(total)}"
    return table(summary)


def _curves(run: pathlib.Path, base: pathlib.Path, heading: str | None) -> list[str]:
    pictures = plots.draw(run)
    if not pictures:
        return []
    links = [
        f"![{picture.caption}]({_link(os.path.relpath(picture.path, base))})"
        for picture in pictures
    ]
    return [heading] * bool(heading) + links


def _evaluation(run: pathlib.Path, final: Row | Sequence[Row], heading: str | None) -> list[str]:
    rows = read_rows(run / METRICS)
    figures = []
    for name in plots.evaluation_names(rows):
        steps, values = plots.series(rows, name)
        if values:
            figures.append(
                {
                    "figure": name,
                    f"first (step {steps[0]:,.0f})": values[0],
                    "lowest": min(values),
                    "highest": max(values),
                    f"last (step {steps[-1]:,.0f})": values[-1],
                }
            )
    same_steps = len({tuple(row) for row in figures}) == 1
    if not same_steps:  # figures of different steps cannot share those headings
        figures = [
            dict(zip(("figure", "first", "lowest", "highest", "last"), row.values(), strict=True))
            for row in figures
        ]
    parts = [table(final)] * bool(final) + [table(figures)] * bool(figures)
    return [heading] * bool(heading and parts) + parts


def _samples(section: Section, heading: str | None) -> list[str]:
    """Shows given samples, or of samples.jsonl the newest beside the first of the same inputs."""
    rows = section.samples
    if rows is None and section.model_dir is not None:
        rows = _before_and_after(read_rows(pathlib.Path(section.model_dir) / SAMPLES))
    if not rows:
        return []
    rows = list(rows)
    parts = [heading] * bool(heading)
    texts = [str(v) for row in rows for v in row.values()]
    if all(len(text) <= _SHORT for text in texts):
        parts.append(table(rows[:_MAX_SAMPLES]))
    else:
        parts += [_block(number, row) for number, row in enumerate(rows[:_MAX_SAMPLES], 1)]
    if len(rows) > _MAX_SAMPLES:
        parts.append(f"{len(rows) - _MAX_SAMPLES} more are not shown.")
    return parts


def _before_and_after(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the newest samples; where an older output of the same input exists, it is added."""
    if not rows:
        return []
    first, last = rows[0]["step"], rows[-1]["step"]
    before = {(r.get("task"), str(r.get("input"))): r for r in rows if r["step"] == first}
    shown = []
    for row in rows:
        if row["step"] != last:
            continue
        entry = {key: row[key] for key in ("task", "input") if key in row}
        older = before.get((row.get("task"), str(row.get("input"))), {})
        for step, of in ((first, older if first != last else {}), (last, row)):
            # What is said of an output stands beside it; outputs without a score have none.
            for name in ("output", "score"):
                if of.get(name) is not None:
                    entry[f"{name} at step {step:,}"] = of[name]
        known = {"step", "task", "input", "output", "score"}
        entry.update({key: value for key, value in row.items() if key not in known})
        shown.append(entry)
    return shown


def _block(number: int, row: Row) -> str:
    """Returns one sample as headed quotations."""
    parts = [f"#### {number}" + (f" {escape(str(row['task']))}" if row.get("task") else "")]
    for name, value in row.items():
        if name != "task" and value is not None:
            parts.append(f"**{escape(name)}**")
            parts.append("\n".join(f"> {line}" for line in _quoted_lines(_shown(value))))
    return "\n\n".join(parts)


def _quoted_lines(text: str) -> list[str]:
    lines = [escape(line) for line in text.split("\n")] if text else ["*(empty)*"]
    # Two spaces at the end keep the line break; an empty quoted line separates paragraphs.
    return [line + "  " if line and i + 1 < len(lines) else line for i, line in enumerate(lines)]


# -- markdown


def table(rows: Row | Sequence[Row]) -> str:
    """Returns a markdown table of a mapping (two columns) or of rows of mappings.

    Columns are the keys in the order of first appearance; numbers are aligned to the right. Texts
    are escaped; line breaks become <br>.
    """
    if isinstance(rows, Mapping):
        lines = ["| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
        return "\n".join(lines)
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    numeric = {
        name: all(isinstance(row.get(name, 0), int | float | None) for row in rows)
        for name in columns
    }
    lines = ["| " + " | ".join(_cell(name) for name in columns) + " |"]
    lines.append("|" + "|".join("---:" if numeric[name] else "---" for name in columns) + "|")
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is: no markup, no HTML, no control characters."""
    text = "".join(
        c if c == "\n" or unicodedata.category(c) != "Cc" else " " if c == "\t" else "\ufffd"
        for c in text
    )
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # inside a word it is only itself
    # Headings, lists and rules begin a line.
    text = re.sub(r"(?m)^(\s*)(#+|[-+](?=\s|$|-)|=+\s*$)", r"\1\\\2", text)
    text = re.sub(r"(?m)^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return re.sub(r"(?m)^ {4,}", lambda m: "&nbsp;" * len(m[0]), text)


def _cell(value: Any) -> str:
    return escape(_shown(value)).replace("\n", "<br>")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    """Returns a code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n\n{content}\n\n</details>"


def _anchor(title: str) -> str:
    """Returns the anchor that Markdown viewers give a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _link(path: str) -> str:
    return pathlib.PurePath(path).as_posix().replace(" ", "%20").replace(")", "%29")


def _origin() -> str:
    versions = [f"chatyuan {__version__}", f"Python {platform.python_version()}"]
    for package in ("jax", "flax", "optax", "orbax-checkpoint"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"Written by {', '.join(versions)} on {platform.system()} {platform.machine()}."


def _write(folder: pathlib.Path, parts: Sequence[str]) -> pathlib.Path:
    """Replaces folder/report.md. Raises UserError when it cannot be written."""
    path = folder / REPORT
    tmp = folder / (REPORT + ".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tmp.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
        os.replace(tmp, path)
    except OSError as error:
        raise unwritable(path, error) from error
    return path
