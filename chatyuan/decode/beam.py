"""Beam search with the rules of Hugging Face transformers 5 (`GenerationMixin._beam_search`).

1. Candidates of a prompt are the 2 x beam_size best continuations of its running hypotheses
   (more with several end tokens), so that beam_size of them never end.
2. Of these, only the first beam_size may enter the pool of finished hypotheses, when they end; at
   the last position all of them end. The pool keeps the best beam_size by
   log-probability / length ** length_penalty, the end token counted in the length.
3. A prompt is closed when its best running hypothesis, scored at its present length, is no better
   than the worst of a full pool; or, with early_stopping, as soon as the pool is full. A closed
   prompt's pool does not change any more, so its result does not depend on the batch.
Differences: candidates are found beam by beam (the same set: the best 2k of all lie within the best
2k of each), and without processors on the logits, normalised afterwards.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from chatyuan.decode import sampling, stopping
from chatyuan.decode.config import DecodeConfig
from chatyuan.ops.sampling import largest, log_normaliser

# Hugging Face's "worse than any score"; its arithmetic on it is kept, ties included.
FLOOR = -1.0e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hypotheses:
    """K hypotheses of each of B prompts: tokens `[B, K, 1 + T]` from the start token on."""

    tokens: Array
    lengths: Array
    log_probs: Array
    scores: Array

    def take(self, places_BK: Array) -> "_Hypotheses":
        """The hypotheses at these places, `[B, K']`."""
        return jax.tree.map(lambda leaf: _gather(leaf, places_BK), self)


def _gather(leaf: Array, places_BK: Array) -> Array:
    index = places_BK.reshape(places_BK.shape + (1,) * (leaf.ndim - 2))
    return jnp.take_along_axis(leaf, index, axis=1)


def _candidates(
    config: DecodeConfig,
    processors: sampling.Processors,
    logits_RV: Array,
    running: _Hypotheses,
    generated: Array,
) -> tuple[Array, Array, Array, Array]:
    """The best continuations of each prompt: scores, beams, ids `[B, M]`, log-probs `[B, M, C]`."""
    batch, beams = running.scores.shape
    vocab_size = logits_RV.shape[-1]
    keep = max(2, 1 + len(processors.eos_ids)) * beams
    each = min(keep, vocab_size)
    normaliser_R1 = log_normaliser(logits_RV)[:, None]
    if processors.active:
        history_RT = running.tokens.reshape(batch * beams, -1)
        processed_RV = processors(logits_RV - normaliser_R1, history_RT, generated)
        best_RM, ids_RM = largest(processed_RV, each)
    else:
        best_RM, ids_RM = largest(logits_RV, each)
        best_RM = best_RM - normaliser_R1
    channels = [best_RM]
    if config.model_log_probs:
        channels.append(jnp.take_along_axis(logits_RV, ids_RM, axis=1) - normaliser_R1)
    totals_BKM = best_RM.reshape(batch, beams, each) + running.scores[:, :, None]
    scores_BM, places_BM = largest(totals_BKM.reshape(batch, -1), min(keep, beams * each))
    flat = [c.reshape(batch, -1) for c in channels]
    log_probs_BMC = jnp.stack([_gather(c, places_BM) for c in flat], axis=-1)
    return (
        scores_BM,
        places_BM // each,
        _gather(ids_RM.reshape(batch, -1), places_BM),
        log_probs_BMC,
    )


def _extend(
    running: _Hypotheses,
    beams_BM: Array,
    ids_BM: Array,
    log_probs_BMC: Array,
    scores_BM: Array,
    generated: Array,
) -> _Hypotheses:
    """The candidates as hypotheses one token longer."""
    parents = running.take(beams_BM)
    tokens = lax.dynamic_update_slice_in_dim(
        parents.tokens, ids_BM[..., None], generated + 1, axis=2
    )
    log_probs = lax.dynamic_update_slice_in_dim(
        parents.log_probs, log_probs_BMC[:, :, None], generated, axis=2
    )
    return _Hypotheses(tokens, parents.lengths + 1, log_probs, scores_BM)


def _merge(
    config: DecodeConfig,
    pool: _Hypotheses,
    full_BK: Array,
    open_B: Array,
    candidates: _Hypotheses,
    ended_BM: Array,
    generated: Array,
) -> tuple[_Hypotheses, Array]:
    """Puts candidates that ended into the pool; returns it and which of its places are filled."""
    beams = config.beam_size
    first_M = jnp.arange(ended_BM.shape[1]) < beams
    entering_BM = ended_BM & first_M[None, :]
    length = (generated + 1).astype(jnp.float32)
    scores_BM = candidates.scores / length**config.length_penalty
    closed_B = ~open_B
    if config.early_stopping:
        closed_B = closed_B | jnp.all(full_BK, axis=1)
    scores_BM = scores_BM + jnp.where(closed_B, FLOOR, 0.0)[:, None]
    scores_BM = scores_BM + jnp.where(entering_BM, 0.0, FLOOR)
    merged = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1),
        pool,
        dataclasses.replace(candidates, scores=scores_BM),
    )
    _, places_BK = largest(merged.scores, beams)
    filled_BK = _gather(jnp.concatenate([full_BK, entering_BM], axis=1), places_BK)
    return merged.take(places_BK), filled_BK


def _improvable(
    config: DecodeConfig, running: _Hypotheses, pool: _Hypotheses, full_BK: Array, generated: Array
) -> Array:
    """Whether a running hypothesis, scored at its present length, beats the pool's worst, `[B]`."""
    best_B1 = running.scores[:, :1] / generated.astype(jnp.float32) ** config.length_penalty
    worst_B1 = jnp.min(pool.scores, axis=1, keepdims=True)
    return jnp.any(best_B1 > jnp.where(full_BK, worst_B1, FLOOR), axis=1)


def _initial(
    config: DecodeConfig, active_B: Array, start_id: int, pad_id: int
) -> tuple[_Hypotheses, _Hypotheses]:
    """Empty running hypotheses, only the first of which counts, and an empty pool."""
    batch, beams, capacity = active_B.shape[0], config.beam_size, config.max_decode_length
    channels = 2 if config.model_log_probs else 1
    tokens = jnp.full((batch, beams, capacity + 1), pad_id, jnp.int32).at[:, :, 0].set(start_id)
    running = _Hypotheses(
        tokens=tokens,
        lengths=jnp.zeros((batch, beams), jnp.int32),
        log_probs=jnp.zeros((batch, beams, capacity, channels), jnp.float32),
        scores=jnp.full((batch, beams), FLOOR, jnp.float32).at[:, 0].set(0.0),
    )
    pool = dataclasses.replace(running, scores=jnp.full((batch, beams), FLOOR, jnp.float32))
    return running, pool


def search(
    config: DecodeConfig,
    processors: sampling.Processors,
    step: Callable,
    logits_BV: Array,
    cache: Any,
    active_B: Array,
    *,
    start_id: int,
    pad_id: int,
) -> tuple[Array, Array, Array, Array]:
    """Beam search from the logits of the first position.

    Args:
      config: beam_size, length_penalty, early_stopping, num_samples, max_decode_length.
      processors: applied to log-probabilities.
      step: `(tokens [R], cache) -> (logits [R, V], cache)` with R = B * beam_size.
      logits_BV: of the first position.
      cache: already expanded to R rows.
      active_B: False for rows that only fill up the batch.
      start_id: first token of the history.
      pad_id: fills outputs past their end.

    Returns:
      Best first: tokens `[B * num_samples, T]`, lengths `[B * num_samples]`, log-probabilities
      `[B * num_samples, T, C]`, scores `[B * num_samples]`.
    """
    batch, beams, capacity = logits_BV.shape[0], config.beam_size, config.max_decode_length

    def choose(logits_RV: Array, state: tuple) -> tuple[tuple, Array]:
        generated, running, pool, full_BK, open_B = state
        scores_BM, beams_BM, ids_BM, log_probs_BMC = _candidates(
            config, processors, logits_RV, running, generated
        )
        candidates = _extend(running, beams_BM, ids_BM, log_probs_BMC, scores_BM, generated)
        ended_BM = stopping.is_end(ids_BM, processors.eos_ids) | (generated + 1 == capacity)
        alive_BM = scores_BM + jnp.where(ended_BM, FLOOR, 0.0)
        alive_BK, places_BK = largest(alive_BM, beams)
        running = dataclasses.replace(candidates.take(places_BK), scores=alive_BK)
        pool, full_BK = _merge(config, pool, full_BK, open_B, candidates, ended_BM, generated)
        generated = generated + 1
        open_B = open_B & _improvable(config, running, pool, full_BK, generated)
        origin_BK = _gather(beams_BM, places_BK) + jnp.arange(batch)[:, None] * beams
        return (generated, running, pool, full_BK, open_B), origin_BK.reshape(-1)

    def unfinished(carry: tuple) -> Array:
        (generated, _, _, full_BK, open_B), _, _ = carry
        going_B = open_B & ~jnp.all(full_BK, axis=1) if config.early_stopping else open_B
        return (generated < capacity) & jnp.any(going_B)

    def advance(carry: tuple) -> tuple:
        state, origin_R, cache = carry
        generated, running, *_ = state
        last_BK = lax.dynamic_index_in_dim(running.tokens, generated, axis=2, keepdims=False)
        logits_RV, cache = step(last_BK.reshape(-1), cache.take(origin_R))
        state, origin_R = choose(logits_RV, state)
        return state, origin_R, cache

    running, pool = _initial(config, active_B, start_id, pad_id)
    full_BK = jnp.broadcast_to(~active_B[:, None], (batch, beams))
    state = (jnp.int32(0), running, pool, full_BK, active_B)
    state, origin_R = choose(jnp.repeat(logits_BV, beams, axis=0), state)
    (_, _, pool, _, _), _, _ = lax.while_loop(unfinished, advance, (state, origin_R, cache))
    return _best(config, pool, active_B, pad_id)


def _best(
    config: DecodeConfig, pool: _Hypotheses, active_B: Array, pad_id: int
) -> tuple[Array, Array, Array, Array]:
    """The num_samples best hypotheses of each prompt as rows; nothing for inactive prompts."""
    capacity = config.max_decode_length
    best = jax.tree.map(lambda leaf: leaf[:, : config.num_samples], pool)
    lengths_BG = jnp.where(active_B[:, None], best.lengths, 0)
    past_BGT = stopping.after_end(lengths_BG, capacity)
    tokens_BGT = jnp.where(past_BGT, pad_id, best.tokens[:, :, 1:])
    log_probs_BGTC = jnp.where(past_BGT[..., None], 0.0, best.log_probs)
    scores_BG = jnp.where(active_B[:, None], best.scores, 0.0)
    return (
        tokens_BGT.reshape(-1, capacity),
        lengths_BG.reshape(-1),
        log_probs_BGTC.reshape((-1,) + log_probs_BGTC.shape[2:]),
        scores_BG.reshape(-1),
    )
