"""ChatYuan's dialogue template, and the named codecs that carry newlines through a vocabulary.

The template of ChatYuan-large-v1/v2 is `用户：{question}\n小元：{answer}` per turn, with full-width
colons. Their SentencePiece model has no newline piece, so they write newline and tab as two visible
characters before encoding; PromptCLUE writes newline as an underscore. A codec is a property of a
vocabulary (see `chatyuan.text.vocabulary`), applied by `encode` and undone by `decode`.
"""

import dataclasses
from collections.abc import Sequence

USER = "用户："
ASSISTANT = "小元："


@dataclasses.dataclass(frozen=True)
class Codec:
    """Replacements made before encoding and after decoding, each in the order given."""

    name: str
    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]

    def escape(self, text: str) -> str:
        """Returns `text` as the vocabulary should see it."""
        for old, new in self.before:
            text = text.replace(old, new)
        return text

    def unescape(self, text: str) -> str:
        """Returns decoded text as a person should see it."""
        for old, new in self.after:
            text = text.replace(old, new)
        return text


# `%20` is how ChatYuan-large-v2 writes the two spaces that indent code; its script turns it back.
CODECS: dict[str, Codec] = {
    "none": Codec("none", (), ()),
    "chatyuan": Codec(
        "chatyuan",
        (("\n", "\\n"), ("\t", "\\t")),
        (("\\n", "\n"), ("\\t", "\t"), ("%20", "  ")),
    ),
    "promptclue": Codec("promptclue", (("\n", "_"),), (("_", "\n"),)),
}


def dialogue_prompt(
    query: str, history: Sequence[tuple[str, str]] = (), *, max_turns: int | None = 5
) -> str:
    """Renders a question after the last `max_turns` (question, answer) pairs, ending in `小元：`.

    Whole turns are dropped from the left, never the latest question. `history` is not changed.
    """
    kept = list(history) if max_turns is None else list(history)[max(0, len(history) - max_turns) :]
    lines = []
    for question, answer in kept:
        lines += [f"{USER}{question.strip()}", f"{ASSISTANT}{answer.strip()}"]
    return "\n".join([*lines, f"{USER}{query.strip()}", ASSISTANT])


def split_dialogue(text: str) -> list[tuple[str, str]]:
    """Splits a rendered dialogue into ("user" | "assistant", text) turns; the rest is one turn."""
    turns: list[tuple[str, str]] = []
    for line in text.split("\n"):
        for role, mark in (("user", USER), ("assistant", ASSISTANT)):
            if line.startswith(mark):
                turns.append((role, line[len(mark) :]))
                break
        else:
            role, before = turns.pop() if turns else ("user", None)
            turns.append((role, line if before is None else f"{before}\n{line}"))
    return turns
