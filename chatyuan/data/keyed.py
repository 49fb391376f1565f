"""Randomness as a function of a key: no generator, no state, the same on every host and thread.

Everything random in the input pipeline (order of examples, choice of denoiser, spans) is
`hash(key, counter)`. A key is built from (seed, task, position in the task's stream, start inside
the document) with `combine`, so a batch can be rebuilt alone, on any machine, from its step.

The hash is SplitMix64's finaliser (Steele, Lea & Flood 2014), the permutation a six-round Feistel
network with cycle walking (Black & Rogaway 2002): position i of a shuffled list of any length in
constant time and memory. Compiled functions; keys are uint64.
"""

import hashlib
import os
import pathlib
import tempfile

import numba
import numpy as np

if not numba.config.CACHE_DIR and not any(
    os.access(folder, os.W_OK) for folder in (pathlib.Path(__file__).parent, pathlib.Path.home())
):
    # numba refuses to compile with a cache that it can write nowhere (read-only containers).
    numba.config.CACHE_DIR = str(pathlib.Path(tempfile.gettempdir()) / f"numba-{os.getuid()}")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL_2 = np.uint64(0x94D049BB133111EB)
_S27 = np.uint64(27)
_S30 = np.uint64(30)
_S31 = np.uint64(31)
_S32 = np.uint64(32)
_ROUNDS = 3  # double rounds
_MIN_BITS = 10  # small lists walk a larger domain: two-bit halves would not mix


def name_key(*parts: str | int) -> np.uint64:
    """A key from names and numbers, stable across processes and versions of Python."""
    text = "\0".join(str(part) for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))


@numba.njit(inline="always")
def mix(x: np.uint64) -> np.uint64:
    """SplitMix64's finaliser: a bijection of 64-bit words that mixes every bit into every bit."""
    x = (x ^ (x >> _S30)) * _MUL_1
    x = (x ^ (x >> _S27)) * _MUL_2
    return x ^ (x >> _S31)


@numba.njit(inline="always")
def combine(key: np.uint64, value: int) -> np.uint64:
    """The key of item `value` under `key`."""
    return mix(key ^ mix(np.uint64(value) + _GOLDEN))


@numba.njit(inline="always")
def draw(key: np.uint64, counter: int) -> np.uint64:
    """Random word number `counter` of `key`: SplitMix64 started at `key`."""
    return mix(key + _GOLDEN * (np.uint64(counter) + np.uint64(1)))


@numba.njit(inline="always")
def bounded(word: np.uint64, size: int) -> int:
    """A random word as an integer in [0, size), size < 2^31; bias below size / 2^32."""
    return np.int64(((word >> _S32) * np.uint64(size)) >> _S32)


@numba.njit(inline="always")
def uniform(word: np.uint64) -> float:
    """A random word as a float64 in [0, 1)."""
    return np.float64(word >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True, nogil=True)
def permute(index: int, size: int, key: np.uint64) -> int:
    """Where position `index` of a list of `size` items goes under the permutation named `key`."""
    bits = _MIN_BITS
    while (1 << bits) < size:
        bits += 1
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (np.uint64(bits) - low_bits)) - np.uint64(1)
    x = np.uint64(index)
    while True:
        high = x >> low_bits
        low = x & low_mask
        for r in range(_ROUNDS):
            high ^= draw(key + low, 2 * r) & high_mask
            low ^= draw(key + high, 2 * r + 1) & low_mask
        x = (high << low_bits) | low
        if x < np.uint64(size):
            return np.int64(x)


@numba.njit(cache=True, nogil=True)
def permutation(size: int, key: np.uint64) -> np.ndarray:
    """`permute` of every position: int64 [size]."""
    out = np.empty(size, np.int64)
    for i in range(size):
        out[i] = permute(i, size, key)
    return out
