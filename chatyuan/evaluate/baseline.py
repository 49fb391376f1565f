"""A linear classifier on character n-grams: what a task is worth before any neural network.

TF-IDF over characters and logistic regression; on Chinese reviews it needs no segmenter. Printed
beside a model's accuracy so that the figure means something.
"""

import os
from collections.abc import Sequence

import numpy as np

from chatyuan.data import cache
from chatyuan.errors import UserError
from chatyuan.text.vocabulary import Vocabulary


def char_ngram_accuracy(
    train_texts: Sequence[str],
    train_labels: Sequence[int] | Sequence[str],
    test_texts: Sequence[str],
    test_labels: Sequence[int] | Sequence[str],
    *,
    ngrams: tuple[int, int] = (1, 3),
    min_count: int = 2,
) -> float:
    """Accuracy on the test texts of a classifier fitted on the train texts.

    Args:
      train_texts: texts to fit on.
      train_labels: a label per text; at least two distinct.
      test_texts: texts to judge.
      test_labels: the right labels.
      ngrams: shortest and longest n-gram, in characters.
      min_count: n-grams in fewer texts are left out.

    Raises:
      UserError: scikit-learn is missing, a set is empty, or there is one label only.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(
            "The linear baseline needs scikit-learn: pip install 'chatyuan[quickstart]'"
        ) from error
    if not train_texts or not test_texts:
        raise UserError(
            f"The linear baseline has {len(train_texts)} texts to train on, {len(test_texts)} to "
            "test on; both must be at least 1."
        )
    if len(set(train_labels)) < 2:
        raise UserError(f"The linear baseline needs two labels; all are {train_labels[0]!r}.")
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=ngrams, min_df=min_count, sublinear_tf=True, dtype=np.float32
    )
    features = vectorizer.fit_transform(train_texts)
    model = LogisticRegression(C=4.0, max_iter=1000, solver="lbfgs", random_state=0)
    model.fit(features, train_labels)
    return float(model.score(vectorizer.transform(test_texts), test_labels))


def cached_task_accuracy(
    cache_dir: str | os.PathLike[str],
    task: str,
    vocabulary: Vocabulary,
    *,
    train_split: str = "train",
    test_split: str = "test",
) -> float:
    """`char_ngram_accuracy` of a cached classification task, its targets being the labels."""
    texts, labels = {}, {}
    for split in (train_split, test_split):
        opened = cache.open_cache(cache_dir, task, split, vocabulary)
        if "inputs" not in opened.features:
            raise UserError(f"Task {task} has no inputs; the baseline classifies inputs.")
        texts[split] = [vocabulary.decode(row) for row in opened.features["inputs"]]
        labels[split] = [vocabulary.decode(row) for row in opened.features["targets"]]
    return char_ngram_accuracy(
        texts[train_split], labels[train_split], texts[test_split], labels[test_split]
    )
