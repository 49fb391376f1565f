"""Tokenise a task or mixture once, into the cache that every training stage reads.

The only training-side stage that imports seqio and TensorFlow (extra `[data]`).
"""

import dataclasses
import itertools
from typing import Any

from chatyuan.errors import UserError, did_you_mean
from chatyuan.text.vocabulary import Vocabulary


def _field(help_text: str, **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tokenised, with what, into which folder."""

    mixture: str | tuple[str, ...] = _field(
        "seqio task or mixture, or file:PATH (.txt, .jsonl, .json, .parquet); or several"
    )
    vocabulary: str = _field("SentencePiece .model file")
    cache_dir: str = _field("folder of all caches")
    splits: tuple[str, ...] = _field(
        "splits to cache; those a task lacks are left out", default=("train", "validation", "test")
    )
    task_modules: tuple[str, ...] = _field("modules that register tasks", default=("tasks",))
    input_length: int = _field(
        "'inputs' length for tasks that trim by themselves (tokens)", default=512
    )
    target_length: int = _field(
        "'targets' length for tasks that trim by themselves (tokens)", default=512
    )
    force: bool = _field("build caches again that are up to date", default=False)


def run(config: Config) -> None:
    """Writes the caches and prints one line each."""
    from chatyuan.data.seqio_build import build_cache

    vocabulary = Vocabulary(config.vocabulary)
    for mixture in _mixtures(config):
        build_cache(
            mixture,
            vocabulary=vocabulary,
            cache_dir=config.cache_dir,
            splits=config.splits,
            task_modules=config.task_modules,
            sequence_length={"inputs": config.input_length, "targets": config.target_length},
            force=config.force,
            report=lambda line: print(line, flush=True),
        )


def dry_run(config: Config) -> None:
    """Resolves the mixture, opens every task and shows its first two examples, tokenised."""
    from chatyuan.data.seqio_build import resolve
    from chatyuan.text.files import Skipped

    vocabulary = Vocabulary(config.vocabulary)
    lengths = {"inputs": config.input_length, "targets": config.target_length}
    tasks = [
        task
        for mixture in _mixtures(config)
        for task in resolve(
            mixture,
            task_modules=config.task_modules,
            sequence_length=lengths,
            vocabulary=vocabulary,
        ).tasks
    ]
    for task in tasks:
        first, *_ = splits = [split for split in config.splits if split in task.splits] or [""]
        if first != config.splits[0]:
            raise UserError(
                f"Task {task.name} has no split {config.splits[0]!r}; it has "
                f"{', '.join(task.splits)}.{did_you_mean(config.splits[0], task.splits)}"
            )
        print(f"{task.name}: splits {', '.join(splits)}")
        for row in itertools.islice(task.rows(first, Skipped()), 2):
            for feature in task.features:
                if task.tokenized:
                    print(f"  {feature}: {list(row[feature])[:20]}")
                else:
                    pieces = [vocabulary.piece(i) for i in vocabulary.encode(row[feature])[:40]]
                    print(f"  {feature}: {' '.join(pieces)}".replace("\n", "\\n"))


def _mixtures(config: Config) -> tuple[str, ...]:
    return (config.mixture,) if isinstance(config.mixture, str) else config.mixture
