"""What a task does with answers in operation, the second half of the protocol of tasks: service, drift, annotation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from sodaops.config.schema import DataConfig
from sodaops.tasks.agreement import Pair, cohen_kappa, majority_label


@dataclass(frozen=True)
class Prediction:
    """The prediction for one text: the most probable label, and the probabilities of all labels."""

    label: Annotated[str, Field(examples=["positive"])]
    score: Annotated[float, Field(ge=0, le=1.0001, description="probability of the label", examples=[0.93])]
    probs: Annotated[dict[str, float], Field(description="label -> probability, in label order")]


class Operation:
    """The protocol. The defaults are for one label per text."""

    # Serving

    # A dataclass of JSON values. Its fields are the service's answer, and what they are annotated with is in the API's docs.
    prediction_class: ClassVar[type] = Prediction

    def shown(self, prediction: Any) -> tuple[str, str]:
        """A prediction in the terminal, and its details."""
        probs = "  ".join(f"{label} {prob:.3f}" for label, prob in prediction.probs.items())
        return f"{prediction.label}\t{prediction.score:.3f}", probs

    def logged(self, prediction: Any) -> tuple[str, float]:
        """The columns ``label`` and ``score`` of the request log."""
        return prediction.label, prediction.score

    def counted(self, prediction: Any) -> tuple[Sequence[str], float | None]:
        """What metrics of a service show: the predicted labels, and the confidence; None: there is no such thing."""
        return (prediction.label,), prediction.score

    def explained(self, prediction: Any, labels: Sequence[str]) -> int:
        """The column of ``probs`` that an explanation is about, unless the client names a label."""
        return labels.index(prediction.label)

    # Drift. Unless the task keeps answers, the predicted label and its score are compared.

    keeps_answers: ClassVar[bool] = False  # whether drift.npz has ``probs`` of its rows, besides groups and scores

    def drift_values(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """What is compared of answers that are kept, as name -> str [n] (shares), float [n], or bool [n, n_labels] (rates).

        People see a name as "predicted NAME".
        """
        raise NotImplementedError

    def groups(self, probs: np.ndarray) -> np.ndarray:
        """Groups of rows, int [n], within which texts are compared, so that another mix of groups is no drift of texts."""
        return np.zeros(len(probs), np.int64)

    # Quality without labels

    estimates_quality: ClassVar[bool] = False  # whether `groups` are the predicted labels, of which each text has one

    # Annotation

    def uncertainty(self, probs: np.ndarray) -> np.ndarray:
        """How uncertain the model is of each row, float [n]; only the order counts."""
        raise NotImplementedError

    @property
    def question(self) -> dict[str, Any]:
        """What the annotation page asks: ``kind`` is choice, choices or number.

        ``min``, ``max`` and ``step`` limit a number; ``none`` tells whether no choice at all is an answer.
        """
        return {"kind": "choice"}

    def labels_without_data(self, config: DataConfig) -> list[str]:
        """The labels as far as the configuration alone has them."""
        return [str(label) for label in config.labels or []]

    def check_answer(self, answer: object, labels: Sequence[str]) -> str:
        """A person's answer, or a model's as in the log, as the store keeps it. This is also a cell that the task reads.

        Args:
            answer: a string; also a list of them, or a number, as the question demands. A result of this method is one too.
            labels: of the store.

        Raises:
            DataError: not an answer to the question.
        """
        raise NotImplementedError

    def answer_value(self, answer: str) -> str | list[str] | float:
        """The JSON value of a result of :meth:`check_answer`, for other tools: a label, several, or a number."""
        return answer

    def table_cells(self, answer: str, config: DataConfig) -> dict[str, Any]:
        """Column -> cell of a new row of the table, for the result of :meth:`check_answer`."""
        return {config.label_column: answer}

    def agree(self, one: str, other: str) -> bool:
        """Whether two people's answers are the same."""
        return one == other

    def kappa(self, pairs: Sequence[Pair]) -> float | None:
        """The agreement of two people beyond chance, at most 1; None where it is not defined."""
        return cohen_kappa(pairs)

    def merged(self, answers: Sequence[str]) -> str | None:
        """The answer of several people, by default that of most; None without agreement."""
        return majority_label(answers)
