"""Choosing the next token: pure functions from scores `[B, V]` to masked scores or to token ids.

Shapes: B rows (a prompt's samples or beams are rows of their own), V vocabulary entries, T history.
The score processors give the same numbers as Hugging Face's logits processors of the same names
(transformers 5, `generation/logits_process.py`); they read the history by gathers and scatters of
size `[B, T]`, so none of them builds an array of `[B, T, V]` or a seen-mask of `[B, V]`.

Sampling draws by inverting the cumulative distribution with two uniforms a row instead of adding V
Gumbel variables: at V = 32k the random bits would cost more than the decoder step of a small model.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

# Width of the blocks of the two-level draw, and of the top-k that usually holds the whole nucleus.
BLOCK = 128


def mask_vocabulary(scores_BV: Array, allowed_V: Array) -> Array:
    """Gives every token outside `allowed_V` (bool `[V]`) the score -inf."""
    return jnp.where(allowed_V[None, :], scores_BV, -jnp.inf)


def repetition_penalty(scores_BV: Array, history_BT: Array, length: Array, penalty: float) -> Array:
    """Makes each token of the history less likely, however often it occurred (CTRL, 1909.05858).

    Args:
      scores_BV: logits or log-probabilities, float32 `[B, V]`.
      history_BT: tokens so far, int32 `[B, T]`; only the first `length` columns count.
      length: int32 scalar.
      penalty: negative scores are multiplied by it, others divided; 1 changes nothing.
    """
    vocab_size = scores_BV.shape[-1]
    rows_B1 = jnp.arange(scores_BV.shape[0])[:, None]
    valid_1T = jnp.arange(history_BT.shape[1])[None, :] < length
    old_BT = jnp.take_along_axis(scores_BV, history_BT, axis=1)
    new_BT = jnp.where(old_BT < 0, old_BT * penalty, old_BT / penalty)
    # A column past the vocabulary is dropped by the scatter; repeated ids write equal values.
    ids_BT = jnp.where(valid_1T, history_BT, vocab_size)
    return scores_BV.at[rows_B1, ids_BT].set(new_BT, mode="drop")


def ban_repeated_ngrams(scores_BV: Array, history_BT: Array, length: Array, size: int) -> Array:
    """Gives -inf to every token that would complete an n-gram the history already holds.

    Args:
      scores_BV: float32 `[B, V]`.
      history_BT: tokens so far, int32 `[B, T]`; only the first `length` columns count.
      length: int32 scalar.
      size: n; 1 bans every token of the history.

    Work and memory are O(B T): the current suffix of n-1 tokens is compared with every window.
    """
    batch, capacity = history_BT.shape
    windows = capacity - size + 1
    if windows <= 0:
        return scores_BV
    match_BW = jnp.arange(windows)[None, :] + size <= length
    match_BW = jnp.broadcast_to(match_BW, (batch, windows))
    if size > 1:
        suffix_BN = lax.dynamic_slice_in_dim(history_BT, length - (size - 1), size - 1, axis=1)
        for i in range(size - 1):
            match_BW &= history_BT[:, i : i + windows] == suffix_BN[:, i : i + 1]
    last_BW = history_BT[:, size - 1 :]
    ids_BW = jnp.where(match_BW, last_BW, scores_BV.shape[-1])
    return scores_BV.at[jnp.arange(batch)[:, None], ids_BW].set(-jnp.inf, mode="drop")


def enforce_min_length(
    scores_BV: Array, generated: Array, min_length: int, eos_ids: tuple[int, ...]
) -> Array:
    """Gives the end tokens -inf while fewer than `min_length` tokens were generated (scalar)."""
    ids = jnp.asarray(eos_ids)
    banned = jnp.where(generated < min_length, -jnp.inf, 0.0).astype(scores_BV.dtype)
    return scores_BV.at[:, ids].add(banned)


def log_normaliser(scores_BV: Array) -> Array:
    """Log of the sum of exponentials over the vocabulary, `[B]`; -inf scores count nothing."""
    top_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    return jnp.log(jnp.sum(jnp.exp(scores_BV - top_B1), axis=-1)) + top_B1[:, 0]


def select(scores_BV: Array, ids_B: Array) -> Array:
    """The score of one token a row, `[B]`."""
    return jnp.take_along_axis(scores_BV, ids_B[:, None], axis=1)[:, 0]


def largest(scores_BV: Array, k: int) -> tuple[Array, Array]:
    """The k best scores of each row in falling order and their ids, `[B, k]` each.

    Long rows are searched in two levels: the k best lie within the k blocks with the best maxima.
    Which of equal scores is kept is not promised.
    """
    batch, width = scores_BV.shape
    if k * 4 * BLOCK > width:
        return _largest(scores_BV, k)
    padded_BV = jnp.pad(scores_BV, ((0, 0), (0, -width % BLOCK)), constant_values=-jnp.inf)
    blocks_BMW = padded_BV.reshape(batch, -1, BLOCK)
    _, chosen_Bk = _largest(jnp.max(blocks_BMW, axis=-1), k)
    # In rising order, so that the lower id comes first among equals of the chosen blocks.
    chosen_Bk = jnp.sort(chosen_Bk, axis=-1)
    inside_BkW = jnp.take_along_axis(blocks_BMW, chosen_Bk[:, :, None], axis=1)
    best_Bk, places_Bk = _largest(inside_BkW.reshape(batch, -1), k)
    block_Bk = jnp.take_along_axis(chosen_Bk, places_Bk // BLOCK, axis=1)
    return best_Bk, block_Bk * BLOCK + places_Bk % BLOCK


def _largest(scores_BV: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` behind a barrier.

    Without it XLA on CPU merges a later slice into the selection, which turns the partial selection
    into a sort of the whole vocabulary, a hundred times slower.
    """
    return lax.optimization_barrier(tuple(lax.top_k(scores_BV, k)))


def greedy(scores_BV: Array) -> Array:
    """The best token of each row, int32 `[B]`; the lowest id among equals.

    A maximum and then the first place that reaches it: both reductions vectorise, where argmax's
    reduction over (value, index) pairs does not on CPU.
    """
    vocab_size = scores_BV.shape[-1]
    top_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    iota_BV = lax.broadcasted_iota(jnp.int32, scores_BV.shape, 1)
    ids_B = jnp.min(jnp.where(scores_BV >= top_B1, iota_BV, vocab_size), axis=-1)
    return jnp.minimum(ids_B, vocab_size - 1)  # a row of NaN must not index past the vocabulary


def sample(
    uniforms_B2: Array, scores_BV: Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[Array, Array]:
    """Draws one token a row and returns it with its log-probability under what was drawn from.

    Args:
      uniforms_B2: float32 in [0, 1), `[B, 2]`, independent.
      scores_BV: float32 logits `[B, V]`; -inf is never drawn.
      temperature: positive divisor of the logits, applied first.
      top_k: 0, or keep only this many of the highest scores (exactly: ties go to the lower id).
      top_p: keep the smallest set of the most likely tokens, after top-k, whose mass reaches
        top_p; 1 keeps all. Tokens as likely as the last one kept are kept too when top_k is 0.

    Returns:
      ids int32 `[B]` and log-probabilities float32 `[B]` of the renormalised kept distribution.
    """
    if 0 < top_k < scores_BV.shape[-1]:
        top_BK, ids_BK = largest(scores_BV, top_k)
        weights_BK = jnp.exp((top_BK - top_BK[:, :1]) / temperature)
        if top_p < 1:
            mass_BK = jnp.cumsum(weights_BK, axis=-1)
            above_BK = mass_BK - weights_BK
            weights_BK = jnp.where(above_BK < top_p * mass_BK[:, -1:], weights_BK, 0.0)
        place_B = invert_cumulative(uniforms_B2, weights_BK)
        chosen_B = select(weights_BK, place_B)
        log_probs_B = jnp.log(chosen_B) - jnp.log(jnp.sum(weights_BK, axis=-1))
        return select(ids_BK, place_B), log_probs_B
    top_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    weights_BV = jnp.exp((scores_BV - top_B1) / temperature)
    if top_p < 1:
        weights_BV = jnp.where(weights_BV >= nucleus_threshold(weights_BV, top_p), weights_BV, 0.0)
    ids_B = invert_cumulative(uniforms_B2, weights_BV)
    # From the scores, not log(weight): exact where the weight is small.
    chosen_B = (select(scores_BV, ids_B) - top_B1[:, 0]) / temperature
    return ids_B, chosen_B - jnp.log(jnp.sum(weights_BV, axis=-1))


def nucleus_threshold(weights_BV: Array, top_p: float) -> Array:
    """The smallest weight in each row's nucleus, `[B, 1]`.

    The nucleus is the smallest set of the largest weights that holds the fraction `top_p` of the
    row's sum. Nearly always it lies within the BLOCK largest weights; rows where it does not take
    the threshold of a bisection, so a row's result never depends on the other rows.
    """
    goal_B1 = top_p * jnp.sum(weights_BV, axis=-1, keepdims=True)
    top_BK, _ = largest(weights_BV, min(BLOCK, weights_BV.shape[-1]))
    mass_BK = jnp.cumsum(top_BK, axis=-1)
    count_B1 = jnp.sum(mass_BK - top_BK < goal_B1, axis=-1, keepdims=True)
    near_B1 = jnp.take_along_axis(top_BK, count_B1 - 1, axis=1)
    covered_B1 = mass_BK[:, -1:] >= goal_B1
    far_B1 = lax.cond(
        jnp.all(covered_B1),
        lambda weights_BV, goal_B1: jnp.zeros_like(goal_B1),
        _bisect_threshold,
        weights_BV,
        goal_B1,
    )
    return jnp.where(covered_B1, near_B1, far_B1)


def _bisect_threshold(weights_BV: Array, goal_B1: Array) -> Array:
    """Largest t whose weights >= t sum to the goal: bisection over float32 bit patterns.

    Non-negative floats order as their bits do, so 31 passes find the exact weight without sorting.
    """
    bits_BV = lax.bitcast_convert_type(weights_BV, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B1, high_B1 = bounds
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        kept_BV = jnp.where(bits_BV >= middle_B1, weights_BV, 0.0)
        enough_B1 = jnp.sum(kept_BV, axis=-1, keepdims=True) >= goal_B1
        return jnp.where(enough_B1, middle_B1, low_B1), jnp.where(enough_B1, high_B1, middle_B1)

    high_B1 = jnp.max(bits_BV, axis=-1, keepdims=True) + 1
    low_B1, _ = lax.fori_loop(0, 31, halve, (jnp.zeros_like(high_B1), high_B1))
    return lax.bitcast_convert_type(low_B1, jnp.float32)


def invert_cumulative(uniforms_B2: Array, weights_BV: Array) -> Array:
    """Draws an index a row with probability proportional to its weight, int32 `[B]`.

    Long rows are drawn in two levels, first a block and then a place in it, each with a uniform of
    its own: 24 random bits for 32k tokens at once would be too coarse, and the running sums stay
    short. A weight of zero is never drawn.
    """
    batch, width = weights_BV.shape
    if width <= BLOCK:
        return _invert(uniforms_B2[:, 0], weights_BV)
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -width % BLOCK)))
    blocks_BKW = padded_BV.reshape(batch, -1, BLOCK)
    block_B = _invert(uniforms_B2[:, 0], jnp.sum(blocks_BKW, axis=-1))
    inside_BW = jnp.take_along_axis(blocks_BKW, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + _invert(uniforms_B2[:, 1], inside_BW)


def _invert(uniform_B: Array, weights_BW: Array) -> Array:
    """First index whose running sum exceeds uniform x total; never one of weight zero."""
    sums_BW = jnp.cumsum(weights_BW, axis=-1)
    target_B1 = uniform_B[:, None] * sums_BW[:, -1:]
    index_B = jnp.sum(sums_BW <= target_B1, axis=-1)
    iota_BW = lax.broadcasted_iota(jnp.int32, weights_BW.shape, 1)
    last_B = jnp.max(jnp.where(weights_BW > 0, iota_BW, 0), axis=-1)
    return jnp.minimum(index_B.astype(jnp.int32), last_B)


def row_uniforms(keys_B: Array, steps: int) -> Array:
    """Two uniforms a row and step, float32 `[steps, B, 2]`, from the row's key and the step only.

    Drawn before the loop: one small program instead of random bits within every step.
    """

    def draw(step: Array, key: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, step), (2,))

    over_rows = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_rows, in_axes=(0, None))(jnp.arange(steps), keys_B)
