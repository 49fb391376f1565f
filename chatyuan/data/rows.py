"""Writes planned rows: gathers tokens from the caches and applies the objective. No jax here.

A batch is a dict of arrays [rows, length] with SeqIO's names, int32 (weights float32), 0 in segment
ids for padding. See `encoder_decoder_batch` and `decoder_only_batch` for the features.
"""

from typing import NamedTuple

import numba
import numpy as np

from chatyuan.data.objectives import (
    LM,
    MASKED,
    REVERSE,
    Objective,
    Variants,
    mask_tokens,
    pair_sizes,
    write_pair,
)


class Segments(NamedTuple):
    """The segments of a batch in row order: arrays [segments]."""

    row: np.ndarray  # int64, row of the batch
    at: np.ndarray  # int64, first token in the gathered text
    num_inputs: np.ndarray  # int64, tokens of a pair's inputs, which come first; -1 for text
    length: np.ndarray  # int64, tokens of the text, or of a pair's inputs and targets
    variant: np.ndarray  # int64
    key: np.ndarray  # uint64


@numba.njit(cache=True, nogil=True)
def gather(
    tokens: np.ndarray, begin: np.ndarray, length: np.ndarray, at: np.ndarray, out: np.ndarray
) -> None:
    """Copies tokens[begin[i]:][:length[i]] to out[at[i]:] for every i; any integer type."""
    for i in range(len(begin)):
        for j in range(length[i]):
            out[at[i] + j] = tokens[begin[i] + j]


@numba.njit(cache=True, nogil=True)
def _sizes(v: Variants, s: Segments, i: int) -> tuple[int, int]:
    if s.num_inputs[i] >= 0:
        return s.num_inputs[i] + 1, s.length[i] - s.num_inputs[i] + 1
    return pair_sizes(v, s.variant[i], s.length[i], s.key[i])


@numba.njit(cache=True, nogil=True)
def _encoder_decoder(
    v: Variants,
    s: Segments,
    text: np.ndarray,
    inputs: np.ndarray,
    input_segments: np.ndarray,
    input_positions: np.ndarray,
    shifted: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    target_segments: np.ndarray,
    target_positions: np.ndarray,
) -> None:
    longest = 1
    for i in range(len(s.row)):
        longest = max(longest, s.length[i])
    flags = np.empty(longest + 1, np.uint8)
    row, a, b, segment = -1, 0, 0, 0
    for i in range(len(s.row)):
        if s.row[i] != row:
            row, a, b, segment = s.row[i], 0, 0, 0
        segment += 1
        size_a, size_b = _sizes(v, s, i)
        write_pair(
            v,
            s.variant[i],
            s.key[i],
            text[s.at[i] : s.at[i] + s.length[i]],
            s.num_inputs[i],
            inputs[row, a : a + size_a],
            targets[row, b : b + size_b],
            flags,
        )
        for j in range(size_a):
            input_segments[row, a + j] = segment
            input_positions[row, a + j] = j
        shifted[row, b] = v.constants[1]
        for j in range(size_b):
            if j > 0:
                shifted[row, b + j] = targets[row, b + j - 1]
            weights[row, b + j] = 1.0
            target_segments[row, b + j] = segment
            target_positions[row, b + j] = j
        a += size_a
        b += size_b


@numba.njit(cache=True, nogil=True)
def _single(
    v: Variants,
    variant: int,
    key: np.uint64,
    text: np.ndarray,
    shifted: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    attention: np.ndarray,
    flags: np.ndarray,
) -> None:
    """One segment of LM, MASKED or REVERSE; the row slices have len(text) + 1 tokens."""
    n = len(text)
    kind = v.table[variant].kind
    for j in range(n):
        targets[j] = text[j]
    targets[n] = v.constants[0]
    if kind == MASKED:
        mask_tokens(n, v.table[variant].density, v.table[variant].ngram_rate, key, flags)
        flags[n] = 0
        for j in range(n + 1):
            masked = flags[j] == 1
            shifted[j] = v.constants[2] if masked else targets[j]
            weights[j] = 1.0 if masked else 0.0
            attention[j] = 1
    elif kind == REVERSE:
        for j in range(n + 1):
            shifted[j] = targets[j + 1] if j < n else v.constants[1]
            weights[j] = 1.0
            attention[j] = 2
    else:
        shifted[0] = v.constants[1]
        for j in range(n + 1):
            if j > 0:
                shifted[j] = targets[j - 1]
            weights[j] = 1.0
            attention[j] = 0


@numba.njit(cache=True, nogil=True)
def _decoder_only(
    v: Variants,
    s: Segments,
    text: np.ndarray,
    shifted: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    segments: np.ndarray,
    positions: np.ndarray,
    attention: np.ndarray,
) -> None:
    longest = 1
    for i in range(len(s.row)):
        longest = max(longest, s.length[i])
    flags = np.empty(longest + 1, np.uint8)
    row, c, segment = -1, 0, 0
    for i in range(len(s.row)):
        if s.row[i] != row:
            row, c, segment = s.row[i], 0, 0
        segment += 1
        size_a, size_b = _sizes(v, s, i)
        size = size_a + size_b
        tokens = text[s.at[i] : s.at[i] + s.length[i]]
        kind = v.table[s.variant[i]].kind
        if kind == LM or kind == MASKED or kind == REVERSE:
            _single(
                v,
                s.variant[i],
                s.key[i],
                tokens,
                shifted[row, c : c + size],
                targets[row, c : c + size],
                weights[row, c : c + size],
                attention[row, c : c + size],
                flags,
            )
        else:
            write_pair(
                v,
                s.variant[i],
                s.key[i],
                tokens,
                s.num_inputs[i],
                targets[row, c : c + size_a],
                targets[row, c + size_a : c + size],
                flags,
            )
            shifted[row, c] = v.constants[1]
            for j in range(size):
                if j > 0:
                    shifted[row, c + j] = targets[row, c + j - 1]
                weights[row, c + j] = 1.0 if j >= size_a else 0.0
                # SeqIO counts the first target's input, the last prefix token, to the prefix.
                attention[row, c + j] = 1 if j <= size_a else 0
        for j in range(size):
            segments[row, c + j] = segment
            positions[row, c + j] = j
        c += size


def _tokens(shape: tuple[int, int], pad: int) -> np.ndarray:
    return np.zeros(shape, np.int32) if pad == 0 else np.full(shape, pad, np.int32)


def encoder_decoder_batch(
    objective: Objective, s: Segments, text: np.ndarray, rows: int, lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The features of an encoder-decoder batch; decoder inputs are shifted inside each segment."""
    a, b, pad = (rows, lengths[0]), (rows, lengths[1]), objective.pad_id
    batch = {
        "encoder_input_tokens": _tokens(a, pad),
        "encoder_segment_ids": np.zeros(a, np.int32),
        "encoder_positions": np.zeros(a, np.int32),
        "decoder_input_tokens": _tokens(b, pad),
        "decoder_target_tokens": _tokens(b, pad),
        "decoder_loss_weights": np.zeros(b, np.float32),
        "decoder_segment_ids": np.zeros(b, np.int32),
        "decoder_positions": np.zeros(b, np.int32),
    }
    _encoder_decoder(objective.variants, s, text, *batch.values())
    return batch


def decoder_only_batch(
    objective: Objective, s: Segments, text: np.ndarray, rows: int, lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The features of a batch for one stack, rows of the sum of both lengths.

    `decoder_causal_attention` is 1 for tokens seen by their whole segment (prefix and masked LM),
    0 for left-to-right and 2 for right-to-left tokens. Masked LM inputs are not shifted; a
    right-to-left token's input is the token after it.
    """
    shape, pad = (rows, sum(lengths)), objective.pad_id
    batch = {
        "decoder_input_tokens": _tokens(shape, pad),
        "decoder_target_tokens": _tokens(shape, pad),
        "decoder_loss_weights": np.zeros(shape, np.float32),
        "decoder_segment_ids": np.zeros(shape, np.int32),
        "decoder_positions": np.zeros(shape, np.int32),
        "decoder_causal_attention": np.zeros(shape, np.int32),
    }
    _decoder_only(objective.variants, s, text, *batch.values())
    return batch
