"""A run on one page: what is there is told, what is missing is said, and nothing of it becomes markup."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.config.schema import DriftConfig
from sodaops.drift.causes import Cause
from sodaops.drift.check import check
from sodaops.drift.features import Feature
from sodaops.inference.predictor import Predictor
from sodaops.registry import gate
from sodaops.registry.checks import Verdict
from sodaops.registry.registry import Registry
from tests.integration.test_report import Page
from tests.requests import log_rows
from tests.serving import copy_bundle, refresh_info
from tests.watching import RECENTLY, fill

HOSTILE = '<img src=x onerror="document.title=1">'
SINGLE = HOSTILE.replace('"', "'")
RUN = Path("outputs/first")


@pytest.fixture
def run(workdir, trained):
    """A copy of the trained run in outputs/first, and its bundle's id."""
    shutil.copytree(trained / "run", RUN, ignore=shutil.ignore_patterns("checkpoints"))
    return layout.read_info(RUN / "bundle").bundle_id


class Spaced(Page):
    """With a space where an element ends, so that the cells of a row stay apart."""

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        self.text += " "


def told(*arguments, path=RUN / "project_report.html"):
    """The page, as source and as text with single spaces."""
    assert main(["report", *map(str, arguments)]) == 0
    source = path.read_text(encoding="utf-8")
    page = Spaced(source)
    assert page.open == [] and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link", source)
    return source, " ".join(page.text.split())


def judged(version, passed=True, against="TF-IDF + logistic regression"):
    """A gate's report, as the gate writes it."""
    verdicts = [Verdict("better", passed, 0.02, "> 0", f"{HOSTILE} more"), Verdict("latency", True, None, "≤ 1.25", "none")]
    found = gate.Judged(
        version, against, {"n_rows": 120, "sha256": "5" * 64}, verdicts, {"challenger": {"macro_f1": 0.5}},
        {"measured": 0.02, "low": 0.0, "high": 0.1, "bound": 0.01}, {"edges": [0.0, 1.0], "shares": [1.0]},
        abilities={"negation": {"rate": 0.75, "n_cases": 40, "failed": [], "champion": None}},
    )  # fmt: skip
    folder = Path("outputs/gate") / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gate.json").write_text(json.dumps(found.as_dict()))
    return found


def test_a_run_alone(run, capsys):
    source, text = told(RUN)
    assert capsys.readouterr().out == "report: outputs/first/project_report.html\n"
    found = json.loads((RUN / "evaluation/metrics.json").read_text())["test"]
    low, high = found["interval_95"]["macro_f1"].values()
    assert f"is {found['macro_f1']:.3f}, with 95 % confidence between {low:.3f} and {high:.3f}" in text
    assert f"Of {found['n_rows']} texts that took no part in training, it labels {100 * found['accuracy']:.0f} %" in text
    worst = min(found["labels"], key=lambda label: found["labels"][label]["f1"])
    assert f"It is weakest at “{worst}”: of {found['labels'][worst]['n_rows']} such texts" in text
    for missing in (
        "No baseline was measured beside it", "No: it is not registered in the registry registry", "No gate has judged it",
        "Not registered in registry", "No gate report", "No drift look was given: outputs/drift holds none", "No slices",
        "Whether it has answered a request is not known",
    ):  # fmt: skip
        assert missing in text, missing
    info = layout.read_info(RUN / "bundle")
    assert all(digest in text for digest in info.files.values()) and "optim.lr" in text and "trainer.max_epochs 2" in text
    assert "val/macro_f1" in text and "train/loss_step" in text and source.count("<circle") >= 6
    assert source.count("data:image/png") == len(list((RUN / "evaluation/plots").iterdir()))
    assert "Rows are the true labels" in text
    assert f"{run}" in text and "int8, serves" in text.replace("int8 , serves", "int8, serves")
    assert not [path for path in RUN.iterdir() if path.name.startswith(".")]


def test_champion_with_a_gate_and_a_look_at_its_requests(run):
    registry = Registry("registry")
    registry.register(RUN / "bundle", "first try")
    registry.move("champion", run, None, f"for the launch {HOSTILE}", gate=judged(run).summary(), forced=False)
    secret = "call me at 555 0100, Mrs Example"
    fill(Path("log"), log_rows(Predictor(RUN / "bundle"), [secret] * 60, RECENTLY))
    assert secret in check(DriftConfig(), str(RUN / "bundle"), "log").said, "what the page must not say"
    source, text = told("champion", "--output", "page.html", path=Path("page.html"))
    assert (
        "Yes: it is the champion of the registry registry" in text
        and f"(reason given: “for the launch {HOSTILE}”): it became" in text
    )
    assert "became champion; all 2 rules of the gate held" in text and "was registered first try" in text
    assert "The gate's last report: passed, held against TF-IDF + logistic regression on 120 test rows." in text
    assert f"{HOSTILE} more" in text and "fails 25 % of 40 cases of negation" in text
    assert "What it was asked has drifted" in text and "one text makes up 100% of the requests" in text
    assert "60 of its requests are in the window" in text
    assert "555 0100" not in source and "Mrs Example" not in source

    path = Path("outputs/drift/drift.json")
    drift = json.loads(path.read_text())
    features = [asdict(Feature("n_chars", 1e-9, 0.61, True, 10.0, 50.0))]
    path.write_text(json.dumps({**drift, "causes": [asdict(Cause("texts", "other texts"))], "features": features}))
    assert "length in characters drift 1.0e-09 0.61" in told(RUN)[1]
    path.write_text(json.dumps({**drift, "bundle_id": "b2"}))
    assert "the one in outputs/drift is of bundle b2" in told(RUN)[1]
    path.write_text(json.dumps({**drift, "judged": False, "drifted": False, "causes": []}))
    assert "had too few requests to judge (60)" in told(RUN)[1]


def test_what_was_decided_later(run, workdir):
    registry = Registry("registry")
    registry.register(RUN / "bundle")
    shutil.rmtree("outputs/gate", ignore_errors=True)
    summary = judged(run, passed=False).summary()
    text = told(RUN)[1]
    assert "No: it is registered in the registry registry as challenger, and was never made champion" in text
    assert "The gate's last report on it refuses it: better did not hold." in text
    registry.move("champion", run, None, "", gate=summary, forced=True)
    shutil.rmtree("outputs/gate")
    text = told(RUN)[1]
    assert "(no reason given): it became champion by force, against the gate: better did not hold." in text
    assert "From the registry's history; the report in words is not in outputs/gate." in text and "better failed 0.02" in text

    second = registry.register(copy_bundle(RUN / "bundle", workdir / "second"))
    registry.move("champion", second, run, "it is newer")
    text = told(RUN)[1]
    assert "Not any more: it was champion of the registry registry from" in text and f"then {second} became champion" in text
    assert f"it was followed; {second} became champion (reason given: “it is newer”)." in text
    registry.roll_back("the newer one is slow")
    text = told(RUN)[1]
    assert f"(reason given: “the newer one is slow”): it became champion again: {second} was rolled back." in text
    assert "Yes: it is the champion" in text and "Nothing more in the registry" in text
    registry.move("champion", second, run, "mended", gate={"passed": False, "error": "no splits"}, forced=True)
    registry.roll_back("no")
    assert [event["aliases"]["champion"] for event in registry.history()[-2:]] == [second, run]


def test_the_pipelines_layout_and_slices(run):
    shutil.copytree(RUN, "artifacts/train")
    shutil.move("artifacts/train/evaluation", "artifacts/evaluation")
    path = Path("artifacts/evaluation/metrics.json")
    found = json.loads(path.read_text())["test"]
    party = {name: {"n_rows": n, "macro_f1": f1, "accuracy": f1, "confidence": 0.5} for name, n, f1 in
             (("few", 3, 0.0), ("A", 40, 0.41), (HOSTILE, 50, 0.6))}  # fmt: skip
    baselines = {"majority": {"macro_f1": 0.1, "accuracy": 0.2}, "tfidf": {"macro_f1": 0.99, "accuracy": 0.99}}
    path.write_text(json.dumps({"test": {**found, "slices": {"party": party}, "baselines": baselines}}))
    text = told("artifacts/train", path=Path("artifacts/train/project_report.html"))[1]
    assert "By party it is weakest for “A” (0.410 over 40 rows)." in text and HOSTILE in text
    assert "“TF-IDF + logistic regression” comes to 0.990: the model's range does not lie above that" in text


def test_what_is_of_another_bundle_is_not_taken(run, workdir):
    shutil.move(RUN / "bundle", "kept")
    version = copy_bundle(workdir / "kept", RUN / "bundle")
    shutil.rmtree(RUN / "metrics")
    text = told(RUN)[1]
    assert f"No evaluation of this bundle was found: the one in outputs/first/evaluation is of bundle {run}" in text
    assert f"Its run.json tells of bundle {run}" in text and "No training curves" in text
    (RUN / "run.json").unlink()
    assert "There is no run.json" in told(RUN)[1] and version


def test_nothing_becomes_markup(run):
    """Labels, names, settings, hosts: what others wrote stays text."""
    bundle, labels = RUN / "bundle", [f"{HOSTILE}{i}" for i in range(3)]
    for name in (layout.DATA, layout.CONFIG, "../run.json"):
        source = (bundle / name).read_text().replace("tweets.csv", f"{SINGLE}.csv")
        (bundle / name).write_text(source.replace('"neutral"', json.dumps(labels[1])))
    record = json.loads((RUN / "run.json").read_text())
    (RUN / "run.json").write_text(json.dumps({**record, "host": HOSTILE, "error": HOSTILE, "status": "failed"}))
    refresh_info(bundle, labels=labels)
    info = layout.read_info(bundle)
    report, path = RUN / "evaluation/report.html", RUN / "evaluation/metrics.json"
    report.write_text(report.read_text().replace(run, info.bundle_id).replace("that took no part", f"&lt;b&gt; {'x' * 9}"))
    path.write_text(path.read_text().replace('"neutral"', json.dumps(labels[1])))
    Registry(HOSTILE.replace("/", "")).register(bundle, HOSTILE)
    source, text = told(RUN, f"registry.path='{HOSTILE}'")
    assert source.count("<img") == 5 and "onerror=" not in source.replace("onerror=&#34;", "").replace("onerror=&#39;", "")
    assert text.count(HOSTILE) > 6 and SINGLE in text


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: shutil.rmtree(RUN / "bundle"), "outputs/first: no bundle/bundle.json here; its training is finished and"),
        (lambda: (RUN / "bundle/model.onnx").write_bytes(b""), "model.onnx has been changed"),
        (lambda: (RUN / "run.json").write_text("{"), "run.json cannot be read"),
        (lambda: (RUN / "evaluation/report.html").write_text("<p>"), "does not say of which bundle it is; `sodaops evaluate"),
        (lambda: (RUN / "evaluation/metrics.json").write_text("[]"), "evaluation/metrics.json: damaged ("),
        (lambda: (RUN / "evaluation/metrics.json").write_text('{"test": {"n_rows": 1}}'), "(test.macro_f1: Field required)"),
        (lambda: (RUN / "evaluation/metrics.json").write_text("{}"), "evaluation/metrics.json: damaged ("),
        (lambda: (RUN / "evaluation/metrics.json").unlink(), "evaluation/metrics.json: missing"),
        (lambda: (RUN / "evaluation/predictions.parquet").write_bytes(b"x"), "predictions.parquet: damaged or missing"),
        (lambda: (RUN / "metrics/metrics.csv").write_text("step,val/loss\nx,1\n"), "metrics/metrics.csv: damaged (ValueError"),
        (lambda: spoiled("outputs/drift/drift.json", "{}"), "drift.json: damaged (bundle_id: Field required); `sodaops drift`"),
        (lambda: Path("outputs/drift/drift.json").mkdir(parents=True), "drift.json: could not be read (Is a directory)"),
        (lambda: spoiled("registry/history/00000001.json", "{"), "00000001.json: damaged"),
        (lambda: Path("outputs/first/project_report.html").mkdir(), "project_report.html: could not be written"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_told(run, capsys, spoil, said):
    spoil()
    assert main(["report", str(RUN)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (RUN / "project_report.html").is_file()


def spoiled(path, content):
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text(content)


def test_a_gate_report_of_another_version(run, capsys):
    judged("b2")
    shutil.move("outputs/gate/b2", f"outputs/gate/{run}")
    assert main(["report", str(RUN)]) == 2 and "gate.json: is of b2; move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("outputs/none", "outputs/none: no run folder, and no version or alias either"),
        ("outputs", "outputs: no bundle/bundle.json here; expected a folder that training wrote"),
        ("outputs/first/bundle", "outputs/first/bundle: no bundle/bundle.json here"),
        ("champion", "champion: no run folder, and no version or alias either (champion points to nothing in registry"),
        ("challenger", "which no run in outputs, multirun, artifacts has made; give the folder of its run."),
    ],
)
def test_no_such_run(run, workdir, capsys, name, said):
    Registry("registry").register(copy_bundle(RUN / "bundle", workdir / "elsewhere"))
    assert main(["report", name]) == 2 and said in capsys.readouterr().err


def test_damage_of_another_run_is_not_this_ones(run):
    Registry("registry").register(RUN / "bundle")
    shutil.copytree(RUN, "outputs/later")
    (Path("outputs/later/bundle") / layout.INFO).write_text("{")
    told("challenger")
