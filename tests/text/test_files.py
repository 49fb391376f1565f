"""Files of every shape are read; what cannot be is counted, never fatal and never silent."""

import gzip
import json

import pytest

from chatyuan.errors import UserError
from chatyuan.text import files


def read(path):
    skipped = files.Skipped()
    return list(files.read_examples(path, skipped)), dict(skipped)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "文"}, {"targets": "文"}),
        ({"title": "题", "content": "文"}, {"targets": "题\n文"}),
        ({"content": "def f(): pass", "lang": "Python"}, {"targets": "def f(): pass"}),
        ({"source": "用户：你好\n小元：", "target": "您好"}, ("用户：你好\n小元：", "您好")),
        ({"src": "a", "tgt": "b"}, ("a", "b")),
        ({"inputs": "a", "targets": "b"}, ("a", "b")),
        ({"instruction": "翻译", "input": "苹果", "output": "apple"}, ("翻译\n苹果", "apple")),
        ({"instruction": "你好", "input": "", "output": "您好"}, ("你好", "您好")),
        (
            {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]], "system": "s"},
            ("s\nq1\na1\nq2", "a2"),
        ),
    ],
)
def test_shapes(row, expected):
    if isinstance(expected, tuple):
        expected = dict(zip(("inputs", "targets"), expected, strict=True))
    assert files.example_of(row) == expected


def test_choices_and_labels_are_kept():
    row = {
        "input": "相似吗？答案：",
        "target": "相似",
        "answer_choices": ["相似", "不相似"],
        "type": "x",
    }
    assert files.example_of(row) == {
        "inputs": "相似吗？答案：",
        "targets": "相似",
        "answer_choices": ["相似", "不相似"],
    }


@pytest.mark.parametrize("row", [{}, {"text": " "}, {"text": 3}, {"input": "a", "target": ""}])
def test_rows_of_no_use(row):
    assert files.example_of(row) is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_lines_skip_and_count_bad_ones(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    data = "\ufeff一\n\n  \n二\r\n".encode() + b"\xff\xfe bad\n" + "三".encode()
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert read(path) == (
        [{"targets": "一"}, {"targets": "二"}, {"targets": "三"}],
        {"empty": 2, "invalid_utf8": 1},
    )


def test_jsonl_skips_and_counts_bad_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "一"}', "{broken", '{"other": 1}', "[1]", "", '{"text": "二"}']
    path.write_text("\n".join(rows), encoding="utf-8")
    examples, skipped = read(path)
    assert [example["targets"] for example in examples] == ["一", "二"]
    assert skipped == {
        "invalid_json": 1,
        "unknown_shape_or_empty": 1,
        "not_an_object": 1,
        "empty": 1,
    }


def test_json_array_and_parquet(tmp_path):
    rows = [{"title": "题", "content": "文"}, {"title": "", "content": "二"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    expected = [{"targets": "题\n文"}, {"targets": "二"}]
    assert read(path) == (expected, {})
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (expected, {})


def test_documents_are_separated_by_empty_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("甲一\n甲二\n\n\n乙一\n", encoding="utf-8")
    assert list(files.read_documents(path, files.Skipped())) == ["甲一\n甲二", "乙一"]


def test_mistakes_are_explained(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text("{}")
    with pytest.raises(UserError, match="Did you mean reviews.jsonl"):
        files.expand(tmp_path / "review.jsonl")
    with pytest.raises(UserError, match="There is no file"):
        files.expand(tmp_path / "*.txt")
    with pytest.raises(UserError, match="ends in '.csv'; expected .txt"):
        files.kind(tmp_path / "a.csv")
    bad = tmp_path / "a.json"
    bad.write_text("[1,")
    with pytest.raises(UserError, match="is not a json array"):
        read(bad)
    cut = tmp_path / "a.txt.gz"
    cut.write_bytes(gzip.compress("文\n".encode() * 1000)[:-20])
    with pytest.raises(UserError, match="is not a complete gzip file"):
        read(cut)
    assert files.expand(tmp_path) == [bad, cut, path]


def test_a_prompt_is_what_a_model_saw_before_what_it_was_made_of(tmp_path):
    rows = [
        {"inputs": "用户：写诗\n小元：", "instruction": "写诗", "prediction": "好"},
        {"instruction": "写诗", "input": "春天"},
        {"prompt": "写诗", "source": "other"},
        {"instruction": ""},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    skipped = files.Skipped()
    found = [row["inputs"] for row in files.read_prompts(path, skipped)]
    assert found == [rows[0]["inputs"], "写诗\n春天", "写诗"]
    assert skipped == {"no_prompt": 1}
