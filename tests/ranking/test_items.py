"""Drafts of several models become items, whatever the order of their files."""

import json

import pytest
from desks import write_rows

from chatyuan.errors import UserError
from chatyuan.ranking.items import read_items, read_taxonomy
from chatyuan.text.files import Skipped


def read(*paths, count=9, seed=0):
    skipped = Skipped()
    return *read_items([str(path) for path in paths], count, seed, skipped), skipped


def test_files_of_infer_are_joined_by_prompt_and_named_by_run(tmp_path):
    a = tmp_path / "sft" / "predictions.jsonl"
    b = tmp_path / "early" / "predictions.jsonl"
    rows = [("天？", "蓝。"), ("海？", "咸。"), ("云？", "白。")]
    write_rows(a, [{"index": i, "inputs": p, "prediction": t, "finished": True}
                   for i, (p, t) in enumerate(rows)])  # fmt: skip
    write_rows(b, [{"inputs": "天？\n", "predictions": ["灰。", "蓝。 "], "prediction": "灰。"},
                   {"inputs": "海？", "prediction": "咸。"},
                   {"inputs": "山？", "prediction": "高。"}])  # fmt: skip
    (item,), sources, skipped = read(a.parent, b)
    assert item.prompt == "天？" and sources == ["sft", "early"]
    assert dict(zip(item.answers, item.sources, strict=True)) == {
        "蓝。": ("sft", "early"),
        "灰。": ("early",),
    }
    assert skipped == {"fewer_than_two_different_answers": 3}


def test_items_do_not_depend_on_the_order_of_files(tmp_path):
    def file(name, letter):
        rows = [{"prompt": f"p{i}", "prediction": f"{letter}{i}"} for i in range(8)]
        return write_rows(tmp_path / f"{name}.jsonl", rows)

    paths = [file(name, name) for name in "abc"]
    forward, _, _ = read(*paths, count=2)
    backward, _, _ = read(*paths[::-1], count=2)
    assert [(i.key, i.answers) for i in forward] == [(i.key, i.answers) for i in backward]
    other, _, _ = read(*paths, count=2, seed=1)
    assert [i.answers for i in other] != [i.answers for i in forward]


def test_each_source_gives_one_before_any_gives_two(tmp_path):
    answers = [{"text": f"long{i}", "source": "many"} for i in range(20)]
    answers += [{"text": f"one{i}", "source": f"few{i}"} for i in range(3)]
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "answers": answers}
                                             for i in range(5)])  # fmt: skip
    for item in read(path, count=5)[0]:
        assert sorted(name for (name,) in item.sources) == ["few0", "few1", "few2", "many", "many"]


def test_the_order_shown_is_a_permutation_per_annotator_without_bias(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "answers": ["x", "y", "z"]}
                                             for i in range(300)])  # fmt: skip
    items, _, _ = read(path)
    first = {text: 0 for text in "xyz"}
    differing = 0
    for item in items:
        orders = [item.shown(0, name) for name in ("a", "b")]
        assert all(sorted(order) == [0, 1, 2] for order in orders)
        assert orders[0] == item.shown(0, "a")
        differing += orders[0] != orders[1]
        first[item.answers[orders[0][0]]] += 1
    assert all(70 <= count <= 130 for count in first.values()), first
    assert differing > 200


def test_an_answer_of_lone_surrogates_can_be_written(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "answers": ["\\ud83d", "ok"]}\n')
    items, _, _ = read(path)
    json.dumps(items[0].answers, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "p", "answers": ["same", " same "]}], "1 fewer_than_two_different_answers"),
        ([{"prompt": "p"}], "1 no_answer"),
        ([{"answers": ["a", "b"]}], "1 no_prompt"),
        ([], "empty"),
    ],
)
def test_nothing_to_rank_is_told(tmp_path, rows, told):
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match=told):
        read(path)


def test_a_taxonomy_is_lines(tmp_path):
    path = tmp_path / "taxonomy.txt"
    path.write_text("# 类别\n闲聊\n\n 知识 \n", encoding="utf-8")
    assert read_taxonomy(str(path)) == ["闲聊", "知识"]
    path.write_text("a\na\n")
    with pytest.raises(UserError, match="more than once"):
        read_taxonomy(str(path))
    with pytest.raises(UserError, match="no file"):
        read_taxonomy(str(tmp_path / "none"))
