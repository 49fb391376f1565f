"""Near duplicates against brute force over Python sets."""

import itertools
import random

import numpy as np
import pytest

from chatyuan.cleaning import dedup
from chatyuan.text.normalize import fingerprint

CONFIG = dedup.DedupConfig()
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 300)]


def corpus(seed: int, count: int = 120) -> list[str]:
    """Random texts, and edited, cut and quoted copies of them."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices(HAN, k=rng.randint(0, 80))) for _ in range(count)]
    for text in list(texts[: count // 2]):
        edited = list(text)
        for _ in range(rng.randint(0, 4)):
            if edited:
                edited[rng.randrange(len(edited))] = rng.choice(HAN)
        texts.append("".join(edited))
        texts.append(text[rng.randint(0, 10) : rng.randint(20, 90)])
        texts.append("，".join([rng.choice(texts), text]))
    rng.shuffle(texts)
    return texts


def sets_of(texts: list[str], width: int) -> list[set[str]]:
    prints = [fingerprint(text) for text in texts]
    return [
        {p[i : i + width] for i in range(max(1, len(p) - width + 1))} if p else set()
        for p in prints
    ]


def brute(texts: list[str]) -> tuple[set, set]:
    """Index pairs with enough Jaccard similarity, and with enough containment."""
    sets = sets_of(texts, CONFIG.shingle)
    near, contained = set(), set()
    for i, j in itertools.combinations(range(len(texts)), 2):
        a, b = sets[i], sets[j]
        if not a or not b:
            continue
        common = len(a & b)
        if common / len(a | b) >= CONFIG.jaccard:
            near.add((i, j))
        short = i if len(a) < len(b) or (len(a) == len(b)) else j
        if len(fingerprint(texts[short])) >= CONFIG.min_contained:
            if common / min(len(a), len(b)) >= CONFIG.containment:
                contained.add((i, j))
    return near, contained


def as_set(pairs: np.ndarray) -> set[tuple[int, int]]:
    return {(min(a, b), max(a, b)) for a, b in pairs.tolist()}


@pytest.mark.parametrize("seed", [0, 1])
def test_containment_is_exact_and_minhash_pairs_are_true(seed):
    texts = corpus(seed)
    near, contained = brute(texts)
    sets = dedup.shingles([fingerprint(text) for text in texts], CONFIG.shingle)
    assert as_set(dedup.contained_pairs(sets, CONFIG)) == contained
    found = as_set(dedup.minhash_pairs(sets, CONFIG))
    assert found <= near and len(near) > 20
    # Together they leave almost nothing; minhash alone compares neighbours in a band only.
    missed = near - found - contained
    assert len(missed) <= 0.02 * len(near)


def test_shingles_are_sets_with_the_rarest_first():
    texts = ["好好好好好", "一二三四五", "二三四五", "短", "", "！"]
    sets = dedup.shingles([fingerprint(text) for text in texts], 4)
    assert np.diff(sets.offsets).tolist() == [1, 2, 1, 1, 0, 0]
    assert sets.counts.tolist() == sorted(sets.counts.tolist())
    row = sets.ids[sets.offsets[1] : sets.offsets[2]]
    assert sets.counts[row].tolist() == [1, 2]


def test_exact_copies_ignore_punctuation_and_are_cheap():
    texts = ["很好！", "很好", "很 好。", "不好", "不好~"] * 200
    labels = dedup.clusters(texts)
    assert labels.tolist() == [0, 0, 0, 3, 3] * 200


def test_clusters_are_connected_components():
    pairs = np.array([[5, 3], [1, 2], [3, 1], [7, 8]])
    assert dedup.components(9, pairs).tolist() == [0, 1, 1, 1, 4, 1, 6, 7, 7]
    assert dedup.components(0, np.zeros((0, 2), np.int64)).tolist() == []
    assert dedup.clusters([]).tolist() == []


def test_short_reviews_of_opposite_meaning_stay_apart():
    labels = dedup.clusters(["房间很干净", "房间不干净", "服务态度很好", "服务态度不好"])
    assert len(set(labels.tolist())) == 4
