"""Behavioural tests of single abilities, such as negation and typos (CheckList, Ribeiro et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sodaops.config.compose import conf_dir
from sodaops.data.sources import read_table
from sodaops.errors import DataError, nearest, some
from sodaops.inference.predictor import Predictor

COLUMNS = ("ability", "text", "expect", "changed")
_OTHER = "name another with registry.gate.behaviour.suite, or set registry.gate.behaviour=null"


@dataclass(frozen=True)
class Case:
    """One test case."""

    ability: str
    text: str
    expect: str  # a label, "not LABEL", or "same": the label of `changed`
    changed: str


def read_suite(path: str) -> list[Case]:
    """Reads a test suite: a table, or one that comes with SoDaOps if the current folder has no such file.

    Raises:
        DataError: no such table, or faulty rows.
    """
    shipped = conf_dir().parent / path
    try:
        table = read_table(str(shipped) if shipped.is_file() and not Path(path).exists() else path, COLUMNS)
    except DataError as error:
        raise DataError(f"{error} It has the gate's behavioural tests; {_OTHER}.") from None
    cases = [Case(*row) for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)]
    faults = [
        f"row {number}: expected an ability, a text, and `changed` if and only if expect=same"
        for number, case in enumerate(cases, 1)
        if not case.text or not case.ability or (case.expect == "same") != bool(case.changed)
    ]
    if faults:
        raise DataError(f"{path} {some(faults)}. Correct the suite, or {_OTHER}.")
    return cases


def applicable(cases: Sequence[Case], labels: Sequence[str], path: str) -> tuple[list[Case], str]:
    """The cases that expect labels which the model has, and a note on those that are skipped.

    Cases that expect the same label for two texts are skipped too if none of the other cases applies, since the suite is
    then for another task.

    Raises:
        DataError: an expected label looks like a misspelt label of the model.
    """
    expected = {case: case.expect.removeprefix("not ") for case in cases if case.expect != "same"}
    absent = sorted(set(expected.values()) - set(labels))
    if not absent:
        return list(cases), ""
    note = f"{path} is for labels {some(absent)}, and the model's are {some(labels)}"
    if len(absent) == len(set(expected.values())):
        return [], f"skipped: {note}; registry.gate.behaviour.suite names your own tests"
    misspelt = [f"{label!r}{hint}" for label in absent if (hint := nearest(label, labels))]
    if misspelt:
        raise DataError(f"{note}: {some(misspelt)}. Correct the suite, or {_OTHER}.")
    kept = [case for case in cases if expected.get(case) not in absent]
    return kept, f"{len(cases) - len(kept)} cases skipped: {note}"


def run_suite(predictor: Predictor, cases: Sequence[Case]) -> np.ndarray:
    """Whether each case passed, bool [n_cases]."""
    texts = [case.text for case in cases] + [case.changed for case in cases if case.changed]
    task, answers = predictor.task, predictor.predict(texts)
    of_changed = iter(answers[len(cases) :])
    return np.array(
        [
            task.counted(answer)[0] == task.counted(next(of_changed))[0]
            if case.expect == "same"
            else task.meets(answer, case.expect)
            for case, answer in zip(cases, answers, strict=False)
        ],
        dtype=bool,
    )


def pass_rates(cases: Sequence[Case], passed: np.ndarray) -> dict[str, dict[str, Any]]:
    """Pass rate and failed cases of each ability."""
    rates: dict[str, dict[str, Any]] = {}
    for ability in dict.fromkeys(case.ability for case in cases):
        rows = [i for i, case in enumerate(cases) if case.ability == ability]
        failed = [cases[i] for i in rows if not passed[i]]
        shown = [f"{case.text} → {case.changed}" if case.changed else f"{case.text} ({case.expect})" for case in failed]
        rates[ability] = {"rate": float(passed[rows].mean()), "n_cases": len(rows), "failed": shown}
    return rates
