"""Comparing a generated text with a reference, by characters: no word segmenter is needed.

Each function returns a value from 0 to 1 for one pair; `mean` averages over pairs.
"""

import collections
import unicodedata
from collections.abc import Callable, Sequence


def normalise(text: str) -> str:
    """Full-width forms to their plain ones (NFKC), spaces removed: how Chinese answers compare."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 when both are the same text after `normalise`."""
    return float(normalise(prediction) == normalise(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters (Lin 2004, with beta 1)."""
    predicted, wanted = normalise(prediction), normalise(reference)
    common = _longest_common_subsequence(predicted, wanted)
    return 2 * common / (len(predicted) + len(wanted)) if common else float(predicted == wanted)


def _longest_common_subsequence(left: str, right: str) -> int:
    """Length, by the bit-parallel recurrence of Hyyrö (2004): one big-integer step a character."""
    places: dict[str, int] = collections.defaultdict(int)
    for place, letter in enumerate(left):
        places[letter] |= 1 << place
    everything = (1 << len(left)) - 1
    state = everything
    for letter in right:
        matched = state & places.get(letter, 0)
        state = ((state + matched) | (state - matched)) & everything
    return len(left) - state.bit_count()


def chrf(prediction: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
    """Character n-gram F-score (Popović 2015), n = 1 ... `order`, recall weighing `beta` times.

    Precision and recall are averaged over the orders that both texts have, as sacreBLEU does.
    """
    predicted, wanted = normalise(prediction), normalise(reference)
    precisions, recalls = [], []
    for size in range(1, order + 1):
        mine, theirs = _ngrams(predicted, size), _ngrams(wanted, size)
        if not mine or not theirs:
            break
        common = sum((mine & theirs).values())
        precisions.append(common / sum(mine.values()))
        recalls.append(common / sum(theirs.values()))
    if not precisions:
        return float(predicted == wanted)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _ngrams(text: str, size: int) -> collections.Counter[str]:
    return collections.Counter(text[i : i + size] for i in range(len(text) - size + 1))


def mean(
    metric: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[str]
) -> float:
    """Average of a metric over pairs; 0 without pairs."""
    values = [metric(a, b) for a, b in zip(predictions, references, strict=True)]
    return sum(values) / max(1, len(values))


def distinct(texts: Sequence[str], size: int) -> float:
    """Share of different n-grams among all character n-grams of the texts (arXiv:1510.03055).

    It falls as texts repeat themselves or each other, and also with more text: compare equal
    numbers of texts. 0 without n-grams.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(_ngrams(text, size))
    return len(counts) / max(1, counts.total())
