"""Caches of files, of our text tasks, of TFDS datasets and of existing T5X tasks unchanged."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from chatyuan.data import cache, seqio_build
from chatyuan.errors import UserError
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINES = [
    f"第{n}条：{'今天天气很好我们去公园散步'[n % 7 :]}{'吃苹果'[n % 3 :]}。" for n in range(200)
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_tokenizer(LINES, path, TokenizerConfig(320, extra_ids=10, character_coverage=1.0))
    return Vocabulary(path)


@pytest.fixture(scope="module")
def seqio():
    module = pytest.importorskip("seqio")
    pytest.importorskip("tensorflow_datasets")
    return module


def texts_of(root, task, split, vocabulary, feature="targets") -> list[str]:
    opened = cache.open_cache(root, task, split, vocabulary)
    return [vocabulary.decode(row) for row in opened.features[feature]]


# Files by path.


def test_a_text_file_needs_no_code(tmp_path, vocabulary):
    path = tmp_path / "my.txt"
    distinct = [f"{line}{n}" for n in (1, 2) for line in LINES]
    path.write_bytes("\n".join(distinct).encode() + b"\n\n\xff\n" + distinct[0].encode())
    lines: list[str] = []
    manifests = seqio_build.build_cache(
        f"file:{path}", vocabulary=vocabulary, cache_dir=tmp_path / "c", report=lines.append
    )
    train = texts_of(tmp_path / "c", f"file:{path}", "train", vocabulary)
    validation = texts_of(tmp_path / "c", f"file:{path}", "validation", vocabulary)
    assert sorted([*train, *validation]) == sorted([*distinct, distinct[0]])
    assert not set(train) & set(validation) and 1 <= len(validation) <= 20
    assert [m["split"] for m in manifests] == ["train", "validation"]
    assert manifests[0]["skipped"] == {"empty": 1, "invalid_utf8": 1}
    assert "skipped 1 empty, 1 invalid_utf8" in lines[0]
    assert cache.read_mixture(tmp_path / "c", f"file:{path}") == [(f"file:{path}", 1.0)]


def test_a_folder_of_pairs_keeps_its_splits(tmp_path, vocabulary):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train-00.jsonl", 3), ("train-01.jsonl", 2), ("dev.jsonl", 2)):
        rows = [
            {"input": f"{name}第{n}条", "target": "很好", "answer_choices": ["很好", "不好"]}
            for n in range(count)
        ]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows, {"text": "x"}])
        (folder / name).write_text(text, encoding="utf-8")
    name = f"file:{folder}"
    seqio_build.build_cache(name, vocabulary=vocabulary, cache_dir=tmp_path / "c")
    assert len(texts_of(tmp_path / "c", name, "train", vocabulary)) == 5
    opened = cache.open_cache(tmp_path / "c", name, "validation", vocabulary)
    assert opened.manifest["skipped"] == {"no_inputs": 1}
    examples = list(opened.examples())
    assert examples[1]["answer_choices"] == ["很好", "不好"]
    decoded = texts_of(tmp_path / "c", name, "validation", vocabulary, "inputs")
    assert decoded == [example["inputs"] for example in examples]


def test_files_that_cannot_be_used(tmp_path, vocabulary):
    build = functools.partial(
        seqio_build.build_cache, vocabulary=vocabulary, cache_dir=tmp_path / "c"
    )
    with pytest.raises(UserError, match="There is no file"):
        build(f"file:{tmp_path}/none.txt")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="ends in '.csv'"):
        build(f"file:{tmp_path}/a.csv")
    (tmp_path / "a.txt").write_bytes(b"\n\n\xff\n")
    with pytest.raises(UserError, match="no usable example \\(2 empty, 1 invalid_utf8\\)"):
        build(f"file:{tmp_path}/a.txt")
    (tmp_path / "a.jsonl").write_text('{"question": "x"}')
    with pytest.raises(UserError, match="1 unknown_shape_or_empty.*Expected"):
        build(f"file:{tmp_path}/a.jsonl")
    assert not (tmp_path / "c").exists()


def test_an_up_to_date_cache_is_reused(tmp_path, vocabulary):
    path = tmp_path / "my.txt"
    path.write_text("\n".join(LINES[:50]), encoding="utf-8")
    build = functools.partial(
        seqio_build.build_cache, f"file:{path}", vocabulary=vocabulary, cache_dir=tmp_path / "c"
    )
    assert not any(manifest.get("reused") for manifest in build())
    manifests = build()
    assert all(manifest["reused"] for manifest in manifests)
    assert "up to date" in seqio_build.describe(manifests[0])
    assert not any(manifest.get("reused") for manifest in build(force=True))
    file = cache.split_path(tmp_path / "c", f"file:{path}", "train") / "targets.tokens.npy"
    file.write_bytes(file.read_bytes()[:-2])
    assert not build()[0].get("reused")
    path.write_text("\n".join(LINES[:60]), encoding="utf-8")
    assert not any(manifest.get("reused") for manifest in build())


def test_files_are_cached_without_tensorflow(tmp_path, vocabulary):
    path = tmp_path / "my.txt"
    path.write_text("\n".join(LINES[:50]), encoding="utf-8")
    code = (
        "import sys; from chatyuan.data import seqio_build, cache\n"
        "from chatyuan.text.vocabulary import Vocabulary\n"
        f"v = Vocabulary({str(vocabulary.path)!r})\n"
        f"seqio_build.build_cache('file:{path}', vocabulary=v, cache_dir={str(tmp_path)!r})\n"
        f"cache.open_cache({str(tmp_path)!r}, 'file:{path}', 'train', v)\n"
        "assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_texts_for_a_tokenizer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "问", "target": "答"}\n{"input": "二", "target": "三"}')
    assert sorted(seqio_build.iter_texts(f"file:{path}")) == ["三", "二", "答", "问"]


# seqio tasks.


def test_a_text_task_with_preprocessors(tmp_path, vocabulary, seqio):
    from chatyuan.data import seqio_tasks

    tf = pytest.importorskip("tensorflow")

    @seqio.map_over_dataset
    def ask(example):
        return {
            "inputs": tf.strings.join(["问：", example["q"]]),
            "targets": example["a"],
            "label": example["label"],
        }

    rows = [{"q": f"第{n}题", "a": LINES[n], "label": n} for n in range(8)]
    rows.append({"q": "空", "a": " ", "label": 9})
    seqio_tasks.add_text_task(
        "asked",
        seqio_tasks.TextSource(lambda split, skipped: iter(rows), ("train", "test")),
        preprocessors=[ask, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )
    manifests = seqio_build.build_cache(
        "asked", vocabulary=vocabulary, cache_dir=tmp_path, task_modules=()
    )
    assert [manifest["split"] for manifest in manifests] == ["train", "test"]
    assert manifests[0]["skipped"] == {"empty": 1}
    assert "ask" in manifests[0]["preprocessors"][0] and len(manifests[0]["preprocessors"]) == 1
    assert texts_of(tmp_path, "asked", "train", vocabulary, "inputs")[3] == "问：第3题"
    assert texts_of(tmp_path, "asked", "train", vocabulary) == LINES[:8]
    examples = list(cache.open_cache(tmp_path, "asked", "test").examples())
    assert examples[2] == {"inputs": "问：第2题", "targets": LINES[2], "label": 2}


def t5x_task(seqio, name, vocabulary, *, extra_ids=0, path=None):
    """A task as a T5X user writes it: own vocabulary, tokenize, append_eos."""
    theirs = seqio.SentencePieceVocabulary(str(path or vocabulary.path), extra_ids=extra_ids)

    def dataset_fn(split, shuffle_files, seed=None):
        import tensorflow as tf

        rows = {"question": [f"第{n}题" for n in range(6)], "answer": LINES[:6]}
        return tf.data.Dataset.from_tensor_slices(rows)

    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=["train", "validation"]),
        preprocessors=[
            functools.partial(
                seqio.preprocessors.rekey, key_map={"inputs": "question", "targets": "answer"}
            ),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary=theirs, add_eos=True),
            "targets": seqio.Feature(vocabulary=theirs, add_eos=True),
        },
        metric_fns=[],
    )


def test_an_existing_task_runs_unchanged(tmp_path, vocabulary, seqio):
    task = t5x_task(seqio, "theirs", vocabulary)
    seqio_build.build_cache("theirs", vocabulary=vocabulary, cache_dir=tmp_path, task_modules=())
    opened = cache.open_cache(tmp_path, "theirs", "train", vocabulary)
    expected = task.get_dataset(sequence_length=None, split="train", shuffle=False)
    for row, example in enumerate(expected.as_numpy_iterator()):
        for name in ("inputs", "targets"):
            assert example[name][-1] == vocabulary.eos_id
            assert opened.features[name][row].tolist() == example[name][:-1].tolist()
    assert texts_of(tmp_path, "theirs", "train", vocabulary) == LINES[:6]
    kept = list(cache.open_cache(tmp_path, "theirs", "validation").examples())
    assert kept[1] == {"inputs": "第1题", "targets": LINES[1]}
    with pytest.raises(UserError, match="yields token ids of its own vocabulary"):
        next(seqio_build.iter_texts("theirs", task_modules=()))
    trimmed = seqio_build.build_cache(
        "theirs",
        vocabulary=vocabulary,
        cache_dir=tmp_path,
        task_modules=(),
        sequence_length={"inputs": 2, "targets": 3},
    )
    assert trimmed[0]["tokens"] == {"inputs": 6, "targets": 12}


def test_a_task_of_another_vocabulary_is_refused(tmp_path, vocabulary, seqio):
    other = tmp_path / "other.model"
    train_tokenizer(LINES[:120], other, TokenizerConfig(300, extra_ids=0, character_coverage=1.0))
    t5x_task(seqio, "other_vocabulary", vocabulary, path=other, extra_ids=100)
    build = functools.partial(
        seqio_build.build_cache, "other_vocabulary", cache_dir=tmp_path / "c", task_modules=()
    )
    expected = "which is not VOCABULARY=.*Use the task's: --gin.VOCABULARY=.*other.model:100"
    with pytest.raises(UserError, match=expected):
        build(vocabulary=vocabulary)
    assert build(vocabulary=Vocabulary(f"{other}:100"))[0]["num_examples"] == 6
    seqio.TaskRegistry.add(
        "bytes",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
        metric_fns=[],
    )
    with pytest.raises(UserError, match="ByteVocabulary of 259 ids, but VOCABULARY"):
        seqio_build.resolve("bytes", vocabulary=vocabulary, task_modules=())


def test_mixture_rates_are_resolved_recursively(tmp_path, vocabulary, seqio):
    from chatyuan.data import seqio_tasks

    for name, count in (("mix_a", 40), ("mix_b", 10), ("mix_c", 20)):
        rows = [{"targets": LINES[n]} for n in range(count)]
        seqio_tasks.add_text_task(
            name,
            seqio_tasks.TextSource(lambda split, skipped, rows=rows: iter(rows), ("train",)),
            features=("targets",),
        )
    by_size = functools.partial(seqio.mixing_rate_num_examples, maximum=30)
    seqio.MixtureRegistry.add("mix_inner", [("mix_a", by_size), ("mix_b", by_size)])
    seqio.MixtureRegistry.add("mix_outer", [("mix_inner", 8.0), ("mix_c", 2.0)])
    seqio_build.build_cache(
        "mix_outer", vocabulary=vocabulary, cache_dir=tmp_path, task_modules=(), splits=("train",)
    )
    rates = dict(cache.read_mixture(tmp_path, "mix_outer"))
    assert rates == pytest.approx({"mix_a": 6.0, "mix_b": 2.0, "mix_c": 2.0})
    mixture = seqio.MixtureRegistry.get("mix_outer")
    assert rates["mix_c"] == mixture.get_rate(seqio.TaskRegistry.get("mix_c"))


def test_names_modules_and_splits_that_do_not_exist(tmp_path, vocabulary, seqio):
    build = functools.partial(
        seqio_build.build_cache, vocabulary=vocabulary, cache_dir=tmp_path / "c"
    )
    with pytest.raises(UserError, match="MIXTURE=zh_pretrian .*Did you mean zh_pretrain"):
        build("zh_pretrian")
    with pytest.raises(UserError, match="there is no module my_tasks"):
        build("zh_pretrain", task_modules=("tasks", "my_tasks"))
    with pytest.raises(UserError, match="has no split 'tarin'.*Did you mean train"):
        build("reviews_text", splits=("tarin",))
    assert not (tmp_path / "c").exists()


def test_user_modules_register_tasks(tmp_path, vocabulary, seqio, monkeypatch):
    (tmp_path / "house_tasks.py").write_text(
        "from chatyuan.data import seqio_tasks\n"
        "def rows(split, skipped):\n"
        "    yield {'targets': '今天天气很好'}\n"
        "seqio_tasks.add_text_task('house', seqio_tasks.TextSource(rows, ('train',)),"
        " features=('targets',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seqio_build.build_cache(
        "house", vocabulary=vocabulary, cache_dir=tmp_path, task_modules=("house_tasks",)
    )
    assert texts_of(tmp_path, "house", "train", vocabulary) == ["今天天气很好"]


def test_a_task_that_fails_is_named(tmp_path, vocabulary, seqio):
    from chatyuan.data import seqio_tasks

    def rows(split, skipped):
        yield {"targets": "好"}
        raise KeyError("text")

    seqio_tasks.add_text_task(
        "failing", seqio_tasks.TextSource(rows, ("train",)), features=("targets",)
    )
    with pytest.raises(UserError, match="Task failing failed while reading its train.*KeyError"):
        seqio_build.build_cache(
            "failing", vocabulary=vocabulary, cache_dir=tmp_path, task_modules=()
        )
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_tfds_dataset_is_a_source(tmp_path, vocabulary, seqio):
    tfds = pytest.importorskip("tensorflow_datasets")
    tf = pytest.importorskip("tensorflow")
    from chatyuan.data import seqio_tasks

    folder = tmp_path / "tfds" / "small_zh" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    splits = []
    for split, lines in (("zh", LINES[:5]), ("zh-validation", LINES[5:7])):
        with tf.io.TFRecordWriter(
            str(folder / f"small_zh-{split}.tfrecord-00000-of-00001")
        ) as file:
            for line in lines:
                file.write(features.serialize_example({"text": line}))
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(lines)], num_bytes=0))
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        split_infos=splits,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    from tasks import corpora

    corpora.add_tfds_text(
        "small_zh_tfds",
        "small_zh:1.0.0",
        splits={"train": "zh", "validation": "zh-validation"},
        data_dir=str(tmp_path / "tfds"),
    )
    assert seqio_tasks.TEXT_FEATURE.rank == 0
    seqio_build.build_cache(
        "small_zh_tfds", vocabulary=vocabulary, cache_dir=tmp_path, task_modules=()
    )
    assert sorted(texts_of(tmp_path, "small_zh_tfds", "train", vocabulary)) == sorted(LINES[:5])
    assert len(texts_of(tmp_path, "small_zh_tfds", "validation", vocabulary)) == 2


def test_cached_ids_equal_encoding_one_by_one(tmp_path, vocabulary):
    path = tmp_path / "a.jsonl"
    rows = [{"text": line + "\n" + line[::-1]} for line in LINES]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    seqio_build.build_cache(f"file:{path}", vocabulary=vocabulary, cache_dir=tmp_path, threads=2)
    opened = cache.open_cache(tmp_path, f"file:{path}", "train", vocabulary)
    expected = {tuple(vocabulary.encode(row["text"])) for row in rows}
    assert {tuple(row.tolist()) for row in opened.features["targets"]} <= expected
    assert not np.isin(vocabulary.eos_id, opened.features["targets"].tokens)
