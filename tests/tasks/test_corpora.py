"""Small copies of the field's corpora in their published layouts."""

import gzip
import json

import pytest

pytest.importorskip("seqio")

from chatyuan.data import cache, seqio_build  # noqa: E402
from chatyuan.errors import UserError  # noqa: E402
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer  # noqa: E402
from chatyuan.text.vocabulary import Vocabulary  # noqa: E402
from tasks import corpora  # noqa: E402


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    lines = [f"文档{n}：标题、正文和代码 def f({n})" for n in range(60)]
    train_tokenizer(lines, path, TokenizerConfig(300, extra_ids=0, character_coverage=1.0))
    return Vocabulary(path)


def jsonl(rows: list[dict]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def c4(root, language: str, name: str, texts: list[str]) -> None:
    folder = root / "c4" / "multilingual"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": t, "timestamp": "2020-01-01T00:00:00Z", "url": "http://a"} for t in texts]
    (folder / f"c4-{language}{name}.json.gz").write_bytes(gzip.compress(jsonl(rows)))


def make(root, task: str) -> tuple[list[str], list[str]]:
    """Writes a small copy; returns its train and validation documents."""
    if task.startswith("c4"):
        c4(root, "zh", ".tfrecord-00000-of-01024", ["正文一", "正文二\n第二段"])
        c4(root, "zh", ".tfrecord-00001-of-01024", ["正文三"])
        c4(root, "zh", "-validation.tfrecord-00000-of-00002", ["正文四"])
        c4(root, "en", ".tfrecord-00000-of-11264", ["def f"])
        english = ["def f"] if task == "c4_multilingual" else []
        return ["正文一", "正文二\n第二段", "正文三", *english], ["正文四"]
    if task.startswith("clue"):
        name = "CLUECorpusSmall" if task == "clue_corpus_small" else "CLUECorpus2020"
        folder = root / name / "wiki_zh" / "AA"
        folder.mkdir(parents=True)
        (folder / "wiki_00.txt").write_text("标题一\n正文一\n\n标题二\n正文二\n", encoding="utf-8")
        return ["标题一\n正文一", "标题二\n正文二"], []
    if task == "wudao":
        folder = root / "WuDaoCorpus2.0_base_200G"
        folder.mkdir()
        rows = [
            {"id": n, "uniqueKey": "k", "dataType": "百科", "title": f"标题{n}", "content": "正文"}
            for n in range(3)
        ]
        (folder / "part-2021278643.json").write_text(
            json.dumps(rows, ensure_ascii=False), encoding="utf-8"
        )
        return [f"标题{n}\n正文" for n in range(3)], []
    if task == "yuan":
        (root / "Yuan1.0").mkdir()
        (root / "Yuan1.0" / "001.txt").write_bytes("文档一\n\n文档二\n".encode() + b"\xff\n")
        return ["文档一", "文档二"], []
    folder = root / "the-stack-dedup" / "data" / "python"
    folder.mkdir(parents=True)
    rows = [{"content": f"def f({n}):\n\tpass", "lang": "Python", "size": 9} for n in range(4)]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(rows[:2])
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    (folder / "more.jsonl").write_bytes(jsonl(rows[2:]))
    return [row["content"] for row in rows], []


@pytest.mark.parametrize("task", corpora.CORPORA)
def test_published_layouts(tmp_path, vocabulary, monkeypatch, task):
    root = tmp_path / "data"
    root.mkdir()
    train, validation = make(root, task)
    monkeypatch.setenv(corpora.VARIABLE, str(root))
    seqio_build.build_cache(task, vocabulary=vocabulary, cache_dir=tmp_path / "c")
    for split, expected in (("train", train), ("validation", validation)):
        if expected:
            opened = cache.open_cache(tmp_path / "c", task, split, vocabulary)
            texts = [vocabulary.decode(row) for row in opened.features["targets"]]
            assert sorted(texts) == sorted(expected)
    if task == "yuan":
        manifest = cache.read_manifest(tmp_path / "c", task, "train")
        assert manifest["skipped"] == {"empty": 1, "invalid_utf8": 1}


def test_a_folder_can_be_a_tasks_own(tmp_path, vocabulary, monkeypatch):
    monkeypatch.delenv(corpora.VARIABLE, raising=False)
    train, _ = make(tmp_path, "wudao")
    corpora.add_corpus("my_wudao", corpora.CORPORA["wudao"], data_dir=str(tmp_path))
    manifests = seqio_build.build_cache("my_wudao", vocabulary=vocabulary, cache_dir=tmp_path / "c")
    assert manifests[0]["num_examples"] == len(train)
    assert "part-2021278643.json" in manifests[0]["source"]


def test_absent_corpora_are_explained(tmp_path, monkeypatch):
    monkeypatch.delenv(corpora.VARIABLE, raising=False)
    with pytest.raises(UserError, match="Task wudao reads your own copy.*CHATYUAN_DATA"):
        seqio_build.resolve("wudao")
    monkeypatch.setenv(corpora.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match="CHATYUAN_DATA=.*none is not a folder"):
        seqio_build.resolve("wudao")
    monkeypatch.setenv(corpora.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"Task c4_zh found no file named \*\*/c4-zh"):
        seqio_build.resolve("c4_zh")
