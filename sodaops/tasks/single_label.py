"""One label per text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sodaops.config.schema import DataConfig, EvaluateConfig, OptimConfig
from sodaops.errors import DataError, nearest, some
from sodaops.tasks import metrics
from sodaops.tasks.base import Metric, Prediction, Targets, Task
from sodaops.text.labels import label_ids, label_order, unknown_label_error

if TYPE_CHECKING:
    import pyarrow as pa  # a service has no pyarrow in its process

    from sodaops.tasks.plots import Wanted


class SingleLabel(Task):
    """One label per text; votes of several raters may soften the targets."""

    name = "single_label"
    limits = "It always answers with one of its labels, even if none fits."
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("macro_f1", "macro-F1", note="in which all labels count equally"),
        Metric("accuracy", "accuracy"),
        Metric("weighted_f1", "weighted F1"),
        Metric("ece", "ECE", higher_is_better=False, note="calibration error; 0 is best"),
    )
    baselines: ClassVar = {"majority": "the most frequent label", "tfidf": "TF-IDF + logistic regression"}
    takes_votes = True
    has_one_label = True
    problem_type: ClassVar[str | None] = "single_label_classification"

    def section(self) -> dict[str, Any]:
        return {} if type(self) is SingleLabel else super().section()  # as in bundles that are older than tasks

    # Data

    def read_cells(self, place: str, counts: Mapping[str, int], config: DataConfig) -> Targets:
        import pyarrow as pa

        from sodaops.tasks.label_checks import check_labels

        labels = label_order(list(counts), config.labels, config.label_map)
        if len(labels) < 2:
            raise DataError(
                f"{place}: {config.label_column} has one label only ({labels[0] if labels else 'none'}); expected at least two."
            )
        if config.labels is None:
            check_labels(place, counts, labels, config)
        ids = np.array(label_ids(list(counts), labels, config.label_map), np.int32)
        columns = {"label": pa.array(labels, pa.string()), "label_id": pa.array(np.arange(len(labels)), pa.int32())}
        return Targets(labels, ids, columns)

    def bad_cells(
        self, place: str, cells: Sequence[str], rows: Sequence[int], labels: Sequence[str], config: DataConfig
    ) -> DataError:
        return unknown_label_error(place, cells, rows, labels, config.label_map)

    def label_counts(self, targets: Targets, ids: np.ndarray) -> dict[str, int]:
        return dict(zip(targets.labels, np.bincount(ids, minlength=len(targets.labels)).tolist(), strict=True))

    def check_train(self, place: str, targets: Targets, ids: np.ndarray, config: DataConfig) -> None:
        from sodaops.tasks.label_checks import check_each_label

        check_each_label(place, self.label_counts(targets, ids), config)

    def truth(self, table: "pa.Table") -> np.ndarray:
        """int64 [n_rows]."""
        return table["label_id"].to_numpy().astype(np.int64)

    def any_truth(self, n_rows: int, n_labels: int) -> np.ndarray:
        return np.arange(n_rows) % n_labels

    # Training

    def targets(self, table: "pa.Table", labels: Sequence[str], optim: OptimConfig) -> np.ndarray:
        return soft_targets(self.truth(table), table["votes"].to_pylist(), len(labels), optim.vote_weight)

    def example_targets(self, n_labels: int) -> np.ndarray:
        """A text whose label is sure, and one on which the raters disagree."""
        return np.array([np.eye(n_labels)[0], np.full(n_labels, 1 / n_labels)], np.float32)

    def balanced_weights(self, truth: np.ndarray, n_labels: int) -> np.ndarray:
        """Weights that give all labels the same total; their mean over the training rows is 1."""
        counts = np.bincount(truth, minlength=n_labels)
        return (counts.sum() / (n_labels * np.maximum(counts, 1))).astype(np.float32)

    def val_metrics(self, n_labels: int) -> dict[str, dict[str, Any]]:
        prefix = "torchmetrics.classification.Multiclass"
        return {
            "macro_f1": {"_target_": f"{prefix}F1Score", "num_classes": n_labels, "average": "macro"},
            "accuracy": {"_target_": f"{prefix}Accuracy", "num_classes": n_labels, "average": "micro"},
        }

    # Answers

    def probs(self, logits: np.ndarray) -> np.ndarray:
        return softmax(logits)

    def torch_probs(self, logits: Any) -> Any:
        return logits.float().softmax(-1)

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> Prediction:
        best = max(range(len(row)), key=row.__getitem__)  # argmax would give up the GIL, and wait for it again
        return Prediction(labels[best], row[best], dict(zip(labels, row, strict=True)))

    def columns(self, probs: np.ndarray, labels: Sequence[str]) -> "dict[str, pa.Array]":
        import pyarrow as pa

        return {
            "label": pa.array(np.array(labels, dtype=object)[self.decide(probs)], pa.string()),
            "score": pa.array(probs[np.arange(len(probs)), self.decide(probs)]),
            **{f"prob_{label}": pa.array(probs[:, i]) for i, label in enumerate(labels)},
        }

    def is_valid(self, probs: np.ndarray) -> bool:
        return bool((abs(probs.sum(axis=1) - 1) < 1e-3).all())

    def decide(self, probs: np.ndarray) -> np.ndarray:
        """The predicted label ids, int64 [n]."""
        return probs.argmax(1)

    # Comparing two models

    def agreement(self, before: np.ndarray, after: np.ndarray) -> float:
        return float((self.decide(after) == self.decide(before)).mean())

    # Evaluation and the gate

    def purpose(self, names: str) -> str:
        return f"classifies a text as one of {names}"

    def measure(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str], settings: EvaluateConfig) -> dict[str, Any]:
        return metrics.measure(probs, truth, labels, settings.n_bootstrap, settings.n_bins, self.decide(probs))

    def summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in metrics.summary(self.confusion(probs, truth)).items()}

    def slice_summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return {**self.summary(probs, truth), "confidence": float(probs.max(1).mean())}

    def label_scores(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, tuple[float, int]]:
        scores = metrics.per_label(self.confusion(probs, truth), labels)
        return {label: (values["f1"], int(values["n_rows"])) for label, values in scores.items()}

    def baseline_probs(self, train: "pa.Table", texts: Sequence[str], labels: Sequence[str]) -> dict[str, np.ndarray]:
        from sodaops.tasks import baselines

        truth = self.truth(train)
        return {
            "majority": baselines.most_frequent(truth, len(texts), len(labels)),
            "tfidf": baselines.tfidf((train["text"].to_pylist(), truth), texts, len(labels)),
        }

    def support(self, probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
        matrix = self.confusion(probs, truth)
        return np.stack([matrix.sum(1), matrix.sum(0)])

    def plots(self, probs: np.ndarray, table: "pa.Table", labels: Sequence[str], n_bins: int) -> list["Wanted"]:
        from sodaops.tasks import plots

        predicted = self.decide(probs)
        of_labels = plots.of_labels(probs, self.truth(table), predicted, labels, n_bins)
        return [*of_labels, *plots.of_confidence(probs, predicted, table, labels)]

    def charts(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        return {"confusion": self.confusion(probs, truth), "curves": metrics.curves(probs, truth, labels)}

    def errors(self, table: "pa.Table", probs: np.ndarray, labels: Sequence[str], n_worst: int) -> list[dict[str, Any]]:
        """The wrong answers with the highest confidence, highest first; rows of equal confidence in the table's order."""
        truth, predicted = self.truth(table), self.decide(probs)
        confidence = probs[np.arange(len(probs)), predicted]
        severity = confidence + self.distance(truth, predicted)
        wrong = np.flatnonzero(predicted != truth)
        return [
            {
                "text": table["text"][int(i)].as_py(),
                "label": labels[truth[i]],
                "predicted": labels[predicted[i]],
                "confidence": float(confidence[i]),
                "votes": table["votes"][int(i)].as_py() or [],
                "row": table["row"][int(i)].as_py(),
            }
            for i in wrong[np.argsort(-severity[wrong], kind="stable")][:n_worst]
        ]

    def gains(self, truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_samples: int) -> np.ndarray:
        return metrics.paired_gains(truth, self.decide(challenger), self.decide(champion), challenger.shape[1], n_samples)

    def calibration_error(self, probs: np.ndarray, truth: np.ndarray) -> float | None:
        return metrics.expected_calibration_error(probs, truth)

    def distance(self, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """How far label ids are apart, which orders errors before their confidence."""
        return np.zeros(len(truth))

    def confusion(self, probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Counts, int64 [n_labels, n_labels]; rows are the true labels, columns the predicted ones."""
        return metrics.confusion(truth, self.decide(probs), probs.shape[1])

    # Monitoring and annotation

    estimates_quality = True

    def groups(self, probs: np.ndarray) -> np.ndarray:
        return self.decide(probs)

    def uncertainty(self, probs: np.ndarray) -> np.ndarray:
        """Minus the difference of the two highest probabilities."""
        ordered = np.sort(probs, axis=1)
        return ordered[:, -2] - ordered[:, -1]

    def check_answer(self, answer: object, labels: Sequence[str]) -> str:
        if answer not in labels:
            raise DataError(f"label={repr(answer)[:80]}; expected one of {some(labels, 20)}{nearest(answer, labels)}.")
        return str(answer)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities from logits [n, n_labels], in their dtype.

    >>> softmax(np.array([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))  # shifted, so that none overflows
    return powers / powers.sum(axis=-1, keepdims=True)


def soft_targets(label_ids: np.ndarray, votes: Sequence[Sequence[int] | None], n_labels: int, weight: float) -> np.ndarray:
    """Target distributions: ``weight`` * vote shares + (1 - ``weight``) * one-hot label; without votes the one-hot label.

    Args:
        label_ids: int64 [n_examples].
        votes: for each example the number of votes for each label, or None.
        n_labels: number of labels.
        weight: in [0, 1].

    Returns:
        float32 [n_examples, n_labels], rows sum to 1.

    >>> soft_targets(np.array([0, 1]), [[3, 1], None], 2, 0.5).tolist()
    [[0.875, 0.125], [0.0, 1.0]]
    """
    targets = np.eye(n_labels, dtype=np.float32)[label_ids]
    voted = np.array([i for i, vote in enumerate(votes) if vote is not None], dtype=np.int64)
    if weight and len(voted):
        shares = np.array([votes[i] for i in voted], dtype=np.float32)
        shares /= shares.sum(axis=1, keepdims=True)
        targets[voted] = weight * shares + (1 - weight) * targets[voted]
    return targets
