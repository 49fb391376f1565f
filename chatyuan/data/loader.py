"""Batches from token caches: the global batch is a pure function of (seed, step).

    loader = Loader(config, objective, open_sources(config, vocabulary))
    for batch in loader.iterate(start_step):  # this process's rows, as numpy arrays

A mixture is one endless stream of rows (`stream`); step s takes the next batch of them, and each
process its contiguous share. So the number of hosts does not matter, and a run continues from its
step alone. Imports neither seqio nor TensorFlow, and jax only through grain in `iterate`.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from chatyuan.data import packing, rows, stream
from chatyuan.data.cache import best_answers, open_cache, read_mixture
from chatyuan.data.objectives import PAIR, UNLIMITED, Objective
from chatyuan.data.stream import Source
from chatyuan.errors import UserError
from chatyuan.text.vocabulary import Vocabulary

Parts = Sequence[tuple[int, int]]  # (start, stop) of rows, ascending

_SAVE_EVERY = 16  # blocks
_SAMPLE = 20_000  # documents looked at for the natural target length


def _field(default: object, text: str, unit: str = "") -> dataclasses.Field:
    return dataclasses.field(default=default, metadata={"help": text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, in which shape and order."""

    mixture: str = _field("", "a cached task or mixture")
    cache_dir: str = _field("", "folder of the token caches")
    split: str = _field("train", "split of every task")
    input_length: int = _field(512, "encoder row, end-of-sequence included", "tokens")
    target_length: int = _field(
        0,
        "decoder row, end-of-sequence included; one stack has rows of input_length + target_length."
        " 0 for an encoder-decoder: what wastes least for this objective and data",
        "tokens",
    )
    batch_size: int = _field(128, "rows of the global batch", "sequences")
    seed: int = _field(0, "orders the examples and draws the noise")
    pack: bool = _field(True, "several examples share a row; False puts one in each")
    concatenate: bool = _field(
        False, "join documents and split them into equal pieces, as T5 did, instead of packing"
    )
    batch_ramp: tuple[tuple[int, int], ...] = _field(
        (), "(from step, sequences) pairs of a growing batch; the rest of the rows is padding"
    )
    threads: int = _field(2, "threads that prepare batches")
    prefetch: int = _field(4, "batches prepared ahead")


def open_sources(config: DataConfig, vocabulary: Vocabulary | None = None) -> list[Source]:
    """Opens the caches of `config.mixture` with their rates.

    A cache of preferences is read as pairs of a prompt and its best answer: what a model is tuned
    on before preferences are optimised.

    Raises:
      UserError: not cached, damaged, empty, or made with another vocabulary.
    """
    if not config.mixture:
        raise UserError("MIXTURE must be set to a cached task or mixture: --gin.MIXTURE=...")
    if not config.cache_dir:
        raise UserError("CACHE_DIR must be set to the folder of the caches: --gin.CACHE_DIR=...")
    sources = []
    for task, rate in read_mixture(config.cache_dir, config.mixture):
        if rate <= 0:
            continue
        cache = open_cache(config.cache_dir, task, config.split, vocabulary)
        targets = cache.features.get("targets", best_answers(cache))
        if targets is None:
            raise UserError(
                f"The cache {cache.path} has features {', '.join(cache.features)}; the loader "
                "needs `targets` (and `inputs` for pairs). Rename them in the task's preprocessors."
            )
        files = json.dumps(cache.manifest["files"], sort_keys=True)
        sources.append(
            Source(
                name=task,
                targets=targets,
                inputs=cache.features.get("inputs"),
                rate=rate,
                fingerprint=hashlib.sha256(files.encode()).hexdigest()[:16],
            )
        )
    if not sources:
        raise UserError(f"MIXTURE={config.mixture} has no task with a rate above 0.")
    return sources


def natural_target_length(
    objective: Objective, sources: Sequence[Source], config: DataConfig
) -> int:
    """The decoder row that fills as evenly as encoder rows of `config.input_length`.

    Packed: the ratio of all targets to all inputs, so that neither side waits for the other.
    Otherwise: the targets of the longest piece that fits the encoder (T5's
    `random_spans_targets_length`). Pairs count with their own lengths.
    """
    room = config.input_length
    total_a = total_b = longest = 0.0
    weight = sum(source.rate for source in sources)
    for source in sources:
        count = min(len(source.targets), _SAMPLE)
        picked = np.unique(np.linspace(0, len(source.targets) - 1, count).astype(np.int64))
        lengths = source.targets.offsets[picked + 1] - source.targets.offsets[picked]
        if source.inputs is not None:
            inputs = source.inputs.offsets[picked + 1] - source.inputs.offsets[picked]
            a, b = float(np.minimum(inputs + 1, room).mean()), float((lengths + 1).mean())
            top = int(lengths.max()) + 1
        else:
            keys = packing.piece_keys(np.zeros(len(picked), np.uint64), picked)
            a, b, top = packing.expected_sizes(objective.variants, lengths, keys, room)
        total_a += source.rate / weight * a
        total_b += source.rate / weight * b
        longest = max(longest, top)
    if config.pack and not config.concatenate:
        return max(2, round(room * total_b / max(total_a, 1.0)))
    return max(2, int(longest))


@dataclasses.dataclass(frozen=True)
class SourceStats:
    """What was taken of one source up to a step."""

    source: str
    documents: int
    tokens: int  # of the documents, without what the objective adds
    epochs: float
    pieces: int  # segments; more than documents where documents were split
    empty: int  # documents without a token, skipped
    truncated_inputs: int  # pairs whose inputs did not fit
    truncated_targets: int


class _Rows:
    """Checks, and rows of the stream as batches; what `Loader` and `EvalLoader` share."""

    def __init__(
        self,
        config: DataConfig,
        objective: Objective,
        sources: Sequence[Source],
        *,
        shuffle: bool,
        index_path: str | os.PathLike[str] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        rows: Parts | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.objective = objective
        self.config = _checked(config, objective, self.sources, process_count)
        share = self.config.batch_size // process_count
        self.rows = rows or ((process_index * share, (process_index + 1) * share),)
        self.lengths = (self.config.input_length, self.config.target_length)
        self.order = stream.Order(self.sources, config.seed, shuffle)
        planner = stream.Planner(
            self.order,
            objective,
            self.lengths,
            pack=config.pack,
            concatenate=config.concatenate,
        )
        self.index = stream.BlockIndex(planner, fingerprint=self._fingerprint(), path=index_path)

    def _fingerprint(self) -> str:
        """Changes with everything that the plan of rows depends on."""
        sources = [
            (s.name, len(s.targets), s.num_tokens, s.rate, s.fingerprint) for s in self.sources
        ]
        v = self.objective.variants
        parts = [
            *sources, self.lengths, self.config.seed, self.config.pack, self.config.concatenate,
            self.objective.config, self.objective.architecture, v.table.tolist(),
            stream.WINDOW, stream.BLOCK_TOKENS, packing.POOL, packing.TOLERANCE, packing.VERSION,
        ]  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def whole(self) -> Self:
        """The loader of all rows of every batch, whatever this process's share is."""
        loader = copy.copy(self)
        loader.rows = ((0, self.config.batch_size),)
        return loader

    def _read(self, first: int, active: int, limit: int | None) -> dict:
        """This process's part of the batch that holds `active` rows of the stream from `first` on.

        With a `limit` on blocks the stream ends; what is missing is padding of weight 0.
        """
        taken: list[tuple[stream.Block, np.ndarray]] = []
        count = sum(stop - start for start, stop in self.rows)
        for start, stop in self.rows:
            missing = min(stop, active) - start
            row = first + start
            while missing > 0:
                number, inside = self.index.find(row, limit)
                if limit is not None and number >= limit:
                    break
                block = self.index.block(number)
                some = block.row_order[inside : inside + missing]
                taken.append((block, some))
                missing -= len(some)
                row += len(some)
        segments, text = self._segments(taken)
        make = (
            rows.decoder_only_batch if self.objective.decoder_only else rows.encoder_decoder_batch
        )
        return make(self.objective, segments, text, count, self.lengths)

    def _segments(
        self, taken: Sequence[tuple[stream.Block, np.ndarray]]
    ) -> tuple[rows.Segments, np.ndarray]:
        """The segments of some rows of some blocks, and their tokens gathered one after another."""
        columns: list[list[np.ndarray]] = [[] for _ in range(10)]
        base = 0
        for block, order in taken:
            row, piece = _pieces_of(block, order)
            e = block.pieces.example[piece]
            start = block.pieces.start[piece]
            num_inputs = block.examples["num_inputs"][e]
            variant = block.examples["variant"][e]
            of_pair = self.objective.variants.table["kind"][variant] == PAIR
            values = (
                # Only the first piece of a segment says in which row it is.
                np.where(block.pieces.joined[piece] == 1, -1, row + base),
                block.source_e[e],
                block.document_e[e],
                start,
                block.pieces.length[piece],
                num_inputs,
                block.cut_inputs_e[e],
                np.where(of_pair, num_inputs, -1),
                variant,
                packing.piece_keys(block.examples["key"][e], start),
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            base += len(order)
        if not taken:
            none = np.zeros(0, np.int64)
            return rows.Segments(none, none, none, none, none, none.astype(np.uint64)), none
        row, source, document, start, length, num_inputs, cut, pair_inputs, variant, key = (
            np.concatenate(column) for column in columns
        )
        taken_tokens = length + num_inputs
        at = np.cumsum(taken_tokens) - taken_tokens
        text = np.empty(int(taken_tokens.sum()), np.int32)
        for s, ragged in enumerate(self.sources):
            of = slice(None) if len(self.sources) == 1 else np.flatnonzero(source == s)
            found = document[of]
            begin = ragged.targets.offsets[found] + start[of]
            rows.gather(ragged.targets.tokens, begin, length[of], at[of] + num_inputs[of], text)
            if ragged.inputs is not None:
                begin = ragged.inputs.offsets[found] + cut[of]
                rows.gather(ragged.inputs.tokens, begin, num_inputs[of], at[of], text)
        heads = np.flatnonzero(row >= 0)
        segments = rows.Segments(
            row=row[heads],
            at=at[heads],
            num_inputs=pair_inputs[heads],
            length=np.add.reduceat(taken_tokens, heads),
            variant=variant[heads],
            key=key[heads],
        )
        return segments, text


def _pieces_of(block: stream.Block, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row counted from 0, piece) of every piece of the rows `order` of a block."""
    starts = block.pieces.row_offsets[order]
    counts = block.pieces.row_offsets[order + 1] - starts
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    piece = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return np.repeat(np.arange(len(order)), counts), piece


def _checked(
    config: DataConfig, objective: Objective, sources: Sequence[Source], process_count: int
) -> DataConfig:
    """The configuration with its target length resolved; raises UserError where it cannot work."""
    pairs = any(source.inputs is not None for source in sources)
    texts = [source.name for source in sources if source.inputs is None]
    hollow = [source.name for source in sources if source.num_tokens == 0]
    if hollow:
        raise UserError(
            f"{', '.join(hollow)}: the cache holds no tokens, only empty examples. Check the "
            "source of that task, or leave it out of the mixture."
        )
    if texts and not objective.takes_text:
        raise UserError(
            f"Objective seq2seq needs tasks with inputs and targets, and {', '.join(texts)} "
            f"hold{'s' if len(texts) == 1 else ''} plain text. Use span_corruption, prefix_lm or "
            "another text objective."
        )
    if pairs and config.concatenate:
        raise UserError(
            "concatenate=True joins plain texts, and "
            + ", ".join(source.name for source in sources if source.inputs is not None)
            + " has inputs and targets. Set DataConfig.concatenate = False."
        )
    if config.concatenate and not config.pack:
        raise UserError("concatenate=True with pack=False contradict each other; set one of them.")
    for name in ("batch_size", "input_length"):
        if getattr(config, name) < 1:
            raise UserError(f"{name.upper()}={getattr(config, name)} must be at least 1.")
    if config.batch_size % process_count:
        lower = config.batch_size - config.batch_size % process_count
        raise UserError(
            f"BATCH_SIZE={config.batch_size} does not divide over {process_count} processes; use "
            f"--gin.BATCH_SIZE={lower + process_count}" + (f" or {lower}." if lower else ".")
        )
    if config.target_length < 0:
        raise UserError(f"TARGET_LENGTH={config.target_length} must not be negative.")
    if config.target_length == 0 and not objective.decoder_only:
        # Room enough that the inputs decide; the targets are computed next.
        objective.check_lengths(config.input_length, UNLIMITED, pairs=pairs)
        natural = natural_target_length(objective, sources, config)
        config = dataclasses.replace(config, target_length=natural)
    objective.check_lengths(config.input_length, config.target_length, pairs=pairs)
    return config


def _check_ramp(config: DataConfig) -> tuple[tuple[int, int], ...]:
    ramp = config.batch_ramp or ((0, config.batch_size),)
    steps = [step for step, _ in ramp]
    sizes_ = [size for _, size in ramp]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise UserError(f"batch_ramp = {ramp} must start at step 0 with growing steps.")
    if min(sizes_) < 1 or max(sizes_) > config.batch_size:
        raise UserError(
            f"batch_ramp = {ramp} must hold sizes from 1 to BATCH_SIZE={config.batch_size}."
        )
    return tuple((int(step), int(size)) for step, size in ramp)


class Loader(_Rows):
    """Training batches of one process; `batch(step)` is a pure function. Thread safe."""

    def __init__(
        self,
        config: DataConfig,
        objective: Objective,
        sources: Sequence[Source],
        *,
        process_index: int = 0,
        process_count: int = 1,
        rows: Parts | None = None,
        index_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Checks everything and plans nothing yet.

        Args:
          config: shapes, seed and packing; `loader.config` has its target length resolved.
          objective: what is done to text.
          sources: see `open_sources`.
          process_index, process_count: this process's share of every batch, in equal parts.
          rows: or the (start, stop) parts of a batch that it reads, ascending: those of
            `sharding.process_rows` where a mesh decides who needs what.
          index_path: where the row counts of finished blocks are kept, so that a run that starts
            again late starts fast (see `stream.BlockIndex`); give it to process 0 only.

        Raises:
          UserError: lengths, sizes and sources that do not go together.
        """
        super().__init__(
            config,
            objective,
            sources,
            shuffle=True,
            index_path=index_path,
            process_index=process_index,
            process_count=process_count,
            rows=rows,
        )
        self._ramp = _check_ramp(self.config)

    def size(self, step: int) -> int:
        """Sequences in the global batch of `step`; less than `batch_size` only in a ramp."""
        return max((start, size) for start, size in self._ramp if start <= step)[1]

    def offset(self, step: int) -> int:
        """Rows of the stream that the steps before `step` took."""
        total = 0
        for i, (start, size) in enumerate(self._ramp):
            end = self._ramp[i + 1][0] if i + 1 < len(self._ramp) else math.inf
            total += size * int(max(0, min(step, end) - start))
        return total

    def active_microbatches(self, step: int, microbatches: int) -> int:
        """How many of `microbatches` equal parts of the batch hold rows at `step`.

        Raises:
          UserError: a size of the ramp is not a whole number of microbatches.
        """
        rows_each, rest = divmod(self.config.batch_size, microbatches)
        uneven = [size for _, size in self._ramp if rest or size % rows_each]
        if uneven:
            raise UserError(
                f"batch_ramp size {uneven[0]} is not a whole number of microbatches of "
                f"{self.config.batch_size}/{microbatches} sequences; use multiples of {rows_each}, "
                "or more MICROBATCHES."
            )
        return self.size(step) // rows_each

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the global batch of `step`; arrays [its rows, L]."""
        batch = self._read(self.offset(step), self.size(step), None)
        if self.index.unsaved >= _SAVE_EVERY:
            self.index.save()
        return batch

    def warm_up(self, step: int = 0) -> threading.Thread:
        """Plans and imports in a thread what `iterate(step)` needs, while weights are made.

        A mistake that it runs into is raised again, where it is seen, by `iterate`.
        """

        def run() -> None:
            with contextlib.suppress(Exception):
                self.batch(step)
                import grain  # noqa: F401

        thread = threading.Thread(target=run, name="loader warm-up", daemon=True)
        thread.start()
        return thread

    def padding(self) -> dict[str, np.ndarray]:
        """A batch that holds nothing: the shapes and dtypes of all, without reading any data."""
        return self._read(0, 0, None)

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[dict]:
        """`batch(start_step)`, `batch(start_step + 1)`, ... prepared ahead by Grain's threads."""
        return read_ahead(self.batch, self.config, start_step, stop_step)

    def stats(self, step: int) -> list[SourceStats]:
        """What the steps before `step` took of each source, counted over all processes."""
        block, inside = self.index.find(self.offset(step))
        _, totals, _ = self.index.before(block)
        if inside:
            totals = totals + _partial(self.index.block(block), inside, len(self.sources))
        return [
            SourceStats(
                source=source.name,
                documents=int(row[0]),
                tokens=int(row[1]),
                epochs=float(row[0]) / len(source.targets),
                pieces=int(row[2]),
                empty=int(row[3]),
                truncated_inputs=int(row[4]),
                truncated_targets=int(row[5]),
            )
            for source, row in zip(self.sources, totals, strict=True)
        ]

    def utilisation(self, step: int = 1) -> tuple[float, float]:
        """Share of tokens that are not padding, (inputs, targets), over the blocks up to `step`.

        One stack has one row: the second figure repeats the first.
        """
        block, _ = self.index.find(max(self.offset(step) - 1, 0))
        count, _, used = self.index.before(block + 1)
        room = self.objective.room(*self.lengths)
        first = float(used[0]) / (count * room[0])
        return first, float(used[1]) / (count * room[1]) if room[1] else first

    def save_index(self) -> None:
        """Writes the block index now, where `index_path` was given."""
        self.index.save()


def _partial(block: stream.Block, inside: int, num_sources: int) -> np.ndarray:
    """`Block.totals` of its first `inside` rows."""
    _, piece = _pieces_of(block, block.row_order[:inside])
    e = block.pieces.example[piece]
    source = block.source_e[e]
    begins = block.pieces.start[piece] == 0
    tokens = block.pieces.length[piece] + np.where(begins, block.examples["num_inputs"][e], 0)
    flags = block.truncated_e[e]

    def count(weights: np.ndarray) -> np.ndarray:
        return np.bincount(source, weights=weights, minlength=num_sources).astype(np.int64)

    every = np.ones(len(piece))
    columns = [begins, tokens, every, np.zeros(len(piece)), flags & 1, (flags & 2) // 2]
    return np.stack([count(np.asarray(column, np.float64)) for column in columns], axis=1)


def read_ahead(
    batch: Callable[[int], Any], config: DataConfig, start_step: int, stop_step: int | None = None
) -> Iterator[Any]:
    """`batch(start_step)`, `batch(start_step + 1)`, ... prepared ahead by Grain's threads."""
    import grain  # imports jax

    options = grain.ReadOptions(
        num_threads=max(1, config.threads), prefetch_buffer_size=max(1, config.prefetch)
    )
    steps = grain.MapDataset.range(start_step, stop_step or (1 << 62))
    return iter(steps.map(batch).to_iter_dataset(options))


class EvalLoader(_Rows):
    """One pass over a split in the order of the caches, the same every time; rates do not matter.

    The last batch is filled up with rows of weight 0, so every example counts exactly once.
    """

    def __init__(
        self,
        config: DataConfig,
        objective: Objective,
        sources: Sequence[Source],
        *,
        process_index: int = 0,
        process_count: int = 1,
        rows: Parts | None = None,
    ) -> None:
        """As `Loader`; `config.seed` draws the noise, so keep it fixed during a run."""
        super().__init__(
            config,
            objective,
            sources,
            shuffle=False,
            process_index=process_index,
            process_count=process_count,
            rows=rows,
        )
        self.num_rows = self.index.before(self.order.blocks_per_window)[0]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.num_rows // self.config.batch_size)

    def batch(self, index: int) -> dict[str, np.ndarray]:
        """This process's rows of batch `index`; IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = self.config.batch_size
        return self._read(index * size, size, self.order.blocks_per_window)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """All batches."""
        return (self.batch(index) for index in range(len(self)))
