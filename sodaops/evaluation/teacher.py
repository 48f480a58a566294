"""Compares a model with the teachers that it learnt from, or with any other model for the same labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sodaops.errors import ConfigError, some
from sodaops.inference.ensemble import Ensemble, median_times_s
from sodaops.inference.predictor import Predictor


def check_teachers(data: Mapping[str, Any], bundle_ids: Sequence[str]) -> None:
    """Refuses to compare a model with other teachers than those that it learnt from.

    Args:
        data: the data manifest in its bundle.
        bundle_ids: of the teachers.
    """
    learnt_from = data.get("distillation", {}).get("teachers", list(bundle_ids))
    if learnt_from != list(bundle_ids):
        raise ConfigError(
            f"teacher: the model learnt from {some(learnt_from)}, and this is {some(bundle_ids)}; the bundle has changed "
            "since, or it is another one. Give the one that the model learnt from, or train again."
        )


def compare_with_teacher(
    predictor: Predictor, teachers: Ensemble, table: pa.Table, probs: np.ndarray, n_bootstrap: int
) -> dict[str, Any]:
    """The teachers' metrics on a split, the difference, and the time for a text of both.

    Args:
        predictor: of the model.
        teachers: which average their answers.
        table: the split.
        probs: the model's answers, float32 [n_rows, n_labels].
        n_bootstrap: samples of the rows for the interval.

    Returns:
        bundle_ids; the teachers' ``summary``, and ``ece``, both teachers' and model's, where the task has one; ``gain``, the
        difference of the first metric, with ``low`` and ``high`` of its paired 95 % interval; and ``ms``, teachers' and
        model's median time for a text, together with ``speed``, their ratio.

    Raises:
        ConfigError: the teachers have other labels.
    """
    task, texts = predictor.task, table["text"].to_pylist()
    for other in teachers.predictors:
        if (type(other.task), other.info.labels) != (type(task), predictor.info.labels):
            raise ConfigError(f"teacher={other.info.bundle_id}: for other labels than {predictor.info.bundle_id}.")
    truth, theirs = task.truth(table), teachers.probs_of_cleaned(texts)
    answered = ~np.isnan(theirs).any(axis=1)
    truth, own, theirs = truth[answered], probs[answered], task.as_of_own(theirs[answered], teachers.task)
    low, high = np.quantile(task.gains(truth, own, theirs, n_bootstrap), [0.025, 0.975]).tolist()
    (teachers_s, own_s), _ = median_times_s([teachers.predictors, [predictor]], texts)
    errors = [task.calibration_error(of, truth) for of in (theirs, own)]
    return {
        "bundle_ids": teachers.ids,
        "summary": task.summary(theirs, truth),
        "gain": {"measured": task.score(own, truth) - task.score(theirs, truth), "low": low, "high": high},
        "ece": errors if None not in errors else None,
        "ms": [1000 * teachers_s, 1000 * own_s],
        "speed": teachers_s / own_s,
    }
