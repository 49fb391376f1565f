"""Training a vocabulary: deterministic, described, and clear about what is impossible."""

import dataclasses
import json
import random

import pytest

from chatyuan.errors import UserError
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

RNG = random.Random(0)
WORDS = (
    "今天 天气 很好 我们 一起 公园 散步 苹果 价格 便宜 酒店 干净 服务 周到 电脑 屏幕 price".split()
)
LINES = [
    f"第{n}句：{''.join(RNG.choices(WORDS, k=9))}，{n * 37}！\n去{RNG.choice(WORDS)}。"
    for n in range(150)
]
CONFIG = TokenizerConfig(vocab_size=420, extra_ids=10, character_coverage=1.0)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_and_described(tmp_path, model_type):
    config = dataclasses.replace(CONFIG, model_type=model_type, vocab_size=400)
    stats = train_tokenizer(LINES, tmp_path / "a.model", config, source="test")
    again = train_tokenizer(LINES, tmp_path / "b.model", config)
    assert stats["sha256"] == again["sha256"] == Vocabulary(tmp_path / "a.model").sha256
    beside = json.loads((tmp_path / "a.model.json").read_text())
    assert beside["config"]["model_type"] == model_type
    assert {key: beside[key] for key in stats} == stats
    assert stats["documents"] == 150 and stats["lines"] == 300
    assert stats["pieces"] == 400 and stats["unknown_rate"] == 0
    assert stats["chars_per_token"] > 1.3
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.model",
        "a.model.json",
        "b.model",
        "b.model.json",
    ]


def test_digits_newlines_and_full_width_punctuation_are_kept(tmp_path):
    train_tokenizer(LINES, tmp_path / "a.model", CONFIG)
    vocabulary = Vocabulary(tmp_path / "a.model")
    assert len(vocabulary.encode("2024")) == 4
    assert vocabulary.encode("\n") == [vocabulary.id("\n")]
    assert "，" in vocabulary.decode(vocabulary.encode("好，我们"))
    assert vocabulary.decode(vocabulary.encode("  a  b ")) == "  a  b "


def test_held_out_lines_are_not_trained_on(tmp_path):
    lines = [*LINES[:60], "生僻字龘龘龘龘"]
    every_line = sum(line.count("\n") + 1 for line in lines)
    config = dataclasses.replace(CONFIG, vocab_size=390, heldout_every=every_line)
    train_tokenizer(lines, tmp_path / "a.model", config)
    assert Vocabulary(tmp_path / "a.model").id("龘") is None


def test_mistakes_are_explained(tmp_path):
    path = tmp_path / "a.model"
    with pytest.raises(UserError, match="no text to train .* 2 documents, all empty"):
        train_tokenizer(["", "  \n"], path, CONFIG)
    with pytest.raises(UserError, match="too high for this much text; at most \\d+"):
        train_tokenizer(
            LINES, path, dataclasses.replace(CONFIG, vocab_size=9000, model_type="unigram")
        )
    with pytest.raises(UserError, match="vocab_size=290 cannot hold .* pieces are needed"):
        train_tokenizer(LINES, path, dataclasses.replace(CONFIG, vocab_size=290))
    with pytest.raises(UserError, match="'bqe' is not one of bpe, unigram. Did you mean bpe"):
        TokenizerConfig(model_type="bqe")
    with pytest.raises(UserError, match="vocab_size=300 leaves no room"):
        TokenizerConfig(vocab_size=300)
    with pytest.raises(UserError, match="character_coverage=99"):
        TokenizerConfig(character_coverage=99)
    assert list(tmp_path.iterdir()) == []
