"""From prompts to texts: tokenise, group by length, generate, decode.

1. Prompts are sorted by length and padded to one of a few lengths and batch sizes, so that a stream
   of any prompts compiles at most lengths x sizes programs.
2. A prompt that is too long loses its beginning, whole turns where it is a dialogue: the latest
   question decides the answer (ChatYuan's own script cuts the end off).
3. A prompt's result depends on its text and its seed, not on its place or its neighbours.
Escapes for newlines and tabs belong to the vocabulary, which applies them in encode and decode.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from chatyuan.decode import stopping
from chatyuan.decode.config import DecodeConfig
from chatyuan.decode.engine import DecodableModel, DecodeOutput, make_generate
from chatyuan.errors import UserError, did_you_mean
from chatyuan.text import templates

TRUNCATIONS = ("turns", "left", "right")


class TextVocabulary(Protocol):
    """What this module asks of `chatyuan.text.vocabulary.Vocabulary`."""

    size: int
    pad_id: int
    eos_id: int
    sentinel_ids: Sequence[int]

    def encode(self, text: str) -> list[int]:
        """Token ids without the end token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How prompts become batches.

    Raises:
      UserError: a value outside its range.
    """

    input_lengths: tuple[int, ...] = dataclasses.field(
        default=(32, 64, 128, 256, 512),
        metadata={
            "help": "padded prompt lengths; a prompt longer than the last is truncated",
            "unit": "tokens",
        },
    )
    batch_sizes: tuple[int, ...] = dataclasses.field(
        default=(1, 8, 32), metadata={"help": "padded batch sizes", "unit": "prompts"}
    )
    truncation: str = dataclasses.field(
        default="turns",
        metadata={
            "help": "what a long prompt loses: turns (whole leading dialogue turns, then tokens "
            "from the left), left or right"
        },
    )
    append_eos: bool = dataclasses.field(
        default=True, metadata={"help": "end every prompt with the end token, as T5's tasks do"}
    )
    stop: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"help": "an answer is cut before the first of these strings"}
    )
    suppress_sentinels: bool = dataclasses.field(
        default=False, metadata={"help": "never emit <extra_id_N>"}
    )

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("input_lengths", "batch_sizes"):
            values = tuple(sorted(set(getattr(self, name))))
            if not values or values[0] < 1:
                raise UserError(
                    f"{name} = {getattr(self, name)} should hold one or more positive integers."
                )
            object.__setattr__(self, name, values)
        if self.input_lengths[0] < 2:
            raise UserError(f"input_lengths = {self.input_lengths} should each be at least 2.")
        if self.truncation not in TRUNCATIONS:
            raise UserError(
                f"truncation = {self.truncation!r} should be one of {', '.join(TRUNCATIONS)}."
                + did_you_mean(str(self.truncation), TRUNCATIONS)
            )


@dataclasses.dataclass(frozen=True)
class TextResult:
    """The G answers to one prompt, best first for beam search.

    Attributes:
      texts: decoded answers, cut at stop strings.
      token_ids: what was generated, the end token included.
      scores: see `DecodeOutput.scores`.
      finished: whether each answer ended by itself (end token or stop string), not by length.
      prompt_tokens: tokens of the prompt as given to the model.
      truncated_tokens: tokens that the prompt lost because it was too long.
    """

    texts: list[str]
    token_ids: list[list[int]]
    scores: list[float]
    finished: list[bool]
    prompt_tokens: int
    truncated_tokens: int

    @property
    def text(self) -> str:
        """The first answer."""
        return self.texts[0]


def encode_prompt(
    vocabulary: TextVocabulary, config: TextConfig, prompt: str
) -> tuple[list[int], int]:
    """Token ids of a prompt, truncated to the longest bucket, and how many were lost."""
    room = config.input_lengths[-1] - config.append_eos
    ids = vocabulary.encode(prompt)
    total = len(ids)
    if total > room and config.truncation == "turns":
        ids = _drop_turns(vocabulary, prompt, room)
    ids = ids[:room] if config.truncation == "right" else ids[max(0, len(ids) - room) :]
    lost = total - len(ids)
    if config.append_eos:
        ids = [*ids, vocabulary.eos_id]
    # A row without tokens would count as a filler of the batch.
    return ids or [vocabulary.eos_id], lost


def _drop_turns(vocabulary: TextVocabulary, prompt: str, room: int) -> list[int]:
    """Token ids of the longest ending of a dialogue that begins with a turn and fits."""
    lines = [0] + [place + 1 for place, letter in enumerate(prompt) if letter == "\n"]
    starts = [place for place in lines if prompt.startswith(templates.USER, place)]
    ids: list[int] = []
    for start in starts or [0]:
        ids = vocabulary.encode(prompt[start:])
        if len(ids) <= room:
            break
    return ids


def length_batches(
    config: TextConfig, lengths: Sequence[int]
) -> Iterator[tuple[list[int], int, int]]:
    """Groups rows by length: yields rows that share a bucket, its length, the padded batch size."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for bucket, group in itertools.groupby(
        order, key=lambda row: next(n for n in config.input_lengths if n >= lengths[row])
    ):
        rows = list(group)
        while rows:
            size = next((n for n in config.batch_sizes if n >= len(rows)), config.batch_sizes[-1])
            yield rows[:size], bucket, size
            rows = rows[size:]


class TextGenerator:
    """Answers prompts with one model, vocabulary and configuration; see the module's text.

    >>> generator = TextGenerator(model, vocabulary, DecodeConfig(method="beam"))
    >>> [result.text for result in generator.generate(params, ["用户：你好\\n小元："])]
    """

    def __init__(
        self,
        model: DecodableModel,
        vocabulary: TextVocabulary,
        decode_config: DecodeConfig,
        text_config: TextConfig | None = None,
        *,
        start_id: int = 0,
    ) -> None:
        """Prepares generation; nothing is compiled before the first prompt of each bucket.

        Args:
          model: see `chatyuan.decode.engine.DecodableModel`.
          vocabulary: see `TextVocabulary`; ids past its size are never emitted.
          decode_config: how tokens are chosen.
          text_config: how prompts become batches; None takes the defaults.
          start_id: what the decoder reads first.
        """
        self.vocabulary = vocabulary
        self.decode_config = decode_config
        self.text_config = text_config or TextConfig()
        suppressed = vocabulary.sentinel_ids if self.text_config.suppress_sentinels else ()
        self._generate = make_generate(
            model,
            decode_config,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            start_id=start_id,
            valid_vocab_size=vocabulary.size,
            suppressed=tuple(suppressed),
        )

    def generate(
        self, params: Any, prompts: Sequence[str], seeds: Sequence[int] | int = 0
    ) -> list[TextResult]:
        """Answers every prompt, in order.

        Args:
          params: the model's parameters.
          prompts: any number of any length.
          seeds: one a prompt, or one number n that stands for n, n + 1, ... (method sample only).
        """
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(prompts))
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each.")
        encoded = [encode_prompt(self.vocabulary, self.text_config, prompt) for prompt in prompts]
        results: list[TextResult | None] = [None] * len(prompts)
        # One batch is decoded to text while the device works on the next.
        pending: tuple[list[int], DecodeOutput] | None = None
        for rows, length, size in length_batches(
            self.text_config, [len(ids) for ids, _ in encoded]
        ):
            output = self._run(params, encoded, seeds, rows, length, size)
            if pending is not None:
                self._collect(*pending, encoded, results)
            pending = rows, output
        if pending is not None:
            self._collect(*pending, encoded, results)
        return [result for result in results if result is not None]

    def num_compiled(self) -> int:
        """Programs compiled so far, one for each bucket met."""
        return self._generate.num_compiled()

    def _run(
        self,
        params: Any,
        encoded: list[tuple[list[int], int]],
        seeds: Sequence[int],
        rows: list[int],
        length: int,
        size: int,
    ) -> DecodeOutput:
        tokens = np.full((size, length), self.vocabulary.pad_id, np.int32)
        lengths = np.zeros(size, np.int32)
        row_seeds = np.zeros(size, np.uint32)
        for place, row in enumerate(rows):
            ids = encoded[row][0]
            tokens[place, : len(ids)] = ids
            lengths[place] = len(ids)
            row_seeds[place] = seeds[row] % 2**32
        return self._generate(params, tokens, lengths, row_seeds)

    def _collect(
        self,
        rows: list[int],
        output: DecodeOutput,
        encoded: list[tuple[list[int], int]],
        results: list[TextResult | None],
    ) -> None:
        """Writes the texts of one batch to their places in `results`."""
        tokens, lengths, scores = map(np.asarray, (output.tokens, output.lengths, output.scores))
        for place, row in enumerate(rows):
            ids = [
                answer[:length].tolist()
                for answer, length in zip(tokens[place], lengths[place], strict=True)
            ]
            cut = [
                stopping.cut_at_stop(self.vocabulary.decode(answer), self.text_config.stop)
                for answer in ids
            ]
            results[row] = TextResult(
                texts=[text for text, _ in cut],
                token_ids=ids,
                scores=scores[place].tolist(),
                finished=[
                    stopped or (bool(answer) and answer[-1] == self.vocabulary.eos_id)
                    for answer, (_, stopped) in zip(ids, cut, strict=True)
                ],
                prompt_tokens=len(encoded[row][0]),
                truncated_tokens=encoded[row][1],
            )
