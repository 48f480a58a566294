"""The gate before production: what a version shows on the test split, held against conf/registry's rules."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from sodaops import pages
from sodaops.bundle import layout
from sodaops.config.schema import GateConfig
from sodaops.data.preprocess import read_manifest, read_split
from sodaops.errors import ConfigError, RegistryError, nearest, some
from sodaops.evaluation import baselines, metrics
from sodaops.inference.predictor import Predictor
from sodaops.io import remote, storage
from sodaops.registry import behaviour, checks
from sodaops.registry.checks import Verdict

WRITTEN = ("gate.html", "gate.json")


@dataclass(frozen=True)
class Judged:
    """What the gate found."""

    version: str
    against: str  # the champion's version, or the baseline's name
    test: dict[str, Any]  # rows and hash of the split
    verdicts: list[Verdict]
    scores: dict[str, dict[str, float]]  # challenger and what it was held against -> macro-F1, accuracy, ECE
    gain: dict[str, float]  # of macro-F1: mean, low, high of the two-sided 95 % interval, bound of the rule
    histogram: dict[str, list[float]]  # of the bootstrapped gains: edges, shares
    slices: list[dict[str, Any]] = field(default_factory=list)
    abilities: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return all(verdict.passed for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"passed": self.passed, **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """What the registry's history keeps."""
        numbers = {v.rule: {"passed": v.passed, "value": v.value, "limit": v.limit} for v in self.verdicts}
        return {"passed": self.passed, "against": self.against, "test": self.test, "rules": numbers}


def judge(version: str, challenger: Path, champion: tuple[str, Path] | None, splits_dir: Path, rules: GateConfig) -> Judged:
    """Holds a version against the champion, on the test split that took no part in making it.

    Args:
        version: the challenger's.
        challenger: its bundle.
        champion: version and bundle, or None, where TF-IDF with logistic regression takes its place.
        splits_dir: the splits of the challenger's data.
        rules: conf/registry's gate.

    Raises:
        ConfigError: splits that are not the challenger's, or a champion with other labels.
        BundleError, DataError: as their names say.
    """
    mine = Predictor(challenger, n_threads=1)
    table, test = _test_split(challenger, mine, splits_dir)
    label_ids, texts, labels = table["label_id"].to_numpy().astype(np.int64), table["text"].to_pylist(), mine.info.labels
    probs = mine.probs_of_cleaned(texts)
    theirs = None if champion is None else _champion(champion[1], mine.info)
    against, other = "TF-IDF + logistic regression", None
    if theirs is None:
        other = baselines.tfidf(_learned_from(splits_dir, "train"), _learned_from(splits_dir, "val"), texts, len(labels))
    else:
        against, other = (
            champion[0],
            theirs.probs_of_cleaned(texts) if theirs.info.cleaning == mine.info.cleaning else theirs.probs(texts),
        )
    gain, histogram = _gain(label_ids, probs.argmax(1), other.argmax(1), len(labels), rules)
    if champion is not None:
        test["also_kept_from_champion"] = _kept_from(champion[1], theirs) == test["sha256"]
    slices = _slices(table, probs, label_ids, labels, rules.slice_rows)
    abilities = _abilities(mine, theirs, rules)
    scores = {"challenger": _score(probs, label_ids), "champion" if theirs else "baseline": _score(other, label_ids)}
    wanted: list[tuple[Any, Callable[[], Verdict]]] = [
        (rules.min_gain, lambda: checks.better(gain, against, rules)),
        (rules.slice_floor, lambda: checks.floors(slices, rules.slice_floor)),
        (rules.max_ece, lambda: checks.calibrated(scores["challenger"]["ece"], rules.max_ece)),
        (rules.max_latency, lambda: checks.quick(mine, theirs, texts, rules.max_latency)),
        (rules.max_gap, lambda: checks.parity(challenger, texts, rules.max_gap)),
        (rules.min_agreement, lambda: checks.agrees(challenger, mine, texts, probs, rules.min_agreement)),
    ]
    asked = [check for limit, check in wanted if limit is not None]
    verdicts = [check() for check in tqdm(asked, desc="gate", unit="rule", delay=2, leave=False, disable=None)]
    verdicts += checks.able(abilities, rules)
    return Judged(version, against, test, verdicts, scores, gain, histogram, slices, abilities)


def write(folder: str, judged: Judged, why: str) -> str:
    """Writes gate.json and gate.html into a folder, and returns where the page is.

    Args:
        folder: made, or replaced; a path, or an address.
        judged: what was found.
        why: what was asked for, in a sentence.
    """
    with remote.output_folder(folder, WRITTEN, "gate.json") as there:
        storage.write_json(there / "gate.json", judged.as_dict())
        (there / "gate.html").write_text(pages.render("gate", j=judged, why=why), encoding="utf-8")
    return f"{folder}/gate.html"


def _test_split(challenger: Path, mine: Predictor, splits_dir: Path) -> tuple[pa.Table, dict[str, Any]]:
    manifest = read_manifest(splits_dir)
    layout.check_splits(mine.info, manifest, splits_dir)
    found = manifest["splits"]["test"]["sha256"]
    if _kept_from(challenger, mine) != found:
        raise ConfigError(
            f"{splits_dir}: its test split is not the one that {mine.info.bundle_id} was kept away from, so rows that it "
            "learned from may be among them. Name the splits that it was trained with in evaluate.splits_dir=FOLDER."
        )
    table = read_split(splits_dir, "test")
    return table, {"n_rows": table.num_rows, "sha256": found}


def _kept_from(bundle: Path, predictor: Predictor) -> str:
    """The hash of the test split that a bundle was kept away from."""
    return json.loads(layout.read_file(bundle, predictor.info, layout.DATA))["splits"]["test"]["sha256"]


def _champion(path: Path, info: layout.BundleInfo) -> Predictor:
    found, labels = Predictor(path, n_threads=1), info.labels
    if found.info.data["name"] != info.data["name"]:
        raise RegistryError(
            f"the champion is of the data set {found.info.data['name']}, the challenger of {info.data['name']}: a test split "
            "of one says nothing of the other. Keep them in registries of their own (registry.path=FOLDER)."
        )
    if found.info.labels != list(labels):
        raise RegistryError(
            f"the champion answers {found.info.labels}, the challenger {list(labels)}: they cannot be compared. Keep them in "
            "registries of their own (registry.path=FOLDER)."
        )
    return found


def _learned_from(splits_dir: Path, split: str) -> tuple[list[str], np.ndarray]:
    table = read_split(splits_dir, split)
    return table["text"].to_pylist(), table["label_id"].to_numpy().astype(np.int64)


def _gain(
    label_ids: np.ndarray, mine: np.ndarray, theirs: np.ndarray, n_labels: int, rules: GateConfig
) -> tuple[dict[str, float], dict[str, list[float]]]:
    gains = checks.paired_gains(label_ids, mine, theirs, n_labels, rules.n_bootstrap)
    f1 = [metrics.summary(metrics.confusion(label_ids, answers, n_labels))["macro_f1"] for answers in (mine, theirs)]
    low, high, bound = np.quantile(gains, [0.025, 0.975, 1 - rules.confidence])
    shares, edges = np.histogram(gains, bins=40)
    found = {"measured": f1[0] - f1[1], "low": low, "high": high, "bound": bound}
    histogram = {"edges": edges.tolist(), "shares": (shares / shares.max()).tolist()}
    return {name: float(value) for name, value in found.items()}, histogram


def _score(probs: np.ndarray, label_ids: np.ndarray) -> dict[str, float]:
    found = metrics.summary(metrics.confusion(label_ids, probs.argmax(1), probs.shape[1]))
    return {
        "macro_f1": float(found["macro_f1"]), "accuracy": float(found["accuracy"]),
        "ece": metrics.expected_calibration_error(probs, label_ids),
    }  # fmt: skip


def _slices(
    table: pa.Table, probs: np.ndarray, label_ids: np.ndarray, labels: Sequence[str], min_rows: int
) -> list[dict[str, Any]]:
    """Each label's F1, and macro-F1 by length and by each slice column, where there are rows enough."""
    predicted = probs.argmax(1)
    per_label = metrics.per_label(metrics.confusion(label_ids, predicted, len(labels)), labels)
    found: list[dict[str, Any]] = [
        {"slice": f"label {name}", "f1": v["f1"], "n_rows": v["n_rows"]} for name, v in per_label.items()
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
            f1 = metrics.summary(metrics.confusion(label_ids[rows], predicted[rows], len(labels)))["macro_f1"]
            found.append({"slice": name, "f1": float(f1), "n_rows": int(rows.sum())})
    return [{**entry, "judged": entry["n_rows"] >= min_rows} for entry in found]


def _abilities(mine: Predictor, theirs: Predictor | None, rules: GateConfig) -> dict[str, dict[str, Any]]:
    if rules.behaviour is None:
        return {}
    cases = behaviour.read_suite(rules.behaviour.suite, mine.info.labels)
    abilities = {case.ability for case in cases}
    missing = [ability for ability in rules.behaviour.floors if ability not in abilities]
    if missing:
        raise ConfigError(
            f"registry.gate.behaviour.floors.{missing[0]}: {rules.behaviour.suite} has no such ability"
            f"{nearest(missing[0], abilities)}; it has {some(sorted(abilities))}."
        )
    found = behaviour.rates(cases, behaviour.run(mine, cases))
    before = behaviour.rates(cases, behaviour.run(theirs, cases)) if theirs else {}
    return {ability: {**of, "champion": before[ability]["rate"] if before else None} for ability, of in found.items()}
