"""Small tests of single abilities (Ribeiro et al. 2020, CheckList): negation, typos, casing, names."""

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
    """One test."""

    ability: str
    text: str
    expect: str  # a label, "not LABEL", or "same" as the answer to `changed`
    changed: str


def read_suite(path: str, labels: Sequence[str]) -> list[Case]:
    """Reads a suite, and holds what it expects against a model's labels.

    Raises:
        DataError: no such table, or rows that expect what the labels do not have.
    """
    table = read_table(path, COLUMNS)
    cases = [Case(*row) for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)]
    faults = []
    for number, case in enumerate(cases, 1):
        wanted = case.expect.removeprefix("not ")
        if case.expect != "same" and wanted not in labels:
            faults.append(
                f"row {number}: expect={case.expect!r}; the model's labels are {', '.join(labels)}{nearest(wanted, labels)}"
            )
        elif not case.text or not case.ability or (case.expect == "same") != bool(case.changed):
            faults.append(f"row {number}: expected an ability, a text, and `changed` with expect=same alone")
    if faults:
        raise DataError(f"{path} {some(faults)}. Mend the suite, name another, or set registry.gate.behaviour=null.")
    return cases


def run(predictor: Predictor, cases: Sequence[Case]) -> np.ndarray:
    """Whether each case passed, bool [n_cases]."""
    asked = [case.text for case in cases] + [case.changed for case in cases if case.changed]
    answers = [predictor.info.labels[i] for i in predictor.probs(asked).argmax(1)]
    changed = iter(answers[len(cases) :])
    passed = []
    for case, answer in zip(cases, answers, strict=False):
        if case.expect == "same":
            passed.append(answer == next(changed))
        elif case.expect.startswith("not "):
            passed.append(answer != case.expect.removeprefix("not "))
        else:
            passed.append(answer == case.expect)
    return np.array(passed, dtype=bool)


def rates(cases: Sequence[Case], passed: np.ndarray) -> dict[str, dict[str, Any]]:
    """Pass rate and failed cases of each ability."""
    found: dict[str, dict[str, Any]] = {}
    for ability in dict.fromkeys(case.ability for case in cases):
        mine = [i for i, case in enumerate(cases) if case.ability == ability]
        failed = [cases[i] for i in mine if not passed[i]]
        shown = [f"{case.text} → {case.changed}" if case.changed else f"{case.text} ({case.expect})" for case in failed]
        found[ability] = {"rate": float(passed[mine].mean()), "n_cases": len(mine), "failed": shown}
    return found
