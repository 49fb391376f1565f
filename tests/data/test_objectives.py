"""Objectives: T5's distribution, exact round trips, lengths known beforehand."""

import collections
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sources import Ids, restore

from chatyuan.data import keyed
from chatyuan.data.objectives import (
    MIN_PIECE,
    Objective,
    ObjectiveConfig,
    fit,
    mask_tokens,
    sizes,
)
from chatyuan.errors import UserError

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/span_corruption.json").read_text())
SAMPLES = 4000
IDS = Ids()


def span(density: float, mean: float, ids: Ids = IDS) -> Objective:
    config = ObjectiveConfig(noise_density=density, mean_noise_span_length=mean)
    return Objective(config, ids)


def key(n: int) -> int:
    return int(keyed.name_key("test", n))


def mask_of(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.isin(tokens, targets)


def t5_form(tokens: list[int], mask: list[int], sentinels: list[int], keep: int) -> list[int]:
    """noise_span_to_unique_sentinel (keep=0) and nonnoise_span_to_unique_sentinel (keep=1)."""
    out, used = [], 0
    for i, (token, noise) in enumerate(zip(tokens, mask, strict=True)):
        if noise == keep:
            out.append(token)
        elif i == 0 or mask[i - 1] == keep:
            out.append(sentinels[used])
            used += 1
    return out


def compositions(total: int, parts: int) -> dict[int, float]:
    """Share of parts of each length over all ways to write `total` as `parts` positive numbers."""
    if parts == 1:
        return {total: 1.0}
    every = math.comb(total - 1, parts - 1)
    return {n: math.comb(total - n - 1, parts - 2) / every for n in range(1, total - parts + 2)}


def distance(counts: dict[int, int], shares: dict[int, float]) -> float:
    """Total variation distance of a histogram to a distribution."""
    total = sum(counts.values())
    every = counts.keys() | shares.keys()
    return sum(abs(counts.get(n, 0) / total - shares.get(n, 0.0)) for n in every) / 2


@pytest.mark.parametrize(
    "golden", GOLDEN["settings"], ids=lambda g: f"{g['tokens']}-{g['density']}-{g['mean']}"
)
def test_span_corruption_has_t5s_distribution(golden):
    n = golden["tokens"]
    objective = span(golden["density"], golden["mean"])
    tokens = np.arange(1000, 1000 + n)
    noise, kept = collections.Counter(), collections.Counter()
    noise_at = np.zeros(n)
    for sample in range(SAMPLES):
        _, targets = objective.pair(tokens, key(sample))
        mask = mask_of(tokens, targets)
        runs = [(value, len(list(run))) for value, run in itertools.groupby(mask.tolist())]
        assert not runs[0][0] and runs[-1][0], "T5 begins with kept tokens and ends with noise"
        assert mask.sum() == golden["noise_tokens"]
        assert len(runs) == 2 * golden["spans"]
        noise.update(length for value, length in runs if value)
        kept.update(length for value, length in runs if not value)
        noise_at += mask
    # Both samples against the exact distribution: what 4,000 masks may deviate by chance.
    for ours, theirs, total in (
        (noise, golden["noise_lengths"], golden["noise_tokens"]),
        (kept, golden["kept_lengths"], n - golden["noise_tokens"]),
    ):
        exact = compositions(total, golden["spans"])
        allowed = 1.5 * math.sqrt(len(exact) / (SAMPLES * golden["spans"]))
        assert distance(dict(map(tuple, theirs)), exact) < allowed
        assert distance(ours, exact) < allowed
    theirs_at = np.array(golden["noise_at"]) / GOLDEN["samples"]
    share = (noise_at / SAMPLES + theirs_at) / 2
    sigma = np.sqrt(share * (1 - share) * (1 / SAMPLES + 1 / GOLDEN["samples"]))
    assert (np.abs(noise_at / SAMPLES - theirs_at) <= 5 * sigma + 1e-9).all()


@pytest.mark.parametrize("golden", GOLDEN["examples"], ids=lambda g: str(len(g["tokens"])))
def test_inputs_and_targets_have_t5s_form(golden):
    top = GOLDEN["vocabulary_size"] - 1
    sentinels = list(range(top, top - 100, -1))
    tokens, mask = golden["tokens"], golden["mask"]
    assert t5_form(tokens, mask, sentinels, 0) == golden["inputs"]
    assert t5_form(tokens, mask, sentinels, 1) == golden["targets"]
    ids = Ids(sentinel_ids=tuple(sentinels))
    for sample in range(50):
        objective = span(golden["density"], golden["mean"], ids)
        inputs, targets = objective.pair(tokens, key(sample))
        ours = mask_of(np.array(tokens), targets).astype(int).tolist()
        assert sum(ours) == sum(mask)
        assert inputs.tolist() == [*t5_form(tokens, ours, sentinels, 0), 1]
        assert targets.tolist() == [*t5_form(tokens, ours, sentinels, 1), 1]


def test_full_pieces_have_t5s_lengths():
    for name, (tokens, targets) in GOLDEN["random_spans_helper"].items():
        length, density, mean = name.split(",")
        objective = span(float(density), float(mean), Ids(sentinel_ids=tuple(range(999, 99, -1))))
        piece = fit(objective.variants, 0, 1 << 30, np.uint64(0), int(length), 1 << 30)
        assert piece == tokens
        assert sizes(objective.variants, 0, piece, np.uint64(0)) == (int(length), targets)


@st.composite
def pair_objectives(draw):
    name = draw(st.sampled_from(["span_corruption", "ul2", "prefix_lm"]))
    modes = draw(st.sampled_from([(), (("R", "<extra_id_99>"), ("S", "<extra_id_97>"))]))
    config = ObjectiveConfig(
        name=name,
        noise_density=draw(st.floats(0.01, 0.99)),
        mean_noise_span_length=draw(st.floats(1.0, 70.0)),
        prefix_target_fraction=draw(st.floats(0.01, 0.5)),
        mode_tokens=modes if name == "ul2" else (),
    )
    return Objective(config, IDS)


@settings(max_examples=150, deadline=None)
@given(pair_objectives(), st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_inputs_and_targets_restore_the_text(objective, n, seed):
    variant = objective.variant(seed)
    n = min(n, int(objective.variants.table["limit"][variant]))
    tokens = np.arange(1000, 1000 + n)
    inputs, targets = objective.pair(tokens, seed)
    assert (len(inputs), len(targets)) == sizes(objective.variants, variant, n, np.uint64(seed))
    mode = objective.variants.table["mode"][variant]
    if mode >= 0:
        assert inputs[0] == mode
        inputs = inputs[1:]
    assert restore(inputs, targets, IDS) == tokens.tolist()
    again = objective.pair(tokens, seed)
    assert again[0].tolist() == objective.pair(tokens, seed)[0].tolist()


@settings(max_examples=100, deadline=None)
@given(pair_objectives(), st.integers(0, 2**64 - 1), st.integers(4, 300), st.integers(4, 300))
def test_sizes_never_shrink_and_fit_is_the_longest(objective, seed, room_a, room_b):
    seed = np.uint64(seed)
    for variant in range(len(objective.names)):
        limit = min(400, int(objective.variants.table["limit"][variant]))
        both = [sizes(objective.variants, variant, n, seed) for n in range(1, limit + 1)]
        assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(both))
        fitting = [n for n, (a, b) in enumerate(both, 1) if a <= room_a and b <= room_b]
        found = fit(objective.variants, variant, limit, seed, room_a, room_b)
        assert found == max(fitting, default=0)


def test_ul2_draws_by_weight_and_marks_modes():
    denoisers = (("R", 0.15, 3.0, 3.0), ("X", 0.5, 64.0, 1.0), ("S", 0.25, 0.0, 2.0))
    modes = (("R", "<extra_id_97>"), ("X", "<extra_id_98>"), ("S", "<extra_id_99>"))
    config = ObjectiveConfig(name="ul2", denoisers=denoisers, mode_tokens=modes)
    objective = Objective(config, IDS)
    drawn = collections.Counter(objective.variant(key(i)) for i in range(6000))
    assert [round(drawn[i] / 1000, 1) for i in range(3)] == [3.0, 1.0, 2.0]
    assert not set(objective.variants.sentinels) & {IDS.id(piece) for _, piece in modes}
    share = []
    for i in range(2000):
        inputs, targets = objective.pair(np.arange(1000, 1200), key(i), variant=2)
        assert inputs[0] == IDS.id("<extra_id_99>")
        share.append((len(targets) - 1) / 200)
    assert abs(np.mean(share) - 0.25) < 0.01 and max(share) <= 0.5


def test_masking_takes_the_exact_number_and_mostly_single_tokens():
    flags = np.zeros(1000, np.uint8)
    lengths = collections.Counter()
    for i in range(400):
        count = mask_tokens(1000, np.float32(0.02), 0.2, np.uint64(key(i)), flags)
        assert count == flags.sum() == 20
        runs = itertools.groupby(flags.tolist())
        lengths.update(len(list(run)) for value, run in runs if value)
    total = sum(lengths.values())
    # Few masks, so runs hardly touch: about 80 %, 10 %, 10 %.
    assert abs(lengths[1] / total - 0.8) < 0.04
    assert abs(lengths[2] / total - 0.1) < 0.04
    assert abs(lengths[3] / total - 0.1) < 0.03
    assert mask_tokens(1, np.float32(0.15), 0.2, np.uint64(3), flags) == 1
    assert mask_tokens(3, np.float32(1.0), 0.2, np.uint64(3), flags) == 3


def test_a_text_is_split_before_the_sentinels_run_out():
    ids = Ids(sentinel_ids=(104, 103, 102, 101, 100))
    objective = span(0.15, 3.0, ids)
    limit = int(objective.variants.table["limit"][0])
    inputs, _ = objective.pair(np.arange(1000, 1000 + limit), key(0))
    assert np.isin(inputs, ids.sentinel_ids).sum() == 5
    assert fit(objective.variants, 0, 10_000, np.uint64(0), 10_000, 10_000) == limit


@pytest.mark.parametrize(
    ("config", "architecture", "words"),
    [
        (
            ObjectiveConfig(name="span_coruption"),
            "encoder_decoder",
            "Did you mean span_corruption?",
        ),
        (ObjectiveConfig(name="lm"), "encoder_decoder", "one stack"),
        (ObjectiveConfig(name="unilm"), "encoder_decoder", "one stack"),
        (ObjectiveConfig(noise_density=1.0), "encoder_decoder", "noise_density = 1.0"),
        (ObjectiveConfig(mean_noise_span_length=0.5), "prefix_lm", "mean_noise_span_length = 0.5"),
        (ObjectiveConfig(prefix_target_fraction=0.7), "prefix_lm", "prefix_target_fraction"),
        (ObjectiveConfig(truncate_inputs="both"), "prefix_lm", "truncate_inputs"),
        (ObjectiveConfig(name="unilm", unilm_rates=(1.0, 1.0)), "prefix_lm", "four"),
        (ObjectiveConfig(name="ul2", denoisers=()), "prefix_lm", "positive weight"),
        (ObjectiveConfig(name="ul2", denoisers=(("S", 0.6, 0.0, 1.0),)), "prefix_lm", "density"),
        (ObjectiveConfig(name="ul2", mode_tokens=(("Q", "x"),)), "prefix_lm", "Q"),
        (ObjectiveConfig(name="ul2", mode_tokens=(("R", "[R]"),)), "prefix_lm", "no piece '[R]'"),
        (ObjectiveConfig(), "decoder", "architecture"),
    ],
)
def test_mistakes_are_explained(config, architecture, words):
    with pytest.raises(UserError, match="(?s)" + words.replace("?", r"\?").replace("[", r"\[")):
        Objective(config, IDS, architecture)


def test_objectives_that_need_sentinels_say_so():
    none = Ids(sentinel_ids=())
    for name in ("span_corruption", "ul2", "unilm"):
        with pytest.raises(UserError, match="extra_id"):
            Objective(ObjectiveConfig(name=name), none, "prefix_lm")
    for name in ("prefix_lm", "lm", "seq2seq"):
        Objective(ObjectiveConfig(name=name), none, "prefix_lm")


def test_too_short_lengths_are_refused_at_the_exact_limit():
    for name in ("span_corruption", "ul2", "prefix_lm"):
        objective = Objective(ObjectiveConfig(name=name), IDS)
        need = [1, 1]
        for variant in range(len(objective.names)):
            for i in range(300):
                both = sizes(objective.variants, variant, MIN_PIECE, np.uint64(key(i)))
                need = [max(n, s) for n, s in zip(need, both, strict=True)]
        objective.check_lengths(*need)
        with pytest.raises(UserError, match=f"INPUT_LENGTH={need[0]}"):
            objective.check_lengths(need[0] - 1, 100)
        with pytest.raises(UserError, match=f"TARGET_LENGTH={need[1]}"):
            objective.check_lengths(100, need[1] - 1)
    single = Objective(ObjectiveConfig(name="lm"), IDS, "prefix_lm")
    single.check_lengths(MIN_PIECE + 1, 0)
    with pytest.raises(UserError, match="INPUT_LENGTH"):
        single.check_lengths(MIN_PIECE, 0)


def test_keyed_permutations_are_permutations_and_fair():
    for size in (1, 2, 3, 7, 1000, 1025, 5000):
        order = keyed.permutation(size, keyed.name_key("order", size))
        assert np.array_equal(np.sort(order), np.arange(size))
    seen = collections.Counter(
        tuple(keyed.permutation(4, keyed.name_key("four", i)).tolist()) for i in range(12_000)
    )
    chi2 = sum((count - 500) ** 2 / 500 for count in seen.values())
    assert len(seen) == 24 and chi2 < 55, "23 degrees of freedom; 55 is p = 0.0002"
