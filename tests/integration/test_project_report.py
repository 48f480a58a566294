"""The project report: what it shows, which parts are missing, and that nothing in it becomes markup."""

import html
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


def text_of(source):
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", source)).split())


def report(*arguments, path=RUN / "project_report.html"):
    """The page's source, and heading -> text of the section or paragraph."""
    assert main(["report", *map(str, arguments)]) == 0
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == [] and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link", source)
    parts = re.split("<(?:h2|p><strong)>(.+?)</(?:h2|strong)>", source)
    return source, {heading: text_of(part) for heading, part in zip(parts[1::2], parts[2::2], strict=True)}


def names(text, *parts):
    """Whether a text has these parts, in this order."""
    return re.search(".*".join(map(re.escape, parts)), text)


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
    source, page = report(RUN)
    assert capsys.readouterr().out == "report: outputs/first/project_report.html\n"
    metrics = json.loads((RUN / "evaluation/metrics.json").read_text())["test"]
    numbers = [metrics["macro_f1"], *metrics["interval_95"]["macro_f1"].values()]
    assert all(f"{number:.3f}" in page["Quality"] for number in numbers) and f"{metrics['n_rows']} texts" in page["Quality"]
    worst = min(metrics["labels"], key=lambda label: metrics["labels"][label]["f1"])
    assert f"“{worst}”" in page["Weaknesses"]
    missing = {"Quality": "evaluate.baselines", "Registry and gate": "outputs/gate", "Drift of its requests": "outputs/drift"}
    assert all(name in page[heading] for heading, name in missing.items()) and "data.slice_columns" in source
    assert page["Production"].startswith("No: ")
    info = layout.read_info(RUN / "bundle")
    assert all(digest in page["Hashes"] for digest in info.files.values())
    assert all(part in page["Training"] for part in ("optim.lr", "trainer.max_epochs 2", "val/macro_f1", "train/loss_step"))
    assert source.count("<circle") >= 6 and "int8, default" in page["ONNX models"] and run in source
    assert page["Plots"] and source.count("data:image/png") == len(list((RUN / "evaluation/plots").iterdir()))
    assert not [path for path in RUN.iterdir() if path.name.startswith(".")]


def test_champion_with_a_gate_and_a_look_at_its_requests(run):
    registry = Registry("registry")
    registry.register(RUN / "bundle", "first try")
    registry.move("champion", run, None, f"for the launch {HOSTILE}", gate=write_gate_result(run).summary(), forced=False)
    secret = "call me at 555 0100, Mrs Example"
    fill(Path("log"), log_rows(Predictor(RUN / "bundle"), [secret] * 60, RECENTLY))
    assert secret in check.check_drift(DriftConfig(), str(RUN / "bundle"), "log").message, "what the page must not say"
    source, page = report("champion", "--output", "page.html", path=Path("page.html"))
    assert page["Production"].startswith("Yes: ") and f"“for the launch {HOSTILE}”" in page["Production"]
    assert names(page["Registry and gate"], "first try", "all 2 checks", "TF-IDF + logistic regression", f"{HOSTILE} more")
    assert "25 % of 40 cases of negation" in page["Weaknesses"]
    assert names(page["Since then"], "60 requests", "100%") and "60" in page["ONNX models"]
    assert "555 0100" not in source and "Mrs Example" not in source

    path = Path("outputs/drift/drift.json")
    drift = json.loads(path.read_text())
    features = [{"name": "n_chars", "p": 1e-9, "effect": 0.61, "drifted": True, "before": 10.0, "now": 50.0}]
    for changes, heading, part in (
        ({"causes": [{"name": "texts", "said": "other texts"}], "features": features}, "Drift of its requests", "1.0e-09 0.61"),
        ({"bundle_id": "b2"}, "Since then", "b2"),
        ({"judged": False, "drifted": False, "causes": []}, "Since then", "too few requests (60)"),
    ):
        path.write_text(json.dumps({**drift, **changes}))
        assert part in report(RUN)[1][heading]


def test_what_was_decided_later(run, workdir):
    registry = Registry("registry")
    registry.register(RUN / "bundle")
    summary = write_gate_result(run, passed=False).summary()
    assert names(report(RUN)[1]["Production"], "No: ", "challenger", "better failed")
    registry.move("champion", run, None, "", gate=summary, forced=True)
    shutil.rmtree("outputs/gate")
    page = report(RUN)[1]
    assert names(page["Production"], "Yes: ", "by force", "better")
    assert names(page["Registry and gate"], "better", "failed 0.02", "outputs/gate"), "from the registry's history"

    second = registry.register(copy_bundle(RUN / "bundle", workdir / "second"))
    registry.move("champion", second, run, "it is newer")
    page = report(RUN)[1]
    assert names(page["Production"], "Not any more: ", second) and names(page["Since then"], second, "“it is newer”")
    registry.roll_back("the newer one is slow")
    page = report(RUN)[1]
    assert names(page["Production"], "Yes: ", "“the newer one is slow”", f"{second} was rolled back")
    assert second not in page["Since then"]
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
    page = report("artifacts/train", path=Path("artifacts/train/project_report.html"))[1]
    assert names(page["Weaknesses"], "“A”", "0.410", "40 rows") and HOSTILE in page["By party"]
    assert names(page["Quality"], "“TF-IDF + logistic regression”", "0.990", "not entirely above")


def test_what_is_of_another_bundle_is_not_taken(run, workdir):
    shutil.move(RUN / "bundle", "kept")
    copy_bundle(workdir / "kept", RUN / "bundle")
    shutil.rmtree(RUN / "metrics")
    page = report(RUN)[1]
    assert names(page["Quality"], "Unknown", "outputs/first/evaluation", run)
    assert names(page["Training"], "run.json", run, "metrics/metrics.csv")
    (RUN / "run.json").unlink()
    assert "no run.json" in report(RUN)[1]["Training"]


def test_an_evaluation_of_an_earlier_version(run):
    """Its metrics.json holds the split alone."""
    path = RUN / "evaluation/metrics.json"
    path.write_text(json.dumps({"test": json.loads(path.read_text())["test"]}))
    assert names(report(RUN)[1]["Quality"], "Unknown", "outputs/first/evaluation", "sodaops evaluate")


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
    source, _ = report(RUN, f"registry.path='{HOSTILE}'")
    assert source.count("<img") == len(plots) and not re.search("onerror=(?!&#3[49];)", source)
    assert text_of(source).count(HOSTILE) > 6 and SINGLE in text_of(source)


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
