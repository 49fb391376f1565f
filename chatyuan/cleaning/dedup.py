"""Exact and near duplicates of Chinese text, on characters (words need a segmenter and miss more).

1. Exact: equal `chatyuan.text.normalize.fingerprint` (punctuation, spaces, width and case ignored).
2. Near: Jaccard similarity of character-shingle sets, found by MinHash-LSH (Broder 1997; Indyk and
   Motwani 1998) and verified exactly, so a reported pair is always a true one.
3. Contained: most of the shorter text's shingles lie in the longer one (a review quoted inside
   another). Candidates come from the shorter text's rarest shingles: a set that shares a fraction c
   with another must share one of any floor((1 - c) n) + 1 of its members (the prefix filter of
   Chaudhuri et al. 2006), so this join is exact, and it also finds every near duplicate with
   Jaccard similarity >= c that LSH may miss.

Kernels are numba over flat arrays; nothing is a Python shingle.
"""

import dataclasses
from collections.abc import Sequence

import numba
import numpy as np

from chatyuan.text.normalize import fingerprint

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    """When two texts count as the same."""

    shingle: int = dataclasses.field(
        default=4, metadata={"help": "length of a shingle", "unit": "characters"}
    )
    jaccard: float = dataclasses.field(
        default=0.7, metadata={"help": "near duplicates share at least this much of their union"}
    )
    containment: float = dataclasses.field(
        default=0.8, metadata={"help": "contained: this much of the shorter text is in the longer"}
    )
    min_contained: int = dataclasses.field(
        default=12,
        metadata={"help": "shorter texts are never 'contained'", "unit": "letters or Han"},
    )
    bands: int = dataclasses.field(default=24, metadata={"help": "LSH bands"})
    rows: int = dataclasses.field(default=5, metadata={"help": "MinHash values per LSH band"})


@dataclasses.dataclass(frozen=True)
class Shingles:
    """Distinct shingles of every text as ids, the rarest shingle of the collection being 0.

    Text i holds ids[offsets[i]:offsets[i+1]], ascending, so its rarest shingles come first.
    """

    ids: np.ndarray  # int64 [total]
    offsets: np.ndarray  # int64 [texts + 1]
    hashes: np.ndarray  # uint64 [distinct shingles], by id
    counts: np.ndarray  # int64 [distinct shingles], texts that hold each
    lengths: np.ndarray  # int64 [texts], letters of each fingerprint

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.offsets) - 1


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, uint64 elementwise; products wrap."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values ascending, and the number of each value among them (numpy's is slower)."""
    order = np.argsort(values)
    ordered = values[order]
    new = np.ones(len(values), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    numbers = np.empty(len(values), np.int64)
    numbers[order] = np.cumsum(new) - 1
    return ordered[new], numbers


def shingles(prints: Sequence[str], width: int) -> Shingles:
    """Shingle sets of fingerprints; one shorter than `width` is one shingle."""
    lengths = np.fromiter((len(p) for p in prints), np.int64, count=len(prints))
    # Zeros between texts let every window be read; windows that begin in them are dropped, and
    # those that run into them too, except a short text's only one.
    padding = "\0" * (width - 1)
    joined = padding.join(prints) + padding
    codes = np.frombuffer(joined.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths + width - 1)])
    windows = np.where(lengths > 0, np.maximum(lengths - width + 1, 1), 0)
    owners = np.repeat(np.arange(len(prints)), windows)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(windows)])
    begins = starts[owners] + np.arange(len(owners)) - first[owners]
    hashed = np.full(len(begins), _GOLDEN, np.uint64)
    for offset in range(width):
        hashed = _mix(hashed + _GOLDEN + codes[begins + offset])
    hashes, ids = _numbered(hashed)
    # Distinct (text, shingle) pairs, then shingles renumbered by how many texts hold them.
    pairs = np.sort(owners * len(hashes) + ids)
    pairs = pairs[np.concatenate([pairs[:1] == pairs[:1], pairs[1:] != pairs[:-1]])]
    owners, ids = np.divmod(pairs, max(len(hashes), 1))
    counts = np.bincount(ids, minlength=len(hashes))
    order = np.argsort(counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    pairs = np.sort(owners * len(hashes) + rank[ids])
    owners, ids = np.divmod(pairs, max(len(hashes), 1))
    sizes = np.bincount(owners, minlength=len(prints))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Shingles(ids, offsets, hashes[order], counts[order], lengths)


@numba.njit(cache=True)
def _signature_kernel(values: np.ndarray, offsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The smallest hash of every text under each seed, uint64 [texts, seeds]."""
    smallest = np.empty((len(offsets) - 1, len(seeds)), np.uint64)
    for text in range(len(offsets) - 1):
        row = smallest[text]
        row[:] = np.uint64(0xFFFFFFFFFFFFFFFF)
        for at in range(offsets[text], offsets[text + 1]):
            for k in range(len(seeds)):
                h = (values[at] ^ seeds[k]) * np.uint64(0xFF51AFD7ED558CCD)
                h ^= h >> np.uint64(32)
                if h < row[k]:
                    row[k] = h
    return smallest


@numba.njit(cache=True)
def _overlap(ids: np.ndarray, a: int, a_end: int, b: int, b_end: int) -> int:
    """Size of the intersection of two sorted runs."""
    common = 0
    while a < a_end and b < b_end:
        if ids[a] == ids[b]:
            common += 1
            a += 1
            b += 1
        elif ids[a] < ids[b]:
            a += 1
        else:
            b += 1
    return common


@numba.njit(cache=True)
def _verify_kernel(
    ids: np.ndarray, offsets: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Exact Jaccard similarity and containment of the smaller set, float64 [pairs] each."""
    jaccard = np.zeros(len(pairs))
    containment = np.zeros(len(pairs))
    for i in range(len(pairs)):
        a, b = pairs[i, 0], pairs[i, 1]
        size_a, size_b = offsets[a + 1] - offsets[a], offsets[b + 1] - offsets[b]
        if size_a == 0 or size_b == 0:
            continue
        common = _overlap(ids, offsets[a], offsets[a + 1], offsets[b], offsets[b + 1])
        jaccard[i] = common / (size_a + size_b - common)
        containment[i] = common / min(size_a, size_b)
    return jaccard, containment


def _seeds(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(20231)).integers(
        0, np.iinfo(np.uint64).max, count, np.uint64, endpoint=True
    )


def _unique_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    pairs = np.stack([np.minimum(left, right), np.maximum(left, right)], axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(pairs, axis=0) if len(pairs) else pairs.reshape(0, 2)


def minhash_pairs(sets: Shingles, config: DedupConfig) -> np.ndarray:
    """Pairs with Jaccard similarity >= `config.jaccard`, int64 [pairs, 2]; LSH may miss some.

    Within a band only neighbours of a run are compared: duplicates stay connected through their
    chain, at a cost linear in the number of texts.
    """
    seeds = _seeds(config.bands * config.rows)
    smallest = _signature_kernel(sets.hashes[sets.ids], sets.offsets, seeds)
    candidates = []
    for start in range(0, len(seeds), config.rows):
        band = np.full(len(sets), _GOLDEN, np.uint64)
        for k in range(start, start + config.rows):
            band = _mix(band + _GOLDEN + smallest[:, k])
        order = np.argsort(band, kind="stable")
        same = np.flatnonzero(band[order][1:] == band[order][:-1])
        candidates.append(np.stack([order[same], order[same + 1]], axis=1))
    found = np.concatenate(candidates)
    pairs = _unique_pairs(found[:, 0], found[:, 1])
    jaccard, _ = _verify_kernel(sets.ids, sets.offsets, pairs)
    return pairs[jaccard >= config.jaccard]


@numba.njit(cache=True)
def _prefix_kernel(
    ids: np.ndarray,
    offsets: np.ndarray,
    postings: np.ndarray,
    posting_offsets: np.ndarray,
    eligible: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """Pairs (shorter, longer) that share one of the shorter text's rarest shingles."""
    out = np.empty((1024, 2), np.int64)
    filled = 0
    texts = len(offsets) - 1
    seen = np.full(texts, -1, np.int64)
    for a in range(texts):
        if not eligible[a]:
            continue
        size = offsets[a + 1] - offsets[a]
        prefix = min(size, int(np.floor((1.0 - threshold) * size + 1e-9)) + 1)
        for k in range(offsets[a], offsets[a] + prefix):
            shingle = ids[k]
            for at in range(posting_offsets[shingle], posting_offsets[shingle + 1]):
                b = postings[at]
                size_b = offsets[b + 1] - offsets[b]
                if seen[b] == a or size_b < size or (size_b == size and b <= a):
                    continue
                seen[b] = a
                if filled == len(out):
                    grown = np.empty((2 * filled, 2), np.int64)
                    grown[:filled] = out
                    out = grown
                out[filled, 0] = a
                out[filled, 1] = b
                filled += 1
    return out[:filled].copy()


def contained_pairs(sets: Shingles, config: DedupConfig) -> np.ndarray:
    """Every pair (shorter, longer) with containment >= `config.containment`, int64 [pairs, 2].

    Only texts of at least `min_contained` letters can be the shorter one.
    """
    owners = np.repeat(np.arange(len(sets)), np.diff(sets.offsets))
    postings = owners[np.argsort(sets.ids, kind="stable")]
    posting_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sets.counts)])
    eligible = sets.lengths >= config.min_contained
    pairs = _prefix_kernel(
        sets.ids, sets.offsets, postings, posting_offsets, eligible, config.containment
    )
    _, containment = _verify_kernel(sets.ids, sets.offsets, pairs)
    return pairs[containment >= config.containment]


def duplicate_pairs(
    texts: Sequence[str], config: DedupConfig | None = None, *, fingerprinted: bool = False
) -> np.ndarray:
    """Pairs of texts that are exact, near or contained duplicates, int64 [pairs, 2], sorted.

    With `fingerprinted` the texts are already `fingerprint`s and are taken as they are.
    """
    prints = texts if fingerprinted else [fingerprint(text) for text in texts]
    config = config or DedupConfig()
    first: dict[str, int] = {}
    exact = []
    for index, text in enumerate(prints):
        earlier = first.setdefault(text, index)
        if earlier != index:
            exact.append((earlier, index))
    # Only one of each exact text goes on: n copies of it would be n^2 contained pairs.
    distinct = np.fromiter(first.values(), np.int64, count=len(first))
    sets = shingles([prints[index] for index in distinct], config.shingle)
    near = np.concatenate([minhash_pairs(sets, config), contained_pairs(sets, config)])
    found = np.concatenate([np.array(exact, np.int64).reshape(-1, 2), distinct[near]])
    return _unique_pairs(found[:, 0], found[:, 1])


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """The smallest index connected to each of `count` texts by `pairs`, int64 [count]."""
    parent = list(range(count))
    for a, b in pairs.tolist():
        while parent[a] != a:
            parent[a] = a = parent[parent[a]]
        while parent[b] != b:
            parent[b] = b = parent[parent[b]]
        parent[max(a, b)] = min(a, b)
    # Parents point to smaller indices, so one ascending pass flattens every chain.
    for index in range(count):
        parent[index] = parent[parent[index]]
    return np.array(parent, np.int64).reshape(count)


def clusters(
    texts: Sequence[str], config: DedupConfig | None = None, *, fingerprinted: bool = False
) -> np.ndarray:
    """The cluster of each text: the index of its first member, int64 [texts]."""
    pairs = duplicate_pairs(texts, config, fingerprinted=fingerprinted)
    return components(len(texts), pairs)
