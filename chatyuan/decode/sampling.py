"""From a configuration to the functions of `chatyuan.ops.sampling` that one step applies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from chatyuan.decode.config import DecodeConfig
from chatyuan.ops import sampling


@dataclasses.dataclass(frozen=True)
class Processors:
    """The score processors of one configuration, applied in Hugging Face's order.

    Greedy decoding and sampling apply them to logits, beam search to log-probabilities, as Hugging
    Face does (it matters for the repetition penalty, which depends on the sign).
    """

    config: DecodeConfig
    eos_ids: tuple[int, ...]
    suppressed: tuple[int, ...]
    valid_vocab_size: int | None

    @property
    def active(self) -> bool:
        """Whether anything is changed at all (a narrower vocabulary is only known at call time)."""
        config = self.config
        return bool(
            config.repetition_penalty != 1
            or config.no_repeat_ngram_size
            or config.min_length
            or self.suppressed
            or self.valid_vocab_size is not None
        )

    def __call__(self, scores_BV: Array, history_BT: Array, generated: Array) -> Array:
        """Processes scores `[B, V]`; the history holds the start token and `generated` more."""
        config = self.config
        length = generated + 1
        if config.repetition_penalty != 1:
            scores_BV = sampling.repetition_penalty(
                scores_BV, history_BT, length, config.repetition_penalty
            )
        if config.no_repeat_ngram_size:
            scores_BV = sampling.ban_repeated_ngrams(
                scores_BV, history_BT, length, config.no_repeat_ngram_size
            )
        if config.min_length:
            scores_BV = sampling.enforce_min_length(
                scores_BV, generated, config.min_length, self.eos_ids
            )
        allowed_V = self._allowed(scores_BV.shape[-1])
        if not allowed_V.all():
            scores_BV = sampling.mask_vocabulary(scores_BV, jnp.asarray(allowed_V))
        return scores_BV

    def _allowed(self, vocab_size: int) -> np.ndarray:
        allowed_V = np.ones(vocab_size, bool)
        if self.valid_vocab_size is not None:
            allowed_V[self.valid_vocab_size :] = False
        allowed_V[list(self.suppressed)] = False
        return allowed_V


def row_keys(seeds: Array, samples: int) -> Array:
    """One random key for each of a prompt's rows, key array `[B * samples]`, prompt-major.

    Args:
      seeds: integers `[B]`, one a prompt; or one key, which is folded with each row's index; or
        keys `[B]`. With integers or keys `[B]` a prompt's output does not depend on its batch.
      samples: rows a prompt.
    """
    if jnp.issubdtype(seeds.dtype, jax.dtypes.prng_key):
        keys_B = seeds
    else:
        keys_B = jax.vmap(jax.random.key)(seeds)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
    return fold(keys_B, jnp.arange(samples)).reshape(-1)


def pick(
    config: DecodeConfig,
    processors: Processors,
    logits_BV: Array,
    history_BT: Array,
    generated: Array,
    uniforms_TB2: Array | None,
) -> tuple[Array, Array]:
    """Chooses the next token of every row (greedy or sample).

    Returns:
      ids int32 `[B]` and log-probabilities float32 `[B, C]`: of the distribution chosen from and,
      with `model_log_probs`, of the model itself.
    """
    scores_BV = processors(logits_BV, history_BT, generated)
    if config.method == "sample":
        uniforms_B2 = lax.dynamic_index_in_dim(uniforms_TB2, generated, keepdims=False)
        ids_B, log_probs_B = sampling.sample(
            uniforms_B2,
            scores_BV,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
    else:
        ids_B = sampling.greedy(scores_BV)
        log_probs_B = sampling.select(scores_BV, ids_B) - sampling.log_normaliser(scores_BV)
    channels = [log_probs_B]
    if config.model_log_probs:
        channels.append(sampling.select(logits_BV, ids_B) - sampling.log_normaliser(logits_BV))
    return ids_B, jnp.stack(channels, axis=-1)
