"""Disagreements of two bundles on live texts, judged by the labels of people."""

from pathlib import Path

from sodaops.annotation.database import INFO
from sodaops.annotation.store import Store
from sodaops.config.schema import Config
from sodaops.errors import ConfigError
from sodaops.registry.checks import LiveTest
from sodaops.request_log.parts import read_disagreements

_UNBIASED = ("disagreed", "random")  # drawn at random; other texts, as those with feedback, depend on the champion's answer


def judge_disagreements(config: Config, champion: str, challenger: str) -> LiveTest:
    """Counts which of two bundles was right on labelled live texts on which they disagreed, as the shadow's log has them.

    Raises:
        ConfigError: there is no request log.
        DataError, StorageError: the store or the log cannot be read.
    """
    log, folder = config.drift.request_log or config.serve.request_log, Path(config.annotate.store)
    if log is None:
        raise ConfigError("registry.gate.min_disagreements needs a request log; set drift.request_log=FOLDER.")
    found = {sha256: row for sha256, row in read_disagreements(log, champion).items() if row["bundle_id"] == challenger}
    if not found or not (folder / INFO).exists():
        return LiveTest(0, 0, 0)
    state, right = Store(folder).state(), []
    task, labels = state.ml_task, state.labels
    for each in state.tasks:
        answers = list(state.labels_of(each.task).values())
        truth = task.merged(answers) if len(answers) >= config.annotate.min_annotators else None
        if each.text_sha256 in found and each.why in _UNBIASED and truth is not None:
            row = found[each.text_sha256]
            right.append([task.agree(task.check_answer(row[key], labels), truth) for key in ("label", "live_label")])
    return LiveTest(len(right), right.count([True, False]), right.count([False, True]))
