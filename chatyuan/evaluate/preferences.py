"""How well scores agree with people's preferences: pure numpy on the scores of a held-out split.

Shapes: N prompts, K answers. A pair is two answers of one prompt of different rank.
"""

import dataclasses
from typing import Any

import numpy as np

BINS = 5
Z_95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pairs: for each, what the preferred answer has more than the other.

    Attributes:
      gap: float64 [M], difference of scores, in the model's (raw) unit.
      length_gap: int64 [M], difference of lengths, tokens.
    """

    gap: np.ndarray
    length_gap: np.ndarray


def pairs_of(scores_NK: np.ndarray, ranks_NK: np.ndarray, lengths_NK: np.ndarray) -> Pairs:
    """Returns the pairs of every prompt.

    Args:
      scores_NK: [N, K] of the model.
      ranks_NK: [N, K] smaller is better, equal is a tie, which gives no pair.
      lengths_NK: [N, K] tokens; 0 = no such answer.
    """
    real = lengths_NK > 0
    beats = ranks_NK[:, :, None] < ranks_NK[:, None, :]
    n, i, j = np.nonzero(beats & real[:, :, None] & real[:, None, :])
    scores, lengths = scores_NK.astype(np.float64), lengths_NK.astype(np.int64)
    return Pairs(scores[n, i] - scores[n, j], lengths[n, i] - lengths[n, j])


def accuracy(gap: np.ndarray) -> float:
    """Share of pairs that a score orders as people did; equal scores are half right."""
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def wilson(right: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share, 95% by default; (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    share, room = right / count, z * z / count
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * np.sqrt(share * (1 - share) / count + room / (4 * count))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def length_accuracy(length_gap: np.ndarray) -> float:
    """What the best rule that knows only the lengths reaches: the longer, or the shorter, wins."""
    longer = accuracy(length_gap)
    return max(longer, 1.0 - longer)


def calibration_error(gap: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of sigma(|gap|) as the probability to be right.

    Mean over equal-width bins of confidence in [1/2, 1], weighted by their pairs, of |share right -
    mean confidence| (Guo et al. 2017, arXiv:1706.04599).
    """
    confidence = 1.0 / (1.0 + np.exp(-np.abs(gap)))
    right = (gap > 0) + 0.5 * (gap == 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    off = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(off).sum() / len(gap))


def by_gap(gap: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Accuracy by how far apart the two scores are: rows from the closest fifth to the farthest.

    Bins hold equally many pairs, so that none is empty while there are `bins` pairs.
    """
    order = np.argsort(np.abs(gap), kind="stable")
    rows = []
    for part in np.array_split(order, min(bins, len(gap))):
        values = gap[part]
        right = accuracy(values) * len(part)
        low, high = wilson(right, len(part))
        rows.append(
            {
                "smallest gap": float(np.abs(values).min()),
                "largest gap": float(np.abs(values).max()),
                "pairs": len(part),
                "accuracy": right / len(part),
                "low": low,
                "high": high,
            }
        )
    return rows
