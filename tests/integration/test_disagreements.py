"""Disagreements of a shadow, from its log to the annotation store, to the gate, and their deletion."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest

from sodaops.annotation.store import Store
from sodaops.cli import main
from sodaops.errors import ConfigError, StorageError
from sodaops.inference.predictor import Predictor
from sodaops.registry.registry import Registry
from sodaops.request_log.parts import write_parts
from tests.conftest import TWEETS, configured, lazy
from tests.integration.test_gate import EASY
from tests.requests import log_rows, write_log_part
from tests.serving import copy_bundle

checks = lazy("sodaops.registry.checks")
disagreements = lazy("sodaops.annotation.disagreements")
parts = lazy("sodaops.request_log.parts")


@pytest.fixture
def logged(trained, workdir):
    """The log of a champion's answers to 60 tweets, and that of a shadow which disagrees on every second one; both bundles."""
    bundles = [
        shutil.copytree(trained / "run/bundle", workdir / "champion"),
        copy_bundle(trained / "run/bundle", workdir / "other"),
    ]
    predictor, other = map(Predictor, bundles)
    rows = log_rows(predictor, pa.csv.read_csv(TWEETS)["text"].to_pylist()[600:660])
    write_log_part(workdir / "log", rows)
    labels = predictor.info.labels
    shadow = [
        {"time": n, "request_id": row["request_id"], "place": 0, "bundle_id": other.info.bundle_id, "labels": labels,
         "label": labels[(labels.index(row["label"]) + n % 2) % 3], "text_sha256": row["text_sha256"],
         "live_bundle_id": predictor.info.bundle_id, "live_label": row["label"], "disagreed": n % 2 == 1}
        for n, row in enumerate(rows.to_pylist())
    ]  # fmt: skip
    Path("journal").mkdir()
    Path("journal/0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shadow))
    assert write_parts("journal", "log-shadow") == 1
    return rows, predictor.info.bundle_id, other.info.bundle_id


KEYS = ["annotate.store=store", "drift.request_log=log"]


def label(why, challenger_is_right):
    """Labels the picked tasks of a kind as one of the bundles does."""
    store = Store("store")
    found = parts.read_disagreements("log", store.state().tasks[0].bundle_id)
    chosen = [task for task in store.state().tasks if task.why == why and task.text_sha256 in found]
    answers = [("ann", task.task, found[task.text_sha256]["label" if challenger_is_right else "live_label"]) for task in chosen]
    store.session("ann").answer_all(answers)
    return len(chosen)


def test_disagreements_are_picked_first_and_judged_by_their_labels(logged, trained):
    _, champion, challenger = logged
    command = ["annotate", "pick", "champion", f"evaluate.splits_dir={trained / 'splits'}", "annotate.n=40", *KEYS]
    judge = lambda *keys: disagreements.judge_disagreements(configured(*KEYS, *keys), champion, challenger)  # noqa: E731
    assert judge() == (0, 0, 0), "there is no store yet"
    assert main(command) == 0
    kinds = Counter(task.why for task in Store("store").state().tasks)
    assert kinds["random"] == 8 and kinds["disagreed"] >= 25 and kinds.total() == 40
    assert kinds["uncertain"] + kinds["drifted"] + kinds["diverse"] == 32 - kinds["disagreed"]
    n_right = label("disagreed", True)
    assert n_right == kinds["disagreed"] and judge() == (n_right, n_right, 0)
    n_wrong = label("random", False)
    label("uncertain", False)
    assert judge() == (n_right + n_wrong, n_right, n_wrong), "uncertain texts were not drawn at random"
    assert judge("annotate.min_annotators=2") == (0, 0, 0)
    assert disagreements.judge_disagreements(configured(*KEYS), champion, champion) == (0, 0, 0)
    with pytest.raises(ConfigError, match=r"drift\.request_log"):
        disagreements.judge_disagreements(configured("annotate.store=store"), champion, challenger)
    (part,) = Path("log-shadow").glob("*/*.parquet")
    part.write_bytes(b"half")
    with pytest.raises(StorageError, match=str(part)):
        judge()


@pytest.mark.parametrize(("live", "passed", "value", "accept"), [
    (None, True, None, ()),
    ((0, 0, 0), False, 0, ("registry.gate.min_disagreements=null",)),
    ((29, 29, 0), False, 29, ("registry.gate.min_disagreements=29",)),
    ((30, 0, 0), True, 1.0, None),  # both are wrong everywhere
    ((30, 8, 14), True, 0.143, None),
    ((30, 5, 20), False, 0.00204, ("registry.gate.min_disagreements=null",)),  # as scipy.stats.binomtest(5, 25)
    ((30, 20, 5), True, 0.99954, None),
])  # fmt: skip
def test_mcnemars_exact_test(live, passed, value, accept):
    verdict = checks.check_disagreements(live and checks.LiveTest(*live), 30, 0.05)
    assert verdict.passed is passed and verdict.value == (value and pytest.approx(value, rel=0.01))
    assert accept is None or verdict.accept == accept


def test_the_gate_asks_for_labelled_disagreements(logged, trained, capsys):
    _, champion, challenger = logged
    registry = Registry("registry")
    for folder in ("champion", "other"):
        registry.register(folder)
    registry.move("champion", champion, None, "")
    splits = f"evaluate.splits_dir={trained / 'splits'}"
    assert main(["annotate", "pick", "champion", splits, *KEYS]) == 0
    promote = ["promote", "challenger", *EASY, splits, *KEYS, "registry.gate.min_disagreements=10"]
    assert main(promote) == 3 and "registry.gate.min_disagreements=null" in capsys.readouterr().err
    label("disagreed", False)
    assert main(promote) == 3, "there are enough, and the challenger is worse"
    page = Path(f"outputs/gate/{challenger}/gate.html").read_text(encoding="utf-8")
    assert "live disagreements" in page and "the champion alone on" in page
    label("disagreed", True)
    assert main(promote) == 0 and registry.version("champion") == challenger
    assert registry.history()[-1]["gate"]["rules"]["live disagreements"]["passed"]


def test_a_text_is_forgotten_in_both_logs(logged, capsys):
    rows, *_ = logged
    digest = rows["text_sha256"][1].as_py()
    segment = Path("log/journal-shadow/0.jsonl")  # of a shadow's log that is not in a part yet
    segment.parent.mkdir()
    segment.write_text(json.dumps({"request_id": "r1", "text_sha256": digest}) + "\n")
    assert main(["log", "forget", "--text-hash", digest, *KEYS]) == 0
    assert "3 rows of 1 requests deleted" in capsys.readouterr().out and segment.read_text() == ""
    assert digest not in parts.read_disagreements("log", logged[1])
    assert main(["log", "prune", "--days", "1", *KEYS]) == 0
    assert not list(Path(".").glob("log*/*/*.parquet"))
