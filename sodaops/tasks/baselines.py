"""Baselines that a model must beat to be worth its cost: the most frequent label, and tuned TF-IDF with a linear model."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, make_union

from sodaops.io.progress import progress
from sodaops.tasks import label_sets

log = logging.getLogger(__name__)
_GRID = tuple(product((None, "balanced"), (1.0, 10.0, 100.0)))  # class weights, inverse regularisation strengths
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the regularisation of ridge regression
_N_FOLDS = 3
_MAX_FEATURES = 20_000  # of words, and of characters
# Limits on rows times labels, in which the time of a fit is linear: seconds for the search, about a minute for the last fit.
_SEARCH_SIZE, _FIT_SIZE = 60_000, 2_000_000
_SEARCH_ROWS, _FIT_ROWS = 5_000, 100_000
_LONG = 100_000  # rows times labels that take more than a few seconds


def most_frequent(train_ids: np.ndarray, n_rows: int, n_labels: int) -> np.ndarray:
    """The label shares of the train split for every row, float [n_rows, n_labels]; their argmax is its most frequent label."""
    shares = np.bincount(train_ids, minlength=n_labels) / len(train_ids)
    return np.tile(shares, (n_rows, 1))


def tfidf(train: tuple[Sequence[str], np.ndarray], texts: Sequence[str], n_labels: int) -> np.ndarray:
    """TF-IDF of words and character n-grams, then logistic regression, one label against the rest.

    The regularisation and the class weights are those with the highest macro-F1 in cross-validation on ``train``. Of a long
    table both the search and the last fit use a sample with the same shares of labels. Equal input gives equal output.

    Args:
        train: texts, and label ids [n_rows].
        texts: to predict.
        n_labels: number of labels; those that are not in ``train`` get probability 0.

    Returns:
        Probabilities, float [n_texts, n_labels].
    """
    rows = _sample(train[1], min(_FIT_ROWS, max(1, _FIT_SIZE // n_labels)))
    if len(rows) * n_labels > _LONG:
        log.info("TF-IDF baseline: cross-validation, then a fit on %s of %s rows", f"{len(rows):,}", f"{len(train[1]):,}")
    train_texts, label_ids = [train[0][i] for i in rows], train[1][rows]
    features = _features()
    train_features = features.fit_transform(train_texts)
    model = _fit(_search(train_features, label_ids, n_labels), train_features, label_ids)
    probs = np.zeros((len(texts), n_labels))
    probs[:, model.classes_] = model.predict_proba(features.transform(texts))
    return probs


def tfidf_label_sets(train: tuple[Sequence[str], np.ndarray], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`tfidf`, for any number of labels per text; a label's threshold has the highest F1 on held-out rows.

    Args:
        train: texts, and whether each has each label, [n_rows, n_labels].
        texts: to predict.

    Returns:
        Probabilities, float [n_texts, n_labels], and thresholds, float [n_labels].
    """
    (n_rows, n_labels), truth = train[1].shape, train[1]
    order = np.random.default_rng(0).permutation(n_rows)[: min(_FIT_ROWS, max(1, _FIT_SIZE // n_labels))]
    features, truth = _features(), truth[order]
    rows = features.fit_transform([train[0][i] for i in order])
    n_search, found = min(_SEARCH_ROWS, max(500, _SEARCH_SIZE // n_labels)), {}
    settings = [setting for setting in _GRID if setting[0] is None]  # the thresholds do what class weights would
    for setting in progress(settings, "TF-IDF baseline", unit="setting"):
        found[setting] = _held_out(setting, rows[:n_search], truth[:n_search])[1]
    best = max(found, key=found.__getitem__)
    thresholds = _held_out(best, rows[: _SEARCH_ROWS * 2], truth[: _SEARCH_ROWS * 2])[0]
    return np.asarray(_fit(best, rows, truth).predict_proba(features.transform(texts))), thresholds


def _held_out(setting: tuple[str | None, float], rows: Any, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """The best thresholds on held-out rows, and the macro-F1 with them."""
    fold, probs = np.arange(len(truth)) % _N_FOLDS, np.zeros(truth.shape)
    for k in range(min(_N_FOLDS, len(truth) - 1)):
        probs[fold == k] = _fit(setting, rows[fold != k], truth[fold != k]).predict_proba(rows[fold == k])
    thresholds = label_sets.best_thresholds(probs, truth)
    return thresholds, float(label_sets.summary(truth, probs >= thresholds)["macro_f1"])


def ridge(train: tuple[Sequence[str], np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """TF-IDF as in :func:`tfidf`, then ridge regression, with the strength of the least squared error in cross-validation.

    Args:
        train: texts, and their numbers, float [n_rows].
        texts: to predict.

    Returns:
        Numbers, float [n_texts].
    """
    order = np.random.default_rng(0).permutation(len(train[1]))[:_FIT_ROWS]
    numbers, features = train[1][order], _features()
    rows = features.fit_transform([train[0][i] for i in order])
    n = min(len(order), _SEARCH_ROWS)
    fold, errors = np.arange(n) % _N_FOLDS, np.zeros(len(_STRENGTHS))
    fits = product(enumerate(_STRENGTHS), range(min(_N_FOLDS, n)))
    for (i, strength), k in progress(fits, "TF-IDF baseline", len(_STRENGTHS) * _N_FOLDS, unit="fit"):
        fitted = np.flatnonzero(fold != k)
        if len(fitted):
            model = Ridge(strength).fit(rows[fitted], numbers[fitted])
            errors[i] += ((model.predict(rows[np.flatnonzero(fold == k)]) - numbers[:n][fold == k]) ** 2).sum()
    return Ridge(_STRENGTHS[int(errors.argmin())]).fit(rows, numbers).predict(features.transform(texts))


def _features() -> FeatureUnion:
    # A word is a run of letters, or a single other character: emoji and punctuation count, so no vocabulary is empty.
    shared: dict[str, Any] = {"sublinear_tf": True, "max_features": _MAX_FEATURES, "dtype": np.float32}
    return make_union(
        TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), **shared),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **shared),
    )


def _fit(setting: tuple[str | None, float], features: Any, targets: np.ndarray) -> OneVsRestClassifier:
    weights, strength = setting
    model = LogisticRegression(
        C=strength, class_weight=weights, solver="liblinear", dual=True, tol=0.01, max_iter=100, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fits that have not converged, and labels that a fold lacks
        return OneVsRestClassifier(model).fit(features, targets)


def _search(features: Any, label_ids: np.ndarray, n_labels: int) -> tuple[str | None, float]:
    """The class weights and the strength with the highest macro-F1 over the held-out rows of all folds."""
    rows = _sample(label_ids, min(_SEARCH_ROWS, max(500, _SEARCH_SIZE // n_labels)))
    features, label_ids = features[rows], label_ids[rows]
    fold = np.empty(len(rows), dtype=int)
    fold[_by_label(label_ids)] = np.arange(len(rows)) % _N_FOLDS
    if len(set(label_ids[fold > 0])) < 2:  # too few rows to hold any out
        return _GRID[-1]
    held_out = {setting: np.empty_like(label_ids) for setting in _GRID}
    fits: Iterator[Any] = product(_GRID, range(_N_FOLDS))
    for setting, k in progress(fits, "TF-IDF baseline", len(_GRID) * _N_FOLDS, unit="fit"):
        model = _fit(setting, features[fold != k], label_ids[fold != k])
        held_out[setting][fold == k] = model.predict(features[fold == k])
    return max(_GRID, key=lambda setting: f1_score(label_ids, held_out[setting], average="macro"))


def _by_label(label_ids: np.ndarray) -> np.ndarray:
    """The rows in the order of their labels, and at random within a label."""
    return np.lexsort((np.random.default_rng(0).random(len(label_ids)), label_ids))


def _sample(label_ids: np.ndarray, n_rows: int) -> np.ndarray:
    """At most ``n_rows`` rows with the same shares of labels, in the table's order."""
    n = len(label_ids)
    return np.sort(_by_label(label_ids)[np.linspace(0, n - 1, n_rows).astype(int)]) if n > n_rows else np.arange(n)
