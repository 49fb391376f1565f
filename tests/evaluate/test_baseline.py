"""The linear baseline learns what is in the characters, and nothing where nothing is."""

import random

import pytest

from chatyuan.data import cache
from chatyuan.errors import UserError
from chatyuan.evaluate.baseline import CharNgramClassifier, cached_examples
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

pytest.importorskip("sklearn")
WORDS = ("很好", "满意", "喜欢"), ("失望", "太差", "难用")


def reviews(count: int, seed: int) -> tuple[list[str], list[int]]:
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    noise = ["酒店", "电脑", "这本书", "昨天买的"]
    return [f"{rng.choice(noise)}{rng.choice(WORDS[y])}。" for y in labels], labels


def test_accuracy():
    assert CharNgramClassifier(*reviews(200, 0)).accuracy(*reviews(100, 1)) == 1.0
    texts, labels = reviews(400, 2)
    shuffled = random.Random(3).sample(labels, len(labels))
    assert CharNgramClassifier(texts, shuffled).accuracy(*reviews(200, 4)) < 0.7


def test_from_a_cache(tmp_path):
    rows = {"train": reviews(100, 0), "test": reviews(50, 1)}
    config = TokenizerConfig(400, extra_ids=0, character_coverage=1.0)
    lines = [f"{text}{n}" for n, text in enumerate(rows["train"][0])]
    train_tokenizer([*lines, "好评差评" * 9], tmp_path / "a.model", config)
    vocabulary = Vocabulary(tmp_path / "a.model")
    for split, (texts, labels) in rows.items():
        names = ("inputs", "targets")
        with cache.CacheWriter(
            tmp_path, "task", split, features=names, vocabulary=vocabulary
        ) as writer:
            strings = (texts, ["好评" if label == 0 else "差评" for label in labels])
            encoded = [vocabulary.encode_flat(column) for column in strings]
            writer.write(
                {name: flat for name, (flat, _) in zip(names, encoded, strict=True)},
                {name: lengths for name, (_, lengths) in zip(names, encoded, strict=True)},
            )
            writer.finish({})
    train, test = (cached_examples(tmp_path, "task", split, vocabulary) for split in rows)
    assert train[0] == rows["train"][0] and set(train[1]) == {"好评", "差评"}
    fitted = CharNgramClassifier(*train)
    assert fitted.labels == ["好评", "差评"] and fitted.predict(test[0]) == test[1]
    assert fitted.accuracy(*test) == 1.0


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="0 texts to test on"):
        CharNgramClassifier(*reviews(20, 0)).accuracy([], [])
    with pytest.raises(UserError, match="0 texts to train on"):
        CharNgramClassifier([], [])
    with pytest.raises(UserError, match="needs two labels"):
        CharNgramClassifier(["a", "b"], [1, 1])
