"""Batches for losses that compare answers: which answers, and what the reference says of them.

    loader = PairLoader(config, vocabulary, pairs="best_worst")
    loader.reference = ...   # float32 [len(loader.kept), columns], computed once

A row of K ranked answers becomes one pair or many:

    best_worst   its best and its worst answer; the others are not even computed
    best_rest    its best answer against every other
    all          every two answers of different rank, as the stage `reward` does

The pairs of a prompt are one gradient, their mean. numpy only.
"""

import copy
import dataclasses
from typing import Any

import numpy as np

from chatyuan.data.cache import Cache
from chatyuan.data.loader import DataConfig
from chatyuan.data.preferences import PreferenceLoader
from chatyuan.errors import UserError, did_you_mean
from chatyuan.text.vocabulary import Vocabulary

PAIRS = ("best_worst", "best_rest", "all")


class PairLoader(PreferenceLoader):
    """A `PreferenceLoader` whose batches also hold what the reference says of each answer.

    Further features: reference float32 [P, C], nats a whole answer. C columns of `answers` and
    `answer_lengths` are the K answers and, with `foreign`, one answer of the next row: KTO's
    reference point is the KL of answers that do not belong to their prompt.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        *,
        pairs: str = "best_worst",
        foreign: bool = False,
        shuffle: bool = True,
    ) -> None:
        """Opens the caches; see `PreferenceLoader`.

        Args:
          config: mixture, lengths, batch (prompts), seed.
          vocabulary: of the caches.
          pairs: a name of PAIRS.
          foreign: whether each prompt has an answer of another one, in the last column.
          shuffle: False gives the rows in the caches' order, once.

        Raises:
          UserError: as there; an unknown name; one row alone, which has no other.
        """
        if pairs not in PAIRS:
            raise UserError(
                f"pairs = {pairs!r} must be one of {', '.join(PAIRS)}.{did_you_mean(pairs, PAIRS)}"
            )
        self.pairs, self.foreign = pairs, foreign
        # [rows of `kept`, C] in their order; None: batches hold zeros.
        self.reference: np.ndarray | None = None
        super().__init__(config, vocabulary, shuffle=shuffle)
        if pairs == "best_worst":
            self.answers = 2
        if foreign and min(len(cache) for cache in self.caches) < 2:
            raise UserError(
                "kto compares with answers of other prompts, and the cache "
                f"{min(self.caches, key=len).path} has one row only; add rows, or choose another "
                "loss."
            )

    @property
    def columns(self) -> int:
        """Answers that are scored for each prompt."""
        return self.answers + self.foreign

    def _answers(self, cache: Cache, row: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        cut, ranks, scores = super()._answers(cache, row)
        if self.pairs != "best_worst":
            return cut, ranks, scores
        two = [int(np.argmin(ranks)), int(np.argmax(ranks))]
        return [cut[k] for k in two], ranks[two], scores[two]

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        batch = super()._empty(rows)
        if self.foreign:
            for name in ("answers", "answer_lengths"):
                wide = [(0, 0), (0, 1)] + [(0, 0)] * (batch[name].ndim - 2)
                fill = self.pad_id if name == "answers" else 0
                batch[name] = np.pad(batch[name], wide, constant_values=fill)
        return batch | {"reference": np.zeros((rows, self.columns), np.float32)}

    def _fill(self, batch: dict[str, np.ndarray], place: int, number: int) -> None:
        super()._fill(batch, place, number)
        if self.foreign:
            source, row = self.kept[number]
            cache = self.caches[source]
            other = super()._answers(cache, (row + 1) % len(cache))[0][0]
            batch["answers"][place, -1, : len(other)] = other
            batch["answers"][place, -1, len(other)] = self.eos_id
            batch["answer_lengths"][place, -1] = len(other) + 1
        if self.reference is not None:
            batch["reference"][place] = self.reference[number]

    def once(self, batch_size: int) -> "PairLoader":
        """A loader of the same rows in the caches' order, once, in batches of another size."""
        loader = copy.copy(self)
        loader.config = dataclasses.replace(self.config, batch_size=batch_size)
        loader.shuffle = False
        return loader

    def identity(self) -> dict[str, Any]:
        """What determines the rows and tokens of `kept`, for a file computed from them."""
        config = self.config
        return {
            "mixture": config.mixture,
            "split": config.split,
            "caches": [dict(cache.manifest["files"]) for cache in self.caches],
            "vocabulary": str(self.caches[0].manifest["vocabulary"]["sha256"]),
            "lengths": [config.input_length, config.target_length],
            "pairs": self.pairs,
            "foreign": self.foreign,
            "rows": len(self.kept),
            "columns": self.columns,
        }
