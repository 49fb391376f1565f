"""Preference rows in the layouts people publish, as one shape: a prompt, its answers, their ranks.

    {"prompt", "chosen", "rejected"}             a pair; optional "margin"
    {"prompt", "answers", "ranks"}               K answers; smaller is better, equal is a tie
    {"prompt", "answers", "scores"}              K answers; a higher score is better
Other names: question, instruction, inputs or input for the prompt; responses or completions for the
answers. A row comes out as inputs, answers, ranks and scores: scores are those of the data (or the
margin of a pair), 0 where there are none, and differences of scores are margins.
"""

import math
from collections.abc import Mapping
from typing import Any

from chatyuan.errors import UserError

PROMPTS = ("prompt", "question", "instruction", "inputs", "input")
ANSWERS = ("answers", "responses", "completions")
FEATURES = ("inputs", "answers")


def is_preference(row: Mapping[str, Any]) -> bool:
    """Whether a json object holds preferences: two answers of which one was chosen, or K."""
    return ("chosen" in row and "rejected" in row) or any(
        isinstance(row.get(name), list) for name in ANSWERS
    )


def preference_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"inputs", "answers", "ranks", "scores"}; equal answers are merged.

    Raises:
      Unusable: nothing can be learned from the row; its text is the reason, one word for counting.
    """
    prompt = next((row[name] for name in PROMPTS if isinstance(row.get(name), str)), "")
    if not prompt.strip():
        raise Unusable("empty_prompt")
    if "chosen" in row and "rejected" in row:
        answers, scores = [row["chosen"], row["rejected"]], [_number(row.get("margin", 0.0)), 0.0]
        ranks = [0, 1]
    else:
        answers = next((row[name] for name in ANSWERS if isinstance(row.get(name), list)), [])
        scores, ranks = _order(row, len(answers))
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise Unusable("empty_answer")
    if len(answers) < 2:
        raise Unusable("no_pair")
    first = [i for i, answer in enumerate(answers) if answer not in answers[:i]]
    if len(first) < 2:
        raise Unusable("identical_answers")
    kept = {name: [values[i] for i in first] for name, values in
            (("answers", answers), ("ranks", ranks), ("scores", scores))}  # fmt: skip
    if len(set(kept["ranks"])) < 2:
        raise Unusable("all_tied")
    return {"inputs": prompt, **kept}


class Unusable(Exception):
    """A row that nothing can be learned from."""


def _order(row: Mapping[str, Any], count: int) -> tuple[list[float], list[int]]:
    """(scores, ranks) of K answers."""
    given = row.get("scores") if row.get("ranks") is None else row["ranks"]
    if not isinstance(given, list) or len(given) != count:
        raise Unusable("no_ranks")
    numbers = [_number(value) for value in given]
    if row.get("ranks") is not None:
        return [0.0] * count, _dense(numbers)
    return numbers, _dense([-number for number in numbers])


def _dense(numbers: list[float]) -> list[int]:
    order = sorted(set(numbers))
    return [order.index(number) for number in numbers]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unusable("not_a_number")
    return float(value)


def nothing_left(name: str, split: str, skipped: Mapping[str, int]) -> UserError:
    """The message when every row was left out."""
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return UserError(
        f"{name}: no preference of its {split} split can be learned from ({lost}). Each row needs "
        'a prompt and two different answers: {"prompt": "...", "chosen": "...", "rejected": "..."}'
    )
