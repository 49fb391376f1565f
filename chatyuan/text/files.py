"""Text and jsonl files of the usual shapes, read line by line, with what was skipped counted.

Shapes of a json object, tried in this order (see `example_of`):
    {"instruction", "input", "output"}   alpaca, BELLE; also with "system" and "history"
    {"input", "target"}                  pCLUE; with "answer_choices"
    {"source", "target"}, {"src", "tgt"} ChatYuan; UniLM's s2s-ft
    {"inputs", "targets"}                seqio
    {"title", "content"}, {"text"}, {"content"}   WuDao and news2016zh; C4; The Stack
    {"prompt", "chosen", "rejected"} and others of `chatyuan.text.preferences`
Files: .txt (a document per line), .jsonl/.json (an object per line, or one array), .parquet; the
text ones also gzipped (.gz).
"""

import collections
import glob
import gzip
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from chatyuan.errors import UserError, did_you_mean
from chatyuan.text import preferences

PAIR_KEYS = (("input", "target"), ("source", "target"), ("src", "tgt"), ("inputs", "targets"))
PROMPT_KEYS = ("inputs", "input", "prompt", "source", "src", "query", "text")
TEXT_KEYS = ("text", "content")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
Skipped = collections.Counter[str]


def _open(path: pathlib.Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def kind(path: pathlib.Path) -> str:
    """The suffix that says how to read `path`, `.gz` removed; UserError when it is none of ours."""
    suffix = pathlib.Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path} ends in {suffix or 'nothing'!r}; expected {', '.join(SUFFIXES)}, or one of "
            "the text ones with .gz. Rename the file to say what it holds."
        )
    return suffix


def decoded_lines(lines: Iterable[bytes], skipped: Skipped) -> Iterator[str]:
    """Lines as text; invalid UTF-8 and empty lines are counted in `skipped` and left out."""
    for line in lines:
        try:
            text = line.decode("utf-8").strip("\ufeff\r\n")
        except UnicodeDecodeError:
            skipped["invalid_utf8"] += 1
            continue
        if not text.strip():
            skipped["empty"] += 1
            continue
        yield text


def read_lines(path: pathlib.Path, skipped: Skipped) -> Iterator[str]:
    """The non-empty lines of a UTF-8 file, gzipped or not."""
    with _open(path) as file:
        try:
            # A last "line" of nothing after the final newline is not an empty line.
            yield from decoded_lines(file, skipped)
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path} is not a complete gzip file ({error}).") from error


def read_documents(path: pathlib.Path, skipped: Skipped) -> Iterator[str]:
    """Documents of a file with a sentence per line and empty lines between documents."""
    document: list[str] = []
    with _open(path) as file:
        for line in file:
            try:
                text = line.decode("utf-8").strip("\ufeff\r\n")
            except UnicodeDecodeError:
                skipped["invalid_utf8"] += 1
                continue
            if text.strip():
                document.append(text)
            elif document:
                yield "\n".join(document)
                document = []
    if document:
        yield "\n".join(document)


def _objects(path: pathlib.Path, skipped: Skipped) -> Iterator[Mapping[str, Any]]:
    with _open(path) as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"["):
            try:
                rows = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is not a json array ({error}).") from error
        else:
            rows = _parsed(decoded_lines(file, skipped), skipped)
        for row in rows:
            if isinstance(row, Mapping):
                yield row
            else:
                skipped["not_an_object"] += 1


def _parsed(lines: Iterable[str], skipped: Skipped) -> Iterator[Any]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            skipped["invalid_json"] += 1


def _parquet(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path} is a parquet file; reading it needs pyarrow: pip install pyarrow"
        ) from error
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def example_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The example in a json object, {"targets"} or {"inputs", "targets", ...}; else None.

    `answer_choices` and `label` are kept for evaluation.
    """
    if "instruction" in row and "output" in row:
        turns = row.get("history") or []
        parts = [_string(row.get("system"))]
        parts += [_string(part) for turn in turns for part in turn]
        parts += [_string(row["instruction"]), _string(row.get("input"))]
        inputs, targets = "\n".join(part for part in parts if part), _string(row["output"])
    else:
        for left, right in PAIR_KEYS:
            if left in row and right in row:
                inputs, targets = _string(row[left]), _string(row[right])
                break
        else:
            return _document_of(row)
    if not inputs or not inputs.strip() or not targets or not targets.strip():
        return None
    example: dict[str, Any] = {"inputs": inputs, "targets": targets}
    for key in ("answer_choices", "label"):
        if row.get(key) is not None:
            example[key] = row[key]
    return example


def _document_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    for key in TEXT_KEYS:
        text = _string(row.get(key))
        if text and text.strip():
            title = _string(row.get("title"))
            joined = f"{title.strip()}\n{text}" if title and title.strip() else text
            return {"targets": joined}
    return None


def read_examples(path: str | os.PathLike[str], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Examples of one file, read by its suffix; `skipped` counts what was left out, by reason."""
    path = pathlib.Path(path)
    suffix = kind(path)
    if suffix == ".txt":
        for line in read_lines(path, skipped):
            yield {"targets": line}
        return
    rows = _parquet(path) if suffix == ".parquet" else _objects(path, skipped)
    for row in rows:
        if preferences.is_preference(row):
            try:
                yield preferences.preference_of(row)
            except preferences.Unusable as reason:
                skipped[str(reason)] += 1
            continue
        example = example_of(row)
        if example is None:
            skipped["unknown_shape_or_empty"] += 1
        else:
            yield example


def read_prompts(path: str | os.PathLike[str], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Prompts of one file as rows with "inputs": a line of text each, or a json object each.

    Objects keep their other fields; the prompt is "inputs", "instruction" with "input", or the
    first of `PROMPT_KEYS` that is there.
    """
    path = pathlib.Path(path)
    suffix = kind(path)
    if suffix == ".txt":
        yield from ({"inputs": line} for line in read_lines(path, skipped))
        return
    for row in _parquet(path) if suffix == ".parquet" else _objects(path, skipped):
        joined = "instruction" in row and not _string(row.get("inputs"))
        names = ("instruction", "input") if joined else PROMPT_KEYS
        parts = [text for name in names if (text := _string(row.get(name)))]
        prompt = "\n".join(parts) if joined else next(iter(parts), "")
        if prompt.strip():
            yield {**row, "inputs": prompt}
        else:
            skipped["no_prompt"] += 1


def expand(pattern: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files of a path, a glob or a folder (every readable file below it), sorted.

    Raises:
      UserError: nothing there; names the nearest file.
    """
    path = pathlib.Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and _readable(p)]
    else:
        found = sorted(pathlib.Path(p) for p in glob.glob(str(pattern), recursive=True))
        found = [p for p in found if p.is_file()]
    if not found:
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"There is no file {pattern}.{near} Give a file, a folder or a glob.")
    return found


def _readable(path: pathlib.Path) -> bool:
    suffix = pathlib.Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix in SUFFIXES and not path.name.startswith(".")
