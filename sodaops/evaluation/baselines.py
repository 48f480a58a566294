"""Baselines that a model must beat to be worth its cost: the most frequent label, and TF-IDF with logistic regression."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_union

_STRENGTHS = (1.0, 3.0, 10.0)  # inverse regularisation strengths; the best on val is taken


def most_frequent(train_ids: np.ndarray, n_rows: int, n_labels: int) -> np.ndarray:
    """The label shares of the train split for every row, float [n_rows, n_labels]; their argmax is its most frequent label."""
    shares = np.bincount(train_ids, minlength=n_labels) / len(train_ids)
    return np.tile(shares, (n_rows, 1))


def tfidf(
    train: tuple[Sequence[str], np.ndarray], val: tuple[Sequence[str], np.ndarray], texts: Sequence[str], n_labels: int
) -> np.ndarray:
    """TF-IDF of words and character n-grams, then logistic regression with a regularisation chosen on val.

    Args:
        train: texts and label ids to fit on.
        val: texts and label ids to choose the regularisation on.
        texts: to predict.
        n_labels: number of labels; those that are not in ``train`` get probability 0.

    Returns:
        Probabilities, float [n_texts, n_labels].

    Raises:
        ValueError: no training text has a word, so that scikit-learn's vocabulary is empty.
    """
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    train_features, val_features = features.fit_transform(train[0]), features.transform(val[0])
    models = [LogisticRegression(C=c, max_iter=300).fit(train_features, train[1]) for c in _STRENGTHS]
    best = max(models, key=lambda model: f1_score(val[1], model.predict(val_features), average="macro"))
    probs = np.zeros((len(texts), n_labels))
    probs[:, best.classes_] = best.predict_proba(features.transform(texts))
    return probs
