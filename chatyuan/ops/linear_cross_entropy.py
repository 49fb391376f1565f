"""The loss of a vocabulary head, and the log-probabilities of given tokens, without the logits.

The logits [tokens, V] are the largest array of a training step: 1.6 GB of float32 for 8192 tokens
and 50,000 pieces. Here they exist for one chunk of tokens at a time. The chunks are of tokens and
never of the vocabulary, so that each needs one pass of softmax and the three products stay large.

The gradients of the loss are made in the forward pass, while the logits of the chunk are at hand:
all of them are proportional to the one number that the loss is multiplied by later. That is three
products per chunk, as many as autodiff needs with the logits in memory, and none is repeated. The
same goes for a loss that is a sum over tokens of any function of the token's log-probability, as
PPO's is. A log-probability by itself has a cotangent that only the backward pass knows, so there
the logits are computed again.

Shapes: `...` any batch dimensions (usually B, T), N tokens, C tokens of a chunk, D model, V
vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from chatyuan.ops.losses import LossSums, LossTerms, RowStatistics, token_losses
from chatyuan.ops.vocabulary_chunks import (
    Head,
    gradients,
    log_probs_and_entropies,
    placed,
    statistics_of,
    token_axes,
    vocab_size_of,
)

Array = jax.Array


def linear_cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    norm_head: bool = False,
    chunk_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> LossSums:
    """Returns `losses.cross_entropy(hidden @ head, ...)`; no array [tokens, V] ever exists.

    Only `total` carries a gradient, to `hidden`, `head` and `weights`; the other sums are metrics
    under `stop_gradient`. Where `total` is differentiated, its gradients are computed with it and
    wait for the backward pass as arrays like `hidden` and `head`; where it is not, no gradient is
    computed. There are no second derivatives and no forward mode.

    Args:
      hidden: [..., D], float32 or bfloat16. The products read this dtype (`head` and the gradient
        of the logits are rounded to it) and sum in float32.
      head: [D, V], any float dtype. Its gradient is summed in float32 and rounded once.
      targets: [...] int32 in [0, V). A target outside gives a loss of NaN.
      weights: [...] float32, 0 for padding.
      z_loss: as in `losses.cross_entropy`, like the next two.
      max_z_loss: as there.
      label_smoothing: as there.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2, arXiv:2408.00118).
      norm_head: divide each column of `head` by its length (Baichuan 2, arXiv:2309.10305).
      chunk_tokens: tokens whose logits exist at a time, at most; None = 344 on CPU, else 2048, or
        as many as make 64 MiB of logits.
      mesh: of `sharding.make_mesh`, where `hidden` and `head` are split as its `RULES` say: tokens
        over data, fsdp and sequence, the vocabulary over tensor. Each device then works off its
        own tokens and columns; gradients are added up once, after the last chunk. None = one
        device; arrays that are split must come with their mesh.
    """
    how = Head(soft_cap, norm_head, chunk_tokens, mesh)
    terms = LossTerms(z_loss, max_z_loss, label_smoothing)
    sums = _loss(how, terms, hidden, head, targets, weights)
    metrics = jax.tree.map(jax.lax.stop_gradient, sums)
    return metrics._replace(total=sums.total)


def token_log_probs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    soft_cap: float | None = None,
    norm_head: bool = False,
    chunk_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Array:
    """Returns `log_softmax(hidden @ head)[target]` of every token, float32 [...], in nats.

    Teacher-forced scores for RL and DPO: differentiable in `hidden` and `head` with a cotangent of
    its own for each token. The backward pass computes the logits of each chunk again.

    Args:
      hidden: [..., D]; this and all other arguments as in `linear_cross_entropy`.
      head: [D, V].
      targets: [...] int32 in [0, V). A target outside gives NaN.
      soft_cap: see there.
      norm_head: see there.
      chunk_tokens: see there.
      mesh: see there.
    """
    return _log_probs(Head(soft_cap, norm_head, chunk_tokens, mesh), hidden, head, targets)


def token_log_probs_and_entropies(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    norm_head: bool = False,
    chunk_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Array, Array]:
    """Returns `token_log_probs` and the entropies of the same distributions, float32 [...], nats.

    One product for both. Constants: no gradient passes.

    Args:
      hidden: [..., D]; this and all other arguments as in `linear_cross_entropy`.
      head: [D, V].
      targets: [...] int32 in [0, V).
      norm_head: see there.
      chunk_tokens: see there.
      mesh: see there.
    """
    how = Head(None, norm_head, chunk_tokens, mesh)

    def local(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
        found = log_probs_and_entropies(how, hidden, head, targets)
        return tuple(x.reshape(targets.shape) for x in found)

    hidden, head = jax.lax.stop_gradient((hidden, head))
    inputs, outputs = ("tokens D", "D V", "tokens"), ("tokens", "tokens")
    return placed(local, how, inputs, outputs)(hidden, head, targets)


def token_loss_sum(
    function: Callable[..., Array],
    hidden: Array,
    head: Array,
    targets: Array,
    constants: Sequence[Array] = (),
    *,
    norm_head: bool = False,
    chunk_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Array, Array]:
    """Returns the sum of `function(log_probs, *constants)` over all tokens, and the log-probs.

    As `token_log_probs`, but the gradients are made with the sum: no logits are computed twice. The
    sum carries a gradient to `hidden` and `head`; the log-probs [...] are constants.

    Args:
      function: elementwise and differentiable in its first argument; it must close over no traced
        value, those belong in `constants`. Its parameters come as [C], a chunk of tokens each.
      hidden: [..., D]; this and all other arguments as in `linear_cross_entropy`.
      head: [D, V].
      targets: [...] int32 in [0, V).
      constants: [...] each, no gradient passes to them.
      norm_head: see there.
      chunk_tokens: see there.
      mesh: see there.
    """
    how = Head(None, norm_head, chunk_tokens, mesh)
    total, log_probs = _token_loss(how, function, hidden, head, targets, tuple(constants))
    return total, jax.lax.stop_gradient(log_probs)


# ------------------------------------------------------------------------------------ derivatives


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    how: Head, terms: LossTerms, hidden: Array, head: Array, targets: Array, weights: Array
) -> LossSums:
    """The primal: statistics chunk by chunk, and no gradient."""

    def local(hidden: Array, head: Array, targets: Array, weights: Array) -> LossSums:
        statistics = statistics_of(how, terms, hidden, head, targets)
        return _sum_up(token_losses(terms, statistics, vocab_size_of(how, head)), weights, how)

    return placed(local, how, ("tokens D", "D V", "tokens", "tokens"), "")(
        hidden, head, targets, weights
    )


def _loss_forward(
    how: Head, terms: LossTerms, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[LossSums, tuple[Array, Array, Array]]:
    def local(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple:
        vocab_size = vocab_size_of(how, head)

        def coefficients(statistics: RowStatistics, weights_C: Array) -> RowStatistics:
            return _cotangents(terms, statistics, weights_C, vocab_size)

        statistics, d_hidden, d_head = gradients(
            how, terms, hidden, head, targets, (weights,), coefficients
        )
        losses = token_losses(terms, statistics, vocab_size)
        per_token = losses.total.reshape(targets.shape)
        return _sum_up(losses, weights, how), (d_hidden, d_head, per_token)

    return placed(
        local, how, ("tokens D", "D V", "tokens", "tokens"), ("", ("tokens D", "D V", "tokens"))
    )(hidden, head, targets, weights)


def _loss_backward(
    how: Head, terms: LossTerms, residuals: tuple[Array, Array, Array], cotangents: LossSums
) -> tuple[Array, Array, None, Array]:
    """Scales what the forward pass has computed."""
    d_hidden, d_head, d_weights = (_scaled(x, cotangents.total) for x in residuals)
    return d_hidden, d_head, None, d_weights


def _scaled(x: Array, factor: Array) -> Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(how: Head, hidden: Array, head: Array, targets: Array) -> Array:
    def local(hidden: Array, head: Array, targets: Array) -> Array:
        statistics = statistics_of(how, None, hidden, head, targets)
        return (statistics.target_logit - statistics.log_z).reshape(targets.shape)

    return placed(local, how, ("tokens D", "D V", "tokens"), "tokens")(hidden, head, targets)


def _log_probs_forward(
    how: Head, hidden: Array, head: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _log_probs(how, hidden, head, targets), (hidden, head, targets)


def _log_probs_backward(
    how: Head, residuals: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    def coefficients(statistics: RowStatistics, cotangent_C: Array) -> RowStatistics:
        zeros = jnp.zeros_like(cotangent_C)
        return RowStatistics(-cotangent_C, zeros, cotangent_C, zeros)

    def local(hidden: Array, head: Array, targets: Array, cotangent: Array) -> tuple:
        return gradients(how, None, hidden, head, targets, (cotangent,), coefficients)[1:]

    inputs = ("tokens D", "D V", "tokens", "tokens")
    d_hidden, d_head = placed(local, how, inputs, ("tokens D", "D V"))(*residuals, cotangent)
    return d_hidden, d_head, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_loss(
    how: Head,
    function: Callable[..., Array],
    hidden: Array,
    head: Array,
    targets: Array,
    constants: tuple[Array, ...],
) -> tuple[Array, Array]:
    log_probs = _log_probs(how, hidden, head, targets)
    return jnp.sum(function(log_probs, *constants)), log_probs


def _token_loss_forward(
    how: Head,
    function: Callable[..., Array],
    hidden: Array,
    head: Array,
    targets: Array,
    constants: tuple[Array, ...],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def coefficients(statistics: RowStatistics, *constants_C: Array) -> RowStatistics:
        log_probs_C = statistics.target_logit - statistics.log_z
        slope_C = jax.grad(lambda x_C: jnp.sum(function(x_C, *constants_C)))(log_probs_C)
        zeros = jnp.zeros_like(slope_C)
        return RowStatistics(-slope_C, zeros, slope_C, zeros)

    def local(hidden: Array, head: Array, targets: Array, *constants: Array) -> tuple:
        statistics, *made = gradients(how, None, hidden, head, targets, constants, coefficients)
        log_probs = statistics.target_logit - statistics.log_z
        return log_probs.reshape(targets.shape), *made

    inputs = ("tokens D", "D V", "tokens", *("tokens" for _ in constants))
    log_probs, *made = placed(local, how, inputs, ("tokens", "tokens D", "D V"))(
        hidden, head, targets, *constants
    )
    return (jnp.sum(function(log_probs, *constants)), log_probs), tuple(made)


def _token_loss_backward(
    how: Head,
    function: Callable[..., Array],
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
    """Scales what the forward pass has computed."""
    d_hidden, d_head = (_scaled(x, cotangents[0]) for x in residuals)
    return d_hidden, d_head, None, None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


# -------------------------------------------------------------------------------------- the terms


def _cotangents(
    terms: LossTerms, statistics: RowStatistics, weights_C: Array, vocab_size: int
) -> RowStatistics:
    """The derivatives of the weighted `total` by the statistics, [C] each."""
    on, off = terms.smoothed(vocab_size)
    return RowStatistics(
        log_z=weights_C * (1.0 + 2.0 * terms.z_loss * statistics.log_z),
        max_logit=weights_C * (2.0 * terms.max_z_loss * statistics.max_logit),
        target_logit=weights_C * -(on - off),
        logit_sum=weights_C * -off,
    )


def _sum_up(losses: LossSums, weights: Array, how: Head) -> LossSums:
    """The weighted sums over the tokens of all devices."""
    weights_N = weights.reshape(-1)
    sums = jax.tree.map(lambda per_token_N: jnp.sum(per_token_N * weights_N), losses)
    return sums if how.mesh is None else jax.lax.psum(sums, token_axes())
