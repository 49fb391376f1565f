"""Batches of prompts with K ranked answers each, a pure function of (seed, step).

    loader = PreferenceLoader(config, vocabulary)
    for batch in loader.iterate(start_step): ...   # this process's rows

Every epoch is a permutation of its own of all rows of all tasks; step s takes the next batch. No
packing: an answer's score is read at its end. Rows whose answers are the same once they are cut to
`target_length` teach nothing and are left out, counted in `loader.dropped`. jax only in `iterate`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from chatyuan.data.cache import PREFERENCES, Cache, open_cache, read_mixture
from chatyuan.data.keyed import name_key, permute
from chatyuan.data.loader import DataConfig, read_ahead
from chatyuan.errors import UserError
from chatyuan.text.preferences import nothing_left
from chatyuan.text.vocabulary import Vocabulary


def open_preferences(config: DataConfig, vocabulary: Vocabulary | None = None) -> list[Cache]:
    """Opens the caches of `config.mixture`. Raises UserError where one holds no preferences."""
    if not config.mixture or not config.cache_dir:
        raise UserError("MIXTURE and CACHE_DIR must be set: --gin.MIXTURE=... --gin.CACHE_DIR=...")
    caches = []
    for task, rate in read_mixture(config.cache_dir, config.mixture):
        if rate <= 0:
            continue
        cache = open_cache(config.cache_dir, task, config.split, vocabulary)
        if not set(PREFERENCES) <= cache.features.keys():
            raise UserError(
                f"The cache {cache.path} holds {', '.join(cache.features)}, not preferences. It "
                'takes rows like {"prompt": "...", "chosen": "...", "rejected": "..."}.'
            )
        caches.append(cache)
    if not caches:
        raise UserError(f"MIXTURE={config.mixture} has no task with a rate above 0.")
    return caches


class PreferenceLoader:
    """Batches of one process; `batch(step)` is a pure function. Thread safe.

    Features: prompts int32 [P, S] and prompt_lengths [P], end token included; answers int32
    [P, K, T] and answer_lengths [P, K], end token included, 0 = no such answer; ranks int32 [P, K],
    0 the best; scores float32 [P, K]; rows int32 [P], the number of the row, -1 = padding.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        *,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Opens the caches and finds the rows that can be learned from.

        Args:
          config: mixture, lengths, batch (prompts), seed.
          vocabulary: of the caches.
          shuffle: False gives the rows in the caches' order, once.
          process_index, process_count: this process's share of every batch.

        Raises:
          UserError: sizes that do not fit, caches without preferences, nothing left to learn from.
        """
        for name in ("batch_size", "input_length", "target_length"):
            if getattr(config, name) < 2 - (name == "batch_size"):
                raise UserError(
                    f"{name.upper()} = {getattr(config, name)} is too short for preferences."
                )
        if config.batch_size % process_count:
            raise UserError(
                f"BATCH_SIZE={config.batch_size} does not divide over {process_count} processes."
            )
        self.config, self.shuffle = config, shuffle
        self.eos_id, self.pad_id = int(vocabulary.eos_id), int(vocabulary.pad_id)
        self.process_index, self.process_count = process_index, process_count
        self.caches = open_preferences(config, vocabulary)
        self.dropped: Counter[str] = Counter()
        kept = []
        for number, cache in enumerate(self.caches):
            counts = cache.features["ranks"].lengths
            kept += [(number, row) for row in range(len(counts)) if self._usable(cache, row)]
        if not kept:
            raise nothing_left(config.mixture, config.split, self.dropped)
        self.kept = np.array(kept, np.int64)
        self.answers = max(int(cache.features["ranks"].lengths.max()) for cache in self.caches)

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.kept) // self.config.batch_size)

    def _usable(self, cache: Cache, row: int) -> bool:
        answers, _, _ = self._answers(cache, row)
        if len(cache.features["inputs"][row]) == 0:
            self.dropped["empty_prompt"] += 1
        elif len({answer.tobytes() for answer in answers}) < len(answers):
            self.dropped["identical_after_truncation"] += 1
        else:
            return True
        return False

    def _answers(self, cache: Cache, row: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The answers of a row, cut to leave room for the end token; their ranks and scores."""
        lengths = cache.features["answer_lengths"][row].astype(np.int64)
        parts = np.split(cache.features["answers"][row], np.cumsum(lengths)[:-1])
        cut = [part[: self.config.target_length - 1] for part in parts]
        return cut, cache.features["ranks"][row], cache.features["scores"][row]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's prompts of the global batch of `step`."""
        share = self.config.batch_size // self.process_count
        batch = self._empty(share)
        start = step * self.config.batch_size + self.process_index * share
        for place in range(share):
            number = self._row(start + place)
            if number >= 0:
                self._fill(batch, place, number)
        return batch

    def _row(self, position: int) -> int:
        """The row at a position of the stream, -1 past the end of a single pass."""
        epoch, inside = divmod(position, len(self.kept))
        if not self.shuffle:
            return inside if epoch == 0 else -1
        key = name_key("preferences", self.config.seed, epoch)
        return int(permute(inside, len(self.kept), key))

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        config, k = self.config, self.answers
        return {
            "prompts": np.full((rows, config.input_length), self.pad_id, np.int32),
            "prompt_lengths": np.zeros(rows, np.int32),
            "answers": np.full((rows, k, config.target_length), self.pad_id, np.int32),
            "answer_lengths": np.zeros((rows, k), np.int32),
            "ranks": np.zeros((rows, k), np.int32),
            "scores": np.zeros((rows, k), np.float32),
            "rows": np.full(rows, -1, np.int32),
        }

    def _fill(self, batch: dict[str, np.ndarray], place: int, number: int) -> None:
        source, row = self.kept[number]
        cache = self.caches[source]
        prompt = cache.features["inputs"][row][-(self.config.input_length - 1) :]
        batch["prompts"][place, : len(prompt)] = prompt
        batch["prompts"][place, len(prompt)] = self.eos_id
        batch["prompt_lengths"][place] = len(prompt) + 1
        answers, ranks, scores = self._answers(cache, row)
        for k, answer in enumerate(answers):
            batch["answers"][place, k, : len(answer)] = answer
            batch["answers"][place, k, len(answer)] = self.eos_id
            batch["answer_lengths"][place, k] = len(answer) + 1
        batch["ranks"][place, : len(ranks)] = ranks
        batch["scores"][place, : len(scores)] = scores
        batch["rows"][place] = number

    def padding(self) -> dict[str, np.ndarray]:
        """A batch that holds nothing: the shapes and dtypes of all."""
        return self._empty(self.config.batch_size // self.process_count)

    def warm_up(self, step: int = 0) -> None:
        """Reads the files of a step, so that damage is told before anything is compiled."""
        self.batch(step)

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Any]:
        """`batch(start_step)`, `batch(start_step + 1)`, ... prepared ahead by Grain's threads."""
        return read_ahead(self.batch, self.config, start_step, stop_step)
