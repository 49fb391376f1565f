"""Choosing among given answers by their log-probability, and accuracy of the choice.

The prompt is read once: its encoder output (or prefix) is shared by the C answers, which are then
fed token by token through the decoder's cache, C rows a prompt. Against one full pass for each
(prompt, answer) pair this saves C - 1 readings of the prompt, which are nearly all the work when
answers are short.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from chatyuan.decode.engine import DecodableModel
from chatyuan.decode.text import TextConfig, TextVocabulary, encode_prompt, length_batches
from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.sampling import log_normaliser, select

NORMALISATIONS = ("sum", "tokens", "characters")


@functools.partial(jax.jit, static_argnums=0)
def choice_log_probs(
    model: DecodableModel,
    params: Any,
    tokens: Array,
    lengths: Array,
    choices: Array,
    choice_lengths: Array,
) -> Array:
    """Log-probability of each answer after its prompt, teacher-forced.

    Args:
      model: see `DecodableModel`; hashable.
      params: its parameters.
      tokens: prompts, int32 `[B, S]`, padded on the right.
      lengths: int32 `[B]`; 0 marks a row that only fills up the batch.
      choices: answers, int32 `[B, C, T]`, with their end token where it counts.
      choice_lengths: int32 `[B, C]`; an answer of length 0 gets 0.

    Returns:
      Sums over each answer's tokens, float32 `[B, C]`.
    """
    batch, count, capacity = choices.shape
    logits_BV, cache = model.bind(params).prefill(tokens, lengths, capacity)
    targets_TR = choices.reshape(batch * count, capacity).T
    lengths_R = choice_lengths.reshape(-1)

    def log_probs(logits_RV: Array, targets_R: Array) -> Array:
        return select(logits_RV, targets_R) - log_normaliser(logits_RV)

    def advance(carry: tuple, inputs: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        cache, total_R = carry
        previous_R, targets_R, place = inputs
        logits_RV, cache = model.bind(params).step(previous_R, cache)
        gained_R = jnp.where(place < lengths_R, log_probs(logits_RV, targets_R), 0.0)
        return (cache, total_R + gained_R), None

    first_R = log_probs(jnp.repeat(logits_BV, count, axis=0), targets_TR[0])
    carry = (cache.expand(count), jnp.where(lengths_R > 0, first_R, 0.0))
    inputs = (targets_TR[:-1], targets_TR[1:], jnp.arange(1, capacity))
    (_, total_R), _ = lax.scan(advance, carry, inputs)
    return total_R.reshape(batch, count)


@dataclasses.dataclass(frozen=True)
class ChoiceResult:
    """How one prompt's answers scored.

    Attributes:
      log_probs: of each answer, the end token included, float32 `[C]`.
      scores: `log_probs` divided as the normalisation says.
      best: index of the highest score (the first among equals).
    """

    log_probs: np.ndarray
    scores: np.ndarray
    best: int


class ChoiceScorer:
    """Scores given answers to prompts with one model and vocabulary."""

    def __init__(
        self,
        model: DecodableModel,
        vocabulary: TextVocabulary,
        text_config: TextConfig | None = None,
        *,
        normalisation: str = "sum",
        choice_length_multiple: int = 8,
    ) -> None:
        """Prepares scoring; nothing is compiled before the first prompt of each bucket.

        Args:
          model: see `DecodableModel`.
          vocabulary: see `TextVocabulary`.
          text_config: how prompts become batches; None takes the defaults.
          normalisation: sum (probability of the answer), tokens or characters (mean over either,
            for answers of different lengths).
          choice_length_multiple: answers are padded to a multiple of this, to bound compilations.

        Raises:
          UserError: an unknown normalisation.
        """
        if normalisation not in NORMALISATIONS:
            raise UserError(
                f"normalisation = {normalisation!r} should be one of {', '.join(NORMALISATIONS)}."
                + did_you_mean(normalisation, NORMALISATIONS)
            )
        self.model = model
        self.vocabulary = vocabulary
        self.text_config = text_config or TextConfig()
        self.normalisation = normalisation
        self.choice_length_multiple = choice_length_multiple

    def score(
        self, params: Any, prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[ChoiceResult]:
        """Scores `choices[i]` as answers to `prompts[i]`, in order.

        Raises:
          UserError: a prompt without answers, or not one list of answers for each prompt.
        """
        if len(prompts) != len(choices):
            raise UserError(f"{len(choices)} lists of answers for {len(prompts)} prompts.")
        for row, answers in enumerate(choices):
            if not answers:
                raise UserError(f"Prompt {row} has no answers to choose from; give at least one.")
        config, vocabulary = self.text_config, self.vocabulary
        encoded = [encode_prompt(vocabulary, config, prompt)[0] for prompt in prompts]
        answer_ids = [
            [[*vocabulary.encode(answer), vocabulary.eos_id] for answer in answers]
            for answers in choices
        ]
        results: list[ChoiceResult | None] = [None] * len(prompts)
        for rows, length, size in length_batches(config, [len(ids) for ids in encoded]):
            log_probs = self._run(params, encoded, answer_ids, rows, length, size)
            for place, row in enumerate(rows):
                found = log_probs[place, : len(choices[row])]
                results[row] = self._result(found, choices[row], answer_ids[row])
        return [result for result in results if result is not None]

    def _run(
        self,
        params: Any,
        encoded: list[list[int]],
        answer_ids: list[list[list[int]]],
        rows: list[int],
        length: int,
        size: int,
    ) -> np.ndarray:
        """Log-probabilities `[size, C]` of the answers of a batch."""
        multiple = self.choice_length_multiple
        longest = max(len(ids) for row in rows for ids in answer_ids[row])
        count = max(len(answer_ids[row]) for row in rows)
        pad_id = self.vocabulary.pad_id
        tokens = np.full((size, length), pad_id, np.int32)
        choices = np.full((size, count, -(-longest // multiple) * multiple), pad_id, np.int32)
        lengths = np.zeros(size, np.int32)
        choice_lengths = np.zeros((size, count), np.int32)
        for place, row in enumerate(rows):
            lengths[place] = len(encoded[row])
            tokens[place, : lengths[place]] = encoded[row]
            for column, ids in enumerate(answer_ids[row]):
                choices[place, column, : len(ids)] = ids
                choice_lengths[place, column] = len(ids)
        return np.asarray(
            choice_log_probs(self.model, params, tokens, lengths, choices, choice_lengths)
        )

    def _result(
        self, log_probs: np.ndarray, answers: Sequence[str], ids: list[list[int]]
    ) -> ChoiceResult:
        divisors = np.ones(len(answers), np.float32)
        if self.normalisation == "tokens":
            divisors = np.asarray([len(tokens) for tokens in ids], np.float32)
        elif self.normalisation == "characters":
            divisors = np.asarray([max(1, len(answer)) for answer in answers], np.float32)
        scores = log_probs / divisors
        return ChoiceResult(log_probs, scores, int(np.argmax(scores)))


def choice_accuracy(results: Sequence[ChoiceResult], correct: Sequence[int]) -> float:
    """Fraction of prompts whose best answer is the correct one; 0 without prompts."""
    hits = [result.best == answer for result, answer in zip(results, correct, strict=True)]
    return sum(hits) / max(1, len(hits))
