"""A linear classifier on character n-grams: what a task is worth before any neural network.

TF-IDF over characters and logistic regression; on Chinese reviews it needs no segmenter. Printed
beside a model's accuracy so that the figure means something.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from chatyuan.data import cache
from chatyuan.errors import UserError
from chatyuan.text.vocabulary import Vocabulary


class CharNgramClassifier:
    """TF-IDF of character n-grams and logistic regression, fitted when it is made."""

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | Sequence[str],
        *,
        ngrams: tuple[int, int] = (1, 3),
        min_count: int = 2,
    ) -> None:
        """Fits it.

        Args:
          texts: texts to fit on.
          labels: a label per text; at least two distinct.
          ngrams: shortest and longest n-gram, in characters.
          min_count: n-grams in fewer texts are left out.

        Raises:
          UserError: scikit-learn is missing, there is no text, or one label only.
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise UserError(
                "The linear baseline needs scikit-learn: pip install 'chatyuan[quickstart]'"
            ) from error
        if not texts:
            raise UserError("The linear baseline has 0 texts to train on; it needs at least 2.")
        if len(set(labels)) < 2:
            raise UserError(f"The linear baseline needs two labels; all are {labels[0]!r}.")
        self._vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=ngrams, min_df=min_count, sublinear_tf=True,
            dtype=np.float32,
        )  # fmt: skip
        features = self._vectorizer.fit_transform(texts)
        self._model = LogisticRegression(C=4.0, max_iter=1000, solver="lbfgs", random_state=0)
        self._model.fit(features, labels)

    @property
    def labels(self) -> list[Any]:
        """The labels, sorted."""
        return list(self._model.classes_)

    def predict(self, texts: Sequence[str]) -> list[Any]:
        """Returns the likeliest label of each text."""
        return list(self._model.predict(self._vectorizer.transform(texts)))

    def accuracy(self, texts: Sequence[str], labels: Sequence[int] | Sequence[str]) -> float:
        """Returns the share of texts whose likeliest label is the right one.

        Raises:
          UserError: there is no text.
        """
        if not texts:
            raise UserError("The linear baseline has 0 texts to test on; it needs at least 1.")
        return float(self._model.score(self._vectorizer.transform(texts), labels))


def cached_examples(
    cache_dir: str | os.PathLike[str], task: str, split: str, vocabulary: Vocabulary
) -> tuple[list[str], list[str]]:
    """Returns inputs and targets of a cached task as texts.

    Raises:
      UserError: the task has no inputs.
    """
    opened = cache.open_cache(cache_dir, task, split, vocabulary)
    if "inputs" not in opened.features:
        raise UserError(f"Task {task} has no inputs; the linear baseline classifies inputs.")
    inputs, targets = (
        [vocabulary.decode(row) for row in opened.features[name]] for name in ("inputs", "targets")
    )
    return inputs, targets
