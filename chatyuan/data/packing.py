"""Which pieces of which examples share a row: planned from lengths alone, before any work.

A row has two capacities (encoder and decoder; one stack has one). `pack` fills rows by best fit on
both at once from a pool of waiting examples:
1. a row starts with the oldest example, so none waits for long;
2. then comes the example that leaves the two sides most evenly filled, the larger the better, and
   as soon as one closes the row with next to no waste on either side, that one;
3. documents that are too long for a row must be cut anyway: they are cut where a row ends;
4. only where a row would end with waste, a document that would fit a row of its own is cut too.
Nothing is dropped, nothing is trimmed. `concatenate` is T5's older way (documents joined without
regard to their ends, then split into equal pieces), `separate` one piece per row. No jax here.
"""

from typing import NamedTuple

import numba
import numpy as np

from chatyuan.data.keyed import combine
from chatyuan.data.objectives import MIN_PIECE, PAIR, SPAN, UNLIMITED, Variants, fit, sizes

VERSION = 1  # of the plans; raise it with any change that moves an example
POOL = 128  # examples that wait; more fill rows better and plan slower
TOLERANCE = 0.004  # a row that wastes at most this share of either side is full
_PATIENCE = 4 * POOL  # arrivals after which a long document starts a row by itself
# A document that takes more than LARGE of one side and LOPSIDED less of the other leaves a row that
# nothing can fill: it is cut as if it were longer than a row.
_LARGE, _LOPSIDED = 0.6, 0.15
_NEARLY_FULL = 0.25  # share of a row left at which two examples that close it are looked for
_EVEN = 0.05  # difference of the shares left on both sides of an evenly filled row
_MAX_TRIES = 6  # documents looked at for a cut
# A bare constant argument would compile the callee once more.
_NO, _YES = np.int64(0), np.int64(1)
_CLOSES = -10.0  # cost of an example that fills the row; below every other cost


# What planning knows of each example.
EXAMPLE = np.dtype(
    [
        ("num_inputs", np.int64),  # tokens of `inputs` of a pair, 0 for text
        ("length", np.int64),  # tokens of the text, or of `targets`
        ("variant", np.int64),
        ("key", np.uint64),
    ]
)
# An example that waits; size_a is -1 for documents longer than a row.
_WAITING = np.dtype(
    [
        ("example", np.int64),
        ("start", np.int64),
        ("length", np.int64),
        ("size_a", np.int64),
        ("size_b", np.int64),
        ("arrival", np.int64),
        ("key", np.uint64),
    ]
)


class Pieces(NamedTuple):
    """The result of planning: pieces of examples in row order."""

    example: np.ndarray  # int64 [pieces], index into the planned examples
    start: np.ndarray  # int64 [pieces], first token
    length: np.ndarray  # int64 [pieces], tokens
    joined: np.ndarray  # uint8 [pieces], 1: belongs to the segment of the piece before it
    row_offsets: np.ndarray  # int64 [rows + 1]; row r is pieces row_offsets[r]:row_offsets[r + 1]


@numba.njit(cache=True, nogil=True)
def whole_size(
    v: Variants, e: np.ndarray, i: int, start: int, room_a: int, room_b: int
) -> tuple[int, int]:
    """What example i from token `start` on takes of a row, (-1, -1) where it must be cut."""
    n = e[i].length - start
    variant = e[i].variant
    if v.table[variant].kind == PAIR:
        a, b = e[i].num_inputs + 1, n + 1
        if v.constants[3] == 1:
            return a + b, 0
        return a, b
    if n > v.table[variant].limit:
        return -1, -1
    a, b = sizes(v, variant, n, combine(e[i].key, start))
    if a > room_a or b > room_b:
        return -1, -1
    return a, b


@numba.njit(cache=True, nogil=True)
def piece_length(
    v: Variants, variant: int, n: int, key: np.uint64, room_a: int, room_b: int, empty: int
) -> int:
    """The longest piece to cut off the front of n tokens; 0 if none should be.

    Leaves no crumb below MIN_PIECE and takes none, except that an empty row must take something.
    """
    length = fit(v, variant, n, key, room_a, room_b)
    if length == n:
        return n
    trimmed = min(length, n - MIN_PIECE)
    if trimmed >= MIN_PIECE:
        return trimmed
    return length if empty == 1 else 0


@numba.njit(cache=True, nogil=True)
def _grown(array: np.ndarray) -> np.ndarray:
    out = np.empty(2 * len(array), array.dtype)
    for i in range(len(array)):  # a slice assignment takes two seconds to compile
        out[i] = array[i]
    return out


@numba.njit(cache=True, nogil=True)
def _best_whole(
    pool: np.ndarray, count: int, room_a: int, room_b: int, per_a: float, per_b: float
) -> tuple[int, float, int]:
    """The best of the examples that fit whole: (slot or -1, cost, slot of the oldest)."""
    best, best_cost, oldest = -1, 1e30, 0
    for i in range(count):
        if pool[i].arrival < pool[oldest].arrival:
            oldest = i
        a, b = pool[i].size_a, pool[i].size_b
        if a <= 0 or a > room_a or b > room_b:
            continue
        left_a, left_b = (room_a - a) * per_a, (room_b - b) * per_b
        worst = max(left_a, left_b)
        cost = worst + _CLOSES if worst <= TOLERANCE else 20.0 * abs(left_a - left_b) + worst
        if cost < best_cost:
            best, best_cost = i, cost
    return best, best_cost, oldest


@numba.njit(cache=True, nogil=True)
def _closing_pair(
    pool: np.ndarray, count: int, room_a: int, room_b: int, per_a: float, per_b: float
) -> int:
    """An example that closes the row together with a second one; -1 if no two do."""
    slack_a = np.int64(TOLERANCE / per_a)
    slack_b = np.int64(TOLERANCE / per_b) if per_b > 0.0 else _NO
    for i in range(count):
        a, b = room_a - pool[i].size_a, room_b - pool[i].size_b
        if pool[i].size_a <= 0 or a <= 0 or b < 0:
            continue
        for j in range(i):
            spare_a, spare_b = a - pool[j].size_a, b - pool[j].size_b
            if 0 <= spare_a <= slack_a and 0 <= spare_b <= slack_b and pool[j].size_a > 0:
                return i
    return -1


@numba.njit(cache=True, nogil=True)
def _best_cut(
    v: Variants,
    e: np.ndarray,
    pool: np.ndarray,
    count: int,
    long: int,
    room: tuple[int, int],
    per: tuple[float, float],
    empty: int,
) -> tuple[int, int, float]:
    """The best piece of a document: (slot or -1, tokens, worst waste left on either side).

    Looks at documents longer than a row, or at the others, in pool order. Under span corruption
    the piece that fits is the same for every document, so one of each variant is enough.
    """
    best, best_length, best_worst = -1, 0, 1e30
    tries = 0
    seen = 0  # bits: variants looked at
    for i in range(count):
        variant = e[pool[i].example].variant
        if (pool[i].size_a < 0) != (long == 1) or v.table[variant].kind == PAIR:
            continue
        if (seen >> variant) & 1:
            continue
        tries += 1
        length = piece_length(v, variant, pool[i].length, pool[i].key, room[0], room[1], empty)
        if length > 0:
            if v.table[variant].kind == SPAN:
                seen |= 1 << variant
            a, b = sizes(v, variant, length, pool[i].key)
            worst = max((room[0] - a) * per[0], (room[1] - b) * per[1])
            if worst < best_worst:
                best, best_length, best_worst = i, length, worst
        if tries >= _MAX_TRIES:
            break
    return best, best_length, best_worst


@numba.njit(cache=True, nogil=True)
def _opening(
    v: Variants,
    variant: int,
    pool: np.ndarray,
    slot: int,
    full: tuple[int, int],
    per: tuple[float, float],
) -> int:
    """How much of a long document opens a row: all that fits, or half where that is lopsided."""
    n, key = pool[slot].length, pool[slot].key
    length = piece_length(v, variant, n, key, full[0], full[1], _YES)
    a, b = sizes(v, variant, length, key)
    if max((full[0] - a) * per[0], (full[1] - b) * per[1]) > _LOPSIDED:
        half = piece_length(v, variant, n, key, full[0] // 2, full[1] // 2, _NO)
        length = half if half > 0 else length
    return length


@numba.njit(cache=True, nogil=True)
def _choose(
    v: Variants,
    e: np.ndarray,
    pool: np.ndarray,
    count: int,
    arrivals: int,
    room: tuple[int, int],
    full: tuple[int, int],
) -> tuple[int, int]:
    """What to put into the row next: (slot, tokens), slot -1 to close the row."""
    per = (1.0 / full[0], 1.0 / full[1] if full[1] > 0 else 0.0)
    empty = _YES if room == full else _NO
    slot, cost, oldest = _best_whole(pool, count, room[0], room[1], per[0], per[1])
    if cost < -1.0:
        return slot, pool[slot].length
    cut, length, worst = _NO - 1, _NO, 1.0
    # Mid-row the piece of a long document closes only a row that is evenly filled.
    if empty == 1 or slot < 0 or abs(room[0] * per[0] - room[1] * per[1]) <= _EVEN:
        cut, length, worst = _best_cut(v, e, pool, count, _YES, room, per, empty)
    if cut >= 0 and worst <= TOLERANCE:
        return cut, length
    if empty == 1 and pool[oldest].size_a > 0:
        return oldest, pool[oldest].length
    if empty == 1 and pool[oldest].arrival + _PATIENCE < arrivals:
        return oldest, _opening(v, e[pool[oldest].example].variant, pool, oldest, full, per)
    if slot >= 0:
        if max(room[0] * per[0], room[1] * per[1]) <= _NEARLY_FULL:
            pair = _closing_pair(pool, count, room[0], room[1], per[0], per[1])
            slot = pair if pair >= 0 else slot
        return slot, pool[slot].length
    if cut >= 0:
        return cut, length
    if max(room[0] * per[0], room[1] * per[1]) > TOLERANCE:
        cut, length, worst = _best_cut(v, e, pool, count, _NO, room, per, empty)
    return cut, length


@numba.njit(cache=True, nogil=True)
def _enter(
    v: Variants,
    e: np.ndarray,
    pool: np.ndarray,
    slot: int,
    i: int,
    start: int,
    full: tuple[int, int],
) -> None:
    """Puts example i, from token `start` on, into a slot of the pool."""
    pool[slot].example = i
    pool[slot].start = start
    pool[slot].length = e[i].length - start
    pool[slot].key = combine(e[i].key, start)
    a, b = whole_size(v, e, i, start, full[0], full[1])
    if a > 0 and full[1] > 0 and v.table[e[i].variant].kind != PAIR:
        share_a, share_b = a / full[0], b / full[1]
        if max(share_a, share_b) > _LARGE and abs(share_a - share_b) > _LOPSIDED:
            a = -1  # it would use up one side alone
    pool[slot].size_a, pool[slot].size_b = a, b


@numba.njit(cache=True, nogil=True)
def _leave(pool: np.ndarray, slot: int, last: int) -> None:
    """Frees a slot by moving the last one into it."""
    pool[slot] = pool[last]


@numba.njit(cache=True, nogil=True)
def pack(v: Variants, e: np.ndarray, room_a: int, room_b: int) -> Pieces:
    """Plans full rows; every token of every example is in exactly one piece.

    Args:
      v: the objective's variants.
      e: EXAMPLE [examples] in the order in which they should be seen, which is roughly kept;
        pairs must fit a row.
      room_a, room_b: capacities of a row; room_b is 0 for one stack.
    """
    full = (room_a, room_b)
    n = np.int64
    pool = np.zeros(POOL, _WAITING)
    total = len(e)
    example, start = np.empty(total + 16, n), np.empty(total + 16, n)
    length = np.empty(total + 16, n)
    row_offsets = np.zeros(total // 4 + 16, n)
    pieces, rows, count, arrivals = _NO, _NO, _NO, _NO
    room = full
    while True:
        while count < POOL and arrivals < total:
            if e[arrivals].length > 0 or e[arrivals].num_inputs > 0:  # an empty text is no example
                _enter(v, e, pool, count, arrivals, _NO, full)
                pool[count].arrival = arrivals
                count += 1
            arrivals += 1
        slot, tokens = _NO - 1, _NO
        if count > 0:
            slot, tokens = _choose(v, e, pool, count, arrivals, room, full)
        if slot < 0:
            assert room != full or count == 0, "check_lengths lets something fit an empty row"
            if room != full:
                rows += 1
                if rows == len(row_offsets):
                    row_offsets = _grown(row_offsets)
                row_offsets[rows] = pieces
                room = full
            if count == 0:
                break
            continue
        i = pool[slot].example
        if pieces == len(example):
            example, start, length = _grown(example), _grown(start), _grown(length)
        example[pieces], start[pieces], length[pieces] = i, pool[slot].start, tokens
        pieces += 1
        if tokens < pool[slot].length:
            a, b = sizes(v, e[i].variant, tokens, pool[slot].key)
            _enter(v, e, pool, slot, i, pool[slot].start + tokens, full)
        else:
            a, b = pool[slot].size_a, pool[slot].size_b
            if a < 0:
                a, b = sizes(v, e[i].variant, tokens, pool[slot].key)
            count -= 1
            _leave(pool, slot, count)
        room = (room[0] - a, room[1] - b)
    joined = np.zeros(pieces, np.uint8)
    return Pieces(
        example[:pieces], start[:pieces], length[:pieces], joined, row_offsets[: rows + 1].copy()
    )


@numba.njit(cache=True, nogil=True)
def separate(v: Variants, e: np.ndarray, room_a: int, room_b: int) -> Pieces:
    """One piece per row: whole examples, and long documents cut into as few pieces as fit."""
    total = len(e)
    example = np.empty(total + 16, np.int64)
    start, length = np.empty(total + 16, np.int64), np.empty(total + 16, np.int64)
    pieces = 0
    for i in range(total):
        at = _NO
        if e[i].length == 0 and e[i].num_inputs == 0:
            continue
        while True:
            tokens = e[i].length - at
            if whole_size(v, e, i, at, room_a, room_b)[0] < 0:
                tokens = piece_length(
                    v, e[i].variant, tokens, combine(e[i].key, at), room_a, room_b, _YES
                )
            if pieces == len(example):
                example, start, length = _grown(example), _grown(start), _grown(length)
            example[pieces], start[pieces], length[pieces] = i, at, tokens
            pieces += 1
            at += tokens
            if at >= e[i].length:
                break
    return Pieces(
        example[:pieces],
        start[:pieces],
        length[:pieces],
        np.zeros(pieces, np.uint8),
        np.arange(pieces + 1),
    )


@numba.njit(cache=True, nogil=True)
def concatenate(v: Variants, e: np.ndarray, room_a: int, room_b: int) -> Pieces:
    """T5's `reduce_concat_tokens` and `split_tokens`: rows of one segment that spans documents.

    Documents are joined without a mark between them. Not for pairs.
    """
    total = len(e)
    example = np.empty(total + 16, np.int64)
    start, length = np.empty(total + 16, np.int64), np.empty(total + 16, np.int64)
    joined = np.empty(total + 16, np.uint8)
    row_offsets = np.zeros(total // 4 + 16, np.int64)
    pieces, rows, want = 0, 0, 0
    for i in range(total):
        at = _NO
        while at < e[i].length:
            if pieces == len(example):
                example, start, length = _grown(example), _grown(start), _grown(length)
                joined = _grown(joined)
            first = want == 0
            if first:
                if rows + 1 == len(row_offsets):
                    row_offsets = _grown(row_offsets)
                row_offsets[rows] = pieces
                rows += 1
                want = fit(v, e[i].variant, 1 << 30, combine(e[i].key, at), room_a, room_b)
            tokens = min(want, e[i].length - at)
            example[pieces], start[pieces], length[pieces] = i, at, tokens
            joined[pieces] = 0 if first else 1
            pieces += 1
            at += tokens
            want -= tokens
    row_offsets[rows] = pieces
    return Pieces(
        example[:pieces],
        start[:pieces],
        length[:pieces],
        joined[:pieces],
        row_offsets[: rows + 1].copy(),
    )


@numba.njit(cache=True, nogil=True)
def piece_keys(keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The key of each piece, from its example's key and its first token: uint64 [pieces]."""
    out = np.empty(len(keys), np.uint64)
    for i in range(len(keys)):
        out[i] = combine(keys[i], starts[i])
    return out


@numba.njit(cache=True, nogil=True)
def expected_sizes(
    v: Variants, lengths: np.ndarray, keys: np.ndarray, room_a: int
) -> tuple[float, float, int]:
    """Mean (inputs, targets) of texts cut to encoder rows of room_a, and the longest targets.

    The mean is over all variants by their weights, so it does not depend on which are drawn.
    """
    total_a, total_b, longest = 0.0, 0.0, _NO
    for variant in range(len(v.table)):
        share = min(v.table[variant].cumulative, 1.0) - (
            v.table[variant - 1].cumulative if variant > 0 else 0.0
        )
        if v.table[variant].kind == PAIR or not share > 0.0:
            continue
        for i in range(len(lengths)):
            whole = fit(v, variant, UNLIMITED, keys[i], room_a, UNLIMITED)
            longest = max(longest, sizes(v, variant, whole, keys[i])[1])
            n = min(lengths[i], whole)
            if n > 0:
                a, b = sizes(v, variant, n, keys[i])
                total_a += share * a * lengths[i] / n
                total_b += share * b * lengths[i] / n
    return total_a / len(lengths), total_b / len(lengths), longest


@numba.njit(cache=True, nogil=True)
def used(v: Variants, e: np.ndarray, p: Pieces) -> tuple[int, int]:
    """Tokens that all rows hold on either side."""
    used_a, used_b = 0, 0
    i = 0
    while i < len(p.example):
        first, n = i, p.length[i]
        i += 1
        while i < len(p.example) and p.joined[i] == 1:
            n += p.length[i]
            i += 1
        x = p.example[first]
        if v.table[e[x].variant].kind == PAIR:
            a, b = e[x].num_inputs + 1, n + 1
            if v.constants[3] == 1:
                a, b = a + b, 0
        else:
            a, b = sizes(v, e[x].variant, n, combine(e[x].key, p.start[first]))
        used_a += a
        used_b += b
    return used_a, used_b
