"""How far annotators who saw the same answers agree."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from chatyuan.ranking.store import Annotation


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Figures over all items that two annotators ranked; None where there is nothing to compare.

    Attributes:
        items: times that two annotators ranked the same item.
        pairs: pairs of answers that were compared by both.
        pair_agreement: share of those on which both said the same: better, tied or worse.
        kappa: Cohen's kappa of those verdicts.
        tau: Kendall's tau-b, mean over the items.
        tau_items: items of that mean; one on which somebody tied all answers has no tau.
        category_agreement: share of the items with the same category.
        category_kappa: Cohen's kappa of the categories.
    """

    items: int
    pairs: int
    pair_agreement: float | None
    kappa: float | None
    tau: float | None
    tau_items: int
    category_agreement: float | None
    category_kappa: float | None


def agreement(groups: Iterable[Sequence[Annotation]]) -> Agreement:
    """Compares every two annotations of each group, which is all annotations of one item."""
    items, taus, verdicts, categories = 0, [], [], []
    for group in groups:
        ranked = [annotation for annotation in group if annotation.ranks is not None]
        for first, second in itertools.combinations(ranked, 2):
            left, right = aligned(first, second)
            items += 1
            tau = stats.kendalltau(left, right).statistic
            taus += [] if math.isnan(tau) else [float(tau)]
            for i, j in itertools.combinations(range(len(left)), 2):
                verdicts.append((np.sign(left[i] - left[j]), np.sign(right[i] - right[j])))
            if first.category is not None and second.category is not None:
                categories.append((first.category, second.category))
    # Which answer of a pair is named first, and which annotator, means nothing: both ways count.
    mirrored = verdicts + [(-a, -b) for a, b in verdicts]
    return Agreement(
        items=items,
        pairs=len(verdicts),
        pair_agreement=_share_equal(verdicts),
        kappa=cohen_kappa(mirrored),
        tau=float(np.mean(taus)) if taus else None,
        tau_items=len(taus),
        category_agreement=_share_equal(categories),
        category_kappa=cohen_kappa(categories + [(b, a) for a, b in categories]),
    )


def aligned(first: Annotation, second: Annotation) -> tuple[list[int], list[int]]:
    """The ranks of two annotations of one item in the order of the first's answers."""
    of_text = dict(zip(second.answers, second.ranks or (), strict=True))
    return list(first.ranks or ()), [of_text[text] for text in first.answers]


def cohen_kappa(pairs: Sequence[tuple[object, object]]) -> float | None:
    """(observed - expected) / (1 - expected) agreement of two raters' labels (Cohen, 1960).

    None where it is undefined: without labels, or where both gave one and the same label only.
    """
    if not pairs:
        return None
    left, right = (collections.Counter(labels) for labels in zip(*pairs, strict=True))
    expected = sum(left[label] * right[label] for label in left) / len(pairs) ** 2
    return None if expected == 1 else (_share_equal(pairs) - expected) / (1 - expected)


def _share_equal(pairs: Sequence[tuple[object, object]]) -> float | None:
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None
