"""Any number of labels per text."""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from sodaops.config.schema import Config, DataConfig, EvaluateConfig, OptimConfig
from sodaops.errors import ConfigError, DataError, nearest, some
from sodaops.tasks import label_sets, metrics
from sodaops.tasks.base import Metric, Targets, Task
from sodaops.tasks.label_cells import BETWEEN, Form, in_words, matrix_of, parsed

if TYPE_CHECKING:
    import pyarrow as pa

    from sodaops.tasks.plots import Wanted

_LOSSES = "sodaops.modeling.losses."


@dataclass(frozen=True)
class LabelSet:
    """The prediction for one text: the labels whose probability reaches their threshold, and the probabilities of all."""

    labels: Annotated[list[str], Field(examples=[["late", "rude"]])]
    probs: Annotated[dict[str, float], Field(description="label -> probability, in label order")]


class MultiLabel(Task):
    """Any number of labels per text: lists in ``data.label_column``, which in CSV are JSON, unless an argument says otherwise.

    Args:
        separator: the column has delimited labels, such as "a;b" with ";".
        columns: a column with 0 or 1 for each label, in place of ``data.label_column``.
        allow_none: whether texts without labels are allowed.
        thresholds: label -> the least probability at which a text has it. Missing ones are chosen on val for the highest F1. A
            bundle has all of them, in label order.
    """

    name = "multi_label"
    metrics = (
        Metric("macro_f1", "macro-F1", note="in which all labels count equally"),
        Metric("micro_f1", "micro-F1", note="in which all decisions count equally"),
        Metric("sample_f1", "F1 per text", note="mean over the texts"),
        Metric("average_precision", "average precision", note="mean over the labels, without thresholds"),
        Metric("hamming_loss", "Hamming loss", False, "share of wrong decisions"),
        Metric("ece", "ECE", False, "calibration error; 0 is best"),
    )
    baselines: ClassVar = {"every": "every label for every text", "tfidf": "TF-IDF + logistic regression"}
    max_cells = 2**20
    problem_type = "multi_label_classification"
    needs_val = True
    prediction_class = LabelSet
    keeps_answers = True

    def __init__(
        self, separator: str | None = None, columns: Sequence[str] | None = None, allow_none: bool = False,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        if separator is not None and (not isinstance(separator, str) or not separator):
            raise ConfigError(f"task.separator={separator!r}: expected what is between labels, such as ';', or null.")
        is_list = isinstance(columns, Sequence) and not isinstance(columns, str)
        if columns is not None and (separator is not None or not is_list or len({*columns}) < max(2, len(columns))):
            raise ConfigError(f"task.columns={columns}: expected a list of two or more columns, and task.separator=null.")
        if not isinstance(allow_none, bool) or not isinstance(thresholds, Mapping | None):
            raise ConfigError(
                f"task.allow_none={allow_none!r}, task.thresholds={thresholds!r}: expected true or false, and a mapping."
            )
        for label, threshold in (thresholds or {}).items():
            if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
                raise ConfigError(f"task.thresholds.{label}={threshold!r}: expected a probability.")
        self.form = Form(separator, columns and [*map(str, columns)], allow_none)
        self.takes_lists = separator is None and columns is None
        self.thresholds = {str(label): float(threshold) for label, threshold in (thresholds or {}).items()}

    def section(self) -> dict[str, Any]:
        return {**super().section(), **self.form._asdict(), "thresholds": self.thresholds or None}

    def splits_section(self) -> dict[str, Any]:
        return {**self.section(), "thresholds": None}

    def check_labels(self, labels: Sequence[str]) -> None:
        if self.thresholds and [*self.thresholds] != [*labels]:
            raise ConfigError(f"task.thresholds is for {some([*self.thresholds])}; expected one for each of {some(labels)}.")

    def faults(self, config: Config) -> Iterator[str]:
        yield from super().faults(config)
        target = config.loss["_target_"]
        if target.startswith(_LOSSES) and target != f"{_LOSSES}BinaryCrossEntropyLoss":
            yield f"loss._target_={target}: it is for one label per text; set loss=binary_cross_entropy."

    # Data

    def table_columns(self, config: DataConfig) -> dict[str, str]:
        columns = self.form.columns
        return super().table_columns(config) if columns is None else dict.fromkeys(columns, "task.columns")

    def cells(self, raw: "pa.RecordBatch", config: DataConfig) -> "pa.Array":
        import pyarrow.compute as pc

        if self.form.columns is None:
            return raw[config.label_column]
        return pc.binary_join_element_wise(*(raw[name] for name in self.form.columns), BETWEEN)

    def read_cells(self, place: str, counts: Mapping[str, int], config: DataConfig) -> Targets:
        from sodaops.tasks.label_checks import check_labels

        targets, n_rows = self.form.read(counts, config)
        labels = targets.labels
        if labels:
            self._check_thresholds(labels)
        if len(labels) < 2 and (targets.ids >= 0).all():  # else the cells are the fault
            where = self.form.place(config.label_column, config)
            raise DataError(f"{place}: {where} has {len(labels)} labels ({some(labels) or 'none'}); expected at least two.")
        if config.labels is None:
            check_labels(place, n_rows, labels, config)
        return targets

    def _check_thresholds(self, labels: Sequence[str]) -> None:
        if strange := [label for label in self.thresholds if label not in labels]:
            near = nearest(strange[0], labels)
            raise ConfigError(f"task.thresholds.{strange[0]}: no such label{near}; expected {some(labels)}.")

    def bad_cells(
        self, place: str, cells: Sequence[str], rows: Sequence[int], labels: Sequence[str], config: DataConfig
    ) -> DataError:
        return self.form.error(place, cells, rows, labels, config)

    def label_counts(self, targets: Targets, ids: np.ndarray) -> dict[str, int]:
        sets = matrix_of(targets.columns["label_set"])
        return dict(zip(targets.labels, (np.bincount(ids, minlength=len(sets)) @ sets).tolist(), strict=True))

    def check_train(self, place: str, targets: Targets, ids: np.ndarray, config: DataConfig) -> None:
        from sodaops.tasks.label_checks import check_each_label

        check_each_label(place, self.label_counts(targets, ids), config)

    def truth(self, table: "pa.Table") -> np.ndarray:
        """bool [n_rows, n_labels]."""
        return matrix_of(table["label_set"].combine_chunks())

    def any_truth(self, n_rows: int, n_labels: int) -> np.ndarray:
        return np.eye(n_rows, n_labels, dtype=bool)

    # Training

    def targets(self, table: "pa.Table", labels: Sequence[str], optim: OptimConfig) -> np.ndarray:
        self._check_thresholds(labels)  # again, since the splits may be older
        return self.truth(table).astype(np.float32)

    def example_targets(self, n_labels: int) -> np.ndarray:
        """A text with one label, and one with all."""
        return np.array([np.eye(n_labels)[0], np.ones(n_labels)], np.float32)

    def balanced_weights(self, truth: np.ndarray, n_labels: int) -> np.ndarray:
        """Texts without a label per text with it, float32 [n_labels]."""
        return ((~truth).sum(0) / np.maximum(truth.sum(0), 1)).astype(np.float32)

    def val_metrics(self, n_labels: int) -> dict[str, dict[str, Any]]:
        prefix, bins = "torchmetrics.classification.Multilabel", (1 / (1 + np.exp(np.linspace(9, -9, 181)))).tolist()
        return {
            "macro_f1": {"_target_": f"{prefix}F1Score", "num_labels": n_labels},
            "average_precision": {"_target_": f"{prefix}AveragePrecision", "num_labels": n_labels, "thresholds": bins},
        }

    def fitted(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Self:
        chosen = zip(labels, label_sets.best_thresholds(probs, truth).tolist(), strict=True)
        fitted = copy.copy(self)
        fitted.thresholds = {label: self.thresholds.get(label, threshold) for label, threshold in chosen}
        return fitted

    # Answers

    def probs(self, logits: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(0.5 * logits))  # the logistic function, without overflow

    def torch_probs(self, logits: Any) -> Any:
        return logits.float().sigmoid()

    def levels(self, n_labels: int) -> np.ndarray:
        """The thresholds in label order, float [n_labels]; 0.5 until they are chosen."""
        return np.array([*self.thresholds.values()] if len(self.thresholds) == n_labels else [0.5] * n_labels)

    def decide(self, probs: np.ndarray) -> np.ndarray:
        """Whether texts have labels, bool [n, n_labels]."""
        return probs >= self.levels(probs.shape[1])

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> LabelSet:
        levels = self.levels(len(labels)).tolist()
        chosen = [label for label, prob, level in zip(labels, row, levels, strict=True) if prob >= level]
        return LabelSet(chosen, dict(zip(labels, row, strict=True)))

    def columns(self, probs: np.ndarray, labels: Sequence[str]) -> "dict[str, pa.Array]":
        import pyarrow as pa

        answers = [[label for label, has in zip(labels, row, strict=True) if has] for row in self.decide(probs)]
        of_labels = {f"prob_{label}": pa.array(probs[:, i]) for i, label in enumerate(labels)}
        return {"labels": pa.array(answers, pa.list_(pa.string())), **of_labels}

    def is_valid(self, probs: np.ndarray) -> bool:
        return bool(((probs >= 0) & (probs <= 1)).all())

    # Comparing two models

    def as_of_own(self, probs: np.ndarray, other: Self) -> np.ndarray:
        return label_sets.moved(probs, other.levels(probs.shape[1]), self.levels(probs.shape[1]))

    def agreement(self, before: np.ndarray, after: np.ndarray) -> float:
        """The mean overlap of the two answers: the labels in both, divided by those in either; 1 if there are none."""
        one, other = self.decide(before), self.decide(after)
        both, either = (one & other).sum(1), (one | other).sum(1)
        return float(np.where(either, both / np.maximum(either, 1), 1.0).mean())

    # Evaluation and the gate

    def purpose(self, names: str) -> str:
        return f"gives a text any number of {names}"

    def measure(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str], settings: EvaluateConfig) -> dict[str, Any]:
        metrics.check_inputs(probs, np.zeros(len(truth), np.int64))
        areas, of_label = metrics.curves(probs, truth, labels), self._label_table(probs, truth, labels)
        for (label, values), level in zip(of_label.items(), self.levels(len(labels)).tolist(), strict=True):
            values |= {key: areas[label][key] for key in ("roc_auc", "average_precision") if label in areas}
            values["threshold"] = level
        return {
            "n_rows": len(truth),
            **self.summary(probs, truth),
            "average_precision": float(np.mean([of["average_precision"] for of in areas.values()] or [0.0])),
            "ece": metrics.calibration_gap(metrics.reliability_of(probs.ravel(), truth.ravel(), settings.n_bins)),
            "interval_95": label_sets.intervals(truth, self.decide(probs), settings.n_bootstrap),
            "labels": of_label,
        }

    def summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in label_sets.summary(truth, self.decide(probs)).items()}

    def label_scores(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, tuple[float, int]]:
        of_label = self._label_table(probs, truth, labels)
        return {label: (values["f1"], int(values["n_rows"])) for label, values in of_label.items()}

    def _label_table(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
        decided = self.decide(probs)
        return metrics.label_table((truth & decided).sum(0), truth.sum(0), decided.sum(0), labels)

    def gains(self, truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_samples: int) -> np.ndarray:
        own, other = (label_sets.samples(truth, self.decide(of), n_samples)["macro_f1"] for of in (challenger, champion))
        return own - other  # of the same samples

    def calibration_error(self, probs: np.ndarray, truth: np.ndarray) -> float:
        """Of all decisions together: the gap between a probability and the share of texts that have the label."""
        return metrics.calibration_gap(metrics.reliability_of(probs.ravel(), truth.ravel(), 15))

    def baseline_probs(self, train: "pa.Table", texts: Sequence[str], labels: Sequence[str]) -> dict[str, np.ndarray]:
        """With the decisions of thresholds of their own."""
        from sodaops.tasks import baselines

        probs, thresholds = baselines.tfidf_label_sets((train["text"].to_pylist(), self.truth(train)), texts)
        return {"every": np.ones_like(probs), "tfidf": label_sets.moved(probs, thresholds, self.levels(len(labels)))}

    def support(self, probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return np.stack([truth.sum(0), self.decide(probs).sum(0)])

    def plots(self, probs: np.ndarray, table: "pa.Table", labels: Sequence[str], n_bins: int) -> list["Wanted"]:
        from sodaops.tasks import plots

        return plots.of_label_sets(probs, self.truth(table), self.decide(probs), labels, n_bins)

    def charts(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        return {"curves": metrics.curves(probs, truth, labels)}

    def errors(self, table: "pa.Table", probs: np.ndarray, labels: Sequence[str], n_worst: int) -> list[dict[str, Any]]:
        """The texts with the most wrong decisions, those farthest from the thresholds first."""
        wrong = self.decide(probs) != self.truth(table)
        severity = (wrong * (1 + np.abs(probs - self.levels(len(labels))))).sum(1)
        worst = np.argsort(-severity, kind="stable")[: min(n_worst, int(wrong.any(1).sum()))]
        rows, predicted = table.take(worst).select(["text", "label", "row"]).to_pylist(), self.decide(probs[worst])
        return [{**row, "predicted": words} for row, words in zip(rows, in_words(predicted, labels), strict=True)]

    # Service, drift and annotation. An answer is kept as a JSON list, in label order.

    def shown(self, prediction: LabelSet) -> tuple[str, str]:
        probs = "  ".join(f"{label} {prob:.3f}" for label, prob in prediction.probs.items())
        return ", ".join(prediction.labels) or "(none)", probs

    def logged(self, prediction: LabelSet) -> tuple[str, float]:
        """The labels, and the lowest probability of a decision."""
        chosen = {*prediction.labels}
        least = min(prob if label in chosen else 1 - prob for label, prob in prediction.probs.items())
        return json.dumps(prediction.labels, ensure_ascii=False), least

    def counted(self, prediction: LabelSet) -> tuple[Sequence[str], float | None]:
        return prediction.labels, None

    def explained(self, prediction: LabelSet, labels: Sequence[str]) -> int:
        """The most probable label."""
        return max(range(len(labels)), key=lambda i: prediction.probs[labels[i]])

    def drift_values(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
        return {"labels": self.decide(probs)}

    def uncertainty(self, probs: np.ndarray) -> np.ndarray:
        """Minus the distance to the nearest threshold, as a share of the way from there to 0 or 1."""
        levels = self.levels(probs.shape[1])
        ways = np.where(probs < levels, levels, 1 - levels)
        return -(np.abs(probs - levels) / np.maximum(ways, 1e-6)).min(1)

    @property
    def question(self) -> dict[str, Any]:
        return {"kind": "choices", "none": self.form.allow_none}

    def labels_without_data(self, config: DataConfig) -> list[str]:
        return [str(label) for label in config.labels or self.form.columns or []]

    def check_answer(self, answer: object, labels: Sequence[str]) -> str:
        is_list = isinstance(answer, str) and answer.startswith("[") and answer not in labels
        given: Any = parsed(str(answer)) if is_list else answer
        if isinstance(given, str):
            given = [given] if given in labels or self.form.separator is None else self.form.names(given)
        unknown = [name for name in given if name not in labels] if isinstance(given, list) else [answer]
        if unknown:
            near = nearest(unknown[0], labels)
            raise DataError(f"labels={repr(answer)[:80]}; expected a list of {some(labels, 20)}{near}.")
        if not given and not self.form.allow_none:
            raise DataError("labels=[]; expected at least one label: task.allow_none=false.")
        return json.dumps([label for label in labels if label in given], ensure_ascii=False)

    def answer_value(self, answer: str) -> list[str]:
        return json.loads(answer)

    def table_cells(self, answer: str, config: DataConfig) -> dict[str, Any]:
        names, form = self.answer_value(answer), self.form
        if form.columns is not None:
            label_of = {str(value): label for value, label in (config.label_map or {}).items()}
            return {name: int(label_of.get(name, name) in names) for name in form.columns}
        return {config.label_column: answer if form.separator is None else form.separator.join(names)}

    def merged(self, answers: Sequence[str]) -> str | None:
        """The labels that more than half of the people gave; None if exactly half gave one, or if none is no answer."""
        n_given = Counter(label for answer in answers for label in self.answer_value(answer))
        labels = [label for label, n in n_given.items() if 2 * n > len(answers)]
        is_tie = any(2 * n == len(answers) for n in n_given.values()) or not (labels or self.form.allow_none)
        return None if is_tie or not answers else json.dumps(labels, ensure_ascii=False)
