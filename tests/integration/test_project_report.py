"""The project report: what it shows, what it says about missing parts, and that nothing in it becomes markup."""

import json
import re
import shutil
from pathlib import Path

import pytest

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.config.schema import DriftConfig
from sodaops.inference.predictor import Predictor
from sodaops.registry.registry import Registry
from tests.conftest import lazy
from tests.integration.test_report import Page
from tests.requests import log_rows
from tests.serving import copy_bundle, refresh_info
from tests.watching import RECENTLY, fill

check = lazy("sodaops.drift.check")
checks = lazy("sodaops.registry.checks")
gate = lazy("sodaops.registry.gate")

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


def report(*arguments, path=RUN / "project_report.html"):
    """The page, as source and as text with single spaces."""
    assert main(["report", *map(str, arguments)]) == 0
    source = path.read_text(encoding="utf-8")
    page = Spaced(source)
    assert page.open == [] and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link", source)
    return source, " ".join(page.text.split())


def write_gate_result(version, passed=True, folder=None):
    """Writes gate.json as the gate does, and returns the result."""
    verdicts = [
        checks.Verdict("better", passed, 0.02, "> 0", f"{HOSTILE} more"),
        checks.Verdict("latency", True, None, "≤ 1.25", "none"),
    ]
    result = gate.GateResult(
        version, "TF-IDF + logistic regression", {"n_rows": 120, "sha256": "5" * 64}, verdicts,
        {"challenger": {"macro_f1": 0.5}},
        {"measured": 0.02, "low": 0.0, "high": 0.1, "bound": 0.01}, {"edges": [0.0, 1.0], "shares": [1.0]},
        abilities={"negation": {"rate": 0.75, "n_cases": 40, "failed": [], "champion": None}},
    )  # fmt: skip
    folder = Path("outputs/gate") / (folder or version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gate.json").write_text(json.dumps(result.as_dict()))
    return result


def test_a_run_alone(run, capsys):
    source, text = report(RUN)
    assert capsys.readouterr().out == "report: outputs/first/project_report.html\n"
    metrics = json.loads((RUN / "evaluation/metrics.json").read_text())["test"]
    numbers = [metrics["macro_f1"], *metrics["interval_95"]["macro_f1"].values()]
    assert all(f"{number:.3f}" in text for number in numbers) and f"{metrics['n_rows']} texts" in text
    worst = min(metrics["labels"], key=lambda label: metrics["labels"][label]["f1"])
    assert f"“{worst}”" in text
    for missing in (
        "No baseline",
        "No: it is not in the registry registry",
        "No gate report in outputs/gate",
        "No drift check in outputs/drift",
        "No slices",
    ):
        assert missing in text, missing
    info = layout.read_info(RUN / "bundle")
    assert all(digest in text for digest in info.files.values()) and "optim.lr" in text and "trainer.max_epochs 2" in text
    assert "val/macro_f1" in text and "train/loss_step" in text and source.count("<circle") >= 6
    assert source.count("data:image/png") == len(list((RUN / "evaluation/plots").iterdir()))
    assert "Rows are the true labels" in text
    assert run in text and "int8, default" in text
    assert not [path for path in RUN.iterdir() if path.name.startswith(".")]


def test_champion_with_a_gate_and_a_look_at_its_requests(run):
    registry = Registry("registry")
    registry.register(RUN / "bundle", "first try")
    registry.move("champion", run, None, f"for the launch {HOSTILE}", gate=write_gate_result(run).summary(), forced=False)
    secret = "call me at 555 0100, Mrs Example"
    fill(Path("log"), log_rows(Predictor(RUN / "bundle"), [secret] * 60, RECENTLY))
    assert secret in check.check_drift(DriftConfig(), str(RUN / "bundle"), "log").message, "what the page must not say"
    source, text = report("champion", "--output", "page.html", path=Path("page.html"))
    assert "Yes: it is the champion of the registry registry" in text and f"“for the launch {HOSTILE}”" in text
    assert "became champion; all 2 checks passed" in text and "was registered first try" in text
    assert "passed, compared with TF-IDF + logistic regression on 120 test rows" in text
    assert f"{HOSTILE} more" in text and "25 % of 40 cases of negation" in text
    assert "Its requests have drifted" in text and "one text makes up 100% of the requests" in text
    assert "The last drift check has 60 of its requests" in text
    assert "555 0100" not in source and "Mrs Example" not in source

    path = Path("outputs/drift/drift.json")
    drift = json.loads(path.read_text())
    features = [{"name": "n_chars", "p": 1e-9, "effect": 0.61, "drifted": True, "before": 10.0, "now": 50.0}]
    path.write_text(json.dumps({**drift, "causes": [{"name": "texts", "said": "other texts"}], "features": features}))
    assert "length in characters drift 1.0e-09 0.61" in report(RUN)[1]
    path.write_text(json.dumps({**drift, "bundle_id": "b2"}))
    assert "outputs/drift is of bundle b2" in report(RUN)[1]
    path.write_text(json.dumps({**drift, "judged": False, "drifted": False, "causes": []}))
    assert "too few requests (60)" in report(RUN)[1]


def test_what_was_decided_later(run, workdir):
    registry = Registry("registry")
    registry.register(RUN / "bundle")
    shutil.rmtree("outputs/gate", ignore_errors=True)
    summary = write_gate_result(run, passed=False).summary()
    text = report(RUN)[1]
    assert "No: it is in the registry registry as challenger, and was never made champion" in text
    assert "The gate refused it when it last ran: better failed." in text
    registry.move("champion", run, None, "", gate=summary, forced=True)
    shutil.rmtree("outputs/gate")
    text = report(RUN)[1]
    assert "it became champion by force, although checks failed: better." in text
    assert "From the registry's history; outputs/gate has no report" in text and "better failed 0.02" in text

    second = registry.register(copy_bundle(RUN / "bundle", workdir / "second"))
    registry.move("champion", second, run, "it is newer")
    text = report(RUN)[1]
    assert "Not any more: it was champion of the registry registry from" in text and f"then {second} became champion" in text
    assert f"it was replaced; {second} became champion (reason given: “it is newer”)." in text
    registry.roll_back("the newer one is slow")
    text = report(RUN)[1]
    assert f"(reason given: “the newer one is slow”): it became champion again: {second} was rolled back." in text
    assert "Yes: it is the champion" in text and "No later events in the registry" in text
    registry.move("champion", second, run, "fixed", gate={"passed": False, "error": "no splits"}, forced=True)
    registry.roll_back("no")
    assert [event["aliases"]["champion"] for event in registry.history()[-2:]] == [second, run]


def test_the_pipelines_layout_and_slices(run):
    shutil.copytree(RUN, "artifacts/train")
    shutil.move("artifacts/train/evaluation", "artifacts/evaluation")
    path = Path("artifacts/evaluation/metrics.json")
    content = json.loads(path.read_text())
    party = {name: {"n_rows": n, "macro_f1": f1, "accuracy": f1, "confidence": 0.5} for name, n, f1 in
             (("few", 3, 0.0), ("A", 40, 0.41), (HOSTILE, 50, 0.6))}  # fmt: skip
    baselines = {"majority": {"macro_f1": 0.1, "accuracy": 0.2}, "tfidf": {"macro_f1": 0.99, "accuracy": 0.99}}
    path.write_text(json.dumps({**content, "test": {**content["test"], "slices": {"party": party}, "baselines": baselines}}))
    text = report("artifacts/train", path=Path("artifacts/train/project_report.html"))[1]
    assert "for “A” (0.410 over 40 rows)" in text and HOSTILE in text
    assert "“TF-IDF + logistic regression” reaches 0.990: the model's interval is not entirely above that" in text


def test_what_is_of_another_bundle_is_not_taken(run, workdir):
    shutil.move(RUN / "bundle", "kept")
    version = copy_bundle(workdir / "kept", RUN / "bundle")
    shutil.rmtree(RUN / "metrics")
    text = report(RUN)[1]
    assert f"No evaluation of this bundle was found: the one in outputs/first/evaluation is of bundle {run}" in text
    assert f"Its run.json names bundle {run}" in text and "No training curves" in text
    (RUN / "run.json").unlink()
    assert "There is no run.json" in report(RUN)[1] and version


def test_an_evaluation_of_an_earlier_version(run):
    """Its metrics.json holds the split alone."""
    path = RUN / "evaluation/metrics.json"
    path.write_text(json.dumps({"test": json.loads(path.read_text())["test"]}))
    text = report(RUN)[1]
    assert "the one in outputs/first/evaluation was written by an earlier version" in text and "sodaops evaluate" in text


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
    path = RUN / "evaluation/metrics.json"
    content = json.loads(path.read_text().replace('"neutral"', json.dumps(labels[1])).replace(run, info.bundle_id))
    plots = [{**plot, "title": HOSTILE, "caption": HOSTILE} for plot in content["plots"]]
    path.write_text(json.dumps({**content, "plots": plots}))
    Registry(HOSTILE.replace("/", "")).register(bundle, HOSTILE)
    source, text = report(RUN, f"registry.path='{HOSTILE}'")
    assert source.count("<img") == len(plots) and "onerror=" not in source.replace("onerror=&#34;", "").replace(
        "onerror=&#39;", ""
    )
    assert text.count(HOSTILE) > 6 and SINGLE in text


METRICS = RUN / "evaluation/metrics.json"


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda run: shutil.rmtree(RUN / "bundle"), "ConfigError: outputs/first: no bundle/bundle.json"),
        (lambda run: (RUN / "bundle/model.onnx").write_bytes(b""), "model.onnx"),
        (lambda run: (RUN / "run.json").write_text("{"), "DataError: outputs/first: run.json"),
        (lambda run: METRICS.write_text("[]"), "DataError: outputs/first/evaluation/metrics.json"),
        (lambda run: METRICS.write_text("{}"), "metrics.json: damaged (bundle_id: "),
        (lambda run: METRICS.write_text(METRICS.read_text().replace('"macro_f1"', '"macro"')), "(test.macro_f1: "),
        (lambda run: METRICS.unlink(), "DataError: outputs/first/evaluation/metrics.json"),
        (lambda run: shutil.rmtree(RUN / "evaluation/plots"), "DataError: outputs/first/evaluation/plots/"),
        (lambda run: (RUN / "evaluation/predictions.parquet").write_bytes(b"x"), "evaluation/predictions.parquet"),
        (lambda run: (RUN / "metrics/metrics.csv").write_text("step,val/loss\nx,1\n"), "outputs/first/metrics/metrics.csv"),
        (lambda run: spoiled("outputs/drift/drift.json", "{}"), "outputs/drift/drift.json: damaged (bundle_id: "),
        (lambda run: Path("outputs/drift/drift.json").mkdir(parents=True), "DataError: outputs/drift/drift.json"),
        (lambda run: spoiled("registry/history/00000001.json", "{"), "RegistryError: registry/history/00000001.json"),
        (lambda run: Path("outputs/first/project_report.html").mkdir(), "StorageError: outputs/first/project_report.html"),
        (lambda run: write_gate_result("b2", folder=run), "gate.json: about version b2"),
    ],
)  # fmt: skip
def test_damaged_files(run, capsys, spoil, names):
    spoil(run)
    assert main(["report", str(RUN)]) == 2
    err = capsys.readouterr().err
    assert names in err and "Traceback" not in err
    assert not (RUN / "project_report.html").is_file()


def spoiled(path, content):
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text(content)


@pytest.mark.parametrize("name", ["outputs/none", "outputs", "outputs/first/bundle", "champion", "challenger"])
def test_no_such_run(run, workdir, capsys, name):
    """The challenger is a bundle that no run here has trained."""
    Registry("registry").register(copy_bundle(RUN / "bundle", workdir / "elsewhere"))
    assert main(["report", name]) == 2 and f"ConfigError: {name}: " in capsys.readouterr().err


def test_damage_of_another_run_is_not_this_ones(run):
    Registry("registry").register(RUN / "bundle")
    shutil.copytree(RUN, "outputs/later")
    (Path("outputs/later/bundle") / layout.INFO).write_text("{")
    report("challenger")
