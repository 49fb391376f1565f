"""What a cache is built from: tasks that yield text (or ids), and tasks made of files by path.

No seqio here: `MIXTURE=file:/data/reviews.jsonl` is cached without it. seqio tasks become the same
`BuildTask` in `chatyuan.data.seqio_tasks`.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chatyuan.errors import UserError
from chatyuan.text import files, preferences

FILE_PREFIX = "file:"
EXAMPLE = "__example__"  # key of a tokenized row's untokenised values
VALIDATION_EVERY = 50  # of a single file, the share 1/50 of distinct documents is held out
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}

Rows = Callable[[str, files.Skipped], Iterator[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class BuildTask:
    """One task to cache.

    `rows(split, skipped)` yields examples: with `tokenized` False each feature is a str, and other
    keys (answer_choices, label, id) are kept for evaluation; with True each is an int array, as a
    seqio task's own vocabulary made it, and the other values are a dict under `EXAMPLE`.
    `key` changes when the rows would.
    """

    name: str
    features: tuple[str, ...]
    splits: tuple[str, ...]
    source: str
    preprocessors: tuple[str, ...]
    key: str
    rows: Rows
    tokenized: bool = False
    eos_id: int | None = None


def digest(*parts: object) -> str:
    """A short hash of the parts' text."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:32]


def stat_key(paths: Sequence[pathlib.Path]) -> str:
    """Names, sizes and modification times of files: changes when one is edited."""
    rows = []
    for path in paths:
        stat = path.stat()
        rows.append(f"{path}:{stat.st_size}:{stat.st_mtime_ns}")
    return digest(*rows)


def hash_fraction(text: str) -> float:
    """A fixed number in [0, 1) for a text: splits by it do not depend on order or other texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _split_of(path: pathlib.Path) -> str | None:
    word = path.name.split(".")[0].lower()
    for separator in "-_":
        word = word.split(separator)[0]
    return _SPLIT_NAMES.get(word)


def _by_split(paths: Sequence[pathlib.Path]) -> dict[str, list[pathlib.Path]] | None:
    """Files grouped by the split their names begin with, or None when there is no train file."""
    groups: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        groups.setdefault(_split_of(path) or "train", []).append(path)
    named = any(_split_of(path) for path in paths) and len(groups) > 1
    return groups if named and "train" in groups else None


def file_task(name: str) -> BuildTask:
    """The task of `file:PATH`, PATH being a file, a glob or a folder.

    A folder whose files are called train*, validation*/valid*/dev*, test* keeps those splits. Else
    one document in 50, chosen by a hash of its text, is the validation split, so that equal
    documents are never on both sides.

    Raises:
      UserError: no such file, an unknown suffix, or no usable example in it.
    """
    paths = files.expand(name.removeprefix(FILE_PREFIX))
    for path in paths:
        files.kind(path)
    groups = _by_split(paths)
    features = _features(paths)

    def rows(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
        for path in groups[split] if groups else paths:
            for example in files.read_examples(path, skipped):
                if not set(features) <= example.keys():
                    skipped["no_inputs"] += 1
                    continue
                if not groups:
                    # Of preferences the prompt decides: it must not be on both sides.
                    texts = [example[name] for name in features if isinstance(example[name], str)]
                    text = "\x1f".join(texts)
                    held = hash_fraction(text) < 1 / VALIDATION_EVERY
                    if held != (split == "validation"):
                        continue
                yield example

    return BuildTask(
        name=name,
        features=features,
        splits=tuple(groups) if groups else ("train", "validation"),
        source=", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" * (len(paths) > 5)),
        preprocessors=(),
        key=digest(name, stat_key(paths), features),
        rows=rows,
    )


def _features(paths: Sequence[pathlib.Path]) -> tuple[str, ...]:
    skipped = files.Skipped()
    for path in paths:
        for example in files.read_examples(path, skipped):
            if "answers" in example:
                return preferences.FEATURES
            return ("inputs", "targets") if "inputs" in example else ("targets",)
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    raise UserError(
        f"{paths[0]}{' and the other files' * (len(paths) > 1)} holds no usable example "
        f"({reasons or 'the file is empty'}). Expected a document per line, or json objects with "
        'text, input/target, source/target or instruction/output: {"text": "..."}'
    )
