"""The token cache: what is written is read, and damage of any kind is one clear message."""

import errno
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatyuan.data import cache
from chatyuan.errors import UserError


class FakeVocabulary:
    """Only what a cache asks of a vocabulary."""

    def __init__(self, size: int = 100, sha256: str = "a" * 64) -> None:
        self.size = size
        self.sha256 = sha256
        self.path = pathlib.Path("spiece.model")


VOCABULARY = FakeVocabulary()


def write(root, rows, *, task="reviews", split="train", vocabulary=VOCABULARY, **kwargs):
    """Caches rows of {"inputs": ids, "targets": ids}, three at a time."""
    names = ("inputs", "targets")
    with cache.CacheWriter(
        root, task, split, features=names, vocabulary=vocabulary, **kwargs
    ) as writer:
        for start in range(0, len(rows), 3):
            block = rows[start : start + 3]
            writer.write(
                {n: np.array(sum((row[n] for row in block), []), np.int64) for n in names},
                {n: np.array([len(row[n]) for row in block]) for n in names},
                [{"id": start + k, "answer_choices": ["好", "差"]} for k in range(len(block))],
            )
        return writer.finish({"key": "k", "source": "test", "documents": len(rows)})


ROWS = [{"inputs": [n, n + 1, n + 2][: n % 4], "targets": [n + 5]} for n in range(10)]
ids = st.lists(st.integers(0, 99), max_size=5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.fixed_dictionaries({"inputs": ids, "targets": ids}), min_size=1, max_size=10))
def test_what_is_written_is_read(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("cache")
    write(root, rows)
    opened = cache.open_cache(root, "reviews", "train", VOCABULARY)
    assert len(opened) == len(rows)
    for name, ragged in opened.features.items():
        assert [ragged[i].tolist() for i in range(len(rows))] == [row[name] for row in rows]
        assert ragged.lengths.tolist() == [len(row[name]) for row in rows]
    assert opened.num_tokens == sum(len(v) for row in rows for v in row.values())


def test_manifest_and_layout(tmp_path):
    manifest = write(tmp_path, ROWS, keep_examples=True)
    folder = tmp_path / "reviews" / "train"
    assert sorted(path.name for path in folder.iterdir()) == [
        "examples.jsonl",
        "inputs.offsets.npy",
        "inputs.tokens.npy",
        "manifest.json",
        "targets.offsets.npy",
        "targets.tokens.npy",
    ]
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert manifest["eos"] is False and manifest["num_examples"] == 10
    assert manifest["tokens"] == {"inputs": 13, "targets": 10}
    assert manifest["vocabulary"]["sha256"] == VOCABULARY.sha256
    # Any numpy reads the files, without this program.
    assert np.load(folder / "targets.tokens.npy").tolist() == [n + 5 for n in range(10)]
    examples = list(cache.open_cache(tmp_path, "reviews", "train").examples())
    assert [example["id"] for example in examples] == list(range(10))
    assert examples[0]["answer_choices"] == ["好", "差"]


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_tokens_take_the_smallest_type(tmp_path, size, dtype):
    vocabulary = FakeVocabulary(size)
    write(tmp_path, [{"inputs": [], "targets": [size - 1]}], vocabulary=vocabulary)
    tokens = cache.open_cache(tmp_path, "reviews", "train").features["targets"].tokens
    assert tokens.dtype == dtype and tokens.tolist() == [size - 1]
    assert isinstance(tokens, np.memmap)


def test_long_and_odd_names_are_one_folder_each(tmp_path):
    names = ["file:/data/我的 文件.txt", "x" * 300, "x" * 299 + "y", "a.b:c"]
    for name in names:
        write(tmp_path, ROWS, task=name)
        assert len(cache.open_cache(tmp_path, name, "train")) == 10
    assert len(list(tmp_path.iterdir())) == 4


def test_rewriting_replaces_and_failing_leaves_the_old_one(tmp_path):
    write(tmp_path, ROWS)
    write(tmp_path, ROWS[:2])
    assert len(cache.open_cache(tmp_path, "reviews", "train")) == 2
    with pytest.raises(RuntimeError, match="interrupted"):
        with cache.CacheWriter(
            tmp_path, "reviews", "train", features=("targets",), vocabulary=VOCABULARY
        ) as writer:
            writer.write({"targets": np.arange(3)}, {"targets": np.array([3])})
            raise RuntimeError("interrupted")
    assert len(cache.open_cache(tmp_path, "reviews", "train")) == 2
    assert [path.name for path in (tmp_path / "reviews").iterdir()] == ["train"]


def test_mixtures(tmp_path):
    write(tmp_path, ROWS)
    assert cache.read_mixture(tmp_path, "reviews") == [("reviews", 1.0)]
    cache.write_mixture(tmp_path, "zh", [("reviews", 2), ("news", 0.5)])
    assert cache.read_mixture(tmp_path, "zh") == [("reviews", 2.0), ("news", 0.5)]
    assert cache.list_tasks(tmp_path) == ["reviews"]
    assert cache.list_splits(tmp_path, "reviews") == ["train"]
    with pytest.raises(UserError, match="MIXTURE=zhh .*holds reviews, zh.*Did you mean zh"):
        cache.read_mixture(tmp_path, "zhh")
    with pytest.raises(UserError, match="holds nothing"):
        cache.read_mixture(tmp_path / "none", "zh")
    (tmp_path / "zh.mixture.json").write_text("{")
    with pytest.raises(UserError, match="zh.mixture.json is damaged"):
        cache.read_mixture(tmp_path, "zh")


def test_absent_tasks_splits_and_other_vocabularies(tmp_path):
    write(tmp_path, ROWS)
    with pytest.raises(UserError, match="Task review is not in the cache.*Did you mean reviews"):
        cache.open_cache(tmp_path, "review", "train")
    with pytest.raises(UserError, match="has no split 'test'.*it has train"):
        cache.open_cache(tmp_path, "reviews", "test")
    with pytest.raises(UserError, match="was made with vocabulary .*aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        cache.open_cache(tmp_path, "reviews", "train", FakeVocabulary(100, "b" * 64))
    with pytest.raises(UserError, match="holds no untokenised examples"):
        next(cache.open_cache(tmp_path, "reviews", "train").examples())


def test_an_empty_cache_is_an_error_unless_asked_for(tmp_path):
    write(tmp_path, [])
    with pytest.raises(UserError, match="is empty: 0 examples of 0 documents"):
        cache.open_cache(tmp_path, "reviews", "train")
    assert len(cache.open_cache(tmp_path, "reviews", "train", allow_empty=True)) == 0


@pytest.mark.parametrize("name", ["inputs.tokens.npy", "targets.offsets.npy", "examples.jsonl"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "longer"])
def test_damaged_files(tmp_path, name, damage):
    write(tmp_path, ROWS, keep_examples=True)
    file = tmp_path / "reviews" / "train" / name
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    file.write_bytes(data[:-1] if damage == "truncated" else data + b"\0" * (damage == "longer"))
    if damage == "missing":
        file.unlink()
    expected = {"flipped": "checksum of", "missing": "is missing"}.get(damage, "bytes where")
    with pytest.raises(UserError, match=f"is damaged: .*{expected}.*build it again"):
        cache.open_cache(tmp_path, "reviews", "train")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_damaged_manifests(tmp_path, text):
    write(tmp_path, ROWS)
    (tmp_path / "reviews" / "train" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged: manifest.json cannot be read"):
        cache.open_cache(tmp_path, "reviews", "train")


def test_another_format_version(tmp_path):
    write(tmp_path, ROWS)
    path = tmp_path / "reviews" / "train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(UserError, match="its format is version 99, this program reads 1"):
        cache.open_cache(tmp_path, "reviews", "train")


def test_large_files_are_checked_at_both_ends(tmp_path, monkeypatch):
    write(tmp_path, ROWS)
    monkeypatch.setattr(cache, "_FULL_CHECK", 0)
    monkeypatch.setattr(cache, "_BLOCK", 16)
    write(tmp_path, ROWS)
    file = tmp_path / "reviews" / "train" / "targets.offsets.npy"
    data = bytearray(file.read_bytes())
    data[150] ^= 1  # 128 bytes of header before, 16 at the end after it
    file.write_bytes(data)
    cache.open_cache(tmp_path, "reviews", "train")
    with pytest.raises(UserError, match="checksum of targets.offsets.npy"):
        cache.open_cache(tmp_path, "reviews", "train", verify=True)
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="checksum of targets.offsets.npy"):
        cache.open_cache(tmp_path, "reviews", "train")


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "write_json", full)
    with pytest.raises(UserError, match="No space left while writing the cache .*CACHE_DIR"):
        write(tmp_path, ROWS)
    assert list((tmp_path / "reviews").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file", ROWS)
