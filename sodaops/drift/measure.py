"""Measures drift: compares requests with the reference of the bundle that answered them."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.bundle import layout
from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.reference import Descriptors, Reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.causes import find_causes
from sodaops.drift.evidently_report import column_tests
from sodaops.drift.features import ABSTAINED, ANSWERS, TEXT, Bin, Feature
from sodaops.drift.quality import Quality, estimate_quality
from sodaops.drift.result import DriftResult, Example
from sodaops.drift.segments import compare_segments, distinct_texts
from sodaops.drift.statistics import EmbeddingTest, chi_square_p, embedding_test, ks_distance, total_variation
from sodaops.errors import BundleError
from sodaops.request_log.window import Window, count_by_bundle
from sodaops.tasks.base import Task
from sodaops.text.columns import named

if TYPE_CHECKING:
    import pandas as pd

_MODEL_INDEPENDENT = ("n_chars", "letters", "non_ascii")  # features that are the same for every bundle
_EMPTY_SHA256 = hashlib.sha256().hexdigest()
_N_EXAMPLES = 12
_N_BINS = 16
_MAX_PERMUTATIONS = 100_000  # some 20 s for segments of 1,000 texts
_Sides = tuple[np.ndarray, np.ndarray]  # of the reference and of the current rows


def measure_drift(settings: DriftConfig, info: BundleInfo, reference: Reference, window: Window) -> tuple[DriftResult, Any]:
    """Compares a window of requests with a bundle's reference.

    Args:
        settings: conf/drift.
        info: the bundle's.
        reference: the bundle's.
        window: rows of the request log.

    Returns:
        The result; and evidently's snapshot, None if there are too few rows.
    """
    rows = window.rows
    own_rows = rows.filter(pc.equal(rows["bundle_id"], info.bundle_id))
    answered = own_rows.filter(pc.is_valid(own_rows["label"]))
    texts, task = distinct_texts(answered), layout.task_of(info.bundle_id, info)
    # Bonferroni: with k tests at alpha / k, the chance of any false alarm is at most alpha.
    n_tests = len(TEXT) + len(_compared_answers(info, reference, texts, task)) + (info.abstention is not None)
    level = settings.alpha / n_tests
    others = {
        bundle_id: _compare_other_bundle(settings, reference, rows.filter(pc.equal(rows["bundle_id"], bundle_id)), level)
        for bundle_id in count_by_bundle(rows)
        if bundle_id != info.bundle_id
    }
    facts = _window_facts(info, window, own_rows) | {"level": level, "n_texts": len(texts), "others": others}
    if len(own_rows) >= settings.min_rows:
        return _judge(settings, info, task, reference, answered, texts, facts)
    message = f"too few requests to judge: {len(own_rows)}; at least {settings.min_rows} are needed"
    facts["quality"] = Quality(withheld="rows", message=message)
    return DriftResult(judged=False, drifted=False, message=message, causes=[], features=[], examples=[], **facts), None


def _judge(
    settings: DriftConfig, info: BundleInfo, task: Task, reference: Reference, answered: pa.Table, texts: pa.Table,
    facts: dict[str, Any],
) -> tuple[DriftResult, Any]:  # fmt: skip
    """The result for enough rows; ``texts`` are the distinct answered ones, ``facts`` the fields that need no comparison."""
    level = facts["level"]
    features: list[Feature] = []
    embedding, snapshot = None, None
    if len(texts) >= settings.min_rows:  # with fewer, only repeated and empty texts can be judged
        features, embedding, snapshot = _compare_features(settings, info, task, reference, texts, level)
    segments = compare_segments(
        info.slice_columns, reference, answered, settings.min_rows, level,
        lambda *sides: _compare_features(settings, info, task, *sides)[0],
    )  # fmt: skip
    causes = find_causes(settings, features, facts["empty"], facts["repeated"], facts["repeated_text"])
    drifted = [cause.name for cause in causes] + [segment.title for segment in segments if segment.drifted]
    with_probs = texts.filter(pc.is_valid(texts["probs"]))
    result = DriftResult(
        judged=True,
        drifted=bool(causes),
        message="; ".join(cause.message for cause in causes) or "like the reference",
        causes=causes,
        features=features,
        examples=_examples(texts, embedding, info.text_columns) if causes and embedding else [],
        segments=segments,
        quality=estimate_quality(settings, task, reference, _logged_answers(info, with_probs), drifted),
        **facts,
    )
    return result, snapshot


def _window_facts(info: BundleInfo, window: Window, own_rows: pa.Table) -> dict[str, Any]:
    """The fields of the result that describe the window."""
    created = datetime.now(UTC)
    times = pc.min_max(window.rows["time"]).as_py()
    n_repeated, text = _most_frequent(own_rows, info.text_columns)
    return {
        "bundle_id": info.bundle_id,
        "n_rows": len(own_rows),
        "n_found": window.n_found,
        "first": times["min"].isoformat() if times["min"] else None,
        "last": times["max"].isoformat() if times["max"] else None,
        "empty": own_rows["label"].null_count / max(1, len(own_rows)),
        "repeated": n_repeated / max(1, len(own_rows)) if n_repeated > 1 else 0.0,
        "repeated_text": text if n_repeated > 1 else None,
        "ahead": window.ahead,
        "skipped": dict(window.skipped),
        "reference_age_days": round((created - datetime.fromisoformat(info.created)).total_seconds() / 86400, 2),
        "created": created.isoformat(timespec="seconds"),
    }


def _most_frequent(rows: pa.Table, columns: Sequence[str]) -> tuple[int, str | None]:
    """The count of the most frequent non-empty text, and the text itself, or its hash if texts are not logged."""
    texts = rows.filter(pc.not_equal(rows["text_sha256"], _EMPTY_SHA256))
    if not len(texts):
        return 0, None
    value_counts = pc.value_counts(texts["text_sha256"])
    counts = value_counts.field("counts").to_numpy(zero_copy_only=False)
    largest = int(np.argmax(counts))
    digest = value_counts.field("values")[largest].as_py()
    row = texts.filter(pc.equal(texts["text_sha256"], digest)).slice(0, 1).to_pylist()[0]
    return int(counts[largest]), named(row["text"], columns) if row["text"] else digest


def _compare_features(
    settings: DriftConfig, info: BundleInfo, task: Task, reference: Reference, rows: pa.Table, level: float
) -> tuple[list[Feature], EmbeddingTest | None, Any]:
    """Tests all features, and returns them with the test of the embeddings and evidently's snapshot."""
    answers = _compared_answers(info, reference, rows, task)
    rates = {name: sides for name, sides in answers.items() if sides[0].ndim == 2}
    reference_frame, current_frame = _frames(reference, rows, {name: answers[name] for name in answers if name not in rates})
    # Logs of earlier versions have no descriptors. These features get no p-value.
    names = [name for name in current_frame.columns if current_frame[name].notna().any()]
    shares = [name for name in names if name in answers and answers[name][0].dtype.kind != "f"]
    p_values, snapshot = column_tests(reference_frame[names], current_frame[names], shares, level) if names else ({}, None)
    features = [
        _compare_column(settings, name, reference_frame[name].dropna(), current_frame[name].dropna(), p_values.get(name), level)
        for name in current_frame.columns
    ]
    features += [_compare_rates(settings, name, info.labels, sides, level) for name, sides in rates.items()]
    features += _compare_abstention(settings, info, reference, rows, level)
    groups = reference.label_ids, answer_groups(info, rows, task)
    embedding = _compare_embeddings(settings, reference, rows, groups, level)
    drifted = embedding is not None and embedding.p < level
    features.append(Feature("embedding", embedding and embedding.p, None, drifted, None, None))
    return features, embedding, snapshot


def _compared_answers(info: BundleInfo, reference: Reference, rows: pa.Table, task: Task) -> dict[str, _Sides]:
    """The features of the answers.

    A model is more confident on its training texts, so scores, values and rates are compared with those of val only; in place
    of the other scores and values is NaN.
    """
    if not task.keeps_answers:
        labels = np.array(info.labels, dtype=object)[reference.label_ids], rows["label"].to_numpy()
        scores = np.where(reference.seen, np.nan, reference.scores.astype(float)), rows["score"].to_numpy().astype(float)
        return dict(zip(ANSWERS, (labels, scores), strict=True))
    if reference.answers is None:
        raise BundleError(f"bundle {info.bundle_id}: {layout.DRIFT} has no answers; `sodaops export` writes it again.")
    old, new = (task.drift_values(answers, info.labels) for answers in (reference.answers, _logged_answers(info, rows)))
    for name, values in old.items():
        if values.dtype.kind == "f":
            old[name] = np.where(reference.seen, np.nan, values)
        elif values.ndim == 2:
            old[name] = values[~reference.seen]
    return {name: (values, new[name]) for name, values in old.items()}


def _logged_answers(info: BundleInfo, rows: pa.Table) -> np.ndarray:
    """Answers of requests, float32 [n_rows, n_labels]; every log of a task that keeps answers has them."""
    return np.array(rows["probs"].to_pylist(), np.float32).reshape(len(rows), len(info.labels))


def answer_groups(info: BundleInfo, rows: pa.Table, task: Task) -> np.ndarray:
    """The group of each answered request, int [n_rows], as ``Reference.label_ids`` has them."""
    if task.keeps_answers:
        return task.groups(_logged_answers(info, rows))
    return pc.index_in(rows["label"], pa.array(info.labels)).to_numpy()


def _frames(reference: Reference, rows: pa.Table, answers: dict[str, _Sides]) -> list["pd.DataFrame"]:
    """The rows of the reference and those of the window, with the same columns."""
    frames = [_descriptor_frame(reference), rows.select(list(Descriptors._fields)).to_pandas().astype(float)]
    for i, frame in enumerate(frames):
        for name, sides in answers.items():
            frame[name] = sides[i]
    return frames


def _descriptor_frame(reference: Reference) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(dict(zip(Descriptors._fields, reference.descriptors.T.astype(float), strict=True)))


def _compare_column(
    settings: DriftConfig, name: str, reference: "pd.Series", current: "pd.Series", p: float | None, level: float
) -> Feature:
    """Drift requires significance and a minimum effect, since with many rows even a tiny shift is significant."""
    if p is None:
        return Feature(name, None, None, False, None, None)
    medians: tuple[float | None, float | None] = (None, None)
    if reference.dtype == object:
        labels = sorted({*reference, *current})
        counts = [np.array([(side == label).sum() for label in labels]) for side in (reference, current)]
        effect = total_variation(*counts)
        bins = _bins(labels, [side / side.sum() for side in counts])
    else:
        values = [reference.to_numpy(), current.to_numpy()]
        effect, bins = ks_distance(*values), _histogram(values)
        medians = float(np.median(values[0])), float(np.median(values[1]))
    return Feature(name, p, effect, p < level and effect >= settings.min_effect, *medians, bins)


def _compare_rates(settings: DriftConfig, name: str, labels: list[str], sides: _Sides, level: float) -> Feature:
    """Compares how often each label is predicted, bool [n, n_labels]: a chi-square test each, with Bonferroni's correction."""
    counts = [np.stack([side.sum(axis=0), (~side).sum(axis=0)]) for side in sides]  # rows with and without each label
    p = min(1.0, len(labels) * min(chi_square_p(counts[0][:, i], counts[1][:, i]) for i in range(len(labels))))
    rates = [side.mean(axis=0) for side in sides]
    effect = float(np.abs(rates[0] - rates[1]).max())
    return Feature(name, p, effect, p < level and effect >= settings.min_effect, None, None, _bins(labels, rates))


def _compare_abstention(
    settings: DriftConfig, info: BundleInfo, reference: Reference, rows: pa.Table, level: float
) -> list[Feature]:
    """Compares how often a bundle with thresholds abstains, with val alone, as a model is surer of texts that it has seen."""
    variant = info.abstention and info.default_variant  # which the reference is of
    thresholds = info.abstention["variants"][variant]["thresholds"] if info.abstention and variant else {}
    logged = rows["abstained"].drop_null().to_numpy()
    if not thresholds or not len(logged):
        return []
    val = ~reference.seen
    before = reference.scores[val] <= np.array([thresholds[label] for label in info.labels])[reference.label_ids[val]]
    return [_compare_rates(settings, ABSTAINED, [ABSTAINED], (before[:, None], logged[:, None]), level)]


def _histogram(sides: list[np.ndarray]) -> list[Bin]:
    """Bins of equal width between the 0.5th and 99.5th percentiles; values outside count in the first or last bin."""
    low, high = np.quantile(np.concatenate(sides), (0.005, 0.995))
    edges = np.linspace(low, high if high > low else low + 1, _N_BINS + 1)
    shares = [np.histogram(np.clip(side, edges[0], edges[-1]), edges)[0] / len(side) for side in sides]
    return _bins(edges[:-1].tolist(), shares)


def _bins(starts: list[Any], shares: list[np.ndarray]) -> list[Bin]:
    return [Bin(start, float(old), float(new)) for start, old, new in zip(starts, *shares, strict=True)]


def _compare_embeddings(
    settings: DriftConfig, reference: Reference, rows: pa.Table, groups: _Sides, level: float
) -> EmbeddingTest | None:
    """Tests the embeddings for drift; None if the log has no sketches, or sketches of another size."""
    if not len(rows) or rows["sketch"].null_count:
        return None
    sketches = np.array(rows["sketch"].combine_chunks().flatten()).reshape(len(rows), -1)
    if sketches.shape[1] != reference.sketches.shape[1]:
        return None
    val = ~reference.seen  # training texts have other embeddings than new texts from the same source
    sides = reference.sketches[val].astype(np.float32), sketches, groups[0][val], groups[1]
    test = embedding_test(*sides, settings.n_permutations)
    # The level of one of many segments may be lower than the lowest p-value of so few permutations.
    lowest, n_more = 1 / (settings.n_permutations + 1), min(int(2 / level), _MAX_PERMUTATIONS)
    return embedding_test(*sides, n_more) if level <= lowest and test.p <= lowest else test


def _examples(rows: pa.Table, embedding: EmbeddingTest, columns: Sequence[str]) -> list[Example]:
    """The rows whose embeddings have the highest drift scores."""
    order = embedding.indices[np.argsort(-embedding.scores)][:_N_EXAMPLES]
    names = ["text", "text_sha256", "label", "score", "request_id"]
    examples = rows.select(names).take(order).to_pylist()
    return [Example(**{**row, "text": row["text"] and named(row["text"], columns)}) for row in examples]


def _compare_other_bundle(settings: DriftConfig, reference: Reference, rows: pa.Table, level: float) -> dict[str, Any]:
    """Compares the rows that another bundle answered, by the features that do not depend on the bundle."""
    n_rows = len(rows)
    rows = rows.filter(pc.is_valid(rows["letters"]))
    if len(rows) < settings.min_rows:
        return {"n_rows": n_rows, "drifted": None}
    names = list(_MODEL_INDEPENDENT)
    reference_frame = _descriptor_frame(reference)[names]
    current_frame = distinct_texts(rows).select(names).to_pandas().astype(float)
    p_values, _ = column_tests(reference_frame, current_frame, [], level)
    features = [
        _compare_column(settings, name, reference_frame[name], current_frame[name], p_values[name], level) for name in names
    ]
    return {"n_rows": n_rows, "drifted": [feature.name for feature in features if feature.drifted]}
