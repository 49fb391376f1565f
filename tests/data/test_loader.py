"""The loader: batches from (seed, step) alone, on any number of hosts, losing nothing."""

import collections
import dataclasses
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from token_sources import (
    FIRST,
    Ids,
    documents,
    pair_segments,
    pairs,
    restore,
    single_segments,
    source,
    write_cache,
)

from chatyuan.data import stream
from chatyuan.data.loader import DataConfig, EvalLoader, Loader, natural_target_length, open_sources
from chatyuan.data.objectives import Objective, ObjectiveConfig
from chatyuan.errors import UserError

IDS = Ids()
RNG = np.random.default_rng(0)
LENGTHS = (RNG.gamma(0.9, 30, 300).astype(int) + 1).tolist()
CONFIG = DataConfig(input_length=96, target_length=40, batch_size=8, seed=1)


def objective(name: str = "span_corruption", single: bool = False, **kwargs) -> Objective:
    architecture = "prefix_lm" if single or name in ("lm", "unilm") else "encoder_decoder"
    return Objective(ObjectiveConfig(name=name, **kwargs), IDS, architecture)


def make(sources=None, config=CONFIG, name="span_corruption", single=False, **kwargs) -> Loader:
    change = {k: kwargs.pop(k) for k in list(kwargs) if k in DataConfig.__dataclass_fields__}
    config = dataclasses.replace(config, **change)
    return Loader(config, objective(name, single), sources or [source(LENGTHS)], **kwargs)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def epoch(loader: Loader, window: int = 0) -> list[dict]:
    """The rows of one window as batches of one row."""
    blocks = loader.order.blocks_per_window
    start, end = (loader.index.before(blocks * (window + i))[0] for i in (0, 1))
    single = Loader(
        dataclasses.replace(loader.config, batch_size=1), loader.objective, loader.sources
    )
    return [single.batch(row) for row in range(start, end)]


def segments(batches: list[dict], single: bool) -> list[list[int]]:
    """The texts of all segments."""
    if single:
        return [text for batch in batches for _, text in single_segments(batch, IDS)]
    return [restore(a, b, IDS) for batch in batches for a, b in pair_segments(batch, IDS)]


def check_tiles(texts: list[list[int]], lengths: list[int]) -> None:
    """The texts are the documents, some of them split, each token exactly once."""
    flat = np.sort(np.concatenate(texts))
    assert np.array_equal(flat, np.arange(FIRST, FIRST + sum(lengths)))
    ends = FIRST + np.cumsum(lengths)
    for text in texts:
        assert text == list(range(text[0], text[0] + len(text))), "tokens stay in order"
        document = np.searchsorted(ends, text[0], side="right")
        assert text[-1] < ends[document], "a segment holds one document"


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("name", "single"),
    [("span_corruption", False), ("ul2", False), ("prefix_lm", False), ("span_corruption", True),
     ("ul2", True), ("prefix_lm", True), ("lm", True), ("unilm", True)],
)  # fmt: skip
def test_an_epoch_holds_every_token_once(name, single, pack):
    loader = make(name=name, single=single, pack=pack, target_length=60)
    for window in (0, 1):
        check_tiles(segments(epoch(loader, window), single), LENGTHS)


def test_unilm_draws_its_four_kinds_by_rate():
    loader = make([source([20] * 1200)], name="unilm")
    kinds = collections.Counter(
        kind for batch in epoch(loader) for kind, _ in single_segments(batch, IDS)
    )
    shares = [kinds[kind] / 1200 for kind in ("masked", "prefix", "lm", "reverse")]
    assert np.abs(np.array(shares) - [1 / 3, 1 / 3, 1 / 6, 1 / 6]).max() < 0.05


def test_concatenated_rows_hold_every_token_once_and_one_segment():
    loader = make(concatenate=True, target_length=0)
    rows = epoch(loader)
    texts = segments(rows, False)
    assert len(texts) == len(rows)
    assert np.array_equal(np.sort(np.concatenate(texts)), np.arange(FIRST, FIRST + sum(LENGTHS)))
    assert min(loader.utilisation(len(rows) // CONFIG.batch_size)) > 0.95


@pytest.mark.parametrize("name", ["span_corruption", "prefix_lm"])
def test_packed_segments_are_the_unpacked_examples(name):
    packed = [pair for batch in epoch(make(name=name)) for pair in pair_segments(batch, IDS)]
    alone = [
        pair for batch in epoch(make(name=name, pack=False)) for pair in pair_segments(batch, IDS)
    ]
    known = {tuple(restore(*pair, IDS)): pair for pair in alone}
    equal = [
        known[text] == pair for pair in packed if (text := tuple(restore(*pair, IDS))) in known
    ]
    assert all(equal) and len(equal) > 250, "the others were cut elsewhere"


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_hosts(hosts):
    alone = make()
    parts = [make(process_index=i, process_count=hosts) for i in range(hosts)]
    for step in (0, 3, 40):
        whole = alone.batch(step)
        for name, value in whole.items():
            joined = np.concatenate([part.batch(step)[name] for part in parts])
            assert np.array_equal(joined, value), name


def test_a_batch_needs_nothing_but_its_step():
    loader = make()
    run = [loader.batch(step) for step in range(60)]
    assert same(make().batch(57), run[57])
    assert not same(run[0], run[1])
    assert not same(make(seed=2).batch(0), run[0])
    warm = make()
    warm.warm_up(57).join()
    assert warm.index._blocks and same(warm.batch(57), run[57])
    ahead = make(threads=3, prefetch=5).iterate(start_step=20, stop_step=40)
    assert all(same(a, b) for a, b in itertools.zip_longest(ahead, run[20:40]))


def test_padding_has_the_shapes_of_a_batch_and_reads_nothing():
    loader = make()
    padding = loader.padding()
    assert not loader.index._blocks
    batch = loader.batch(0)
    assert padding.keys() == batch.keys()
    for name, value in batch.items():
        assert (padding[name].shape, padding[name].dtype) == (value.shape, value.dtype), name
    assert not padding["decoder_loss_weights"].any() and not padding["decoder_segment_ids"].any()


def test_epochs_differ_in_order_and_noise():
    loader = make(pack=False)
    first, second = (segments(epoch(loader, window), False) for window in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    noise = [
        {tuple(restore(*p, IDS)): p for row in epoch(loader, w) for p in pair_segments(row, IDS)}
        for w in (0, 1)
    ]
    differ = [noise[0][text] != noise[1][text] for text in noise[0] if len(text) > 60]
    assert np.mean(differ) > 0.9


def test_a_large_task_is_shuffled_in_parts_that_make_up_an_epoch(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 70)
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 1000)
    loader = make()
    assert loader.order._parts == 5
    texts = [text for window in range(5) for text in segments(epoch(loader, window), False)]
    check_tiles(texts, LENGTHS)


def test_blocks_are_planned_alone(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 1)
    lengths = (LENGTHS * 20)[:5000]
    loader = make([source(lengths)])
    assert loader.order.blocks_per_window == 5
    check_tiles(segments(epoch(loader), False), lengths)
    other = make([source(lengths)])
    assert np.array_equal(other.index.planner.block(3).row_order, loader.index.block(3).row_order)


def test_mixture_rates_and_epochs():
    sources = [source([20] * 900, "large", 3.0), source([20] * 100, "small", 1.0)]
    loader = make(sources)
    rows, step = 0, 0
    while rows < loader.index.before(loader.order.blocks_per_window * 4)[0]:
        rows += CONFIG.batch_size
        step += 1
    large, small = loader.stats(step)
    assert (large.source, small.source) == ("large", "small")
    assert abs(large.documents / small.documents - 3) < 0.05
    assert abs(large.epochs - large.documents / 900) < 1e-9
    assert abs(small.epochs - 10) < 0.5
    counted = collections.Counter()
    for s in range(step):
        for inputs, targets in pair_segments(loader.batch(s), IDS):
            counted["tokens"] += len(restore(inputs, targets, IDS))
            counted["pieces"] += 1
    assert counted["tokens"] == large.tokens + small.tokens
    assert counted["pieces"] == large.pieces + small.pieces


def test_one_tasks_examples_do_not_depend_on_the_others():
    alone = make([source([20] * 50, "a")], pack=False)
    mixed = make([source([20] * 50, "a"), source([30] * 50, "b")], pack=False)
    of_a = lambda loader: {  # noqa: E731
        (tuple(a), tuple(b))
        for window in range(2)
        for batch in epoch(loader, window)
        for a, b in pair_segments(batch, IDS)
        if len(restore(a, b, IDS)) == 20
    }
    assert of_a(alone) == of_a(mixed)


def test_pairs_are_truncated_on_the_chosen_side_and_counted():
    inputs, targets = [10, 120, 95, 96], [5, 5, 60, 39]
    given = pairs(inputs, targets)
    for side in ("right", "left"):
        what = Objective(ObjectiveConfig(name="seq2seq", truncate_inputs=side), IDS)
        loader = Loader(dataclasses.replace(CONFIG, batch_size=1), what, [given])
        rows = loader.index.before(1)[0]
        (stats,) = loader.stats(rows)
        assert (stats.truncated_inputs, stats.truncated_targets) == (2, 1)
        assert stats.documents == 4 and stats.epochs == 1
        found = [p for row in range(rows) for p in pair_segments(loader.batch(row), IDS)]
        firsts = documents(inputs, FIRST + sum(targets))
        expected = []
        for a, b in zip(firsts, documents(targets), strict=True):
            kept = a[:95] if side == "right" else a[-95:]
            expected.append(([*kept.tolist(), 1], [*b[:39].tolist(), 1]))
        assert sorted(found) == sorted(expected)


def test_partial_statistics_add_up():
    mixed = [source(LENGTHS, "text"), pairs([10, 120] * 40, [5, 60] * 40)]
    loader = make(mixed)
    rows = loader.index.before(1)[0]
    one = Loader(dataclasses.replace(loader.config, batch_size=1), loader.objective, mixed)
    before, whole = one.stats(rows - 1), one.stats(rows)
    last = one.batch(rows - 1)
    number = len(pair_segments(last, IDS))
    assert sum(s.pieces for s in whole) - sum(s.pieces for s in before) == number
    assert whole[1].truncated_inputs > 0
    assert one.stats(0)[0].tokens == 0


def test_pairs_and_texts_share_one_stack():
    mixed = [source(LENGTHS, "text"), pairs([10] * 300, [6] * 300)]
    batches = epoch(make(mixed, name="unilm", target_length=60))
    found = [item for batch in batches for item in single_segments(batch, IDS)]
    assert {"masked", "prefix", "lm", "reverse"} == {kind for kind, _ in found}
    # Of a pair, inputs keep their end-of-sequence inside the row; restore drops it.
    joined = [text for kind, text in found if kind == "prefix" and len(text) == 16]
    assert joined


def test_a_growing_batch_takes_each_row_once():
    loader = make(batch_ramp=((0, 2), (3, 4), (5, 8)))
    flat = make(batch_size=1)
    row = 0
    for step in range(8):
        size = loader.size(step)
        assert size == (2 if step < 3 else 4 if step < 5 else 8)
        assert loader.offset(step) == row
        assert loader.active_microbatches(step, 4) == size // 2
        batch = loader.batch(step)
        assert batch["decoder_loss_weights"].shape[0] == 8
        for i in range(size):
            one = flat.batch(row + i)
            assert all(np.array_equal(batch[k][i], one[k][0]) for k in batch)
        assert batch["decoder_loss_weights"][size:].sum() == 0
        assert batch["encoder_segment_ids"][size:].sum() == 0
        row += size
    with pytest.raises(UserError, match="multiples of 8"):
        loader.active_microbatches(0, 1)


@pytest.mark.parametrize("ramp", [((1, 2),), ((0, 2), (0, 4)), ((0, 16),), ((0, 0),)])
def test_bad_ramps_are_refused(ramp):
    with pytest.raises(UserError, match="batch_ramp"):
        make(batch_ramp=ramp)


def test_the_index_file_replaces_planning(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 1)
    sources = [source([20] * 4000)]
    path = tmp_path / "index.npz"
    first = make(sources, index_path=path)
    step = first.index.before(20)[0] // CONFIG.batch_size
    expected = first.batch(step), first.stats(step)
    first.save_index()
    planned = []
    second = make(sources, index_path=path)
    plan = second.index.planner.block
    monkeypatch.setattr(second.index.planner, "block", lambda i: planned.append(i) or plan(i))
    assert same(second.batch(step), expected[0]) and second.stats(step) == expected[1]
    assert len(planned) <= 3
    other = make(sources, index_path=path, seed=5)
    assert other.index.unsaved == 0 and not other.index._ends, "another seed is another plan"
    path.write_bytes(b"broken")
    assert same(make(sources, index_path=path).batch(step), expected[0])


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_sees_every_example_once(pack):
    config = dataclasses.replace(CONFIG, pack=pack)
    loader = EvalLoader(config, objective(), [source(LENGTHS)])
    batches = list(loader)
    assert len(batches) == len(loader) and batches[0]["encoder_input_tokens"].shape == (8, 96)
    check_tiles(segments(batches, False), LENGTHS)
    assert (batches[-1]["decoder_loss_weights"][loader.num_rows % 8 :] == 0).all()
    again = EvalLoader(config, objective(), [source(LENGTHS)])
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    halves = [
        EvalLoader(config, objective(), [source(LENGTHS)], process_index=i, process_count=2)
        for i in range(2)
    ]
    for index, batch in enumerate(batches):
        both = [half.batch(index)["decoder_target_tokens"] for half in halves]
        assert np.array_equal(np.concatenate(both), batch["decoder_target_tokens"])
    with pytest.raises(IndexError):
        loader.batch(len(loader))


def test_the_natural_target_length_is_t5s_for_long_documents():
    sources = [source([5000, 7000])]
    config = DataConfig(input_length=512)
    for change in ({}, {"pack": False}, {"concatenate": True}):
        changed = dataclasses.replace(config, **change)
        assert natural_target_length(objective(), sources, changed) == 114
    assert make(sources, input_length=512, target_length=0).config.target_length == 114


def test_empty_documents_are_counted_not_shown():
    lengths = [0, 20, 0, 30, 20]
    loader = make([source(lengths)], batch_size=1)
    rows = loader.index.before(1)[0]
    assert loader.stats(rows)[0].empty == 2
    check_tiles(segments(epoch(loader), False), lengths)


@pytest.mark.parametrize(
    ("change", "name", "given", "words"),
    [
        ({"input_length": 5}, "span_corruption", None, "INPUT_LENGTH=5 is too short"),
        ({"target_length": 2}, "span_corruption", None, "TARGET_LENGTH=2 is too short"),
        ({"target_length": -1}, "span_corruption", None, "TARGET_LENGTH=-1"),
        ({"target_length": 1}, "seq2seq", pairs([5], [5]), "TARGET_LENGTH=1 is too short"),
        ({"batch_size": 0}, "span_corruption", None, "BATCH_SIZE=0"),
        ({}, "seq2seq", None, "plain text"),
        ({}, "span_corruption", source([0, 0]), "no tokens"),
        ({"concatenate": True}, "span_corruption", pairs([5], [5]), "concatenate"),
        ({"concatenate": True, "pack": False}, "span_corruption", None, "contradict"),
    ],
)
def test_mistakes_are_explained(change, name, given, words):
    with pytest.raises(UserError, match=words):
        make([given or source(LENGTHS)], name=name, **change)


def test_batches_must_divide_over_processes():
    with pytest.raises(UserError, match="BATCH_SIZE=8 does not divide over 3"):
        make(process_count=3)


def test_caches_are_opened_with_their_rates(tmp_path):
    from chatyuan.data.cache import write_mixture

    write_cache(tmp_path, "a", source(LENGTHS))
    write_cache(tmp_path, "b", pairs([5] * 10, [6] * 10))
    write_mixture(tmp_path, "both", [("a", 2.0), ("b", 1.0)])
    config = dataclasses.replace(CONFIG, mixture="both", cache_dir=str(tmp_path))
    a, b = open_sources(config)
    assert (a.name, a.rate, a.inputs, b.rate) == ("a", 2.0, None, 1.0)
    assert len(b.inputs) == 10 and a.fingerprint != b.fingerprint
    alone = make(open_sources(dataclasses.replace(config, mixture="a")))
    assert same(alone.batch(3), make([source(LENGTHS, "a")]).batch(3))
    for change, words in (
        ({"mixture": "c"}, "MIXTURE=c"),
        ({"mixture": ""}, "MIXTURE must be set"),
        ({"cache_dir": ""}, "CACHE_DIR must be set"),
        ({"split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(UserError, match=words):
            open_sources(dataclasses.replace(config, **change))


def test_reading_a_cache_imports_neither_tensorflow_nor_seqio_nor_jax(tmp_path):
    write_cache(tmp_path, "a", source([30] * 20))
    program = textwrap.dedent(f"""
        import sys
        from chatyuan.data.loader import DataConfig, Loader, open_sources
        from chatyuan.data.objectives import Objective, ObjectiveConfig
        class Ids:
            sentinel_ids, eos_id, pad_id = (5, 4, 3), 1, 0
            def id(self, piece): return None
        config = DataConfig(mixture="a", cache_dir={str(tmp_path)!r}, input_length=64, batch_size=2)
        loader = Loader(config, Objective(ObjectiveConfig(), Ids()), open_sources(config))
        assert loader.batch(0)["decoder_loss_weights"].sum() > 0
        heavy = {{"jax", "tensorflow", "seqio", "torch", "grain", "flax"}} & set(sys.modules)
        assert not heavy, heavy
        next(loader.iterate(0))
        assert not {{"tensorflow", "seqio", "torch"}} & set(sys.modules)
    """)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
