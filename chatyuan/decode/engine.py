"""Generation as one compiled loop: prefill once, then one decoder step a token until all rows end.

1. The encoder (or the prefix) runs once a prompt; the G rows of a prompt share its cross keys and
   values.
2. The loop is one `lax.while_loop` without host synchronisation; it stops when every row has ended.
3. Random numbers come from (seed of the prompt, row, step) alone: a prompt's output does not depend
   on which prompts share its batch.
4. A row whose length is 0 only fills up the batch: it ends before its first token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from chatyuan.decode import beam, sampling, stopping
from chatyuan.decode.config import DecodeConfig
from chatyuan.ops.sampling import row_uniforms


class DecodableModel(Protocol):
    """What generation asks of a model; both kinds in `chatyuan.models` offer it."""

    def bind(self, params: Any) -> Any:
        """Returns a module with `prefill(tokens, lengths, max_length, cache_dtype)` and `step`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """What was generated for B prompts, G results each, best first for beam search.

    Attributes:
      tokens: int32 `[B, G, T]`, the end token included, then the padding token.
      lengths: int32 `[B, G]`, tokens of each result, the end token included.
      log_probs: float32 `[B, G, T]`, 0 past the end. Of the distribution drawn from (after
        temperature, filters and penalties, renormalised); for greedy, of the processed logits; for
        beam, the processed log-probabilities that the search adds up.
      scores: float32 `[B, G]`, sum of `log_probs`; for beam divided by length ** length_penalty.
      model_log_probs: float32 `[B, G, T]` or None: the model's own log-probabilities of the tokens
        (temperature 1, nothing filtered), when the configuration asks for them.
    """

    tokens: Array
    lengths: Array
    log_probs: Array
    scores: Array
    model_log_probs: Array | None = None


GenerateFn = Callable[[Any, Array, Array, Array], DecodeOutput]


def make_generate(
    model: DecodableModel,
    config: DecodeConfig,
    *,
    eos_id: int | Sequence[int],
    pad_id: int = 0,
    start_id: int = 0,
    valid_vocab_size: int | None = None,
    suppressed: Sequence[int] = (),
) -> GenerateFn:
    """Builds the compiled generation function of one model and configuration.

    Args:
      model: see `DecodableModel`.
      config: how tokens are chosen.
      eos_id: the end token, or several.
      pad_id: fills outputs past their end.
      start_id: what the decoder reads first; it is the first entry of the history that the
        repetition rules look at (Hugging Face's decoder_start_token_id).
      valid_vocab_size: ids from here on are padding rows of the embedding and are never emitted.
      suppressed: further ids that are never emitted (sentinels, say).

    Returns:
      `generate(params, tokens, lengths, seeds) -> DecodeOutput`; tokens int32 `[B, S]`, lengths
      int32 `[B]` (0 marks a row that only fills up the batch), seeds int32 `[B]` or a JAX key or
      keys `[B]` (ignored but by method sample). It is compiled once for each (B, S).
    """
    eos_ids = stopping.eos_tuple(eos_id)
    banned = set(suppressed) | ({pad_id} if config.suppress_pad else set())
    processors = sampling.Processors(
        config=config,
        eos_ids=eos_ids,
        suppressed=tuple(sorted(banned - set(eos_ids))),
        valid_vocab_size=valid_vocab_size,
    )

    ends = {"start_id": start_id, "pad_id": pad_id}

    def run(params: Any, tokens: Array, lengths: Array, seeds: Array) -> DecodeOutput:
        return _run(model, config, processors, params, tokens, lengths, seeds, **ends)

    compiled = jax.jit(run)

    def generate(params: Any, tokens: Array, lengths: Array, seeds: Array) -> DecodeOutput:
        if not hasattr(seeds, "dtype"):
            seeds = jnp.asarray(seeds)
        if jnp.issubdtype(seeds.dtype, jax.dtypes.prng_key) and seeds.ndim == 0:
            rows_B = jnp.arange(tokens.shape[0])
            seeds = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(seeds, rows_B)
        assert tokens.ndim == 2 and lengths.shape == seeds.shape == tokens.shape[:1], (
            f"tokens {tokens.shape}, lengths {lengths.shape} and seeds {seeds.shape} disagree"
        )
        return compiled(
            params, jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), seeds
        )

    generate.num_compiled = compiled._cache_size
    return generate


def _run(
    model: DecodableModel,
    config: DecodeConfig,
    processors: sampling.Processors,
    params: Any,
    tokens: Array,
    lengths: Array,
    seeds: Array,
    *,
    start_id: int,
    pad_id: int,
) -> DecodeOutput:
    """Reads the prompts once, then searches or draws; what `make_generate` compiles."""
    logits_BV, cache = model.bind(params).prefill(
        tokens, lengths, config.max_decode_length, config.cache_dtype
    )
    cache = cache.expand(config.rows_per_prompt)

    def step(tokens_R: Array, cache: Any) -> tuple[Array, Any]:
        return model.bind(params).step(tokens_R, cache)

    common = (config, processors, step, logits_BV, cache, lengths > 0)
    ends = {"start_id": start_id, "pad_id": pad_id}
    if config.method == "beam":
        found = beam.search(*common, **ends)
    else:
        uniforms_TR2 = None
        if config.method == "sample":
            keys_R = sampling.row_keys(seeds, config.num_samples)
            uniforms_TR2 = row_uniforms(keys_R, config.max_decode_length)
        found = _decode_rows(*common, uniforms_TR2, **ends)
    return _output(config, tokens.shape[0], *found)


def _decode_rows(
    config: DecodeConfig,
    processors: sampling.Processors,
    step: Callable,
    logits_BV: Array,
    cache: Any,
    active_B: Array,
    uniforms_TR2: Array | None,
    *,
    start_id: int,
    pad_id: int,
) -> tuple[Array, Array, Array, Array]:
    """Greedy decoding and sampling; every row is on its own.

    Returns tokens `[R, T]`, lengths `[R]`, log-probabilities `[R, T, C]`, scores `[R]`.
    """
    capacity, repeats = config.max_decode_length, config.rows_per_prompt
    logits_RV = jnp.repeat(logits_BV, repeats, axis=0)
    rows = logits_RV.shape[0]
    channels = 2 if config.model_log_probs else 1
    history_RT = jnp.full((rows, capacity + 1), pad_id, jnp.int32).at[:, 0].set(start_id)
    log_probs_RTC = jnp.zeros((rows, capacity, channels), jnp.float32)
    done_R = jnp.repeat(~active_B, repeats)

    def choose(logits_RV: Array, state: tuple) -> tuple:
        generated, history_RT, log_probs_RTC, lengths_R, done_R = state
        ids_R, chosen_RC = sampling.pick(
            config, processors, logits_RV, history_RT, generated, uniforms_TR2
        )
        ids_R = jnp.where(done_R, pad_id, ids_R)
        chosen_RC = jnp.where(done_R[:, None], 0.0, chosen_RC)
        history_RT = lax.dynamic_update_slice_in_dim(
            history_RT, ids_R[:, None], generated + 1, axis=1
        )
        log_probs_RTC = lax.dynamic_update_slice_in_dim(
            log_probs_RTC, chosen_RC[:, None], generated, axis=1
        )
        lengths_R = lengths_R + jnp.where(done_R, 0, 1)
        done_R = done_R | stopping.is_end(ids_R, processors.eos_ids)
        return generated + 1, history_RT, log_probs_RTC, lengths_R, done_R

    def unfinished(carry: tuple) -> Array:
        (generated, *_, done_R), _ = carry
        return (generated < capacity) & ~jnp.all(done_R)

    def advance(carry: tuple) -> tuple:
        state, cache = carry
        generated, history_RT, *_ = state
        last_R = lax.dynamic_index_in_dim(history_RT, generated, axis=1, keepdims=False)
        logits_RV, cache = step(last_R, cache)
        return choose(logits_RV, state), cache

    lengths_R = jnp.zeros(rows, jnp.int32)
    state = choose(logits_RV, (jnp.int32(0), history_RT, log_probs_RTC, lengths_R, done_R))
    (_, history_RT, log_probs_RTC, lengths_R, _), _ = lax.while_loop(
        unfinished, advance, (state, cache)
    )
    return history_RT[:, 1:], lengths_R, log_probs_RTC, jnp.sum(log_probs_RTC[..., 0], axis=-1)


def _output(
    config: DecodeConfig,
    batch: int,
    tokens_RT: Array,
    lengths_R: Array,
    log_probs_RTC: Array,
    scores_R: Array,
) -> DecodeOutput:
    """Rows to `[B, G, ...]`."""
    capacity = config.max_decode_length
    return DecodeOutput(
        tokens=tokens_RT.reshape(batch, -1, capacity),
        lengths=lengths_R.reshape(batch, -1),
        log_probs=log_probs_RTC[..., 0].reshape(batch, -1, capacity),
        scores=scores_R.reshape(batch, -1),
        model_log_probs=(
            log_probs_RTC[..., 1].reshape(batch, -1, capacity) if config.model_log_probs else None
        ),
    )
