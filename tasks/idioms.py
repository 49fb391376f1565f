"""Idioms: plain text, "what does it mean", and a choice of four meanings."""

from collections.abc import Iterator
from typing import Any

from chatyuan.data import seqio_tasks
from chatyuan.data.sources import hash_fraction
from chatyuan.text import files
from chatyuan.text.normalize import normalize
from tasks import sources

LETTERS = ("A", "B", "C", "D")
_EXPLAIN = (
    "“{word}”是什么意思？",
    "解释成语：{word}",
    "请说明“{word}”的意思。",
)
_LONGEST = 80  # characters of an explanation used as an answer or an option


def texts(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """A dictionary entry per line."""
    for item in sources.select("idiom", split, skipped):
        parts = [f"{item['word']}：{item['explanation']}"]
        if item["derivation"]:
            parts.append(f"出处：{item['derivation']}")
        if item["example"]:
            parts.append(f"例句：{item['example']}")
        yield {"targets": normalize("".join(parts)), "id": item.id}


def _usable(split: str, skipped: files.Skipped) -> list[sources.Item]:
    kept = []
    for item in sources.select("idiom", split, skipped):
        if len(item.key_text) <= _LONGEST and not item.key_text.startswith(("同“", "见“")):
            kept.append(item)
        else:
            skipped["long_or_reference"] += 1
    return kept


def explanation(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """What does the idiom mean?"""
    for item in _usable(split, skipped):
        prompt = sources.pick(item["word"], _EXPLAIN).format(word=item["word"])
        yield {"inputs": prompt, "targets": item["explanation"], "id": item.id}


def _distractors(
    items: list[sources.Item], index: int, cluster: dict[str, int]
) -> list[sources.Item]:
    """Three others of the same split whose meaning is another cluster's, fixed by the word."""
    used = {cluster[items[index].id]}
    found: list[sources.Item] = []
    draw = 0
    while len(found) < 3:
        at = hash_fraction(f"{items[index]['word']}:{draw}")
        other = items[int(at * len(items))]
        draw += 1
        if cluster[other.id] not in used:
            used.add(cluster[other.id])
            found.append(other)
        elif draw > 100:
            return []
    return found


def choice(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """Which of four meanings is the idiom's? The answer is a letter."""
    cluster = sources.load().cluster
    items = _usable(split, skipped)
    for index, item in enumerate(items):
        others = _distractors(items, index, cluster)
        if not others:
            skipped["no_distractors"] += 1
            continue
        right = int(hash_fraction(f"answer:{item['word']}") * len(LETTERS))
        options = [other["explanation"] for other in others]
        options.insert(right, item["explanation"])
        lines = [f"{letter}．{text}" for letter, text in zip(LETTERS, options, strict=True)]
        yield {
            "inputs": "\n".join([f"“{item['word']}”的意思是哪一项？", *lines]),
            "targets": LETTERS[right],
            "answer_choices": list(LETTERS),
            "label": right,
            "id": item.id,
        }


def _source(rows: seqio_tasks.RowsFn) -> seqio_tasks.TextSource:
    return seqio_tasks.TextSource(rows, sources.SPLITS, files=sources.all_files)


seqio_tasks.add_text_task("idioms_text", _source(texts), features=("targets",))
seqio_tasks.add_text_task("idiom_explanation", _source(explanation))
seqio_tasks.add_text_task("idiom_choice", _source(choice))
