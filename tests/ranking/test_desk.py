"""Who gets what, what is refused, what survives, and the figures against scipy and sklearn."""

import errno
import itertools
import json
import os
import threading

import numpy as np
import pytest
from desks import items_of, ranked
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from chatyuan.errors import UserError
from chatyuan.ranking import results, store
from chatyuan.ranking.agreement import agreement, cohen_kappa
from chatyuan.ranking.desk import Refused
from chatyuan.ranking.store import Annotation
from chatyuan.text.preferences import preference_of


def given_out(desk, *annotators):
    """item key -> annotators, all items being ranked in turns until nobody gets any."""
    by_key = {item.key: item for item in desk.items}
    found = {}
    waiting = list(annotators)
    while waiting:
        name = waiting.pop(0)
        item = desk.next(name)["item"]
        if item is not None:
            found.setdefault(item["key"], []).append(name)
            ranked(desk, name, by_key[item["key"]], range(len(item["answers"])))
            waiting.append(name)
    return found


def test_every_nth_item_goes_to_two_annotators_and_the_others_to_one(tmp_path, desk_of):
    items = items_of(tmp_path, count=10)
    desk = desk_of(tmp_path, items, overlap_period=3)
    found = given_out(desk, "甲", "乙", "丙")
    for place, item in enumerate(items, 1):
        names = found[item.key]
        assert len(names) == len(set(names)) == (2 if place % 3 == 0 else 1), place
    progress = desk.progress("甲")
    assert (progress["items"], progress["finished"], progress["waiting"]) == (10, 10, 0)
    assert progress["agreement"]["items"] == 3
    assert progress["annotators"] == 3


def test_alone_one_gets_all_and_the_overlap_waits(tmp_path, desk_of):
    desk = desk_of(tmp_path, items_of(tmp_path), overlap_period=2)
    assert len(given_out(desk, "甲")) == 6
    assert desk.progress("甲")["waiting"] == 3
    assert len(given_out(desk, "乙")) == 3
    assert desk.progress()["waiting"] == 0


def test_what_is_on_a_screen_is_not_given_to_another(tmp_path, desk_of):
    desk = desk_of(tmp_path, items_of(tmp_path))
    first, second = desk.next("甲")["item"], desk.next("乙")["item"]
    assert first["key"] != second["key"]
    assert desk.next("甲")["item"] == first, "a reload shows the same"


def test_skips_settle_an_item_or_pass_it_on(tmp_path, desk_of):
    items = items_of(tmp_path, count=2)
    desk = desk_of(tmp_path, items)
    desk.save({"annotator": "甲", "item": items[0].key, "skipped": "cannot_judge"})
    desk.save({"annotator": "甲", "item": items[1].key, "skipped": "all_bad"})
    assert desk.next("甲")["item"] is None
    assert desk.next("乙")["item"]["key"] == items[0].key
    assert desk.progress("甲")["mine_skipped"] == 2
    assert list(results.rankings(desk.log.by_item)) == []


def test_the_page_never_learns_the_source(tmp_path, desk_of):
    desk = desk_of(tmp_path, items_of(tmp_path))
    assert "m0" not in json.dumps(desk.next("甲"))


def test_going_back_and_saving_again_replaces(tmp_path, desk_of):
    items = items_of(tmp_path, count=3)
    desk = desk_of(tmp_path, items)
    state = ranked(desk, "甲", items[0], [2, 0, 1])
    back = desk.previous("甲", state["item"]["key"])
    assert back["item"]["key"] == items[0].key
    shown = dict(zip(back["item"]["answers"], back["item"]["ranks"], strict=True))
    assert [shown[text] for text in items[0].answers] == [2, 3, 1]
    again = ranked(desk, "甲", items[0], [[0, 2], 1])
    assert again["item"]["key"] == state["item"]["key"]
    (row,) = results.rankings(desk.log.by_item)
    assert dict(zip(row["answers"], row["ranks"], strict=True)) == dict(
        zip(items[0].answers, [0, 1, 0], strict=True)
    )
    assert len(desk.log.path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"annotator": ""}, "bad_name"),
        ({"annotator": "x" * 65}, "bad_name"),
        ({"annotator": "a\nb"}, "bad_name"),
        ({"annotator": "a\ud800"}, "bad_name"),
        ({"annotator": 3}, "bad_name"),
        ({"item": "nope"}, "unknown_item"),
        ({"ranks": [1, 2]}, "bad_ranks"),
        ({"ranks": [0, 1, 2]}, "bad_ranks"),
        ({"ranks": [1, 2, 4]}, "bad_ranks"),
        ({"ranks": [1, True, 2]}, "bad_ranks"),
        ({"ranks": [1, 2, 1.5]}, "bad_ranks"),
        ({"ranks": None}, "bad_ranks"),
        ({"skipped": "bored"}, "unknown_reason"),
        ({"category": None}, "no_category"),
        ({"category": "c"}, "unknown_category"),
        ({"seconds": "1"}, "bad_seconds"),
        ({"seconds": float("nan")}, "bad_seconds"),
    ],
)
def test_requests_without_sense_save_nothing(tmp_path, desk_of, change, word):
    items = items_of(tmp_path)
    desk = desk_of(tmp_path, items, taxonomy=["a", "b"])
    good = {"annotator": "甲", "item": items[0].key, "ranks": [1, 2, 2], "category": "a",
            "seconds": 2}  # fmt: skip
    with pytest.raises(Refused, match=f"^{word}$"):
        desk.save({**good, **change})
    assert desk.log.path.read_bytes() == b""
    desk.save(good)


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=3),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=2),
    max_leaves=4,
)


def test_no_request_is_an_accident(tmp_path, desk_of):
    desk = desk_of(tmp_path, items_of(tmp_path), taxonomy=["a"])
    good = {"annotator": "甲", "item": desk.items[0].key, "ranks": [1, 2, 3], "skipped": None,
            "category": "a", "seconds": 1}  # fmt: skip

    @settings(max_examples=150, deadline=None)
    @given(some.sampled_from(list(good)), JSON, JSON)
    def fuzz(field, value, other):
        for request in ({**good, field: value}, {field: value}):
            try:
                desk.save(request)
            except Refused as error:
                assert str(error).replace("_", "").isalpha()
        for call in (desk.next, desk.previous):
            try:
                call(value, other)
            except Refused as error:
                assert str(error) == "bad_name"

    fuzz()
    desk.save({**good, "seconds": 10**400})
    found, note, _ = store.read_annotations(desk.log.path)
    assert not note and {a.item for a in found} == {desk.items[0].key}


def test_what_was_saved_is_there_after_a_kill_and_goes_on(tmp_path, desk_of):
    items = items_of(tmp_path)
    desk = desk_of(tmp_path, items)
    ranked(desk, "甲", items[0], [0, 1, 2])
    ranked(desk, "甲", items[1], [0, 1, 2])
    desk.log.close()
    path = desk.log.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # as power lost in the middle of a line leaves it
    again = desk_of(tmp_path, items)
    assert "cut off" in again.log.note
    assert again.next("甲")["item"]["key"] == items[1].key
    ranked(again, "甲", items[1], [0, 1, 2])
    assert len(store.read_annotations(path)[0]) == 2
    again.log.close()
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="Line 1 of"):
        desk_of(tmp_path, items)
    path.write_bytes(whole)
    desk_of(tmp_path, items).log.close()  # the failure before let go of the folder


def test_a_full_disk_loses_nothing(tmp_path, desk_of, monkeypatch):
    items = items_of(tmp_path)
    desk = desk_of(tmp_path, items)
    ranked(desk, "甲", items[0], [0, 1, 2])
    before = desk.log.path.read_bytes()
    real = os.write

    def full(descriptor, data):
        real(descriptor, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        ranked(desk, "甲", items[1], [0, 1, 2])
    monkeypatch.undo()
    assert desk.log.path.read_bytes() == before
    assert items[1].key not in desk.log.by_item
    ranked(desk, "甲", items[1], [0, 1, 2])
    assert len(store.read_annotations(desk.log.path)[0]) == 2


def test_a_folder_has_one_process(tmp_path, desk_of):
    desk = desk_of(tmp_path, items_of(tmp_path))
    with pytest.raises(UserError, match=f"process {os.getpid()}.*another MODEL_DIR"):
        desk_of(tmp_path, desk.items)
    desk.log.close()
    desk_of(tmp_path, desk.items).log.close()


def test_many_at_once_lose_nothing(tmp_path, desk_of):
    desk = desk_of(tmp_path, items_of(tmp_path, count=40), overlap_period=4)
    threads = [threading.Thread(target=given_out, args=(desk, f"n{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert desk.progress()["finished"] == 40
    assert len(store.read_annotations(desk.log.path)[0]) == 50


# -- figures


def annotation(ranks, name="甲", order=None, category=None):
    texts = [f"t{i}" for i in range(len(ranks))]
    order = order if order is not None else range(len(ranks))
    return Annotation("key", name, "p", tuple(texts[i] for i in order),
                      tuple((f"m{i}",) for i in order), tuple(ranks[i] for i in order),
                      None, category, 1.0, "now")  # fmt: skip


RANKS = some.lists(some.tuples(some.integers(0, 3), some.integers(0, 3)), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(some.lists(RANKS, min_size=1, max_size=4), some.randoms())
def test_agreement_is_scipys_and_sklearns(groups, random):
    annotations, verdicts, taus = [], [], []
    for pairs in groups:
        left, right = (list(side) for side in zip(*pairs, strict=True))
        order = list(range(len(left)))
        random.shuffle(order)  # each annotator saw another order
        annotations.append([annotation(left), annotation(right, "乙", order)])
        for i, j in itertools.permutations(range(len(left)), 2):
            verdicts.append([np.sign(side[i] - side[j]) for side in (left, right)])
        with np.errstate(all="ignore"):
            taus.append(stats.kendalltau(left, right).statistic)
    found = agreement(annotations)
    assert found.items == len(groups) and found.pairs == len(verdicts) // 2
    ours, theirs = np.array(verdicts).T
    assert found.pair_agreement == pytest.approx(np.mean(ours == theirs))
    with np.errstate(all="ignore"):
        kappa = cohen_kappa_score(ours, theirs) if len({*ours, *theirs}) > 1 else None
    assert found.kappa == (kappa if kappa is None else pytest.approx(kappa))
    defined = [tau for tau in taus if not np.isnan(tau)]
    assert found.tau_items == len(defined)
    assert found.tau == (pytest.approx(np.mean(defined)) if defined else None)


def test_kappa_of_categories():
    """Cohen's own example of 2 x 2: 20 and 15 alike, 5 and 10 not: .4."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([("y", "y")]) is None and cohen_kappa([]) is None
    group = [annotation([0, 1], category="y"), annotation([0, 1], "乙", category="n")]
    assert agreement([group]).category_agreement == 0.0


def by_item(*annotations):
    return {"key": {a.annotator: a for a in annotations}}


def test_two_rankings_become_one_row_where_contradictions_are_ties():
    first, second = annotation([0, 1, 2, 2]), annotation([1, 0, 2, 3], "乙", [3, 1, 0, 2])
    (row,) = results.rankings(by_item(first, second))
    assert row["answers"] == ["t0", "t1", "t2", "t3"]
    assert row["ranks"] == [0, 0, 1, 2]
    assert preference_of(row)["ranks"] == [0, 0, 1, 2]
    assert list(results.rankings(by_item(annotation([0, 1]), annotation([1, 0], "乙")))) == []


def test_sources_are_compared_by_what_won():
    (best, middle, worst) = results.source_table(by_item(annotation([0, 1, 1])))
    assert (best["source"], best["comparisons"], best["preferred"]) == ("m0", 2, 1.0)
    assert {middle["source"], worst["source"]} == {"m1", "m2"}
    assert middle["preferred"] == worst["preferred"] == 0.25
