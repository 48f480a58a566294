"""A snapshot of a store: tasks, answers, progress, agreement."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sodaops.annotation.tasks import Task
from sodaops.tasks import SINGLE_LABEL
from sodaops.tasks.agreement import Pair, raw_agreement
from sodaops.tasks.base import Task as MLTask

SKIP = None  # in place of a label


class Progress(NamedTuple):
    """Numbers of tasks, of tasks with a label by anybody, and of labelled and skipped tasks by annotator."""

    tasks: int
    answered: int
    labelled: dict[str, int]
    skipped: dict[str, int]


class Agreement(NamedTuple):
    """How far two annotators agree on the tasks that both labelled; None where it is not defined."""

    one: str
    other: str
    n_shared: int
    raw: float | None
    kappa: float | None


@dataclass(frozen=True)
class AnnotationState:
    """What a store holds at one moment.

    Attributes:
        labels: in the store's order.
        tasks: in the order in which they are shown.
        answers: task -> annotator -> label, or :data:`SKIP`; tasks without an answer are left out.
        n_strays: answers to tasks that were deleted; feedback on a request that is no task does not count.
        ml_task: what people are asked.
        text_columns: with the parts of a text, if there are several (:mod:`sodaops.text.columns`).
    """

    labels: Sequence[str]
    tasks: Sequence[Task]
    answers: Mapping[str, Mapping[str, str | None]]
    n_strays: int
    ml_task: MLTask = SINGLE_LABEL
    text_columns: Sequence[str] = ("text",)

    def labels_of(self, task: str) -> dict[str, str]:
        """Annotator -> label, without skips."""
        return {name: label for name, label in self.answers.get(task, {}).items() if label is not SKIP}

    def next_for(self, annotator: str) -> Task | None:
        """The first task that this annotator neither labelled nor skipped."""
        return next((task for task in self.tasks if annotator not in self.answers.get(task.task, {})), None)

    def progress(self) -> Progress:
        """Counts tasks; one that was only skipped is not answered."""
        labelled: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        for answers in self.answers.values():
            for name, label in answers.items():
                (skipped if label is SKIP else labelled)[name] += 1
        n_answered = sum(any(label is not SKIP for label in answers.values()) for answers in self.answers.values())
        return Progress(len(self.tasks), n_answered, dict(labelled), dict(skipped))

    def annotators(self) -> list[str]:
        """Everyone who answered or skipped a task, in alphabetical order."""
        return sorted({name for answers in self.answers.values() for name in answers})

    def conflicts(self) -> list[Task]:
        """The tasks to which annotators gave different labels, in order."""
        answers = [list(self.labels_of(task.task).values()) for task in self.tasks]
        in_conflict = [any(not self.ml_task.agree(given[0], other) for other in given[1:]) for given in answers]
        return list(itertools.compress(self.tasks, in_conflict))

    def agreement(self, one: str, other: str) -> Agreement:
        """How far two annotators agree."""
        labels = [self.labels_of(task) for task in self.answers]
        pairs: list[Pair] = [(by[one], by[other]) for by in labels if one in by and other in by]
        return Agreement(one, other, len(pairs), raw_agreement(pairs, self.ml_task.agree), self.ml_task.kappa(pairs))

    def agreements_of(self, annotator: str) -> list[Agreement]:
        """Agreement with each annotator who labelled some of the same tasks, most shared tasks first."""
        agreements = [self.agreement(annotator, other) for other in self.annotators() if other != annotator]
        return sorted((a for a in agreements if a.n_shared), key=lambda a: (-a.n_shared, a.other))
