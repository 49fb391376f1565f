"""What is made of the annotations: rankings.jsonl for the stage `reward`, and report.md."""

import collections
import json
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from chatyuan.checkpoint_files import write_whole
from chatyuan.ranking.agreement import aligned
from chatyuan.ranking.store import Annotation

RANKINGS = "rankings.jsonl"
ByItem = Mapping[str, Mapping[str, Annotation]]


def rankings(by_item: ByItem) -> Iterator[dict[str, Any]]:
    """One row of preferences per item that was ranked and not tied throughout.

    {"prompt", "answers", "ranks"} is what `chatyuan.text.preferences` reads; beside it are
    "sources", "categories" and "annotators". Where several ranked an item, ranks are the order of
    their mean ranks (Borda's count, tied answers sharing the mean of their places): a prompt is one
    row, since the loss weighs prompts equally, and answers on which annotators contradict each
    other come out tied, which the loss leaves out.
    """
    for annotations in by_item.values():
        ranked = [a for a in annotations.values() if a.ranks is not None]
        if not ranked:
            continue
        first = ranked[0]
        ranks = _merged(ranked) if len(ranked) > 1 else list(first.ranks or ())
        if max(ranks) == 0:
            continue
        yield {
            "prompt": first.prompt,
            "answers": list(first.answers),
            "ranks": ranks,
            "sources": [list(names) for names in first.sources],
            "categories": sorted({a.category for a in ranked if a.category is not None}),
            "annotators": [a.annotator for a in ranked],
        }


def _merged(ranked: Sequence[Annotation]) -> list[int]:
    """The order of the mean ranks, for the answers in the order of the first annotation."""
    places = [stats.rankdata(aligned(ranked[0], other)[1]) for other in ranked]
    # Sums, not means: halves add up exactly, so what is equal compares equal.
    return (stats.rankdata(np.sum(places, axis=0), method="dense").astype(int) - 1).tolist()


def export(folder: pathlib.Path, by_item: ByItem) -> int:
    """Replaces rankings.jsonl; returns its number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rankings(by_item)]
    write_whole(folder / RANKINGS, "".join(lines))
    return len(lines)


def source_table(by_item: ByItem) -> list[dict[str, Any]]:
    """How often each source's answer was put above another source's, best first.

    A tie is half a win. Two answers of one source are not compared on its behalf.
    """
    won: collections.Counter[str] = collections.Counter()
    met: collections.Counter[str] = collections.Counter()
    for annotation in _all(by_item):
        ranks = annotation.ranks or ()
        for mine, rank in zip(annotation.sources, ranks, strict=False):  # no ranks: skipped
            for theirs, other in zip(annotation.sources, ranks, strict=False):
                alone, others = set(mine) - set(theirs), set(theirs) - set(mine)
                for name in alone if others else ():
                    met[name] += 1
                    won[name] += 1.0 if rank < other else 0.5 * (rank == other)
    rows = [{"source": name, "comparisons": met[name], "preferred": won[name] / met[name]}
            for name in met]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["preferred"], row["source"]))


def annotator_table(by_annotator: Mapping[str, Mapping[str, Annotation]]) -> list[dict[str, Any]]:
    """Items, skips and median time of each annotator."""
    return [
        {
            "annotator": name,
            "ranked": sum(a.ranks is not None for a in own.values()),
            "skipped": sum(a.skipped is not None for a in own.values()),
            "median seconds": statistics.median(a.seconds for a in own.values()),
        }
        for name, own in by_annotator.items()
    ]


def write_report(
    folder: pathlib.Path,
    by_item: ByItem,
    by_annotator: Mapping[str, Mapping[str, Annotation]],
    progress: Mapping[str, Any],
    exported: int,
) -> pathlib.Path:
    """Writes report.md; `progress` is the desk's, `exported` the rows of rankings.jsonl."""
    from chatyuan import report  # draws plots elsewhere: slow to import

    counts = {
        "prompts": progress["items"],
        "finished": progress["finished"],
        "waiting for a second annotator": progress["waiting"],
        f"rows of {RANKINGS}": exported,
    }
    sections = [report.Section("Progress", table=counts)]
    if by_annotator:
        sections.append(report.Section("Annotators", table=annotator_table(by_annotator)))
    sections.append(
        report.Section("Agreement", text=AGREEMENT_TEXT, table=said(progress["agreement"]))
    )
    sources = source_table(by_item)
    if sources:
        text = "Share of comparisons with other sources that its answer won; a tie is half a win."
        sections.append(report.Section("Sources", text=text, table=sources))
    for title, counted in (
        ("Categories", _counts(a.category for a in _all(by_item))),
        ("Skipped", _counts(a.skipped for a in _all(by_item))),
    ):
        if counted:
            sections.append(report.Section(title, table=counted))
    return report.combine_reports(folder, title=folder.name, sections=sections)


AGREEMENT_TEXT = (
    "Over the prompts that two annotators ranked: the share of pairs of answers on which both said "
    "better, tied or worse alike; Cohen's kappa of those verdicts; Kendall's tau-b, mean over the "
    "prompts. 0 is chance for the last two, 1 is full agreement."
)


def said(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The agreement as name -> value for people; what is undefined says so."""
    names = {
        "items": "prompts ranked by two",
        "pairs": "pairs of answers",
        "pair_agreement": "same verdict on a pair",
        "kappa": "Cohen's kappa",
        "tau": "Kendall's tau-b",
        "category_agreement": "same category",
        "category_kappa": "Cohen's kappa of categories",
    }
    return {text: "undefined" if figures[name] is None else figures[name]
            for name, text in names.items()
            if figures[name] is not None or not name.startswith("category")}  # fmt: skip


def _all(by_item: ByItem) -> Iterator[Annotation]:
    for annotations in by_item.values():
        yield from annotations.values()


def _counts(values: Iterable[str | None]) -> Sequence[Mapping[str, Any]]:
    counted = collections.Counter(value for value in values if value is not None)
    return [{"name": name, "annotations": count} for name, count in counted.most_common()]
