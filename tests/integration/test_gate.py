"""The gate: its arithmetic, its checks, and what a promotion changes in the registry."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.errors import DataError
from sodaops.inference.predictor import Predictor
from sodaops.registry.registry import Registry
from tests.conftest import REPO, lazy, run_overrides
from tests.serving import copy_bundle, refresh_info

behaviour = lazy("sodaops.registry.behaviour")
metrics = lazy("sodaops.tasks.metrics")

# Rules that the tests' random model can meet.
EASY = [
    "registry.gate.slice_floor=null", "registry.gate.max_ece=null", "registry.gate.behaviour=null",
    "registry.gate.min_gain=-1.0", "registry.gate.max_latency=null", "registry.gate.max_gap=null",
    "registry.gate.min_agreement=null", "registry.gate.n_bootstrap=1000",
]  # fmt: skip


SENTIMENT = str(REPO / "data/behaviour/sentiment.csv")


def macro_f1(label_ids, predicted, n_labels):
    return metrics.summary(metrics.confusion(label_ids, predicted, n_labels))["macro_f1"]


def test_paired_gains_are_those_of_drawing_rows():
    rng = np.random.default_rng(1)
    labels, n_rows = rng.integers(0, 3, 300), 300
    challenger, champion = (np.where(rng.random(n_rows) < right, labels, rng.integers(0, 3, n_rows)) for right in (0.8, 0.7))
    fast = metrics.paired_gains(labels, challenger, champion, 3, 4000)
    slow = metrics.bootstrap_rows(
        lambda rows: macro_f1(labels[rows], challenger[rows], 3) - macro_f1(labels[rows], champion[rows], 3), n_rows, 2000
    )
    for q in (0.05, 0.5, 0.95):
        assert np.quantile(fast, q) == pytest.approx(np.quantile(slow, q), abs=0.006)
    assert fast.mean() == pytest.approx(macro_f1(labels, challenger, 3) - macro_f1(labels, champion, 3), abs=0.004)
    assert (metrics.paired_gains(labels, challenger, challenger, 3, 100) == 0).all(), "the same rows for both"


def test_a_label_that_nobody_names():
    labels = np.array([0, 0, 1, 1])
    assert metrics.paired_gains(labels, labels, np.zeros(4, int), 5, 1000).min() >= 0


def test_the_suite_in_the_repository():
    cases = behaviour.read_suite(SENTIMENT)
    assert behaviour.applicable(cases, ["negative", "neutral", "positive"], SENTIMENT) == (cases, "")
    abilities = {case.ability for case in cases}
    assert abilities == {"negation", "typos", "casing", "names"}
    assert all(sum(case.ability == ability for case in cases) >= 20 for ability in abilities)
    assert len({(case.text, case.changed) for case in cases}) == len(cases)
    seen = (REPO / "data/raw/tweets.csv").read_text(encoding="utf-8")
    assert not [case.text for case in cases if case.text in seen]


def test_what_a_case_expects(trained, write):
    predictor = Predictor(trained / "run/bundle")
    answer = predictor.predict(["so good"])[0].label
    other = next(label for label in predictor.info.labels if label != answer)
    rows = [("a", "so good", answer, ""), ("a", "so good", other, ""), ("b", "so good", f"not {answer}", ""),
            ("b", "so good", f"not {other}", ""), ("c", "so good", "same", "so good")]  # fmt: skip
    path = write("suite.csv", "ability,text,expect,changed\n" + "".join(",".join(row) + "\n" for row in rows))
    cases = behaviour.read_suite(path)
    passed = behaviour.run_suite(predictor, cases)
    assert passed.tolist() == [True, False, False, True, True]
    rates = behaviour.pass_rates(cases, passed)
    assert [rates[ability]["rate"] for ability in "abc"] == [0.5, 0.5, 1.0] and rates["a"]["failed"] == [f"so good ({other})"]


@pytest.mark.parametrize("row", ["a,text,same,", "a,text,positive,changed", ",text,positive,"])
def test_a_faulty_suite(row, write):
    path = write("suite.csv", f"ability,text,expect,changed\n{row}\n")
    with pytest.raises(DataError, match=r"suite\.csv row 1: "):
        behaviour.read_suite(path)


@pytest.mark.parametrize(
    ("labels", "n_cases"),
    [(["1", "5"], 0), (["Negative", "Positive"], 0), (["negative", "positive"], 108), (["positive", "x"], 96)],
)
def test_a_suite_applies_where_its_labels_exist(labels, n_cases):
    cases, note = behaviour.applicable(behaviour.read_suite(SENTIMENT), labels, SENTIMENT)
    assert len(cases) == n_cases and ("skipped" in note) == (n_cases < 108)
    assert not note or all(label in note for label in labels)


def test_a_misspelt_label_of_a_suite(write):
    path = write("suite.csv", "ability,text,expect,changed\na,text,postive,\na,other,not negative,\n")
    with pytest.raises(DataError, match=r"suite\.csv.*postive.*did you mean positive"):
        behaviour.applicable(behaviour.read_suite(path), ["negative", "neutral", "positive"], path)


@pytest.fixture
def place(workdir, trained):
    """A folder with the splits of the trained bundle and two versions in a registry: the settings, and the versions."""
    shutil.copytree(trained / "splits", workdir / "splits")
    bundles = [copy_bundle(trained / "run/bundle", workdir / f"bundle{i}", f"{i}") for i in range(2)]
    versions = [Registry("registry").register(bundle) for bundle in bundles]
    return [*EASY, "evaluate.splits_dir=splits"], versions


def entries():
    return sorted(path.name for path in Path("registry/history").iterdir())


def test_accepted_refused_forced(place, capsys):
    settings, (first, second) = place
    before = entries()
    assert main(["promote", first, *settings, "registry.gate.min_gain=0.5"]) == 3
    assert re.search(f"RefusedError: {first} .*better", capsys.readouterr().err) and entries() == before
    page = Path(f"outputs/gate/{first}/gate.html").read_text(encoding="utf-8")
    result = json.loads(Path(f"outputs/gate/{first}/gate.json").read_text())
    assert not result["passed"] and result["against"] == "TF-IDF + logistic regression" and "http" not in page
    assert [verdict["rule"] for verdict in result["verdicts"] if not verdict["passed"]] == ["better"]

    assert main(["promote", first, *settings]) == 0 and Registry("registry").version("champion") == first
    assert main(["promote", first, *settings]) == 2 and f"RegistryError: {first}" in capsys.readouterr().err
    assert main(["promote", "challenger", *settings]) == 0, "the same answers: no gain, and none asked for"
    assert Registry("registry").version("champion") == second
    history = Registry("registry").history()
    assert (
        history[-1]["gate"]["passed"]
        and history[-1]["gate"]["against"] == first
        and history[-1]["gate"]["rules"]["better"]["value"] == 0.0
    )
    assert history[-1]["forced"] is False and history[-1]["before"] == first

    assert main(["rollback", "--reason", "to try again"]) == 0 and Registry("registry").version("champion") == first
    hard = [*settings, "registry.gate.min_gain=0.0"]
    assert main(["promote", second, *hard]) == 3 and Registry("registry").version("champion") == first
    assert main(["promote", second, *hard, "--force"]) == 2 and "ConfigError: --force" in capsys.readouterr().err
    assert main(["promote", second, *hard, "--force", "--reason", "the first one leaks"]) == 0
    last = Registry("registry").history()[-1]
    assert last["forced"] is True and last["why"] == "the first one leaks" and not last["gate"]["passed"]
    assert main(["registry", "history"]) == 0 and "the first one leaks" in capsys.readouterr().out
    assert "Test-set reuse: 2 " in Path(f"outputs/gate/{second}/gate.html").read_text()


def test_a_champion_that_moves_while_the_gate_runs(place, monkeypatch, capsys):
    from sodaops.registry import promotion

    settings, (first, second) = place
    run_gate = promotion.run_gate

    def interrupted(*arguments):
        result = run_gate(*arguments)
        Registry("registry").move("champion", second, None, "somebody else")
        return result

    monkeypatch.setattr(promotion, "run_gate", interrupted)
    assert main(["promote", first, *settings]) == 2
    assert f"nothing to {second}" in capsys.readouterr().err and Registry("registry").version("champion") == second


def test_every_check_can_fail_and_the_refusal_names_the_limits_that_pass(place, capsys):
    settings, (first, _) = place
    hard = [
        "registry.gate.slice_floor=1.0", "registry.gate.max_ece=0.0", "registry.gate.max_gap=0.0",
        "registry.gate.min_agreement=1.0", "registry.gate.max_latency=1.0",
        "registry.gate.behaviour={suite:" + str(REPO / "data/behaviour/sentiment.csv") + ",floors:{negation:1.0},max_drop:0.0}",
    ]  # fmt: skip
    assert main(["promote", first, *settings, *hard, "registry.gate.min_gain=1.0"]) == 3
    result = json.loads(Path(f"outputs/gate/{first}/gate.json").read_text())
    failed = {verdict["rule"] for verdict in result["verdicts"] if not verdict["passed"]}
    assert failed >= {"better", "slices", "calibration", "parity", "behaviour: negation"}
    assert {verdict["rule"] for verdict in result["verdicts"]} >= {"latency", "agreement", "behaviour: names"}
    limits = re.search("adding to the command: (.+)", capsys.readouterr().err)[1].split()
    assert main(["promote", first, *settings, *hard, "registry.gate.min_gain=1.0", *limits]) == 0


def test_a_slower_model_is_refused(place, monkeypatch):
    from sodaops.inference import ensemble

    settings, (first, second) = place
    Registry("registry").move("champion", second, None, "")
    run = Predictor.run
    monkeypatch.setattr(ensemble.time, "perf_counter", clock := Clock())

    def timed(self, rows):
        clock.now += 0.003 if self.info.bundle_id == first else 0.001
        return run(self, rows)

    monkeypatch.setattr(Predictor, "run", timed)
    assert main(["promote", first, *settings, "registry.gate.max_latency=2.5"]) == 3
    (verdict,) = json.loads(Path(f"outputs/gate/{first}/gate.json").read_text())["verdicts"][1:]
    assert verdict["rule"] == "latency" and verdict["value"] == pytest.approx(3.0)


class Clock:
    """A clock that stands still unless it is set."""

    now = 0.0

    def __call__(self):
        return self.now


def test_what_cannot_be_judged(place, trained, small_tweets, capsys, workdir):
    settings, (first, second) = place
    assert main(["promote", "champion", *settings]) == 2 and "RegistryError: champion: " in capsys.readouterr().err
    assert main(["promote", first, *EASY, "evaluate.splits_dir=none"]) == 2
    assert "DataError: none" in capsys.readouterr().err
    other = [o for o in run_overrides(workdir / "o", small_tweets) if o.startswith(("data.", "evaluate.splits_dir"))]
    assert main(["preprocess", *other, "data.max_rows=500"]) == 0
    assert main(["promote", first, *EASY, f"evaluate.splits_dir={workdir / 'o/splits'}"]) == 2
    assert "ConfigError: evaluate.splits_dir=" in capsys.readouterr().err
    odd = ["registry.gate.behaviour={suite:none.csv,floors:{},max_drop:0.1}"]
    assert (
        main(["promote", first, *settings[:-1], *odd, settings[-1]]) == 2 and "DataError: none.csv" in capsys.readouterr().err
    )
    shutil.rmtree(f"registry/versions/{second}")
    assert main(["promote", second, *settings]) == 2 and "BundleError: " in capsys.readouterr().err
    info = layout.read_info("bundle0")
    (Path(f"registry/versions/{first}") / layout.ONNX[info.default_variant]).write_bytes(b"x")
    assert main(["promote", first, *settings]) == 2 and layout.ONNX[info.default_variant] in capsys.readouterr().err
    assert len(entries()) == 2
    assert main(["promote", first, *settings, "--force", "--reason", "at night"]) == 0
    assert Registry("registry").history()[-1]["gate"]["error"]


def test_only_what_can_be_compared(place, trained, workdir, capsys):
    settings, (first, _) = place
    champion, onnx = None, layout.read_info("bundle0").onnx
    for name, fields in {
        "data set elsewhere": {"data": {"name": "elsewhere", "fingerprint": "f"}, "cleaning": "social"},
        "task ordinal": {
            "task": {"_target_": "sodaops.tasks.ordinal.Ordinal"},
            "onnx": {variant: {**of, "quadratic_kappa_change": 0.0} for variant, of in onnx.items()},
        },
    }.items():
        shutil.copytree("bundle0", name)
        refresh_info(workdir / name, **fields)
        other = Registry("registry").register(name)
        Registry("registry").move("champion", other, champion, "")
        champion = other
        assert main(["promote", first, *settings]) == 2
        assert f"RegistryError: the champion's {name} " in capsys.readouterr().err
    suite = Path("suite.csv")
    suite.write_text("ability,text,expect,changed\nnegatoin,not good,not positive,\n")
    odd = ["registry.gate.behaviour={suite:suite.csv,floors:{negation:0.5},max_drop:0.1}", "registry.path=fresh"]
    Registry("fresh").register("bundle0")
    kept = [setting for setting in settings if "behaviour" not in setting]
    assert main(["promote", "challenger", *kept, *odd]) == 2
    assert "ConfigError: registry.gate.behaviour.floors.negation: suite.csv" in capsys.readouterr().err
