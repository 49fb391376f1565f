"""The endless order of examples of a mixture, planned into rows block by block. No jax here.

Window w holds about `num_examples` examples (of one task exactly one epoch, or an equal part of it
where it is large). Task i gives it the next rate_i * num_examples of its own endless stream, in
which every epoch is a new keyed permutation; the window is shuffled by a keyed permutation too.
Windows are cut into blocks, and a block is planned (`packing`) without knowing any other, its rows
shuffled. So row r of the training run is a pure function of (seed, r); to find it, only the numbers
of rows of earlier blocks are needed, which `BlockIndex` remembers and can keep in a file.
"""

import dataclasses
import math
import os
import pathlib
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence

import numba
import numpy as np

from chatyuan.data import packing
from chatyuan.data.cache import Ragged
from chatyuan.data.keyed import combine, name_key, permutation, permute
from chatyuan.data.objectives import Objective, choose_variants

WINDOW = 4_000_000  # examples; the most that are shuffled together
BLOCK_TOKENS = 4_000_000  # tokens planned together; about 0.1 s
_KEPT_BLOCKS = 4
PACKINGS = {True: packing.pack, False: packing.separate}


@dataclasses.dataclass(frozen=True)
class Source:
    """One cached task of a mixture."""

    name: str
    targets: Ragged
    inputs: Ragged | None = None  # None: plain text, to which the objective is applied
    rate: float = 1.0
    fingerprint: str = ""  # of the cache's content

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, end-of-sequence not counted."""
        return len(self.targets.tokens) + (len(self.inputs.tokens) if self.inputs else 0)


@dataclasses.dataclass(frozen=True)
class Block:
    """Planned rows. Arrays ending in _e are [examples], the others those of `packing.Pieces`."""

    source_e: np.ndarray  # int64
    document_e: np.ndarray  # int64
    examples: np.ndarray  # packing.EXAMPLE [examples]
    cut_inputs_e: np.ndarray  # int64, tokens of a pair's inputs left out on the left
    truncated_e: np.ndarray  # uint8 [examples], 1: inputs truncated, 2: targets, 3: both
    pieces: packing.Pieces
    row_order: np.ndarray  # int64 [rows]
    totals: np.ndarray  # int64 [sources, len(TOTALS)]
    used: tuple[int, int]  # tokens of all rows on either side

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_order)


TOTALS = ("documents", "tokens", "pieces", "empty", "truncated_inputs", "truncated_targets")


@numba.njit(cache=True, nogil=True)
def locate(
    first: int,
    count: int,
    size: int,
    window_key: np.uint64,
    shuffle: bool,
    bounds: np.ndarray,
    starts: np.ndarray,
    num_examples: np.ndarray,
    task_keys: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, document, key) of positions first..first+count of a window of `size` examples.

    Args:
      first, count, size: which positions.
      window_key: orders the window.
      shuffle: False gives source after source, document after document.
      bounds: int64 [sources + 1], cumulative number of examples that each source gives.
      starts: int64 [sources], where the window starts in each source's endless stream.
      num_examples: int64 [sources], examples of one epoch.
      task_keys: uint64 [sources].
    """
    source = np.empty(count, np.int64)
    document = np.empty(count, np.int64)
    key = np.empty(count, np.uint64)
    for i in range(count):
        position = permute(first + i, size, window_key) if shuffle else first + i
        s = 0
        while position >= bounds[s + 1]:
            s += 1
        epoch, index = divmod(starts[s] + position - bounds[s], num_examples[s])
        epoch_key = combine(task_keys[s], epoch)
        if shuffle:
            index = permute(index, num_examples[s], epoch_key)
        source[i], document[i], key[i] = s, index, combine(epoch_key, index)
    return source, document, key


class Order:
    """Which examples come when: windows and their blocks, from (seed, sources, rates) alone."""

    def __init__(self, sources: Sequence[Source], seed: int, shuffle: bool = True) -> None:
        """Computes the size of windows and blocks; `shuffle=False` is one pass in order."""
        self.sources = tuple(sources)
        self.seed = seed
        self.shuffle = shuffle
        self.num_examples = np.array([len(s.targets) for s in sources], np.int64)
        total = sum(s.rate for s in sources)
        self.rates = [s.rate / total for s in sources]
        self._keys = np.array([name_key(seed, s.name) for s in sources], np.uint64)
        examples = int(self.num_examples.sum())
        # An epoch of a single large task is `parts` windows of equal size.
        self._parts = math.ceil(examples / WINDOW) if len(sources) == 1 and shuffle else 1
        self._window = min(examples, WINDOW) if len(sources) > 1 and shuffle else examples
        mean = sum(
            rate * s.num_tokens / max(len(s.targets), 1)
            for rate, s in zip(self.rates, sources, strict=True)
        )
        per_block = min(max(int(BLOCK_TOKENS / max(mean, 1.0)), 1024), 1 << 17)
        window = math.ceil(self._window / self._parts)
        self.blocks_per_window = max(1, round(window / per_block))

    def _start(self, window: int, source: int) -> int:
        if not self.shuffle:
            return int(self.num_examples[source]) * window
        if len(self.sources) == 1:
            return window * self._window // self._parts
        return math.floor(window * self._window * self.rates[source])

    def block(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, document, key) of the examples of block `index`, counted from the start."""
        window, part = divmod(index, self.blocks_per_window)
        starts = [self._start(window, s) for s in range(len(self.sources))]
        ends = [self._start(window + 1, s) for s in range(len(self.sources))]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        size = int(bounds[-1])
        first = part * size // self.blocks_per_window
        count = (part + 1) * size // self.blocks_per_window - first
        return locate(
            first,
            count,
            size,
            name_key(self.seed, "window", window),
            self.shuffle,
            bounds,
            np.array(starts, np.int64),
            self.num_examples,
            self._keys,
        )


class Planner:
    """Plans blocks of an `Order` into rows."""

    def __init__(
        self,
        order: Order,
        objective: Objective,
        lengths: tuple[int, int],
        *,
        pack: bool = True,
        concatenate: bool = False,
    ) -> None:
        """`lengths` are INPUT_LENGTH and TARGET_LENGTH, end-of-sequence included."""
        self.order = order
        self.objective = objective
        self.lengths = lengths
        self.room = objective.room(*lengths)
        self._plan = packing.concatenate if concatenate else PACKINGS[pack]
        self._shuffle_rows = order.shuffle

    def block(self, index: int) -> Block:
        """Block `index`, planned."""
        source, document, key = self.order.block(index)
        examples, cut, truncated, totals = self._examples(source, document, key)
        pieces = self._plan(self.objective.variants, examples, *self.room)
        rows = len(pieces.row_offsets) - 1
        order = np.arange(rows)
        if self._shuffle_rows:
            order = permutation(rows, name_key(self.order.seed, "rows", index))
        totals[:, TOTALS.index("pieces")] = np.bincount(
            source[pieces.example], minlength=len(totals)
        )
        used = packing.used(self.objective.variants, examples, pieces)
        return Block(source, document, examples, cut, truncated, pieces, order, totals, used)

    def _examples(
        self, source: np.ndarray, document: np.ndarray, key: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lengths after truncation of pairs, variants, and what was counted on the way."""
        num_inputs = np.zeros(len(source), np.int64)
        length = np.zeros(len(source), np.int64)
        cut = np.zeros(len(source), np.int64)
        truncated = np.zeros(len(source), np.uint8)
        variant = np.zeros(len(source), np.int64)
        choose_variants(self.objective.variants, key, variant)
        totals = np.zeros((len(self.order.sources), len(TOTALS)), np.int64)
        left = self.objective.config.truncate_inputs == "left"
        for s, ragged in enumerate(self.order.sources):
            # One source is the common case and needs no selection.
            of = slice(None) if len(self.order.sources) == 1 else np.flatnonzero(source == s)
            rows = document[of]
            targets = ragged.targets.offsets[rows + 1] - ragged.targets.offsets[rows]
            inputs = np.zeros_like(targets)
            if ragged.inputs is not None:
                inputs = ragged.inputs.offsets[rows + 1] - ragged.inputs.offsets[rows]
                over = (inputs >= self.lengths[0]) + 2 * (targets >= self.lengths[1])
                truncated[of] = over
                kept = np.minimum(inputs, self.lengths[0] - 1)
                if left:
                    cut[of] = inputs - kept
                inputs, targets = kept, np.minimum(targets, self.lengths[1] - 1)
                variant[of] = self.objective.pair_variant
            num_inputs[of], length[of] = inputs, targets
            totals[s, : len(TOTALS) - 1] = (
                len(rows),
                (inputs + targets).sum(),
                0,  # pieces, known after planning
                np.count_nonzero(inputs + targets == 0),
                np.count_nonzero(truncated[of] & 1),
            )
            totals[s, -1] = np.count_nonzero(truncated[of] & 2)
        examples = np.zeros(len(source), packing.EXAMPLE)
        examples["num_inputs"], examples["length"] = num_inputs, length
        examples["variant"], examples["key"] = variant, key
        return examples, cut, truncated, totals


class BlockIndex:
    """Rows, counts and utilisation of every block up to the furthest asked for; thread safe.

    With a `path` the finished part is kept in a file (about 60 bytes a block and source), so that a
    run that starts again far into its data need not plan what came before. The file is an
    accelerator: it is ignored where its fingerprint differs and can be deleted at any time.
    """

    def __init__(
        self, planner: Planner, *, fingerprint: str = "", path: str | os.PathLike[str] | None = None
    ) -> None:
        """Reads `path` if it was written for the same `fingerprint`."""
        self.planner = planner
        self._fingerprint = fingerprint
        self._path = pathlib.Path(path) if path else None
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._ends: list[int] = []  # rows up to and with block i
        self._totals: list[np.ndarray] = []
        self._used: list[tuple[int, int]] = []
        self._saved = 0
        self._read()

    @property
    def unsaved(self) -> int:
        """Blocks that a call to `save` would add; 0 without a path."""
        return len(self._ends) - self._saved if self._path else 0

    def block(self, index: int) -> Block:
        """Block `index`; the last few are kept."""
        with self._lock:
            return self._block(index)

    def _block(self, index: int) -> Block:
        block = self._blocks.get(index)
        if block is None:
            block = self.planner.block(index)
            self._blocks[index] = block
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        if index == len(self._ends):
            self._ends.append((self._ends[-1] if self._ends else 0) + block.rows)
            self._totals.append(block.totals)
            self._used.append(block.used)
        return block

    def find(self, row: int, limit: int | None = None) -> tuple[int, int]:
        """(block, row inside it) of a row counted from the start; (limit, 0) at or past its end."""
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                if limit is not None and len(self._ends) >= limit:
                    return limit, 0
                self._block(len(self._ends))
            index = int(np.searchsorted(self._ends, row, side="right"))
            return index, row - (self._ends[index - 1] if index else 0)

    def before(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(rows, totals int64 [sources, len(TOTALS)], used int64 [2]) of the blocks before one."""
        with self._lock:
            while len(self._ends) < index:
                self._block(len(self._ends))
            totals = np.zeros((len(self.planner.order.sources), len(TOTALS)), np.int64)
            for block in self._totals[:index]:
                totals += block
            used = np.array(self._used[:index], np.int64).reshape(-1, 2).sum(axis=0)
            return (self._ends[index - 1] if index else 0), totals, used

    def save(self) -> None:
        """Writes the index aside and renames it; nothing to do without a path or anything new."""
        with self._lock:
            if self._path is None or len(self._ends) == self._saved:
                return
            count = len(self._ends)
            temporary = self._path.with_name(f"{self._path.name}.tmp{os.getpid()}.npz")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                temporary,
                fingerprint=np.array(self._fingerprint),
                ends=np.array(self._ends, np.int64),
                totals=np.array(self._totals, np.int64),
                used=np.array(self._used, np.int64),
            )
            os.replace(temporary, self._path)
            self._saved = count

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            with np.load(self._path) as stored:
                if str(stored["fingerprint"]) != self._fingerprint:
                    return
                ends, totals, used = stored["ends"], stored["totals"], stored["used"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return  # an unreadable index costs time only
        self._ends = [int(end) for end in ends]
        self._totals = list(totals)
        self._used = [(int(a), int(b)) for a, b in used]
        self._saved = len(self._ends)
