"""Cross entropy over a vocabulary with the regularisers of T5X and Baichuan 2, in weighted sums.

Shapes: `...` any batch dimensions (usually B, T), V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LossSums(NamedTuple):
    """Sums over tokens, each token multiplied by its weight; float32 scalars.

    Divide any of them by `weight` for the mean. `total` is what training minimises.
    """

    total: jax.Array  # nll with label smoothing + z_loss + max_z_loss
    nll: jax.Array  # -log p(target) in nats, without smoothing or regularisers
    z_loss: jax.Array
    max_z_loss: jax.Array
    correct: jax.Array  # targets that no other logit exceeds (a tie counts as correct)
    weight: jax.Array


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossSums:
    """Returns the weighted sums of the loss of each token.

    With log_z = logsumexp(logits), per token:

        nll        = log_z - logits[target]
        smoothed   = -sum_v q_v log p_v - H(q),  q = 1 - s at the target, s / (V - 1) elsewhere
        z_loss     = z_loss * log_z ** 2                    (T5X `losses.py`; T5 1.1 uses 1e-4)
        max_z_loss = max_z_loss * max_v(logits_v) ** 2      (Baichuan 2, arXiv:2309.10305: 2e-4)

    Subtracting the entropy H(q) makes the smoothed loss reach 0, as T5X does. Besides the logits
    themselves only O(tokens) numbers are kept for the backward pass, and the gradient is one
    elementwise pass over the logits, which XLA writes over them.

    Args:
      logits: [..., V], any float type; the arithmetic is float32.
      targets: [...] int32 in [0, V). A target outside gives a loss of NaN.
      weights: [...] float32, 0 for padding.
      z_loss: coefficient, 0 = off.
      max_z_loss: coefficient, 0 = off.
      label_smoothing: s above, in [0, 1).
    """
    terms = LossTerms(z_loss, max_z_loss, label_smoothing)
    statistics = RowStatistics(
        *_row_statistics(logits, targets, label_smoothing != 0, max_z_loss != 0)
    )
    losses = token_losses(terms, statistics, logits.shape[-1])
    return jax.tree.map(lambda per_token: jnp.sum(per_token * weights), losses)


class LossTerms(NamedTuple):
    """Coefficients of `cross_entropy`; static."""

    z_loss: float
    max_z_loss: float
    label_smoothing: float

    def smoothed(self, vocab_size: int) -> tuple[float, float]:
        """Returns the probabilities of the target and of each other piece after smoothing."""
        if not self.label_smoothing:
            return 1.0, 0.0
        return 1.0 - self.label_smoothing, self.label_smoothing / (vocab_size - 1)


class RowStatistics(NamedTuple):
    """All that the terms need of a row of logits; float32, one number per token."""

    log_z: jax.Array
    max_logit: jax.Array
    target_logit: jax.Array
    logit_sum: jax.Array  # 0 where no term needs it


def token_losses(terms: LossTerms, statistics: RowStatistics, vocab_size: int) -> LossSums:
    """Returns the terms of `cross_entropy` per token instead of summed; `weight` is 1."""
    log_z, max_logit, target_logit, logit_sum = statistics
    nll = log_z - target_logit
    loss = nll
    if terms.label_smoothing:
        on, off = terms.smoothed(vocab_size)
        entropy = -(on * np.log(on) + (vocab_size - 1) * off * np.log(off + 1e-20))
        loss = log_z - (on - off) * target_logit - off * logit_sum - float(entropy)
    z_term = terms.z_loss * jnp.square(log_z)
    max_z_term = terms.max_z_loss * jnp.square(max_logit)
    return LossSums(
        total=loss + z_term + max_z_term,
        nll=nll,
        z_loss=z_term,
        max_z_loss=max_z_term,
        correct=(target_logit >= max_logit).astype(jnp.float32),
        weight=jnp.ones_like(log_z),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _row_statistics(
    logits: jax.Array, targets: jax.Array, with_sum: bool, with_max_gradient: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Everything the losses need of a row of logits: (log_z, max, logit of the target, sum).

    Each [...] float32. The sum is 0 unless `with_sum`, and the maximum passes a gradient only
    `with_max_gradient`: both would cost the backward pass another comparison per logit.
    """
    max_logit = jnp.max(logits, axis=-1).astype(jnp.float32)
    shifted = logits.astype(jnp.float32) - max_logit[..., None]
    log_z = max_logit + jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if with_sum:
        logit_sum = jnp.sum(logits.astype(jnp.float32), axis=-1)
    else:
        logit_sum = jnp.zeros_like(log_z)
    return log_z, max_logit, target_logit.astype(jnp.float32), logit_sum


def _row_statistics_forward(
    logits: jax.Array, targets: jax.Array, with_sum: bool, with_max_gradient: bool
) -> tuple:
    statistics = _row_statistics(logits, targets, with_sum, with_max_gradient)
    log_z, max_logit = statistics[:2]
    return statistics, (logits, targets, log_z, max_logit)


def _row_statistics_backward(
    with_sum: bool, with_max_gradient: bool, residuals: tuple, cotangents: tuple
) -> tuple[jax.Array, None]:
    logits, targets, log_z, max_logit = residuals
    g_log_z, g_max, g_target, g_sum = (g[..., None] for g in cotangents)
    values = logits.astype(jnp.float32)
    gradient = g_log_z * jnp.exp(values - log_z[..., None])
    # Comparing with an iota fuses into the same pass; a scatter would be a second one.
    vocab_index = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    gradient += jnp.where(vocab_index == targets[..., None], g_target, 0.0)
    if with_sum:
        gradient += g_sum
    if with_max_gradient:
        # Equal maxima each get the whole gradient: counting them would materialise a mask of V.
        # Without the barrier XLA shares this broadcast with the forward pass and materialises it.
        (max_logit,) = jax.lax.optimization_barrier((max_logit,))
        gradient += jnp.where(values == max_logit[..., None], g_max, 0.0)
    return gradient.astype(logits.dtype), None


_row_statistics.defvjp(_row_statistics_forward, _row_statistics_backward)
