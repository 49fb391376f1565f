"""Builds token caches of seqio tasks and mixtures, and of files by path.

Text is tokenised with SentencePiece threads in blocks, not example by example inside tf.data (which
is five times slower). seqio and TensorFlow are imported only when a name is not a `file:` path, and
only through `chatyuan.data.seqio_tasks`.
"""

import dataclasses
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from chatyuan.data import cache, sources
from chatyuan.errors import UserError, did_you_mean
from chatyuan.text import files, preferences
from chatyuan.text.vocabulary import Vocabulary

BUILDER_VERSION = 1
SPLITS = ("train", "validation", "test")
_BLOCK_ROWS = 4096
_NUMBERS = {"answer_lengths": "<i4", "ranks": "<i4", "scores": "<f4"}  # of preferences
_BLOCK_CHARACTERS = 4_000_000

Rate = Callable[[str, Mapping[str, int]], float]
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A task or mixture by name: its tasks, and the rate of each given their train examples."""

    name: str
    tasks: tuple[sources.BuildTask, ...]
    rate: Rate


def resolve(
    mixture: str,
    *,
    task_modules: Sequence[str] = ("tasks",),
    sequence_length: Mapping[str, int] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Resolved:
    """Finds a `file:` path, or a seqio task or mixture registered by `task_modules`.

    Raises:
      UserError: unknown name (did you mean), a module that cannot be imported, a task whose own
        vocabulary is not `vocabulary`.
    """
    if mixture.startswith(sources.FILE_PREFIX):
        task = sources.file_task(mixture)
        return Resolved(mixture, (task,), lambda name, counts: 1.0)
    # Imported here: a cache of files needs neither TensorFlow (seconds, a gigabyte) nor seqio.
    from chatyuan.data import seqio_tasks

    tasks, rate = seqio_tasks.resolve(
        mixture,
        task_modules=task_modules,
        sequence_length=sequence_length,
        vocabulary=vocabulary,
    )
    return Resolved(mixture, tasks, rate)


def iter_texts(
    mixture: str, *, split: str = "train", task_modules: Sequence[str] = ("tasks",)
) -> Iterator[str]:
    """Every string of a mixture's split, for training a tokenizer: inputs, then targets, of a task
    at a time. Only text tasks; tasks that already yield ids raise UserError.
    """
    for task in resolve(mixture, task_modules=task_modules).tasks:
        if task.tokenized:
            raise UserError(
                f"Task {task.name} yields token ids of its own vocabulary, not text; a tokenizer "
                "cannot be trained on it. Use a text task or a file: path."
            )
        if split not in task.splits:
            continue
        for row in task.rows(split, files.Skipped()):
            for feature in task.features:
                yield row[feature]


def build_cache(
    mixture: str,
    *,
    vocabulary: Vocabulary,
    cache_dir: str | os.PathLike[str],
    splits: Sequence[str] = SPLITS,
    task_modules: Sequence[str] = ("tasks",),
    sequence_length: Mapping[str, int] | None = None,
    example_splits: Sequence[str] = ("validation", "test"),
    threads: int | None = None,
    force: bool = False,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Tokenises every task of a mixture and writes its caches and mixture file.

    Args:
      mixture: a seqio task or mixture, or `file:PATH`.
      vocabulary: tokenises text tasks; tasks with a vocabulary of their own must have this one.
      cache_dir: where (`chatyuan.data.cache` says how).
      splits: those that a task lacks, or that turn out empty, are left out; every task must have
        examples in the first.
      task_modules: imported to register tasks.
      sequence_length: passed to seqio tasks that make model-ready features of a fixed length.
      example_splits: splits that also keep their untokenised examples, for evaluation.
      threads: SentencePiece threads; None uses every core.
      force: build even what is up to date.
      report: receives one line per cache.

    Returns:
      The manifests, task by task and split by split; those up to date hold `"reused": True`.

    Raises:
      UserError: see `resolve`; an empty train split; a full disk.
    """
    resolved = resolve(
        mixture, task_modules=task_modules, sequence_length=sequence_length, vocabulary=vocabulary
    )
    manifests = []
    for task in resolved.tasks:
        _check_splits(task, splits)
        for split in (split for split in splits if split in task.splits):
            manifest = _build_or_reuse(
                task,
                split,
                vocabulary=vocabulary,
                cache_dir=cache_dir,
                keep_examples=split in example_splits,
                may_be_empty=split != splits[0],
                threads=threads,
                force=force,
            )
            if manifest is None:
                continue
            manifests.append(manifest)
            if report is not None:
                report(describe(manifest))
    counts = {
        manifest["task"]: int(manifest["num_examples"])
        for manifest in manifests
        if manifest["split"] == splits[0]
    }
    rates = [(task.name, resolved.rate(task.name, counts)) for task in resolved.tasks]
    cache.write_mixture(cache_dir, mixture, rates)
    return manifests


def describe(manifest: Mapping[str, Any]) -> str:
    """One line about a manifest: counts, what was skipped and why, time."""
    tokens = sum(manifest["tokens"].values())
    skipped = manifest.get("skipped") or {}
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    how = "up to date" if manifest.get("reused") else f"{manifest.get('seconds', 0):.1f} s"
    line = (
        f"{manifest['task']} {manifest['split']}: {manifest['num_examples']} examples, "
        f"{tokens} tokens, {how}"
    )
    return f"{line}; skipped {lost}" if lost else line


def _check_splits(task: sources.BuildTask, splits: Sequence[str]) -> None:
    if not splits:
        raise UserError("splits is empty; name at least one, for example train.")
    if splits[0] not in task.splits:
        raise UserError(
            f"Task {task.name} has no split {splits[0]!r}; it has {', '.join(task.splits)}."
            f"{did_you_mean(splits[0], task.splits)}"
        )


def _build_or_reuse(
    task: sources.BuildTask,
    split: str,
    *,
    vocabulary: Vocabulary,
    cache_dir: str | os.PathLike[str],
    keep_examples: bool,
    may_be_empty: bool,
    threads: int | None,
    force: bool,
) -> dict[str, Any] | None:
    """The manifest of one split; None when it has no examples and may be empty."""
    key = sources.digest(
        BUILDER_VERSION, task.key, split, vocabulary.sha256, vocabulary.codec, keep_examples
    )
    if not force:
        try:
            manifest = cache.read_manifest(cache_dir, task.name, split)
            if manifest is not None and manifest.get("key") == key:
                cache.open_cache(cache_dir, task.name, split, vocabulary, allow_empty=True)
                return {**manifest, "reused": True}
        except UserError:
            pass  # damaged: built again
    started = time.monotonic()
    skipped = files.Skipped()
    rows = _guarded(task, split, skipped)
    numbers = _NUMBERS if task.features == preferences.FEATURES else {}
    with cache.CacheWriter(
        cache_dir,
        task.name,
        split,
        features=[*task.features, *numbers],
        vocabulary=vocabulary,
        keep_examples=keep_examples,
        numbers=numbers,
    ) as writer:
        if numbers:
            documents = _write_preferences(rows, writer, vocabulary, threads)
        elif task.tokenized:
            documents = _write_ids(task, rows, writer, vocabulary, skipped)
        else:
            documents = _write_text(task, rows, writer, vocabulary, skipped, threads)
        if documents == 0 and may_be_empty:
            shutil.rmtree(writer.target, ignore_errors=True)  # of an earlier build
            return None
        if documents == 0:
            lost = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            raise UserError(
                f"Task {task.name} has no example in its {split} split (source: {task.source}; "
                f"skipped: {lost or 'none'}). Check the source."
            )
        return writer.finish(
            {
                "key": key,
                "source": task.source,
                "preprocessors": list(task.preprocessors),
                "documents": documents + sum(skipped.values()),
                "skipped": dict(sorted(skipped.items())),
                "codec": vocabulary.codec,
                "seconds": round(time.monotonic() - started, 3),
            }
        )


def _guarded(
    task: sources.BuildTask, split: str, skipped: files.Skipped
) -> Iterator[dict[str, Any]]:
    """Rows of a task; whatever its own code raises becomes a message that names it."""
    try:
        yield from task.rows(split, skipped)
    except (UserError, MemoryError, GeneratorExit):
        raise
    except Exception as error:
        raise UserError(
            f"Task {task.name} failed while reading its {split} split ({task.source}): "
            f"{type(error).__name__}: {error}"
        ) from error


def _blocks(rows: Iterable[dict[str, Any]], features: Sequence[str]) -> Iterator[list[dict]]:
    block: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += sum(len(row[feature]) for feature in features)
        if len(block) >= _BLOCK_ROWS or characters >= _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _write_text(
    task: sources.BuildTask,
    rows: Iterable[dict[str, Any]],
    writer: cache.CacheWriter,
    vocabulary: Vocabulary,
    skipped: files.Skipped,
    threads: int | None,
) -> int:
    def usable() -> Iterator[dict[str, Any]]:
        for row in rows:
            if all(row[feature].strip() for feature in task.features):
                yield row
            else:
                skipped["empty"] += 1

    documents = 0
    for block in _blocks(usable(), task.features):
        flat, lengths = {}, {}
        for feature in task.features:
            texts = [row[feature] for row in block]
            flat[feature], lengths[feature] = vocabulary.encode_flat(texts, threads=threads)
        writer.write(flat, lengths, block)
        documents += len(block)
    return documents


def _write_preferences(
    rows: Iterable[dict[str, Any]],
    writer: cache.CacheWriter,
    vocabulary: Vocabulary,
    threads: int | None,
) -> int:
    """Prompts, their answers one after another, and what says where each ends and ranks."""
    documents = 0
    rows = iter(rows)
    while block := list(itertools.islice(rows, _BLOCK_ROWS)):
        flat, lengths = {}, {}
        flat["inputs"], lengths["inputs"] = vocabulary.encode_flat(
            [row["inputs"] for row in block], threads=threads
        )
        answers = [answer for row in block for answer in row["answers"]]
        flat["answers"], each = vocabulary.encode_flat(answers, threads=threads)
        counts = np.array([len(row["answers"]) for row in block], np.int64)
        lengths["answers"] = np.add.reduceat(each, np.cumsum(counts) - counts)
        flat["answer_lengths"] = each
        for name in ("ranks", "scores"):
            flat[name] = np.array([number for row in block for number in row[name]])
        lengths |= dict.fromkeys(_NUMBERS, counts)
        writer.write(flat, lengths, block)
        documents += len(block)
    return documents


def _strip_eos(row: np.ndarray, eos_id: int | None) -> np.ndarray:
    return row[:-1] if eos_id is not None and len(row) and row[-1] == eos_id else row


def _write_ids(
    task: sources.BuildTask,
    rows: Iterable[dict[str, Any]],
    writer: cache.CacheWriter,
    vocabulary: Vocabulary,
    skipped: files.Skipped,
) -> int:
    documents = 0
    rows = iter(rows)
    while block := list(itertools.islice(rows, _BLOCK_ROWS)):
        kept, examples = [], []
        for row in block:
            ids = {name: _strip_eos(row[name], task.eos_id) for name in task.features}
            if not len(ids["targets"] if "targets" in ids else next(iter(ids.values()))):
                skipped["empty"] += 1
                continue
            kept.append(ids)
            examples.append(row.get(sources.EXAMPLE, {}))
        flat, lengths = {}, {}
        for name in task.features:
            parts = [ids[name] for ids in kept]
            flat[name] = np.concatenate(parts) if parts else np.zeros(0, np.int64)
            lengths[name] = np.fromiter(map(len, parts), np.int64, count=len(parts))
            _check_ids(task, name, flat[name], vocabulary)
        writer.write(flat, lengths, examples)
        documents += len(kept)
    return documents


def _check_ids(
    task: sources.BuildTask, feature: str, ids: np.ndarray, vocabulary: Vocabulary
) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary.size):
        worst = int(ids.max() if ids.max() >= vocabulary.size else ids.min())
        raise UserError(
            f"Task {task.name} feature {feature} holds id {worst}, outside VOCABULARY="
            f"{vocabulary.path} ({vocabulary.size} pieces). Give the vocabulary that the task uses."
        )


def cached_path(cache_dir: str | os.PathLike[str], manifest: Mapping[str, Any]) -> pathlib.Path:
    """The folder of a manifest returned by `build_cache`."""
    return cache.split_path(cache_dir, manifest["task"], manifest["split"])
