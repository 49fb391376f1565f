"""Losses of preference optimisation on log-probs of whole responses: DPO and its relatives.

Every loss is a function of a few numbers per pair: the log-probs of the chosen and of the rejected
response, under the policy and under the reference, each summed over the tokens of the response
(EOS included, prompt and padding excluded, no length normalisation), and the token counts.

Legend: c chosen, r rejected; pi_c the policy's log-prob of c, ref_c the reference's, n_c the tokens
of c; h_c = pi_c - ref_c; h = h_c - h_r; b = beta; sigma the logistic function. Shapes: B pairs.
All arithmetic is float32, float64 if given.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.masked import at_least_float32, masked_mean, masked_sum

# ORPO's log-odds are log p - log(1 - p); p = 1 would be infinite (tunix clips there as well).
MAX_MEAN_LOG_PROB = -1e-7


class PairLogProbs(NamedTuple):
    """What a preference loss needs of B pairs; each [B], log-probs in nats.

    Reference log-probs are constants: no gradient passes through them. They are None for losses
    that need none (`LOSSES[name].needs_reference`); given, they are still used for the metrics.
    """

    chosen: jax.Array  # sum over the response's tokens of log p(token) under the policy
    rejected: jax.Array
    reference_chosen: jax.Array | None = None
    reference_rejected: jax.Array | None = None
    chosen_tokens: jax.Array | None = None  # tokens in each sum, EOS included; at least 1
    rejected_tokens: jax.Array | None = None
    # [] estimate of KL(policy || reference), for KTO: `kto_kl` of mismatched pairs.
    kl: jax.Array | None = None


def _option(default: Any, text: str, unit: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """Which loss, and its coefficients; static. `check` tells which coefficient fits which loss."""

    loss: str = _option(
        "dpo", "dpo, cdpo, robust, ipo (per token), ipo_sum, hinge, dpop, kto, orpo or simpo"
    )
    beta: float = _option(
        0.1, "strength of the pull to the reference; IPO's tau; SimPO uses 2 to 2.5"
    )
    label_smoothing: float = _option(
        0.0, "share of labels thought to be flipped; cdpo and robust"
    )
    nll_weight: float = _option(
        0.0, "weight of the chosen answer's loss per token, added to any loss (RPO, "
        "arXiv:2404.19733): keeps it likely"
    )  # fmt: skip
    dpop_lambda: float = _option(5.0, "weight of DPOP's penalty on a fall of the chosen answer")
    orpo_lambda: float = _option(0.1, "weight of ORPO's odds ratio")
    simpo_gamma: float = _option(0.5, "SimPO's target margin, in units of reward")
    desirable_weight: float = _option(1.0, "weight of chosen answers; kto")
    undesirable_weight: float = _option(1.0, "weight of rejected answers; kto")

    def check(self) -> None:
        """Raises UserError for an unknown loss, or a coefficient out of range or without effect."""
        if self.loss not in LOSSES:
            raise UserError(
                f"The preference loss {self.loss!r} is unknown; known are {', '.join(LOSSES)}."
                + did_you_mean(self.loss, LOSSES)
            )
        known = LOSSES[self.loss]
        for field in dataclasses.fields(self):
            name, default, value = field.name, field.default, getattr(self, field.name)
            owners = [key for key, entry in LOSSES.items() if name in entry.options]
            if name in known.options or not owners or value == default:
                continue
            raise UserError(
                f"{name} = {value} has no effect on the preference loss {self.loss!r}: it belongs "
                f"to {', '.join(owners)}. Leave it at {default} or choose one of these losses."
            )
        for name, (valid, constraint) in _RANGES.items():
            value = getattr(self, name)
            if not valid(value):
                raise UserError(f"The preference loss's {name} = {value} must be {constraint}.")
        if "label_smoothing" in known.options and self.label_smoothing == 0:
            raise UserError(
                f"The preference loss {self.loss!r} with label_smoothing = 0 is 'dpo': choose that "
                "loss or set label_smoothing, for example to 0.1."
            )


_RANGES = {
    "beta": (lambda value: value > 0, "above 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
    **{
        name: (lambda value: value >= 0, "at least 0")
        for name in (
            "nll_weight",
            "dpop_lambda",
            "orpo_lambda",
            "simpo_gamma",
            "desirable_weight",
            "undesirable_weight",
        )
    },
}


class PreferenceTerms(NamedTuple):
    """The loss and what to watch, per pair [B] or summed over pairs []; float32.

    Rewards are TRL's: b * h_c and b * h_r, without gradient; of a loss without reference they are
    b * pi_c / n_c (SimPO, ORPO). `chosen_fall` is how far the chosen response has become less
    likely than under the reference, in nats: plain DPO lowers both answers' log-probs while its
    accuracy rises, which only these raw numbers show.
    """

    loss: jax.Array  # the term that compares the answers + nll_weight * nll
    nll: jax.Array  # -pi_c / n_c: chosen negative log-likelihood per token; 0 without token counts
    chosen_reward: jax.Array
    rejected_reward: jax.Array
    margin: jax.Array  # chosen_reward - rejected_reward
    accuracy: jax.Array  # 1 where the margin is above 0; a tie, as at step 0, counts 0
    chosen_log_prob: jax.Array  # pi_c, nats per response
    rejected_log_prob: jax.Array
    chosen_fall: jax.Array | None  # ref_c - pi_c in nats, above 0 = fallen; None without reference
    rejected_fall: jax.Array | None


def _h(pair: PairLogProbs) -> tuple[jax.Array, jax.Array]:
    """Returns (h_c, h_r)."""
    return pair.chosen - pair.reference_chosen, pair.rejected - pair.reference_rejected


def _means(pair: PairLogProbs) -> tuple[jax.Array, jax.Array]:
    """Returns the policy's log-probs per token (pi_c / n_c, pi_r / n_r)."""
    return pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens


def dpo(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """-log sigma(b h) (Rafailov et al., arXiv:2305.18290 eq. 7). ln 2 at policy = reference."""
    chosen, rejected = _h(pair)
    return -jax.nn.log_sigmoid(options.beta * (chosen - rejected))


def cdpo(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """-(1 - s) log sigma(b h) - s log sigma(-b h), s = label_smoothing (Mitchell, cDPO note)."""
    chosen, rejected = _h(pair)
    logits = options.beta * (chosen - rejected)
    smooth = options.label_smoothing
    return -(1 - smooth) * jax.nn.log_sigmoid(logits) - smooth * jax.nn.log_sigmoid(-logits)


def robust(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """(-(1 - s) log sigma(b h) + s log sigma(-b h)) / (1 - 2 s) (arXiv:2403.00409 eq. 12).

    Its mean over labels flipped with probability s is the DPO loss of the true labels.
    """
    chosen, rejected = _h(pair)
    logits = options.beta * (chosen - rejected)
    smooth = options.label_smoothing
    kept = -(1 - smooth) * jax.nn.log_sigmoid(logits) + smooth * jax.nn.log_sigmoid(-logits)
    return kept / (1 - 2 * smooth)


def ipo(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """(h_c / n_c - h_r / n_r - 1 / (2 b))^2: IPO averaged over tokens, as TRL computes it."""
    chosen, rejected = _h(pair)
    gap = chosen / pair.chosen_tokens - rejected / pair.rejected_tokens
    return jnp.square(gap - 1 / (2 * options.beta))


def ipo_sum(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """(h - 1 / (2 b))^2 on sums (Azar et al., arXiv:2310.12036 eq. 17; the DPO authors' code)."""
    chosen, rejected = _h(pair)
    return jnp.square(chosen - rejected - 1 / (2 * options.beta))


def hinge(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """max(0, 1 - b h) (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    chosen, rejected = _h(pair)
    return jax.nn.relu(1 - options.beta * (chosen - rejected))


def dpop(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """-log sigma(b (h - lambda max(0, -h_c))) (DPO-Positive, arXiv:2402.13228 eq. 3).

    The penalty is felt once the chosen answer is less likely than under the reference.
    """
    chosen, rejected = _h(pair)
    penalty = options.dpop_lambda * jax.nn.relu(-chosen)
    return -jax.nn.log_sigmoid(options.beta * (chosen - rejected - penalty))


def kto(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """Half the sum of `kto_losses` of the two answers: a pair is one good and one bad example."""
    good = kto_losses(pair.chosen, pair.reference_chosen, True, pair.kl, options)
    bad = kto_losses(pair.rejected, pair.reference_rejected, False, pair.kl, options)
    return 0.5 * (good + bad)


def kto_losses(
    log_probs: jax.Array,
    reference: jax.Array,
    desirable: jax.Array | bool,
    kl: jax.Array,
    options: PreferenceLoss,
) -> jax.Array:
    """KTO of single answers (Ethayarajh et al., arXiv:2402.01306 eq. 8), z = `kl` >= 0 constant.

        desirable:   weight_d * (1 - sigma(b (h - z)))
        undesirable: weight_u * (1 - sigma(b (z - h))),   h = log_probs - reference

    Args:
      log_probs: [B] the policy's summed log-probs.
      reference: [B] the reference's.
      desirable: [B] boolean, or one for all.
      kl: [] from `kto_kl`.
      options: beta and the two weights.
    """
    advantage = options.beta * (log_probs - reference - jax.lax.stop_gradient(kl))
    good = options.desirable_weight * jax.nn.sigmoid(-advantage)
    bad = options.undesirable_weight * jax.nn.sigmoid(advantage)
    return jnp.where(desirable, good, bad)


def kto_kl(log_probs: jax.Array, reference: jax.Array, weights: jax.Array) -> jax.Array:
    """KTO's reference point: max(0, mean of pi - ref) over prompts with foreign answers.

    Args:
      log_probs: [B] the policy's log-probs of answers that belong to other prompts of the batch.
      reference: [B] the reference's of the same.
      weights: [B] 0 leaves a row out.

    Returns:
      [] constant: no gradient passes. Not linear in the rows, so take it over the whole batch
      before that is cut into microbatches.
    """
    log_ratio = at_least_float32(log_probs) - at_least_float32(reference)
    return jax.lax.stop_gradient(jax.nn.relu(masked_mean(log_ratio, weights)))


def orpo(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """-pi_c / n_c - lambda log sigma(log odds_c - log odds_r) (Hong et al., arXiv:2403.07691).

    log odds = m - log(1 - e^m) with m = min(pi / n, -1e-7), the log-prob per token.
    """
    chosen, rejected = (jnp.minimum(mean, MAX_MEAN_LOG_PROB) for mean in _means(pair))
    odds = [mean - jnp.log(-jnp.expm1(mean)) for mean in (chosen, rejected)]
    return _nll(pair) - options.orpo_lambda * jax.nn.log_sigmoid(odds[0] - odds[1])


def simpo(pair: PairLogProbs, options: PreferenceLoss) -> jax.Array:
    """-log sigma(b (pi_c / n_c - pi_r / n_r) - gamma) (Meng et al., arXiv:2405.14734 eq. 6)."""
    chosen, rejected = _means(pair)
    return -jax.nn.log_sigmoid(options.beta * (chosen - rejected) - options.simpo_gamma)


def _nll(pair: PairLogProbs) -> jax.Array:
    return -pair.chosen / pair.chosen_tokens


class _Loss(NamedTuple):
    """A preference loss: its function, what it needs, and the coefficients that change it."""

    function: Callable[[PairLogProbs, PreferenceLoss], jax.Array]
    options: tuple[str, ...] = ("beta",)
    needs_reference: bool = True
    needs_tokens: bool = False
    needs_kl: bool = False


LOSSES: dict[str, _Loss] = {
    "dpo": _Loss(dpo),
    "cdpo": _Loss(cdpo, ("beta", "label_smoothing")),
    "robust": _Loss(robust, ("beta", "label_smoothing")),
    "ipo": _Loss(ipo, needs_tokens=True),
    "ipo_sum": _Loss(ipo_sum),
    "hinge": _Loss(hinge),
    "dpop": _Loss(dpop, ("beta", "dpop_lambda")),
    "kto": _Loss(kto, ("beta", "desirable_weight", "undesirable_weight"), needs_kl=True),
    "orpo": _Loss(orpo, ("orpo_lambda",), needs_reference=False, needs_tokens=True),
    "simpo": _Loss(simpo, ("beta", "simpo_gamma"), needs_reference=False, needs_tokens=True),
}


def preference_loss(pair: PairLogProbs, options: PreferenceLoss) -> PreferenceTerms:
    """Returns the loss and metrics of every pair, each [B].

    Args:
      pair: log-probs; see `LOSSES` for what each loss needs of it.
      options: which loss and its coefficients.

    Raises:
      UserError: from `PreferenceLoss.check`.
      ValueError: `pair` lacks what the loss needs.
    """
    options.check()
    entry = LOSSES[options.loss]
    needed = {
        "reference_chosen": entry.needs_reference,
        "reference_rejected": entry.needs_reference,
        "chosen_tokens": entry.needs_tokens or options.nll_weight > 0,
        "rejected_tokens": entry.needs_tokens,
        "kl": entry.needs_kl,
    }
    missing = [name for name, need in needed.items() if need and getattr(pair, name) is None]
    if missing:
        raise ValueError(f"The preference loss {options.loss!r} needs {', '.join(missing)}.")
    pair = jax.tree.map(at_least_float32, pair)
    references = ("reference_chosen", "reference_rejected")
    counts = ("chosen_tokens", "rejected_tokens")
    constants = {n: jax.lax.stop_gradient(getattr(pair, n)) for n in (*references, *counts)}
    # Rows that only fill a batch have no tokens; 0 / 0 would poison the gradient of all.
    floors = {n: jnp.maximum(constants[n], 1) for n in counts if constants[n] is not None}
    pair = pair._replace(**{**constants, **floors})
    nll = jnp.zeros_like(pair.chosen) if pair.chosen_tokens is None else _nll(pair)
    loss = entry.function(pair, options)
    if options.nll_weight:
        loss += options.nll_weight * nll
    return _terms(loss, nll, pair, entry, options)


def _terms(
    loss: jax.Array, nll: jax.Array, pair: PairLogProbs, entry: _Loss, options: PreferenceLoss
) -> PreferenceTerms:
    rewards = _h(pair) if entry.needs_reference else _means(pair)
    scale = options.beta if "beta" in entry.options else options.orpo_lambda
    chosen, rejected = (scale * jax.lax.stop_gradient(reward) for reward in rewards)
    falls = (None, None)
    if pair.reference_chosen is not None and pair.reference_rejected is not None:
        falls = tuple(-jax.lax.stop_gradient(value) for value in _h(pair))
    return PreferenceTerms(
        loss=loss,
        nll=jax.lax.stop_gradient(nll),
        chosen_reward=chosen,
        rejected_reward=rejected,
        margin=chosen - rejected,
        accuracy=(chosen > rejected).astype(loss.dtype),
        chosen_log_prob=jax.lax.stop_gradient(pair.chosen),
        rejected_log_prob=jax.lax.stop_gradient(pair.rejected),
        chosen_fall=falls[0],
        rejected_fall=falls[1],
    )


def preference_sums(
    terms: PreferenceTerms, weights: jax.Array
) -> tuple[PreferenceTerms, jax.Array]:
    """Sums the terms over pairs: (each field a scalar sum of value * weight, the sum of weights).

    Args:
      terms: fields [B].
      weights: [B], 0 for rows that only fill the batch.
    """
    weights = at_least_float32(weights)
    summed = jax.tree.map(lambda values: masked_sum(values * weights, weights), terms)
    return summed, jnp.sum(weights)
