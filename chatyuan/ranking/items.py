"""What is ranked: prompts with the answers that several models drafted, read from their files.

A row is a prompt and
    {"prediction"} or {"predictions"}      what `infer` writes; the file names the source
    {"answers": [text, ...]}               likewise; "responses" and "completions" too
    {"answers": [{"text", "source"}]}      with sources of their own
Files are joined by the prompt, and equal answers of several sources are one answer with several
sources. Nothing here depends on the order of the files: which answers are chosen, and in which
order each annotator sees them, are hashes of texts and the seed.
"""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatyuan.errors import UserError
from chatyuan.text import files
from chatyuan.text.preferences import ANSWERS

PREDICTIONS = "predictions.jsonl"  # as `infer` names it
LETTERS = "ABCDEFGHI"  # what the page calls the answers; as many as there are digits


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its different answers.

    Attributes:
        key: names the item in annotations.jsonl; another prompt or answer makes another key.
        prompt: as the model saw it.
        answers: K >= 2 different texts.
        sources: of each answer, who gave it.
    """

    key: str
    prompt: str
    answers: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]

    def shown(self, seed: int, annotator: str) -> list[int]:
        """The order in which an annotator sees the answers, as indices into `answers`.

        Annotators see different orders, or a habit of preferring what comes first would count as
        agreement.
        """
        return sorted(
            range(len(self.answers)),
            key=lambda i: _hash(seed, annotator, self.key, self.answers[i]),
        )


def read_items(
    paths: Sequence[str], count: int, seed: int, skipped: files.Skipped
) -> tuple[list[Item], list[str]]:
    """Reads drafts.

    Args:
        paths: files, globs, or folders in which `infer` wrote.
        count: answers an item has at most; each source gives one before any gives its second.
        seed: of the choice where there are more.
        skipped: counts what is left out, by reason.

    Returns:
        (items in the order of first appearance, the names of the sources).

    Raises:
        UserError: nothing there, or no prompt with two different answers.
    """
    labels = _labels(paths)
    drafts: dict[str, tuple[str, dict[str, list[str]]]] = {}
    sources: dict[str, None] = {}
    for path, label in labels.items():
        for row in files.read_prompts(path, skipped):
            answers = list(_answers(row, label))
            if not answers:
                skipped["no_answer"] += 1
                continue
            prompt = _encodable(row["inputs"])
            _, texts = drafts.setdefault(prompt.strip(), (prompt, {}))
            for text, source in answers:
                sources[source] = None
                if source not in texts.setdefault(text, []):
                    texts[text].append(source)
    items = []
    for prompt, texts in drafts.values():
        if len(texts) < 2:
            skipped["fewer_than_two_different_answers"] += 1
            continue
        chosen = _chosen(prompt, texts, count, seed)
        given = tuple(tuple(texts[text]) for text in chosen)
        items.append(Item(_hash(prompt, *sorted(chosen))[:16], prompt, tuple(chosen), given))
    if not items:
        raise UserError(
            f"{', '.join(map(str, labels))}: no prompt has two different answers "
            f"({said(skipped) or 'the files are empty'}). Give the files of several models, or "
            'rows like {"prompt": "...", "answers": ["...", "..."]}.'
        )
    return items, list(sources)


def said(skipped: Mapping[str, int]) -> str:
    """Counts with their reasons as text."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


def read_taxonomy(path: str) -> list[str]:
    """The categories of a text file, one a line; empty lines and lines after # are left out.

    Raises:
        UserError: no such file, no category, or one that is there twice.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"There is no file {path} of categories (rank.Config.taxonomy).")
    lines = [line.strip() for line in files.read_lines(file, files.Skipped())]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"{path} holds no category; write one a line.")
    twice = [name for name, times in collections.Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{path} names {', '.join(twice)} more than once; each category once.")
    return names


def _labels(paths: Sequence[str]) -> dict[pathlib.Path, str]:
    """File -> the name of its source: the run's folder for what `infer` wrote, else the file's."""
    found: list[pathlib.Path] = []
    for path in paths:
        own = pathlib.Path(path) / PREDICTIONS
        found += [own] if own.is_file() else files.expand(path)
    found = list(dict.fromkeys(found))
    names = [p.absolute().parent.name if p.name == PREDICTIONS else p.name.split(".")[0]
             for p in found]  # fmt: skip
    return {
        path: name if names.count(name) == 1 else str(path)
        for path, name in zip(found, names, strict=True)
    }


def _answers(row: Mapping[str, Any], label: str) -> Iterator[tuple[str, str]]:
    """(text, source) of every answer of a row that is not empty."""
    lists = (row[name] for name in (*ANSWERS, "predictions") if isinstance(row.get(name), list))
    for answer in next(lists, [row.get("prediction")]):
        source = label
        if isinstance(answer, Mapping):
            source = _encodable(str(answer.get("source") or label))
            answer = answer.get("text")
        if isinstance(answer, str) and answer.strip():
            yield _encodable(answer.strip()), source


def _chosen(prompt: str, texts: Mapping[str, list[str]], count: int, seed: int) -> list[str]:
    order = sorted(texts, key=lambda text: _hash(seed, prompt, text))
    given: collections.Counter[str] = collections.Counter()
    turns = {}
    for text in order:
        source = min(texts[text])
        turns[text] = given[source]
        given[source] += 1
    return sorted(order, key=turns.__getitem__)[:count]


def _encodable(text: str) -> str:
    """Lone surrogates, which JSON can hold and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8")).hexdigest()
