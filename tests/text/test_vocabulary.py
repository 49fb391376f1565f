"""A vocabulary takes every id from its file, round-trips text, and explains what is wrong."""

import json
import pathlib
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatyuan.errors import UserError
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

RNG = random.Random(0)
WORDS = (
    "今天 天气 很好 我们 一起 公园 散步 苹果 价格 便宜 酒店 干净 服务 周到 电脑 屏幕 price".split()
)
LINES = [f"第{n}句：{''.join(RNG.choices(WORDS, k=9))}，{n * 37}！" for n in range(200)]
CONFIG = TokenizerConfig(vocab_size=420, extra_ids=10, character_coverage=1.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_tokenizer(LINES, file, CONFIG)
    return file


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> pathlib.Path:
    """A file without sentinels, as T5's original and ChatYuan's are."""
    file = tmp_path_factory.mktemp("bare") / "spiece.model"
    train_tokenizer(LINES, file, TokenizerConfig(410, extra_ids=0, character_coverage=1.0))
    return file


def test_ids_come_from_the_file(path):
    vocabulary = Vocabulary(path)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.size == 420
    assert vocabulary.sentinel_ids == tuple(range(419, 409, -1))
    assert vocabulary.piece(419) == "<extra_id_0>"
    assert vocabulary.id("<extra_id_9>") == 410
    assert vocabulary.id("<extra_id_10>") is None


def test_sentinels_can_be_added_to_a_file_without_them(bare):
    assert Vocabulary(bare).sentinel_ids == ()
    added = Vocabulary(f"{bare}:100")
    assert added.size == 510
    assert added.sentinel_ids == tuple(range(509, 409, -1))
    assert added.sha256 != Vocabulary(bare).sha256
    assert added.sha256 == Vocabulary(bare, extra_ids=100).sha256
    assert added.encode("今天<extra_id_1>")[-1] == 508
    assert added.decode([509, 508]) == "<extra_id_0><extra_id_1>"
    # What an export writes is a model of its own that says the same.
    again = bare.with_name("again.model")
    again.write_bytes(added.serialized)
    assert Vocabulary(again).sentinel_ids == added.sentinel_ids


def test_added_sentinels_have_the_ids_that_seqio_gives_them(bare):
    seqio = pytest.importorskip("seqio")
    theirs = seqio.SentencePieceVocabulary(str(bare), extra_ids=100)
    ours = Vocabulary(bare, extra_ids=100)
    assert theirs.vocab_size == ours.size
    text = "今天天气 <extra_id_0> 很好 <extra_id_7>"
    assert theirs.encode(text)[-1] == ours.encode(text)[-1] == ours.sentinel_ids[7]
    assert theirs.encode("我们去公园，12") == ours.encode("我们去公园，12")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_any_text_round_trips(path, text):
    # U+2581 is SentencePiece's spelling of a space, so it cannot be told from one.
    text = text.replace("▁", "_")
    vocabulary = Vocabulary(path)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_batches_equal_single_texts(path):
    vocabulary = Vocabulary(path)
    texts = ["", "今天", "我们去\n公园", "price 37"]
    expected = [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_batch(texts, threads=2) == expected
    flat, lengths = vocabulary.encode_flat(texts)
    assert flat.dtype == np.int32
    assert lengths.tolist() == [len(row) for row in expected]
    assert flat.tolist() == sum(expected, [])
    assert vocabulary.decode_batch(expected) == texts


def test_decoding_stops_at_the_end_and_skips_padding(path):
    vocabulary = Vocabulary(path)
    ids = vocabulary.encode("今天")
    assert vocabulary.decode([0, *ids, 1, *ids]) == "今天"
    assert vocabulary.decode(np.array([*ids, 0, 0])) == "今天"
    assert vocabulary.decode([5000]) == vocabulary.decode([vocabulary.unk_id])


def test_codecs(path, bare):
    assert Vocabulary(path).codec == "none"
    assert "\n" in LINES[0] + "\n"
    escaped = Vocabulary(path, codec="chatyuan")
    assert escaped.encode("a\nb") == Vocabulary(path).encode("a\\nb")
    assert escaped.encode_batch(["a\nb"]) == [escaped.encode("a\nb")]
    assert escaped.decode(escaped.encode("用户：a\n小元：\tb")) == "用户：a\n小元：\tb"
    assert escaped.decode(Vocabulary(path).encode("x%20y")) == "x  y"
    clue = Vocabulary(path, codec="promptclue")
    assert clue.decode(clue.encode("a\nb")) == "a\nb"
    with pytest.raises(UserError, match="'chatyaun' is not one of.*Did you mean chatyuan"):
        Vocabulary(path, codec="chatyaun")


def test_a_file_that_cannot_spell_newline_gets_chatyuans_codec(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=120,
        model_type="bpe",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    file = tmp_path / "old.model"
    file.write_bytes(model.getvalue())
    vocabulary = Vocabulary(file)
    assert vocabulary.codec == "chatyuan"
    (tmp_path / "old.model.json").write_text(json.dumps({"codec": "promptclue"}))
    assert Vocabulary(file).codec == "promptclue"


def test_pickles_by_path(bare):
    vocabulary = Vocabulary(bare, extra_ids=3, codec="chatyuan")
    again = pickle.loads(pickle.dumps(vocabulary))
    assert (again.sha256, again.codec, again.size) == (vocabulary.sha256, "chatyuan", 413)


def test_mistakes_are_explained(path, tmp_path):
    with pytest.raises(UserError, match=r"no such file\. Did you mean spiece.model\?"):
        Vocabulary(path.with_name("spice.model"))
    with pytest.raises(UserError, match="is a folder"):
        Vocabulary(path.parent)
    other = tmp_path / "vocab.txt"
    other.write_text("not a model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Vocabulary(other)
    other.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Vocabulary(other)
    other.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        Vocabulary(other)
    with pytest.raises(UserError, match="already holds 10 <extra_id_N> pieces"):
        Vocabulary(path, extra_ids=100)
