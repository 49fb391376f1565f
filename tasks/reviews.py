"""Reviews: plain text, sentiment as an instruction, continuation of the opening clause."""

import re
from collections.abc import Iterator
from typing import Any

from chatyuan.data import seqio_tasks
from chatyuan.text import files
from tasks import sources

ANSWERS = ("差评", "好评")  # by label
_INSTRUCTIONS = ("这条评论是好评还是差评？",)
_CONTINUE = ("接着写下去：", "请续写这条评论：", "续写：")
_CLAUSE_END = re.compile(r"[，。！？；,.!?;~～…\s]+")
_SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）]*")
_LONGEST = 400  # characters of a review in a prompt
_LONGEST_CONTINUATION = 60


def shorten(text: str, longest: int = _LONGEST) -> str:
    """The head and tail of a long review: opinions stand at its ends."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}……{text[-half:]}"


def texts(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """The reviews as they are."""
    for item in sources.select("review", split, skipped):
        yield {"targets": item.key_text, "id": item.id}


def sentiment_prompt(text: str) -> str:
    """The instruction of the sentiment task; also what evaluation and preference data use."""
    return f"{_INSTRUCTIONS[0]}\n{shorten(text)}"


def sentiment(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """Is the review good or bad?"""
    for item in sources.select("review", split, skipped):
        assert item.label is not None
        yield {
            "inputs": sentiment_prompt(item.key_text),
            "targets": ANSWERS[item.label],
            "answer_choices": list(ANSWERS),
            "label": item.label,
            "id": item.id,
        }


def cut(text: str) -> tuple[str, str] | None:
    """Opening clause and a continuation of at most 60 characters; None for a short review."""
    for match in _CLAUSE_END.finditer(text):
        opening, rest = text[: match.end()], text[match.end() :]
        if len(opening) < 8:
            continue
        if len(rest) < 8:
            return None
        if len(rest) > _LONGEST_CONTINUATION:
            ends = [m.end() for m in _SENTENCE_END.finditer(rest[:_LONGEST_CONTINUATION])]
            ends = ends or [m.end() for m in _CLAUSE_END.finditer(rest[:_LONGEST_CONTINUATION])]
            if not ends or ends[-1] < 8:
                return None
            rest = rest[: ends[-1]]
        return opening.strip(), rest.strip()
    return None


def continuation(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """Go on from the opening clause."""
    for item in sources.select("review", split, skipped):
        parts = cut(item.key_text)
        if parts is None:
            skipped["too_short"] += 1
            continue
        opening, rest = parts
        prompt = sources.pick(item.key_text, _CONTINUE)
        yield {"inputs": f"{prompt}{opening}", "targets": rest, "id": item.id}


def continuation_sentiment(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """Does the continuation alone come from a good or a bad review? What a judge learns from."""
    for item in sources.select("review", split, skipped):
        assert item.label is not None
        parts = cut(item.key_text)
        if parts is None:
            skipped["too_short"] += 1
            continue
        yield {"inputs": parts[1], "targets": ANSWERS[item.label], "id": item.id}


def _source(rows: seqio_tasks.RowsFn) -> seqio_tasks.TextSource:
    return seqio_tasks.TextSource(rows, sources.SPLITS, files=sources.all_files)


seqio_tasks.add_text_task("reviews_text", _source(texts), features=("targets",))
seqio_tasks.add_text_task("review_sentiment", _source(sentiment))
seqio_tasks.add_text_task("review_continuation", _source(continuation))
seqio_tasks.add_text_task("continuation_sentiment", _source(continuation_sentiment))
