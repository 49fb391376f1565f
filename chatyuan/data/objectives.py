"""Pretraining objectives as plain functions on token ids: one compiled implementation each.

An objective is a list of weighted *variants*, each of one kind:
  SPAN     T5 span corruption (Raffel et al. 2020), any density and mean span length
  PREFIX   the text is split in two: inputs and targets
  LM       left to right
  MASKED   bidirectional masked tokens (UniLM, Dong et al. 2019)
  REVERSE  right to left
  PAIR     an example that already has inputs and targets
Span corruption is one variant, UL2 (Tay et al. 2022) several SPAN and PREFIX ones, UniLM four. How
long an example becomes is `sizes(variant, tokens, key)`, known without doing the work: packing is
planned from lengths alone. Span corruption follows `t5.data` in float32 rounding and in the
distribution of its masks (`random_spans_noise_mask`), with two differences: where T5 fails for more
spans than non-noise tokens the spans are fewer, and a text is split before it needs more sentinels
than the vocabulary has. Inputs and targets end with end-of-sequence. No jax here.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numba
import numpy as np

from chatyuan.data.keyed import bounded, draw, uniform
from chatyuan.errors import UserError, did_you_mean

SPAN, PREFIX, LM, MASKED, REVERSE, PAIR = range(6)
KINDS = ("span", "prefix", "lm", "masked", "reverse", "pair")
NAMES = ("span_corruption", "ul2", "prefix_lm", "lm", "seq2seq", "unilm")
ARCHITECTURES = ("encoder_decoder", "prefix_lm")
MIN_PIECE = 8  # tokens; a document is not cut into shorter pieces than this
UNLIMITED = 1 << 30

# UL2's seven denoisers (Tay et al. 2022, table 1); a mean length of 0 is one span at the end.
UL2_DENOISERS = (
    ("R", 0.15, 3.0, 1.0),
    ("R", 0.15, 8.0, 1.0),
    ("X", 0.5, 3.0, 1.0),
    ("X", 0.5, 8.0, 1.0),
    ("X", 0.15, 64.0, 1.0),
    ("X", 0.5, 64.0, 1.0),
    ("S", 0.25, 0.0, 1.0),
)


def _field(default: object, text: str, unit: str = "") -> dataclasses.Field:
    return dataclasses.field(default=default, metadata={"help": text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a text becomes before it is learned from."""

    name: str = _field("span_corruption", "one of " + ", ".join(NAMES))
    noise_density: float = _field(
        0.15, "share of tokens removed (span_corruption) or masked (unilm)", "fraction"
    )
    mean_noise_span_length: float = _field(3.0, "mean length of a removed span", "tokens")
    prefix_target_fraction: float = _field(
        0.5,
        "mean share of a text that becomes targets where it is split in two; the split is uniform, "
        "so at most 0.5",
        "fraction",
    )
    denoisers: tuple[tuple[str, float, float, float], ...] = _field(
        UL2_DENOISERS,
        "ul2: (mode, density, mean span length in tokens, weight); length 0 is one span at the end",
    )
    mode_tokens: tuple[tuple[str, str], ...] = _field(
        (), "ul2: (mode, piece of the vocabulary) put before the inputs of that mode's examples"
    )
    unilm_rates: tuple[float, ...] = _field(
        (2.0, 2.0, 1.0, 1.0),
        "unilm: relative rates of masked, sequence-to-sequence, left-to-right, right-to-left",
    )
    mask_ngram_rate: float = _field(
        0.2, "unilm: share of masking draws that take two or three tokens, not one", "fraction"
    )
    truncate_inputs: str = _field(
        "right", "which end of inputs that do not fit is cut: right, or left (keeps the last turn)"
    )


class VocabularyLike(Protocol):
    """What an objective reads from `chatyuan.text.vocabulary.Vocabulary`."""

    sentinel_ids: Sequence[int]

    @property
    def eos_id(self) -> int:
        """End of sequence."""

    @property
    def pad_id(self) -> int:
        """Padding and decoder start."""

    def id(self, piece: str) -> int | None:
        """The id of a piece, None when there is no such piece."""


# Tables of records: every array of an argument costs compile time in each function that passes it.
VARIANT = np.dtype(
    [
        ("kind", np.int64),
        ("mode", np.int64),  # id of the mode token, or -1
        ("limit", np.int64),  # longest text whose spans the sentinels suffice for
        ("cumulative", np.float64),  # share of this variant and those before; PAIR is never drawn
        ("ngram_rate", np.float64),
        ("density", np.float32),
        ("mean", np.float32),  # tokens
    ],
    align=True,
)


class Variants(NamedTuple):
    """The variants of an objective, and the ids that they write."""

    table: np.ndarray  # VARIANT [variants]
    sentinels: np.ndarray  # int32
    constants: np.ndarray  # int64: eos, pad, mask, decoder_only


@numba.njit(inline="always")
def _noise(n: int, density: np.float32) -> int:
    # T5 computes in float32 and rounds half to even.
    count = np.int64(np.rint(np.float32(n) * density))
    return min(max(count, 1), n - 1)


@numba.njit(inline="always")
def _spans(n: int, noise: int, mean: np.float32) -> int:
    count = np.int64(np.rint(np.float32(noise) / mean))
    return min(max(count, 1), min(noise, n - noise))


@numba.njit(inline="always")
def _split(n: int, density: np.float32, key: np.uint64) -> int:
    """Number of target tokens of a text of n that is split in two; monotone in n."""
    if n < 2:
        return n
    longest = min(n - 1, max(1, np.int64(np.rint(np.float32(2.0) * density * np.float32(n))) - 1))
    return 1 + bounded(draw(key, 0), longest)


@numba.njit(cache=True, nogil=True)
def pair_sizes(v: Variants, variant: int, n: int, key: np.uint64) -> tuple[int, int]:
    """Lengths (inputs, targets) of a text of n >= 1 tokens, with mode token and end-of-sequence.

    Both are non-decreasing in n for a fixed key. Kinds without inputs return (0, length).
    """
    kind = v.table[variant].kind
    lead = 1 if v.table[variant].mode >= 0 else 0
    if kind == SPAN:
        if n == 1:  # T5 keeps a single token and asks for an empty span
            return 2 + lead, 2
        noise = _noise(n, v.table[variant].density)
        spans = _spans(n, noise, v.table[variant].mean)
        return n - noise + spans + 1 + lead, noise + spans + 1
    if kind == PREFIX:
        targets = _split(n, v.table[variant].density, key)
        return n - targets + 1 + lead, targets + 1
    return 0, n + 1


@numba.njit(cache=True, nogil=True)
def sizes(v: Variants, variant: int, n: int, key: np.uint64) -> tuple[int, int]:
    """What a text of n tokens takes of a row: (encoder, decoder), or (all, 0) for one stack."""
    inputs, targets = pair_sizes(v, variant, n, key)
    if v.constants[3] == 1:
        return inputs + targets, 0
    return inputs, targets


@numba.njit(cache=True, nogil=True)
def fit(v: Variants, variant: int, n: int, key: np.uint64, room_a: int, room_b: int) -> int:
    """The longest prefix of a text of n tokens that fits into (room_a, room_b); 0 if none does."""
    low, high = 0, min(n, v.table[variant].limit)
    while low < high:
        middle = (low + high + 1) // 2
        a, b = sizes(v, variant, middle, key)
        if a <= room_a and b <= room_b:
            low = middle
        else:
            high = middle - 1
    return low


@numba.njit(cache=True, nogil=True)
def choose_variants(v: Variants, keys: np.ndarray, out: np.ndarray) -> None:
    """Draws a variant for every example key by the objective's weights into out int64 [n]."""
    for i in range(len(keys)):
        u = uniform(draw(keys[i], 1))
        variant = 0
        while u >= v.table[variant].cumulative:
            variant += 1
        out[i] = variant


@numba.njit(inline="always")
def _mark(flags: np.ndarray, size: int, count: int, key: np.uint64, counter: int) -> int:
    """Sets `count` of flags[1:size], every choice equally likely; returns the next counter."""
    rest = size - 1
    invert = 2 * count > rest
    base = np.uint8(1) if invert else np.uint8(0)
    for i in range(size):
        flags[i] = base
    todo = rest - count if invert else count
    while todo > 0:
        i = 1 + bounded(draw(key, counter), rest)
        counter += 1
        if flags[i] == base:
            flags[i] = np.uint8(1) - base
            todo -= 1
    return counter


@numba.njit(cache=True, nogil=True)
def _write_spans(
    v: Variants,
    variant: int,
    key: np.uint64,
    text: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Span corruption of `text` into exactly sized inputs and targets; flags uint8 [>= n]."""
    n = len(text)
    eos = v.constants[0]
    a = 0
    b = 0
    if v.table[variant].mode >= 0:
        inputs[0] = v.table[variant].mode
        a = 1
    if n == 1:
        inputs[a] = text[0]
        inputs[a + 1] = eos
        targets[0] = v.sentinels[0]
        targets[1] = eos
        return
    noise = _noise(n, v.table[variant].density)
    spans = _spans(n, noise, v.table[variant].mean)
    kept = n - noise
    counter = _mark(flags, kept, spans - 1, key, 2)
    _mark(flags[kept:], noise, spans - 1, key, counter)
    i = 0  # over kept tokens
    j = kept  # over removed tokens, where their flags lie
    at = 0  # over the text
    for span in range(spans):
        inputs[a] = text[at]
        at += 1
        a += 1
        i += 1
        while i < kept and flags[i] == 0:
            inputs[a] = text[at]
            at += 1
            a += 1
            i += 1
        inputs[a] = v.sentinels[span]
        a += 1
        targets[b] = v.sentinels[span]
        targets[b + 1] = text[at]
        at += 1
        b += 2
        j += 1
        while j < n and flags[j] == 0:
            targets[b] = text[at]
            at += 1
            b += 1
            j += 1
    inputs[a] = eos
    targets[b] = eos


@numba.njit(cache=True, nogil=True)
def write_pair(
    v: Variants,
    variant: int,
    key: np.uint64,
    text: np.ndarray,
    num_inputs: int,
    inputs: np.ndarray,
    targets: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Inputs and targets of one example into exactly sized arrays.

    `text` is the tokens without end-of-sequence; for PAIR the first `num_inputs` are the inputs.
    """
    kind = v.table[variant].kind
    if kind == SPAN:
        _write_spans(v, variant, key, text, inputs, targets, flags)
        return
    n = len(text)
    a = 0
    if kind == PREFIX:
        num_inputs = n - _split(n, v.table[variant].density, key)
        if v.table[variant].mode >= 0:
            inputs[0] = v.table[variant].mode
            a = 1
    for i in range(num_inputs):
        inputs[a + i] = text[i]
    if len(inputs) > 0:
        inputs[a + num_inputs] = v.constants[0]
    for i in range(n - num_inputs):
        targets[i] = text[num_inputs + i]
    targets[n - num_inputs] = v.constants[0]


@numba.njit(cache=True, nogil=True)
def mask_tokens(
    n: int, density: np.float32, ngram_rate: float, key: np.uint64, flags: np.ndarray
) -> int:
    """Chooses about density * n of n tokens (at least one): sets flags[:n]; returns how many.

    Draws single tokens, and with probability `ngram_rate` two or three tokens in a row (equally
    likely), until the exact number is reached; the last draw is cut to it.
    """
    for i in range(n):
        flags[i] = 0
    count = min(max(np.int64(np.rint(np.float32(n) * density)), 1), n)
    todo = count
    counter = 2
    while todo > 0:
        length = 1
        if uniform(draw(key, counter)) < ngram_rate:
            length = 2 + bounded(draw(key, counter + 1), 2)
        start = bounded(draw(key, counter + 2), n)
        counter += 3
        for i in range(start, min(start + length, n)):
            if flags[i] == 0 and todo > 0:
                flags[i] = 1
                todo -= 1
    return count


class Objective:
    """An `ObjectiveConfig` checked against a vocabulary and a model kind; immutable."""

    def __init__(
        self,
        config: ObjectiveConfig,
        vocabulary: VocabularyLike,
        architecture: str = "encoder_decoder",
    ) -> None:
        """Resolves every variant.

        Args:
          config: the objective.
          vocabulary: gives end-of-sequence, padding, sentinels and mode tokens.
          architecture: "encoder_decoder" or "prefix_lm" (one stack), as in `ModelConfig`.

        Raises:
          UserError: an unknown name, a value out of range, or pieces that the vocabulary lacks.
        """
        _check_config(config, architecture)
        self.config = config
        self.architecture = architecture
        self.decoder_only = architecture == "prefix_lm"
        self.eos_id = int(vocabulary.eos_id)
        self.pad_id = int(vocabulary.pad_id)
        rows = _rows(config)
        self.names = tuple(row[0] for row in rows)
        modes = {name: _mode_id(vocabulary, name, piece) for name, piece in config.mode_tokens}
        taken = set(modes.values())
        sentinels = [int(token) for token in vocabulary.sentinel_ids if int(token) not in taken]
        needs = any(kind in (SPAN, MASKED) for _, kind, _, _, _ in rows)
        if needs and not sentinels:
            raise UserError(
                f"ObjectiveConfig.name = {config.name!r} needs <extra_id_N> pieces, and the "
                "vocabulary has none. Use a vocabulary with them (T5's own files: VOCABULARY="
                "spiece.model:100), or an objective without: prefix_lm, lm, seq2seq."
            )
        rows = [*rows, ("pair", PAIR, 0.0, 0.0, 0.0)]
        weights = np.array([row[4] for row in rows], np.float64)
        total = weights.sum()
        cumulative = np.cumsum(weights / total) if total else np.full(len(rows), 1.0)
        cumulative[cumulative > 1 - 1e-12] = np.inf  # rounding must not draw the last variant
        table = np.zeros(len(rows), VARIANT)
        table["kind"] = [row[1] for row in rows]
        table["mode"] = [modes.get(row[0], -1) for row in rows]
        table["limit"] = [_limit(row, len(sentinels)) for row in rows]
        table["cumulative"] = cumulative
        table["ngram_rate"] = config.mask_ngram_rate
        table["density"] = [row[2] for row in rows]
        table["mean"] = [row[3] for row in rows]
        self.variants = Variants(
            table=table,
            sentinels=np.array(sentinels or [0], np.int32),
            constants=np.array(
                [self.eos_id, self.pad_id, sentinels[0] if sentinels else -1, self.decoder_only],
                np.int64,
            ),
        )
        self.pair_variant = len(rows) - 1

    @property
    def takes_text(self) -> bool:
        """False for `seq2seq`, which reads only tasks that have inputs and targets."""
        return self.config.name != "seq2seq"

    def variant(self, key: int) -> int:
        """The variant that example `key` draws."""
        out = np.zeros(1, np.int64)
        choose_variants(self.variants, np.array([key], np.uint64), out)
        return int(out[0])

    def pair(
        self, tokens: Sequence[int], key: int, variant: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one text, int32, with end-of-sequence (a SPAN or PREFIX variant).

        The same code fills batches; this form is for tests, `--dry_run` and other tools.
        """
        text = np.ascontiguousarray(tokens, np.int32)
        variant = self.variant(key) if variant is None else variant
        assert self.variants.table["kind"][variant] in (SPAN, PREFIX), self.names[variant]
        key = np.uint64(key)
        a, b = pair_sizes(self.variants, variant, len(text), key)
        inputs, targets = np.zeros(a, np.int32), np.zeros(b, np.int32)
        flags = np.zeros(len(text) + 1, np.uint8)
        write_pair(self.variants, variant, key, text, 0, inputs, targets, flags)
        return inputs, targets

    def check_lengths(self, input_length: int, target_length: int, *, pairs: bool = False) -> None:
        """Raises UserError where a piece of MIN_PIECE tokens (a pair of single ones) does not fit.

        Args:
          input_length, target_length: tokens of a row, end-of-sequence included; one stack has
            rows of their sum.
          pairs: whether there are examples with inputs and targets of their own.
        """
        v = self.variants
        needs = {"pair": (2, 2)} if pairs else {}
        for variant, name in enumerate(self.names):
            both = [pair_sizes(v, variant, MIN_PIECE, _extreme(u)) for u in (0, 1)]
            need = max(a for a, _ in both), max(b for _, b in both)
            if self.decoder_only:
                need = (max(sum(each) for each in both) - target_length, 0)
            needs[name] = need
        for name, (need_a, need_b) in needs.items():
            if need_a <= input_length and need_b <= target_length:
                continue
            macro, value, need = "INPUT_LENGTH", input_length, need_a
            if need_a <= input_length:
                macro, value, need = "TARGET_LENGTH", target_length, need_b
            raise UserError(
                f"{macro}={value} is too short for one example of {self.config.name} ({name}), "
                f"which takes at least {need} tokens there. Use --gin.{macro}={need} or more."
            )

    def room(self, input_length: int, target_length: int) -> tuple[int, int]:
        """The capacities of a row that `sizes` counts against."""
        if self.decoder_only:
            return input_length + target_length, 0
        return input_length, target_length


# Keys whose draw(key, 0) is the smallest and the largest word, found by inverting SplitMix64.
def _extreme(which: int) -> np.uint64:
    word = 0 if which == 0 else (1 << 64) - 1
    mask = (1 << 64) - 1

    def unshift(x: int, bits: int) -> int:
        out = x
        for _ in range(64 // bits + 1):
            out = x ^ (out >> bits)
        return out

    x = unshift(word, 31)
    x = unshift(x * pow(0x94D049BB133111EB, -1, 1 << 64) & mask, 27)
    x = unshift(x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & mask, 30)
    return np.uint64((x - 0x9E3779B97F4A7C15) & mask)


def _rows(config: ObjectiveConfig) -> list[tuple[str, int, float, float, float]]:
    """(name, kind, density, mean, weight) of every variant but PAIR."""
    half = config.prefix_target_fraction
    density = config.noise_density
    if config.name == "span_corruption":
        return [("span", SPAN, density, config.mean_noise_span_length, 1.0)]
    if config.name == "prefix_lm":
        return [("prefix", PREFIX, half, 0.0, 1.0)]
    if config.name == "lm":
        return [("lm", LM, 0.0, 0.0, 1.0)]
    if config.name == "unilm":
        masked, prefix, forward, backward = config.unilm_rates
        rows = [
            ("masked", MASKED, density, 0.0, masked),
            ("prefix", PREFIX, half, 0.0, prefix),
            ("lm", LM, 0.0, 0.0, forward),
            ("reverse", REVERSE, 0.0, 0.0, backward),
        ]
        return [row for row in rows if row[4] > 0]
    if config.name == "ul2":
        return [
            (name, SPAN if mean else PREFIX, density, mean, weight)
            for name, density, mean, weight in config.denoisers
            if weight > 0
        ]
    return []


def _limit(row: tuple[str, int, float, float, float], sentinels: int) -> int:
    """The longest text whose number of spans is at most the number of sentinels."""
    _, kind, density, mean, _ = row
    if kind != SPAN:
        return UNLIMITED
    n = max(2, int(sentinels * mean / density * 1.2) + 16)
    f32 = np.float32
    while _spans.py_func(n, _noise.py_func(n, f32(density)), f32(mean)) > sentinels:
        n -= 1
    return n


def _mode_id(vocabulary: VocabularyLike, mode: str, piece: str) -> int:
    token = vocabulary.id(piece)
    if token is None:
        raise UserError(
            f"ObjectiveConfig.mode_tokens: the vocabulary has no piece {piece!r} (mode {mode}). "
            "Name existing pieces, for example the last sentinels, or leave mode_tokens empty."
        )
    return int(token)


def _check_config(config: ObjectiveConfig, architecture: str) -> None:
    name = "ObjectiveConfig."
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture = {architecture!r} is not one of {', '.join(ARCHITECTURES)}."
            + did_you_mean(architecture, ARCHITECTURES)
        )
    if config.name not in NAMES:
        raise UserError(
            f"{name}name = {config.name!r} is not one of {', '.join(NAMES)}."
            + did_you_mean(config.name, NAMES)
        )
    if config.name in ("lm", "unilm") and architecture == "encoder_decoder":
        raise UserError(
            f"{name}name = {config.name!r} needs a model of one stack (ModelConfig.architecture = "
            "'prefix_lm'); an encoder-decoder learns text with span_corruption, ul2 or prefix_lm."
        )
    if config.truncate_inputs not in ("left", "right"):
        raise UserError(
            f"{name}truncate_inputs = {config.truncate_inputs!r} is neither 'left' nor 'right'."
        )
    checks = [("noise_density", config.noise_density, 0.0, 1.0)]
    checks += [("prefix_target_fraction", config.prefix_target_fraction, 0.0, 0.5 + 1e-9)]
    checks += [("mean_noise_span_length", config.mean_noise_span_length, 0.999, np.inf)]
    checks += [("mask_ngram_rate", config.mask_ngram_rate, -1e-9, 1.0 + 1e-9)]
    for mode, density, mean, weight in config.denoisers:
        # One span at the end is drawn uniformly around its mean, which cannot pass one half.
        top = 1.0 if mean else 0.5 + 1e-9
        checks += [(f"denoisers ({mode}) density", density, 0.0, top)]
        checks += [(f"denoisers ({mode}) mean length", mean if mean else 1.0, 0.999, np.inf)]
        checks += [(f"denoisers ({mode}) weight", weight, -1e-9, np.inf)]
    for what, value, low, high in checks:
        if not low < value < high:
            raise UserError(
                f"{name}{what} = {value} must lie above {round(low, 2)} and below {round(high, 2)}."
            )
    if config.name == "ul2" and not sum(row[3] for row in config.denoisers) > 0:
        raise UserError(f"{name}denoisers = {config.denoisers} has no row of positive weight.")
    rates = config.unilm_rates
    if len(rates) != 4 or min(rates) < 0 or not sum(rates) > 0:
        raise UserError(
            f"{name}unilm_rates = {rates} must be four non-negative rates, not all 0: masked, "
            "sequence-to-sequence, left-to-right, right-to-left."
        )
    unknown = {mode for mode, _ in config.mode_tokens} - {row[0] for row in config.denoisers}
    if unknown:
        raise UserError(
            f"{name}mode_tokens names {', '.join(sorted(unknown))}, which no denoiser is called."
        )
