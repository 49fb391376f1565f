"""The token cache on disk: written once per task and split, read as memory maps. numpy only.

Layout, under CACHE_DIR:

    <task>/<split>/manifest.json          what was tokenised, with what, how much, sizes, checksums
    <task>/<split>/<feature>.tokens.npy   every example's tokens one after another, uint16 or int32
    <task>/<split>/<feature>.offsets.npy  int64 [examples + 1]; example i is tokens[o[i]:o[i+1]]
    <task>/<split>/examples.jsonl         optional: the untokenised example of each row (evaluation)
    <mixture>.mixture.json                tasks and rates of a mixture, resolved recursively

Tokens are stored WITHOUT end-of-sequence (`"eos": false` in the manifest): the loader adds it
where an objective wants one. A folder is written under a temporary name and renamed, so one that
exists is complete. Names are percent-quoted, so `file:/data/a.txt` is one folder.
"""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from chatyuan.errors import UserError, did_you_mean

VERSION = 1
MANIFEST = "manifest.json"
EXAMPLES = "examples.jsonl"
# Features of a cache of preferences: all answers of a row stand one after another in `answers`.
PREFERENCES = ("inputs", "answers", "answer_lengths", "ranks", "scores")
_HEADER = 128  # bytes; .npy allows any padding, so the true length can be written at the end
_BLOCK = 1 << 20  # bytes at each end of a file that are always checked
_FULL_CHECK = 256 << 20  # bytes; smaller caches are checksummed whole when opened (about 0.1 s)


class HasHash(Protocol):
    """What a cache needs to know of a vocabulary (`chatyuan.text.vocabulary.Vocabulary`)."""

    sha256: str
    path: pathlib.Path

    @property
    def size(self) -> int:
        """Number of pieces."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different length in one flat array: tokens [total], offsets int64 [rows + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The tokens of one row: a view, not a copy."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [rows]."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class Cache:
    """One task's split: `features[name]` is a `Ragged`; all features have the same rows."""

    path: pathlib.Path
    manifest: Mapping[str, Any]
    features: Mapping[str, Ragged]

    def __len__(self) -> int:
        """Number of examples."""
        return int(self.manifest["num_examples"])

    @property
    def num_tokens(self) -> int:
        """Tokens of all features together, end-of-sequence not counted."""
        return sum(self.manifest["tokens"].values())

    def examples(self) -> Iterator[dict[str, Any]]:
        """The untokenised examples in row order (inputs, targets, label, answer_choices, ...)."""
        file = self.path / EXAMPLES
        if not file.exists():
            raise UserError(
                f"The cache {self.path} holds no untokenised examples (they are kept for "
                "evaluation splits); build it again with keep_examples=True."
            )
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def best_answers(cache: Cache) -> Ragged | None:
    """The best answer of each row of a cache of preferences, copied; None of another cache."""
    if not set(PREFERENCES) <= cache.features.keys():
        return None
    answers, lengths, ranks = (cache.features[n] for n in ("answers", "answer_lengths", "ranks"))
    # Of the answers of a row, whose offsets are those of `ranks`, the first of the lowest rank.
    rows = np.repeat(np.arange(len(ranks)), ranks.lengths)
    order = np.lexsort((np.arange(len(rows)), ranks.tokens, rows))
    best = order[ranks.offsets[:-1]]
    ends = np.cumsum(lengths.tokens, dtype=np.int64)
    taken = lengths.tokens[best].astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(taken)])
    places = np.arange(offsets[-1]) + np.repeat(ends[best] - taken - offsets[:-1], taken)
    return Ragged(answers.tokens[places], offsets)


def folder_name(name: str) -> str:
    """A task or mixture name as one file name: percent-quoted, long ones shortened with a hash."""
    quoted = urllib.parse.quote(name, safe="+@=,")
    if len(quoted) > 120:
        quoted = f"{quoted[:100]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return quoted


def split_path(cache_dir: str | os.PathLike[str], task: str, split: str) -> pathlib.Path:
    """The folder of one task's split."""
    return pathlib.Path(cache_dir) / folder_name(task) / folder_name(split)


def _checksums(path: pathlib.Path, whole: bool) -> dict[str, Any]:
    size = path.stat().st_size
    found: dict[str, Any] = {"bytes": size}
    with path.open("rb") as file:
        found["crc32_head"] = zlib.crc32(file.read(_BLOCK))
        file.seek(max(0, size - _BLOCK))
        found["crc32_tail"] = zlib.crc32(file.read(_BLOCK))
        if whole:
            file.seek(0)
            crc = 0
            while block := file.read(4 * _BLOCK):
                crc = zlib.crc32(block, crc)
            found["crc32"] = crc
    return found


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (_HEADER - 10).to_bytes(2, "little")
        + text.ljust(_HEADER - 11).encode()
        + b"\n"
    )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes json aside and renames it."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


class CacheWriter:
    """Writes one task's split; use as a context manager. Nothing appears if the body raises."""

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        task: str,
        split: str,
        *,
        features: Sequence[str],
        vocabulary: HasHash,
        keep_examples: bool = False,
        numbers: Mapping[str, str] | None = None,
    ) -> None:
        """Opens temporary files beside `CACHE_DIR/task/split`.

        `numbers` names the features that are no tokens, with the dtype of each.
        """
        self._dtypes = {name: np.dtype(dtype) for name, dtype in (numbers or {}).items()}
        self.target = split_path(cache_dir, task, split)
        self.features = tuple(features)
        self._vocabulary = vocabulary
        self._identity = {"task": task, "split": split}
        self._dtype = np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<i4")
        self._temporary = self.target.with_name(f".{self.target.name}.tmp{os.getpid()}")
        self._files: dict[str, BinaryIO] = {}
        self._lengths: dict[str, list[np.ndarray]] = {name: [] for name in self.features}
        self._keep_examples = keep_examples
        self._examples: BinaryIO | None = None
        self._num_examples = 0

    def __enter__(self) -> "CacheWriter":
        """Creates the temporary folder."""
        with _disk_errors(self.target):
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
            for name in self.features:
                self._files[name] = (self._temporary / f"{name}.tokens.npy").open("wb")
                self._files[name].write(bytes(_HEADER))
            if self._keep_examples:
                self._examples = (self._temporary / EXAMPLES).open("wb")
        return self

    def write(
        self,
        flat: Mapping[str, np.ndarray],
        lengths: Mapping[str, np.ndarray],
        examples: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """Appends a block of rows.

        Args:
          flat: per feature, all tokens of the block one after another.
          lengths: per feature, tokens of each row; the same number of rows in each.
          examples: the rows untokenised, written when `keep_examples` was given.
        """
        rows = {len(lengths[name]) for name in self.features}
        assert len(rows) == 1, f"features disagree on the number of rows: {rows}"
        with _disk_errors(self.target):
            for name in self.features:
                assert int(np.sum(lengths[name])) == len(flat[name]), name
                dtype = self._dtypes.get(name, self._dtype)
                self._files[name].write(np.ascontiguousarray(flat[name], dtype).data)
                self._lengths[name].append(np.asarray(lengths[name], np.int64))
            if self._examples is not None:
                for example in examples or ():
                    line = json.dumps(dict(example), ensure_ascii=False, separators=(",", ":"))
                    self._examples.write(line.encode() + b"\n")
        self._num_examples += rows.pop()

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Writes offsets and manifest and renames the folder into place; returns the manifest.

        `manifest` adds what the builder knows: key, source, preprocessors, documents, skipped.
        """
        tokens: dict[str, int] = {}
        with _disk_errors(self.target):
            for name in self.features:
                dtype = self._dtypes.get(name, self._dtype)
                count = (self._files[name].tell() - _HEADER) // dtype.itemsize
                self._files[name].seek(0)
                self._files[name].write(_npy_header(dtype, count))
                offsets = np.zeros(self._num_examples + 1, np.int64)
                if self._num_examples:
                    np.cumsum(np.concatenate(self._lengths[name]), out=offsets[1:])
                np.save(self._temporary / f"{name}.offsets.npy", offsets)
                if name not in self._dtypes:
                    tokens[name] = count
            self._close()
            files = {
                file.name: _checksums(file, True) for file in sorted(self._temporary.iterdir())
            }
            full = {
                **manifest,
                **self._identity,
                "version": VERSION,
                "vocabulary": {
                    "path": str(self._vocabulary.path),
                    "sha256": self._vocabulary.sha256,
                    "size": self._vocabulary.size,
                },
                "features": list(self.features),
                "dtype": self._dtype.str,
                "eos": False,
                "num_examples": self._num_examples,
                "tokens": tokens,
                "files": files,
            }
            write_json(self._temporary / MANIFEST, full)
            self._replace()
        return full

    def _replace(self) -> None:
        old = self.target.with_name(f".{self.target.name}.old{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(old)
        self._temporary.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)

    def _close(self) -> None:
        for file in [*self._files.values(), *([self._examples] if self._examples else [])]:
            file.close()

    def __exit__(self, *exception: object) -> None:
        """Removes what was not finished."""
        try:
            self._close()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


class _disk_errors:  # noqa: N801 (reads as a verb at its uses)
    """Turns a full or read-only disk into a message."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space left while writing the cache {self._path}; nothing was kept of it. "
                "Free some space or put it elsewhere: --gin.CACHE_DIR=..."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"The cache {self._path} cannot be written: {error.strerror}. "
                "Choose another place: --gin.CACHE_DIR=..."
            ) from error


def _names(cache_dir: pathlib.Path) -> tuple[list[str], list[str]]:
    """Names of cached tasks and of mixture files."""
    if not cache_dir.is_dir():
        return [], []
    tasks, mixtures = [], []
    for entry in sorted(cache_dir.iterdir()):
        if entry.name.endswith(".mixture.json"):
            mixtures.append(urllib.parse.unquote(entry.name.removesuffix(".mixture.json")))
        elif not entry.name.startswith(".") and any(entry.glob(f"*/{MANIFEST}")):
            tasks.append(urllib.parse.unquote(entry.name))
    return tasks, mixtures


def list_tasks(cache_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the tasks cached in `cache_dir`, sorted."""
    return _names(pathlib.Path(cache_dir))[0]


def list_splits(cache_dir: str | os.PathLike[str], task: str) -> list[str]:
    """Names of a cached task's splits, sorted; empty when it is not cached."""
    folder = pathlib.Path(cache_dir) / folder_name(task)
    found = folder.glob(f"*/{MANIFEST}") if folder.is_dir() else ()
    return sorted(urllib.parse.unquote(path.parent.name) for path in found)


def write_mixture(
    cache_dir: str | os.PathLike[str], mixture: str, rates: Sequence[tuple[str, float]]
) -> None:
    """Writes the (task, rate) pairs of a mixture beside the caches of its tasks."""
    path = pathlib.Path(cache_dir) / f"{folder_name(mixture)}.mixture.json"
    tasks = [{"task": task, "rate": float(rate)} for task, rate in rates]
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"mixture": mixture, "tasks": tasks, "version": VERSION})


def read_mixture(cache_dir: str | os.PathLike[str], mixture: str) -> list[tuple[str, float]]:
    """The (task, rate) pairs of a cached mixture; a cached task is a mixture of itself, rate 1.

    Raises:
      UserError: nothing of that name is cached; names the nearest.
    """
    cache_dir = pathlib.Path(cache_dir)
    path = cache_dir / f"{folder_name(mixture)}.mixture.json"
    if path.exists():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["tasks"]
            return [(str(row["task"]), float(row["rate"])) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The mixture file {path} is damaged ({error}). Build it again: "
                f"python run.py cache --gin.MIXTURE={mixture}"
            ) from error
    tasks, mixtures = _names(cache_dir)
    if mixture in tasks:
        return [(mixture, 1.0)]
    known = sorted({*tasks, *mixtures})
    raise UserError(
        f"MIXTURE={mixture} is not in the cache {cache_dir}, which holds "
        f"{', '.join(known) if known else 'nothing'}.{did_you_mean(mixture, known)} "
        f"Build it first: python run.py cache --gin.MIXTURE={mixture} --gin.CACHE_DIR={cache_dir}"
    )


def _rebuild(manifest_path: pathlib.Path, problem: str) -> UserError:
    folder = manifest_path.parent
    return UserError(
        f"The cache {folder} is damaged: {problem}. Remove that folder and build it again with "
        "python run.py cache."
    )


def read_manifest(
    cache_dir: str | os.PathLike[str], task: str, split: str
) -> dict[str, Any] | None:
    """The manifest of one task's split, or None when it is not cached; UserError when damaged."""
    path = split_path(cache_dir, task, split) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        assert isinstance(manifest["files"], dict) and isinstance(manifest["features"], list)
        int(manifest["num_examples"]), str(manifest["vocabulary"]["sha256"])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise _rebuild(
            path, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if version != VERSION:
        raise _rebuild(path, f"its format is version {version}, this program reads {VERSION}")
    return manifest


def _missing(cache_dir: pathlib.Path, task: str, split: str) -> UserError:
    splits = list_splits(cache_dir, task)
    if splits:
        return UserError(
            f"Task {task} has no split {split!r} in the cache {cache_dir}; it has "
            f"{', '.join(splits)}.{did_you_mean(split, splits)}"
        )
    tasks = list_tasks(cache_dir)
    return UserError(
        f"Task {task} is not in the cache {cache_dir}, which holds "
        f"{', '.join(tasks) if tasks else 'nothing'}.{did_you_mean(task, tasks)} "
        f"Build it first: python run.py cache --gin.MIXTURE={task} --gin.CACHE_DIR={cache_dir}"
    )


def _check_files(folder: pathlib.Path, manifest: Mapping[str, Any], verify: bool | None) -> None:
    files: Mapping[str, Mapping[str, int]] = manifest["files"]
    whole = sum(entry["bytes"] for entry in files.values()) <= _FULL_CHECK
    whole = whole if verify is None else verify
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            raise _rebuild(folder / MANIFEST, f"{name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _rebuild(
                folder / MANIFEST,
                f"{name} has {size} bytes where the manifest says {expected['bytes']}",
            )
        if verify is False:
            continue
        found = _checksums(path, whole)
        if any(found[key] != expected[key] for key in found):
            raise _rebuild(folder / MANIFEST, f"the checksum of {name} differs from the manifest")


def _load_feature(folder: pathlib.Path, name: str, rows: int) -> Ragged:
    try:
        # An empty array cannot be mapped.
        path = folder / f"{name}.tokens.npy"
        empty = path.stat().st_size == _HEADER
        tokens = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
        offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _rebuild(folder / MANIFEST, f"feature {name} cannot be read ({error})") from error
    if offsets.shape != (rows + 1,) or int(offsets[0]) != 0 or int(offsets[-1]) != len(tokens):
        raise _rebuild(folder / MANIFEST, f"the offsets of feature {name} do not fit its tokens")
    return Ragged(tokens, offsets)


def open_cache(
    cache_dir: str | os.PathLike[str],
    task: str,
    split: str,
    vocabulary: HasHash | None = None,
    *,
    verify: bool | None = None,
    allow_empty: bool = False,
) -> Cache:
    """Opens one task's split as memory maps.

    Args:
      cache_dir: the folder given to the cache stage.
      task: a task's name (for a mixture see `read_mixture`).
      split: e.g. "train".
      vocabulary: when given, the cache must have been made with it.
      verify: True checksums every byte, False only sizes; None every byte up to 256 MiB, and above
        that the first and last MiB of each file.
      allow_empty: return a cache of no examples instead of raising.

    Raises:
      UserError: not cached, damaged or truncated, made with another vocabulary, or empty.
    """
    cache_dir = pathlib.Path(cache_dir)
    manifest = read_manifest(cache_dir, task, split)
    if manifest is None:
        raise _missing(cache_dir, task, split)
    folder = split_path(cache_dir, task, split)
    made_with = manifest["vocabulary"]
    if vocabulary is not None and made_with["sha256"] != vocabulary.sha256:
        raise UserError(
            f"The cache {folder} was made with vocabulary {made_with['path']} (sha256 "
            f"{made_with['sha256'][:12]}, {made_with['size']} pieces), but VOCABULARY="
            f"{vocabulary.path} is {vocabulary.sha256[:12]} ({vocabulary.size} pieces). Use the "
            "same file, or build a cache for this one in another CACHE_DIR."
        )
    _check_files(folder, manifest, verify)
    rows = int(manifest["num_examples"])
    if rows == 0 and not allow_empty:
        raise UserError(
            f"The cache {folder} is empty: 0 examples of {manifest.get('documents', 0)} documents "
            f"(skipped: {manifest.get('skipped') or 'none'}). Check the source "
            f"{manifest.get('source', task)}."
        )
    features = {name: _load_feature(folder, name, rows) for name in manifest["features"]}
    return Cache(folder, manifest, features)
