"""Behavioural tests of single abilities, such as negation and typos (CheckList, Ribeiro et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sodaops.data.sources import read_table
from sodaops.errors import DataError, nearest, some
from sodaops.inference.predictor import Predictor

COLUMNS = ("ability", "text", "expect", "changed")


@dataclass(frozen=True)
class Case:
    """One test case."""

    ability: str
    text: str
    expect: str  # a label, "not LABEL", or "same": the label of `changed`
    changed: str


def read_suite(path: str, labels: Sequence[str]) -> list[Case]:
    """Reads a test suite, and checks that it expects labels that the model has.

    Raises:
        DataError: no such table, or faulty rows.
    """
    table = read_table(path, COLUMNS)
    cases = [Case(*row) for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)]
    faults = []
    for number, case in enumerate(cases, 1):
        label = case.expect.removeprefix("not ")
        if case.expect != "same" and label not in labels:
            faults.append(
                f"row {number}: expect={case.expect!r}; the model's labels are {', '.join(labels)}{nearest(label, labels)}"
            )
        elif not case.text or not case.ability or (case.expect == "same") != bool(case.changed):
            faults.append(f"row {number}: expected an ability, a text, and `changed` if and only if expect=same")
    if faults:
        raise DataError(f"{path} {some(faults)}. Correct the suite, choose another, or set registry.gate.behaviour=null.")
    return cases


def run_suite(predictor: Predictor, cases: Sequence[Case]) -> np.ndarray:
    """Whether each case passed, bool [n_cases]."""
    texts = [case.text for case in cases] + [case.changed for case in cases if case.changed]
    answers = [predictor.info.labels[i] for i in predictor.probs(texts).argmax(1)]
    changed_answers = iter(answers[len(cases) :])
    passed = []
    for case, answer in zip(cases, answers, strict=False):
        if case.expect == "same":
            passed.append(answer == next(changed_answers))
        elif case.expect.startswith("not "):
            passed.append(answer != case.expect.removeprefix("not "))
        else:
            passed.append(answer == case.expect)
    return np.array(passed, dtype=bool)


def pass_rates(cases: Sequence[Case], passed: np.ndarray) -> dict[str, dict[str, Any]]:
    """Pass rate and failed cases of each ability."""
    rates: dict[str, dict[str, Any]] = {}
    for ability in dict.fromkeys(case.ability for case in cases):
        rows = [i for i, case in enumerate(cases) if case.ability == ability]
        failed = [cases[i] for i in rows if not passed[i]]
        shown = [f"{case.text} → {case.changed}" if case.changed else f"{case.text} ({case.expect})" for case in failed]
        rates[ability] = {"rate": float(passed[rows].mean()), "n_cases": len(rows), "failed": shown}
    return rates
