"""The gate before a promotion: evaluates a version on the test split, and checks the results against conf/registry."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sodaops import pages
from sodaops.bundle import layout
from sodaops.bundle.files import parsing
from sodaops.config.schema import GateConfig
from sodaops.data.preprocess import read_manifest, read_split
from sodaops.errors import ConfigError, RegistryError, nearest, some
from sodaops.inference.predictor import Predictor
from sodaops.io import remote, storage
from sodaops.io.progress import progress
from sodaops.registry import behaviour, checks
from sodaops.registry.checks import LiveTest, Verdict
from sodaops.tasks.base import Task

GATE_PAGE, GATE_JSON = "gate.html", "gate.json"


@dataclass(frozen=True)
class GateResult:
    """The measurements and verdicts of the gate. The fields are written to gate.json."""

    version: str
    against: str  # the champion's version, or the baseline's name
    test: dict[str, Any]  # number of rows and hash of the test split
    verdicts: list[Verdict]
    scores: dict[str, dict[str, float]]  # challenger, and champion or baseline -> metric -> value
    gain: dict[str, float]  # of the first metric: measured; low and high of its 95 % interval; bound: the lower one of the rule
    histogram: dict[str, list[float]]  # of the bootstrapped gains: edges, shares
    slices: list[dict[str, Any]] = field(default_factory=list)
    abilities: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def accept(self) -> list[str]:
        """The settings with which the failed checks would pass."""
        return list(dict.fromkeys(setting for v in self.verdicts if not v.passed for setting in v.accept))

    def as_dict(self) -> dict[str, Any]:
        """All fields and ``passed``, for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """The part that is kept in the registry's history."""
        numbers = {v.rule: {"passed": v.passed, "value": v.value, "limit": v.limit} for v in self.verdicts}
        return {"passed": self.passed, "against": self.against, "test": self.test, "rules": numbers}


def run_gate(
    version: str, challenger_dir: Path, champion: tuple[str, Path] | None, splits_dir: Path, rules: GateConfig,
    live: LiveTest | None = None,
) -> GateResult:  # fmt: skip
    """Compares a version with the champion on the test split, which its training did not use.

    Args:
        version: the challenger's version.
        challenger_dir: its bundle.
        champion: version and bundle; if None, the challenger is compared with the task's best baseline.
        splits_dir: the splits of the challenger's data.
        rules: conf/registry's section ``gate``.
        live: labelled live texts on which both disagree; None: not counted.

    Raises:
        ConfigError: the splits are not the challenger's.
        RegistryError: the champion has another task, other labels or another data set.
        BundleError, DataError: damaged files.
    """
    challenger = Predictor(challenger_dir, n_threads=1)
    table, test = _test_split(challenger_dir, challenger, splits_dir)
    task, labels, texts = challenger.task, challenger.info.labels, table["text"].to_pylist()
    truth, probs = task.truth(table), challenger.probs_of_cleaned(texts)
    if champion is None:
        *_, (baseline, other_probs) = task.baseline_probs(read_split(splits_dir, "train"), texts, labels).items()
        against, champion_model, other_task = task.baselines[baseline], None, task
    else:
        against, champion_model = champion[0], _load_champion(champion[1], challenger)
        other_task = champion_model.task
        same_cleaning = champion_model.info.cleaning == challenger.info.cleaning  # then the texts are clean already
        other_probs = champion_model.probs_of_cleaned(texts) if same_cleaning else champion_model.probs(texts)
        test["also_kept_from_champion"] = _test_hash(champion[1], champion_model) == test["sha256"]
    gain, histogram = _gain(task, truth, probs, task.as_of_own(other_probs, other_task), rules)
    slices = _slices(task, table, probs, truth, labels, rules.slice_rows)
    abilities, skipped = _abilities(challenger, champion_model, rules)
    compared = {"challenger": (task, probs), "champion" if champion else "baseline": (other_task, other_probs)}
    scores = {name: _scores(of, answers, truth) for name, (of, answers) in compared.items()}
    configured: list[tuple[Any, Callable[[], Verdict]]] = [  # (limit, check); a check whose limit is null is skipped
        (rules.min_gain, lambda: checks.check_gain(gain, against, task.metrics[0], rules)),
        (rules.slice_floor, lambda: checks.check_slices(slices, task, rules.slice_floor)),
        (rules.max_ece, lambda: checks.check_calibration(scores["challenger"].get("ece"), task, rules.max_ece)),
        (rules.max_latency, lambda: checks.check_latency(challenger, champion_model, texts, rules.max_latency)),
        (rules.max_gap, lambda: checks.check_parity(challenger_dir, texts, rules.max_gap)),
        (rules.min_disagreements, lambda: checks.check_disagreements(live, rules.min_disagreements, 1 - rules.confidence)),
        (rules.min_agreement, lambda: checks.check_agreement(challenger_dir, challenger, texts, probs, rules.min_agreement)),
    ]
    active = [check for limit, check in configured if limit is not None]
    verdicts = [check() for check in progress(active, desc="gate", unit="rule")]
    verdicts += checks.check_behaviour(abilities, rules, skipped)
    return GateResult(version, against, test, verdicts, scores, gain, histogram, slices, abilities)


def write_gate_report(folder: str, result: GateResult, introduction: str, task: Task) -> str:
    """Writes gate.json and gate.html.

    Args:
        folder: path or address; created, or replaced.
        result: the gate's result.
        introduction: the first sentences of the page.
        task: of the version.

    Returns:
        The page's path or address.
    """
    with remote.output_folder(folder, (GATE_PAGE, GATE_JSON), GATE_JSON) as temporary:
        storage.write_json(temporary / GATE_JSON, result.as_dict())
        page = pages.render_page("gate", j=result, why=introduction, metrics=task.metrics, key=task.slice_key)
        (temporary / GATE_PAGE).write_text(page, encoding="utf-8")
    return f"{folder}/{GATE_PAGE}"


def _test_split(bundle: Path, challenger: Predictor, splits_dir: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The test split, with its number of rows and its hash."""
    manifest = read_manifest(splits_dir)
    layout.check_splits(challenger.info, manifest, splits_dir)
    actual = manifest["splits"]["test"]["sha256"]
    if _test_hash(bundle, challenger) != actual:
        raise ConfigError(
            f"evaluate.splits_dir={splits_dir}: not the test split that was held out when {challenger.info.bundle_id} was "
            "trained, so it may have rows of its training. Set evaluate.splits_dir to the splits that it was trained with."
        )
    table = read_split(splits_dir, "test")
    table = table.take(challenger.tokenise(table["text"].to_pylist()).kept)
    return table, {"n_rows": table.num_rows, "sha256": actual}


def _test_hash(bundle: Path, predictor: Predictor) -> str:
    """The hash of the test split that was held out when a bundle was trained."""
    with parsing(bundle / layout.DATA):
        return layout.read_json(bundle, predictor.info, layout.DATA)["splits"]["test"]["sha256"]


def _load_champion(path: Path, challenger: Predictor) -> Predictor:
    champion = Predictor(path, n_threads=1)
    for name, champion_value, challenger_value in (
        ("task", champion.task.name, challenger.task.name),
        ("data set", champion.info.data["name"], challenger.info.data["name"]),
        ("labels", champion.info.labels, challenger.info.labels),
        ("number of text columns", len(champion.info.text_columns), len(challenger.info.text_columns)),
    ):
        if champion_value != challenger_value:
            same_data = f", or train again with data.name={champion_value} if it is the same task" if name == "data set" else ""
            raise RegistryError(
                f"the champion's {name} {champion_value} and the challenger's {challenger_value} differ, so they cannot be "
                f"compared. Use a separate registry for each (registry.path=FOLDER){same_data}."
            )
    return champion


def _gain(
    task: Task, truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, rules: GateConfig
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The gain in the task's score with its bootstrap interval, and a histogram of the bootstrapped gains."""
    gains = task.gains(truth, challenger, champion, rules.n_bootstrap)
    measured = task.score(challenger, truth) - task.score(champion, truth)
    low, high, bound = np.quantile(gains, [0.025, 0.975, 1 - rules.confidence])
    numbers = {"measured": measured, "low": low, "high": high, "bound": bound}
    shares, edges = np.histogram(gains, bins=40)
    histogram = {"edges": edges.tolist(), "shares": (shares / shares.max()).tolist()}
    return {name: float(value) for name, value in numbers.items()}, histogram


def _scores(task: Task, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The task's first two metrics, and its calibration error where it has one."""
    summary, ece = task.summary(probs, truth), task.calibration_error(probs, truth)
    return {metric.name: summary[metric.name] for metric in task.metrics[:2]} | ({} if ece is None else {"ece": ece})


def _slices(
    task: Task, table: pa.Table, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str], min_rows: int
) -> list[dict[str, Any]]:
    """The first metric by label, by text length and by each slice column; ``judged`` if a slice has ``min_rows`` rows."""
    key, scores = task.slice_key, task.label_scores(probs, truth, labels)
    slices: list[dict[str, Any]] = [
        {"slice": f"label {name}", key: score, "n_rows": n_rows} for name, (score, n_rows) in scores.items()
    ]
    lengths = np.array([len(text) for text in table["text"].to_pylist()])
    short, long = np.quantile(lengths, [1 / 3, 2 / 3])
    groups = {
        "short texts": lengths <= short, "texts of middle length": (lengths > short) & (lengths <= long),
        "long texts": lengths > long,
    }  # fmt: skip
    for name in table.column_names:
        if name.startswith("slice_"):
            values = np.array([value or "(no value)" for value in table[name].to_pylist()])
            groups |= {f"{name.removeprefix('slice_')} {value}": values == value for value in sorted(set(values))}
    for name, rows in groups.items():
        if rows.any():
            value = task.summary(probs[rows], truth[rows])[task.metrics[0].name]
            slices.append({"slice": name, key: value, "n_rows": int(rows.sum())})
    return [{**entry, "judged": entry["n_rows"] >= min_rows} for entry in slices]


def _abilities(challenger: Predictor, champion: Predictor | None, rules: GateConfig) -> tuple[dict[str, dict[str, Any]], str]:
    """The challenger's results in the behavioural tests, with the champion's pass rates; and a note on skipped tests."""
    if rules.behaviour is None:
        return {}, ""
    suite = rules.behaviour.suite
    cases = behaviour.read_suite(suite)
    abilities = {case.ability for case in cases}
    for ability in rules.behaviour.floors:
        if ability not in abilities:
            raise ConfigError(
                f"registry.gate.behaviour.floors.{ability}: {suite} has no such ability"
                f"{nearest(ability, abilities)}; it has {some(sorted(abilities))}."
            )
    if len(challenger.info.text_columns) > 1:
        return {}, f"skipped: {suite} has texts of one column"
    cases, skipped = behaviour.applicable(cases, challenger.info.labels, suite)
    rates = behaviour.pass_rates(cases, behaviour.run_suite(challenger, cases))
    champion_rates = behaviour.pass_rates(cases, behaviour.run_suite(champion, cases)) if champion else {}
    with_champion = {
        name: {**rate, "champion": champion_rates[name]["rate"] if champion else None} for name, rate in rates.items()
    }
    return with_champion, skipped
