"""Preferences about continuations of reviews: a good review's own is better than what is not.

    python -m tasks.preferences openings openings.jsonl
    python run.py infer openings.jsonl ...         # drafts: of the tuned model, of an earlier one
    python -m tasks.preferences pairs FOLDER DRAFTS.jsonl [MORE.jsonl ...]
    python run.py reward --gin.MIXTURE=file:FOLDER ...

1. The prompt is the opening clause of a good review, in the words of `review_continuation`.
2. Its own continuation (rank 0) stands above that of a bad review and above each draft (rank 1, not
   compared with each other): a model has to read the prompt as well as the answer to tell them.
3. FOLDER holds train.jsonl and validation.jsonl, of reviews of these splits; the bad reviews too.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from chatyuan.errors import UserError
from chatyuan.text import files
from tasks import reviews, sources

SPLITS = ("train", "validation")


def _continuations(split: str, label: int) -> Iterator[dict[str, Any]]:
    """Rows of `review_continuation` from reviews of one label."""
    labels = {item.id: item.label for item in sources.load().items["review"][split]}
    for row in reviews.continuation(split, files.Skipped()):
        if labels[row["id"]] == label:
            yield row


def _evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` of the rows, in their order; all where there are not so many."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def openings(train: int, validation: int) -> list[dict[str, Any]]:
    """Returns prompts with the continuation of their review, its id and its split.

    Each also has the continuation of a bad review, `other`.

    Args:
      train, validation: at most so many of each split.
    """
    found = []
    for split, count in zip(SPLITS, (train, validation), strict=True):
        bad = [row["targets"] for row in _continuations(split, 0)]
        for row in _evenly(list(_continuations(split, 1)), count):
            other = sources.pick(row["id"], bad, "other")
            found.append({**row, "other": other, "split": split})
    return found


def pairs(drafts: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Returns preference rows by split.

    Args:
      drafts: of each model the rows of `openings` with its `prediction`, in the same order.

    Raises:
      UserError: the models have not answered the same prompts, or not those of `openings`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if any("other" not in row for row in drafts[0]):
        raise UserError("The drafts lack the field `other`: make their prompts with `openings`.")
    first = [(row["id"], row["inputs"]) for row in drafts[0]]
    for other in drafts[1:]:
        if [(row["id"], row["inputs"]) for row in other] != first:
            raise UserError("The files of drafts do not answer the same prompts in the same order.")
    for rows in zip(*drafts, strict=True):
        prompt = rows[0]
        others = [prompt["other"], *(row["prediction"] for row in rows)]
        # An empty draft is no answer; one that repeats another counts once.
        others = [o for o in dict.fromkeys(others) if o.strip() and o != prompt["targets"]]
        found.setdefault(prompt["split"], []).append(
            {
                "prompt": prompt["inputs"],
                "answers": [prompt["targets"], *others],
                "ranks": [0, *[1] * len(others)],
            }
        )
    return found


def _read(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)
    print(f"Written: {path} ({len(rows):,} rows)")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("openings", help="prompts for the models that draft")
    first.add_argument("file", help="JSONL to write")
    first.add_argument("--train", type=int, default=6000, help="prompts of the train split")
    first.add_argument("--validation", type=int, default=500, help="and of the validation split")
    second = commands.add_parser("pairs", help="preferences from their drafts")
    second.add_argument("folder", help="for train.jsonl and validation.jsonl")
    second.add_argument("drafts", nargs="+", help="predictions.jsonl of infer, one of each model")
    given = parser.parse_args(arguments)
    try:
        if given.command == "openings":
            _write(pathlib.Path(given.file), openings(given.train, given.validation))
        else:
            found = pairs([_read(path) for path in given.drafts])
            for split in reversed(SPLITS):  # train last: the folder is whole when it is there
                _write(pathlib.Path(given.folder) / f"{split}.jsonl", found.get(split, []))
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
