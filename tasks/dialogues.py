"""Short dialogues in ChatYuan's template, `用户：…\n小元：`, made of the other tasks' facts.

Greetings are written here; every other answer is a fact of a source: an idiom's meaning or a
review's label. Some dialogues have an earlier turn, so that the model sees a history.
"""

from collections.abc import Iterator
from typing import Any

from chatyuan.data import seqio_tasks
from chatyuan.data.sources import hash_fraction
from chatyuan.text import files
from chatyuan.text.templates import dialogue_prompt
from tasks import reviews, sources

GREETINGS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("你好", "您好", "你好！", "嗨", "哈喽", "早上好", "晚上好", "在吗？", "你好，小元"),
        ("您好，我是小元，有什么可以帮您？", "您好！请问有什么可以帮您？"),
    ),
    (
        ("你是谁？", "你叫什么名字？", "介绍一下你自己。", "请问你是？", "你是机器人吗？"),
        ("我是小元，一个中文对话模型。", "我叫小元，是一个会说中文的对话模型。"),
    ),
    (
        ("你会做什么？", "你能帮我什么？", "你有什么功能？"),
        ("我可以解释成语，判断评论是好评还是差评，也可以续写句子。",),
    ),
    (
        ("谢谢", "谢谢你！", "多谢", "太感谢了", "辛苦了"),
        ("不客气，很高兴能帮到您。", "不用谢，有需要再问我。"),
    ),
    (
        ("再见", "拜拜", "下次见", "我先走了", "晚安"),
        ("再见，祝您愉快！", "再见，欢迎下次再来。"),
    ),
)
_MEANING = (
    "“{word}”是什么意思？",
    "{word}是什么意思？",
    "请问“{word}”怎么解释？",
    "帮我解释一下成语“{word}”。",
)
_OPINION = (
    "下面这条评论是好评还是差评？{text}",
    "帮我看看这条评论是好评还是差评：{text}",
    "这个人满意吗？{text}",
)
_OPINION_ANSWERS = {
    0: ("这是一条差评，写的人不满意。", "差评，写的人不满意。"),
    1: ("这是一条好评，写的人很满意。", "好评，写的人很满意。"),
}
_LONGEST = 60  # characters of an explanation or a review inside a dialogue


def _greeting(seed: str) -> tuple[str, str]:
    questions, answers = GREETINGS[int(hash_fraction(f"kind:{seed}") * len(GREETINGS))]
    return sources.pick(seed, questions, "question"), sources.pick(seed, answers, "answer")


def _idiom_turn(item: sources.Item) -> tuple[str, str]:
    question = sources.pick(item["word"], _MEANING, "dialogue").format(word=item["word"])
    return question, f"“{item['word']}”的意思是：{item['explanation']}"


def _review_turn(item: sources.Item) -> tuple[str, str]:
    assert item.label is not None
    question = sources.pick(item.key_text, _OPINION, "dialogue").format(text=item.key_text)
    return question, sources.pick(item.key_text, _OPINION_ANSWERS[item.label], "answer")


def _sampled(items: list[sources.Item], share: float) -> list[sources.Item]:
    return [
        item
        for item in items
        if len(item.key_text) <= _LONGEST
        and not item.key_text.startswith(("同“", "见“"))
        and hash_fraction(f"dialogue:{item.id}") < share
    ]


def dialogues(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """Greetings, idioms' meanings, opinions of reviews; a third of them after an earlier turn."""
    turns = [(item.id, *_idiom_turn(item)) for item in _select("idiom", split, 0.3)]
    turns += [(item.id, *_review_turn(item)) for item in _select("review", split, 0.5)]
    greetings = max(20, len(turns) // 4)
    turns += [(f"greeting-{n}", *_greeting(f"{split}:{n}")) for n in range(greetings)]
    for seed, question, answer in turns:
        history = [_greeting(f"before:{seed}")] if hash_fraction(f"turn:{seed}") < 1 / 3 else []
        yield {"inputs": dialogue_prompt(question, history), "targets": answer, "id": seed}


def _select(source: str, split: str, share: float) -> list[sources.Item]:
    # Its own counter: dialogues are a sample, so what the source left out is not theirs to report.
    return _sampled(sources.select(source, split, files.Skipped()), share)


def sentiment_dialogue(text: str) -> str:
    """A review's question as a dialogue prompt, for showing replies."""
    return dialogue_prompt(_OPINION[0].format(text=reviews.shorten(text, _LONGEST)))


seqio_tasks.add_text_task(
    "short_dialogues",
    seqio_tasks.TextSource(dialogues, sources.SPLITS, files=sources.all_files),
)
