"""Chinchilla's scaling law L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs of one's own.

Hoffmann et al. 2022 (arXiv:2203.15556), approach 3, in numbered sentences:
1. log L is predicted by logsumexp(a - alpha log N, b - beta log D, e), A = exp a and so on.
2. The sum over runs of the Huber loss (delta 1e-3) of the difference of logarithms is minimised by
   L-BFGS from a grid of starts; the best end counts. Huber (1964) makes outliers count linearly.
3. log N and log D are centred, so that the terms are of order 1 and L-BFGS needs few steps; the
   grid is one of shares of the loss and of exponents, and its best points alone are followed.
4. Intervals are percentiles over fits to resampled runs (bootstrap), as Besiroglu et al. 2024
   (arXiv:2404.10102) advise: of the law where a curve is shown, and with a resampled residual added
   where one more run is predicted.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from chatyuan.errors import UserError

HUBER_DELTA = 1e-3
LEAST_RUNS = 6  # one more than there are parameters
_LEAST_SPREAD = 1.5  # of N and of D: smallest to largest, by this factor at least
_FOLLOWED = 8  # starts that L-BFGS follows
_SHARES, _EXPONENTS = (0.05, 0.2, 0.5), (0.1, 0.3, 0.6, 1.0)  # of each term, at the middle run


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: of its folder, for tables and messages.
        parameters: N.
        tokens: D, those it was trained on, padding not counted.
        loss: L, nats per target token.
    """

    name: str
    parameters: float
    tokens: float
    loss: float


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """The five numbers of the law."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Returns L(N, D); arguments broadcast."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.e + self.a * n**-self.alpha + self.b * d**-self.beta

    def optimum(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (N, D) of least loss with 6 N D = `flops`; equation 4 of the paper."""
        share = self.beta / (self.alpha + self.beta)
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n = g * (np.asarray(flops, float) / 6) ** share
        return n, np.asarray(flops, float) / (6 * n)


# Hoffmann et al. 2022, equation 10, with the exponents as their LaTeX source has them.
CHINCHILLA = ScalingLaw(e=1.693, a=406.4, b=410.7, alpha=0.339, beta=0.285)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law and how far it can be trusted.

    Attributes:
        law: the best fit.
        runs: what it was fitted to.
        resampled: fits to resampled runs.
        residuals: log L - log predicted, of each run.
    """

    law: ScalingLaw
    runs: tuple[Run, ...]
    resampled: tuple[ScalingLaw, ...]
    residuals: np.ndarray

    def interval(
        self, parameters: float, tokens: float, *, level: float = 0.9, new_run: bool = True
    ) -> tuple[float, float]:
        """Returns the interval of the loss of a run of N and D.

        Args:
            parameters: N.
            tokens: D.
            level: of confidence.
            new_run: whether the scatter of single runs belongs to it; False: of the law itself.
        """
        logs = np.log([law.loss(parameters, tokens) for law in self.resampled])
        if new_run:
            # Five numbers were fitted, which makes the residuals smaller than the scatter is.
            count = len(self.runs)
            scatter = self.residuals * np.sqrt(count / max(1, count - 5))
            logs = (logs[:, None] + scatter[None, :]).ravel()
        low, high = np.quantile(logs, [(1 - level) / 2, (1 + level) / 2])
        return float(np.exp(low)), float(np.exp(high))


def fit(runs: Sequence[Run], *, resamples: int = 100, seed: int = 0) -> Fit:
    """Fits the law to finished runs.

    Args:
        runs: at least `LEAST_RUNS`, of several sizes and several token counts.
        resamples: fits to resampled runs, for the intervals.
        seed: of the resampling.

    Raises:
        UserError: too few runs, or sizes that do not tell the terms of the law apart.
    """
    check(runs)
    logs = np.log([[run.parameters, run.tokens, run.loss] for run in runs]).T
    middle = logs.mean(axis=1)
    n, d, loss = logs[0] - middle[0], logs[1] - middle[1], logs[2]
    ends = [_minimise(start, n, d, loss) for start in _starts(n, d, loss)]
    best = min(ends, key=lambda end: end[0])[1]
    random = np.random.default_rng(seed)
    resampled = []
    while len(resampled) < resamples:
        picked = random.integers(0, len(runs), len(runs))
        if len({(n[i], d[i]) for i in picked}) >= 5:  # fewer determine no law
            resampled.append(_minimise(best, n[picked], d[picked], loss[picked])[1])
    residuals = loss - _log_loss(best, n, d)[0]
    return Fit(
        _law(best, middle), tuple(runs), tuple(_law(x, middle) for x in resampled), residuals
    )


def check(runs: Sequence[Run]) -> None:
    """Raises UserError where the runs cannot determine the law; see `fit`."""
    for run in runs:
        for name in ("parameters", "tokens", "loss"):
            value = getattr(run, name)
            if not (np.isfinite(value) and value > 0):
                raise UserError(f"{run.name}: its {name} is {value}; leave this run out of --fit.")
    if len(runs) < LEAST_RUNS:
        raise UserError(
            f"--fit has {len(runs)} finished run{'s' * (len(runs) != 1)}; the law has five numbers "
            f"and needs at least {LEAST_RUNS} runs, of several sizes, each with several lengths."
        )
    for name, remedy in (("parameters", "model sizes"), ("tokens", "TRAIN_STEPS")):
        values = [getattr(run, name) for run in runs]
        if max(values) < _LEAST_SPREAD * min(values):
            raise UserError(
                f"--fit: the {name} of all {len(runs)} runs lie between {min(values):.3g} and "
                f"{max(values):.3g}; the law needs runs that differ in them by a factor of "
                f"{_LEAST_SPREAD:g} at least, better 10: train with other {remedy}."
            )
    logs = np.log([[run.parameters, run.tokens] for run in runs])
    if abs(np.corrcoef(logs.T)[0, 1]) > 0.999:
        raise UserError(
            "--fit: tokens are the same power of parameters in all runs, so that their terms "
            "cannot be told apart; add runs of one size with several TRAIN_STEPS."
        )


def _law(theta: np.ndarray, middle: np.ndarray) -> ScalingLaw:
    """The law of parameters that were fitted to centred logarithms."""
    a, b, e, alpha, beta = (float(x) for x in theta)
    a, b = a + alpha * middle[0], b + beta * middle[1]
    return ScalingLaw(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta)


def _log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns log L [R] and the weights [3, R] of its three terms; n and d are logarithms."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    top = terms.max(axis=0)
    exponentials = np.exp(terms - top)
    total = exponentials.sum(axis=0)
    return top + np.log(total), exponentials / total


def _objective(
    theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray
) -> tuple[float, np.ndarray]:
    """The sum of Huber losses and its gradient."""
    predicted, weights = _log_loss(theta, n, d)
    difference = predicted - loss
    size = np.abs(difference)
    huber = np.where(size <= HUBER_DELTA, difference**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
    slope = np.clip(difference, -HUBER_DELTA, HUBER_DELTA)
    by_a, by_b, by_e = (slope * weights).sum(axis=1)
    by_alpha, by_beta = (slope * weights[0] * -n).sum(), (slope * weights[1] * -d).sum()
    return float(huber.sum()), np.array([by_a, by_b, by_e, by_alpha, by_beta])


def _starts(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> list[np.ndarray]:
    """The most promising points of the grid."""
    level = float(loss.mean())
    grid = [
        np.array([level + np.log(a), level + np.log(b), level + np.log(e), alpha, beta])
        for a, b, e in itertools.product(_SHARES, _SHARES, (0.2, 0.5, 0.8))
        for alpha, beta in itertools.product(_EXPONENTS, _EXPONENTS)
    ]
    return sorted(grid, key=lambda theta: _objective(theta, n, d, loss)[0])[:_FOLLOWED]


def _minimise(
    start: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray
) -> tuple[float, np.ndarray]:
    from scipy.optimize import minimize

    # Scaled, because L-BFGS stops at gradients of 1e-5 and Huber's are at most 1e-3.
    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _objective(theta, n, d, loss)
        return value / HUBER_DELTA**2, gradient / HUBER_DELTA**2

    found = minimize(
        scaled,
        start,
        jac=True,
        method="L-BFGS-B",
        # Exponents outside say that a term is constant or a step; neither can be extrapolated.
        bounds=[(-20, 5), (-20, 5), (-10, 5), (0.01, 3), (0.01, 3)],
        options={"maxiter": 500, "ftol": 1e-9, "gtol": 1e-6},
    )
    return float(found.fun), found.x
