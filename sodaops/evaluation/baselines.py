"""What a model must beat to be worth its cost: the most frequent label, and TF-IDF with logistic regression."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_union

_STRENGTHS = (1.0, 3.0, 10.0)  # inverse of the regularisation; val chooses


def majority(train_ids: np.ndarray, n_rows: int, n_labels: int) -> np.ndarray:
    """Probabilities [n_rows, n_labels] that always name the training split's most frequent label."""
    shares = np.bincount(train_ids, minlength=n_labels) / len(train_ids)
    return np.tile(shares, (n_rows, 1))


def tfidf(
    train: tuple[Sequence[str], np.ndarray], val: tuple[Sequence[str], np.ndarray], texts: Sequence[str], n_labels: int
) -> np.ndarray:
    """Words and character n-grams by TF-IDF, then logistic regression; the regularisation is chosen on val.

    Args:
        train: texts and label ids to learn from.
        val: texts and label ids that choose.
        texts: those to answer.
        n_labels: labels in all.

    Returns:
        Probabilities, float [n_texts, n_labels].

    Raises:
        ValueError: no training text has a word (scikit-learn's empty vocabulary).
    """
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    known, chosen_by, asked = features.fit_transform(train[0]), features.transform(val[0]), features.transform(texts)
    models = [LogisticRegression(C=c, max_iter=300).fit(known, train[1]) for c in _STRENGTHS]
    best = max(models, key=lambda model: f1_score(val[1], model.predict(chosen_by), average="macro"))
    probs = np.zeros((len(texts), n_labels))
    probs[:, best.classes_] = best.predict_proba(asked)
    return probs
