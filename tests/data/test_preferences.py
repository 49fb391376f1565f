"""Preference rows: the layouts, what is left out and counted, batches as a function of the step."""

import dataclasses
import json

import numpy as np
import pytest

from chatyuan.data.loader import DataConfig, open_sources
from chatyuan.data.pairs import PairLoader
from chatyuan.data.preferences import PreferenceLoader
from chatyuan.data.seqio_build import build_cache
from chatyuan.errors import UserError
from chatyuan.text.preferences import Unusable, preference_of
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

PAIRS = [
    {"prompt": f"第{n}间房怎么样？", "chosen": f"很好，{n}分。", "rejected": f"很差，不要{n}次。"}
    for n in range(9)
]
RANKED = [
    {"prompt": "书好看吗？", "answers": ["好看", "还行", "不好", "还行吧"], "ranks": [1, 2, 3, 2]},
    {"prompt": "电影呢？", "responses": ["差", "好", "中"], "scores": [-1.5, 2.0, 0.5]},
]
BAD = [
    {"prompt": " ", "chosen": "a", "rejected": "b"},
    {"prompt": "p", "chosen": "same", "rejected": "same"},
    {"prompt": "p", "answers": ["only"], "ranks": [0]},
    {"prompt": "p", "answers": ["a", "b"]},
    {"prompt": "p", "answers": ["a", "b"], "ranks": [3, 3]},
    {"prompt": "p", "chosen": "a", "rejected": ""},
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "zh.model"
    texts = [text for row in PAIRS for text in row.values()] * 4
    texts += ["书好看吗？还行吧不好看电影呢差好中"] * 4
    train_tokenizer(texts, path, TokenizerConfig(310, extra_ids=4, character_coverage=1.0))
    return Vocabulary(path)


def cached(folder, vocabulary, rows):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    name = f"file:{path}"
    manifests = build_cache(
        name, vocabulary=vocabulary, cache_dir=folder / "cache", splits=("train", "validation")
    )
    config = DataConfig(
        name, str(folder / "cache"), input_length=12, target_length=9, batch_size=4, seed=3
    )
    return config, manifests


@pytest.fixture(scope="module")
def loader(tmp_path_factory, vocabulary):
    config, manifests = cached(tmp_path_factory.mktemp("data"), vocabulary, PAIRS + RANKED + BAD)
    skipped = manifests[0]["skipped"]
    assert skipped == {"all_tied": 1, "empty_answer": 1, "empty_prompt": 1, "identical_answers": 1,
                       "no_pair": 1, "no_ranks": 1}  # fmt: skip
    return PreferenceLoader(config, vocabulary)


def test_the_layouts_mean_what_they_say():
    assert preference_of({**PAIRS[0], "margin": 2})["scores"] == [2.0, 0.0]
    row = preference_of(RANKED[0])
    assert row["ranks"] == [0, 1, 2, 1] and row["scores"] == [0.0] * 4
    assert preference_of(RANKED[1])["ranks"] == [2, 0, 1]
    merged = preference_of({"prompt": "p", "answers": ["a", "b", "a"], "ranks": [0, 1, 0]})
    assert merged["answers"] == ["a", "b"] and merged["ranks"] == [0, 1]
    for row in BAD:
        with pytest.raises(Unusable):
            preference_of(row)


def test_a_batch_holds_the_texts_with_their_ends_and_ranks(loader, vocabulary):
    rows = {row["prompt"]: preference_of(row) for row in PAIRS + RANKED}
    seen = set()
    for step in range(len(loader)):
        batch = loader.batch(step)
        for p in range(4):
            prompt = batch["prompts"][p][: batch["prompt_lengths"][p]]
            assert prompt[-1] == vocabulary.eos_id
            row = rows[vocabulary.decode(prompt[:-1])]
            seen.add(row["inputs"])
            count = len(row["answers"])
            assert (batch["answer_lengths"][p] > 0).sum() == count
            np.testing.assert_array_equal(batch["ranks"][p][:count], row["ranks"])
            np.testing.assert_array_equal(batch["scores"][p][:count], row["scores"])
            for k, text in enumerate(row["answers"]):
                answer = batch["answers"][p, k][: batch["answer_lengths"][p, k]]
                assert answer[-1] == vocabulary.eos_id
                wanted = vocabulary.encode(text)[: loader.config.target_length - 1]
                assert answer[:-1].tolist() == wanted
    assert len(seen) >= len(loader.kept) - 1


def test_an_epoch_is_every_row_once_and_the_next_is_in_another_order(loader):
    count = len(loader.kept)
    order = [int(n) for step in range(count) for n in loader.batch(step)["rows"]]
    epochs = [order[i * count : (i + 1) * count] for i in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_hosts_share_a_batch_and_a_step_is_found_again(loader, vocabulary):
    whole = loader.batch(5)
    parts = [
        PreferenceLoader(loader.config, vocabulary, process_index=i, process_count=2).batch(5)
        for i in range(2)
    ]
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))
    stream = loader.iterate(5)
    for name, value in next(stream).items():
        np.testing.assert_array_equal(value, whole[name])


def test_a_single_pass_ends_in_padding(loader, vocabulary):
    once = PreferenceLoader(loader.config, vocabulary, shuffle=False)
    rows = np.concatenate([once.batch(i)["rows"] for i in range(len(once))])
    assert rows[rows >= 0].tolist() == list(range(len(once.kept)))
    assert not once.batch(len(once))["answer_lengths"].any()


def test_answers_that_are_the_same_once_cut_are_left_out(tmp_path, vocabulary):
    rows = [{"prompt": "书？", "chosen": "很好很好很好很好好", "rejected": "很好很好很好很好差"}]
    config, _ = cached(tmp_path, vocabulary, [*rows, *PAIRS])
    short = dataclasses.replace(config, target_length=4)
    assert PreferenceLoader(short, vocabulary).dropped["identical_after_truncation"] >= 1
    config, _ = cached(tmp_path, vocabulary, rows * 60)
    with pytest.raises(UserError, match="identical_after_truncation"):
        PreferenceLoader(dataclasses.replace(config, target_length=4), vocabulary)


def test_files_of_nothing_usable_and_caches_of_another_kind_are_refused(tmp_path, vocabulary):
    with pytest.raises(UserError, match="identical_answers"):
        cached(tmp_path, vocabulary, [BAD[1]])
    config, _ = cached(tmp_path, vocabulary, [{"input": "a", "target": "b"}])
    with pytest.raises(UserError, match="not preferences"):
        PreferenceLoader(config, vocabulary)


def test_a_model_is_tuned_on_the_best_answers(tmp_path, vocabulary):
    given = [*RANKED, *PAIRS]
    config, _ = cached(tmp_path, vocabulary, given)
    (source,) = open_sources(config, vocabulary)
    kept = [row for row in map(preference_of, given)]
    wanted = {row["inputs"]: row["answers"][int(np.argmin(row["ranks"]))] for row in kept}
    got = {
        vocabulary.decode(source.inputs[row]): vocabulary.decode(source.targets[row])
        for row in range(len(source.targets))
    }
    assert len(got) == len(source.targets) and got.items() <= wanted.items()


def test_pairs_are_of_the_best_and_the_worst_answer(tmp_path, vocabulary):
    config, _ = cached(tmp_path, vocabulary, [*RANKED, *PAIRS])
    loader = PairLoader(config, vocabulary, shuffle=False)
    texts = {row["inputs"]: row for row in map(preference_of, [*RANKED, *PAIRS])}
    for index in range(len(loader)):
        batch = loader.batch(index)
        assert batch["answers"].shape[1] == loader.columns == 2
        for p in np.flatnonzero(batch["rows"] >= 0):
            row = texts[vocabulary.decode(batch["prompts"][p][: batch["prompt_lengths"][p] - 1])]
            for k, place in enumerate((np.argmin(row["ranks"]), np.argmax(row["ranks"]))):
                answer = batch["answers"][p, k][: batch["answer_lengths"][p, k] - 1]
                wanted = vocabulary.encode(row["answers"][place])[: config.target_length - 1]
                assert answer.tolist() == wanted
    assert PairLoader(config, vocabulary, pairs="all").columns == 4
    with pytest.raises(UserError, match="best_worst"):
        PairLoader(config, vocabulary, pairs="best_wurst")


def test_the_answer_of_another_prompt_is_the_next_rows(tmp_path, vocabulary):
    config, _ = cached(tmp_path, vocabulary, PAIRS)
    loader = PairLoader(config, vocabulary, foreign=True)
    loader.reference = np.arange(3.0 * len(loader.kept), dtype=np.float32).reshape(-1, 3)
    batch = loader.batch(0)
    cache = loader.caches[0]
    for p, number in enumerate(batch["rows"]):
        row = int(loader.kept[number][1])
        other = cache.features["answers"][(row + 1) % len(cache)].tolist()
        length = batch["answer_lengths"][p, 2] - 1
        assert batch["answers"][p, 2, :length].tolist() == other[:length] and length > 0
        np.testing.assert_array_equal(batch["reference"][p], loader.reference[number])
    config, _ = cached(tmp_path, vocabulary, PAIRS[:1])
    with pytest.raises(UserError, match="one row only"):
        PairLoader(config, vocabulary, foreign=True)
