"""How good the quality is that drift checks estimate without labels, and when it is withheld.

For each bundle, random windows of 200 tweets of the test split, which neither the model nor its reference has seen: the mean
absolute error of the estimated accuracy and macro-F1 against those of the labels, and how often the interval has these. Chance
in the labels of 200 texts is a part of each error. The expected metric of a window's texts, without that chance, is not known.
So two columns show how large it is: "by chance" is the error if the labels were drawn from the model's own probabilities, and
"constant" that of the whole test split's metric, which no monitoring knows, as the estimate of every window.

Then whole drift checks of windows of 200 requests, for the first bundle: how often an estimate is withheld for tweets of the
test split, for product reviews, and for tweets in which one label is three times as frequent; and how often any of four random
segments is flagged.

    python benchmarks/trust_quality.py --bundles RUN/bundle … --splits data/processed/tweets

The labels and answers of val, which bundles of earlier versions lack, are added from the splits. Test rows only measure.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from drift import REPO, logged
from tqdm import tqdm

from sodaops.bundle import reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.measure import measure_drift
from sodaops.drift.quality import largest_difference
from sodaops.drift.statistics import total_variation
from sodaops.inference.predictor import Predictor
from sodaops.request_log.window import Window
from sodaops.tasks.estimate import METRICS, calibrate, estimate

N_ROWS = 200
Split = tuple[np.ndarray, np.ndarray]  # answers and labels


def answers(predictor: Predictor, splits: Path, split: str) -> Split:
    """The probabilities, float32 [n, n_labels], and the label ids, int [n], of a split."""
    table = pq.read_table(splits / f"{split}.parquet")
    return predictor.probs(table["text"].to_pylist()), table["label_id"].to_numpy()


def with_val(known: reference.Reference, val: Split) -> reference.Reference:
    """A reference of an earlier version, with what this version's have."""
    probs, truth = val
    if known.truth is not None:
        return known
    if len(truth) != (~known.seen).sum():
        raise SystemExit("--splits: val has other texts than the bundle's reference.")
    every, labels = np.zeros((len(known.seen), probs.shape[1]), np.float32), np.full(len(known.seen), -1, np.int16)
    every[~known.seen], labels[~known.seen] = probs, truth
    return replace(known, answers=every, truth=labels)


def actual(predictor: Predictor, probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The metrics of rows with labels, in the order of METRICS."""
    measured = predictor.task.summary(probs, truth)
    return np.array([measured[name] for name in METRICS])


def errors(name: str, predictor: Predictor, known: reference.Reference, val: Split, test: Split, n_windows: int) -> str:
    """A row of the first table."""
    task, rng = predictor.task, np.random.default_rng(0)
    of_val, of_test = task.groups(val[0]), task.groups(test[0])
    calibration, whole = calibrate(val[0], of_val, val[1]), actual(predictor, *test)
    counts = np.bincount(known.label_ids, minlength=val[0].shape[1])
    limit = largest_difference(counts, N_ROWS, DriftConfig().alpha)
    found, covered, withheld = [], [], 0
    for _ in tqdm(range(n_windows), desc=name, leave=False):
        rows = rng.permutation(len(test[1]))[:N_ROWS]
        probs, predicted, true = test[0][rows], of_test[rows], actual(predictor, test[0][rows], test[1][rows])
        if total_variation(counts, np.bincount(predicted, minlength=len(counts))) > limit:
            withheld += 1
            continue
        estimates = [[metric.value, metric.low, metric.high] for metric in estimate(probs, predicted, calibration).values()]
        value, low, high = np.array(estimates).T
        raw = [metric.value for metric in estimate(probs, predicted, n_samples=2).values()]
        drawn = (rng.random((N_ROWS, 1)) > probs.cumsum(axis=1)).sum(axis=1).clip(max=probs.shape[1] - 1)
        found.append(np.abs([value - true, raw - true, raw - actual(predictor, probs, drawn), whole - true]))
        covered.append((low <= true) & (true <= high))
    of_errors = np.mean(found, axis=0)
    estimated = [metric.value for metric in estimate(test[0], of_test, calibration).values()]
    cells = [
        " / ".join(f"{number:.3f}" for number in numbers) for numbers in (whole, estimated, *of_errors)
    ] + [" / ".join(f"{share:.0%}" for share in np.mean(covered, axis=0)), f"{withheld} of {n_windows}"]  # fmt: skip
    return f"| {name} | {' | '.join(cells)} |"


def skewed(rows: pa.Table, rng: np.random.Generator) -> np.ndarray:
    """Rows of a window in which the rarest predicted label is three times as frequent."""
    labels = rows["label"].to_numpy()
    names, counts = np.unique(labels, return_counts=True)
    weights = np.where(labels == names[counts.argmin()], 3.0, 1.0)
    return rng.choice(len(rows), N_ROWS, replace=False, p=weights / weights.sum())


def checks(bundle: Path, known: reference.Reference, tweets: pa.Table, n_windows: int) -> list[str]:
    """The second table."""
    predictor, rng, settings = Predictor(bundle), np.random.default_rng(0), DriftConfig()
    reviews = logged(predictor, pyarrow.csv.read_csv(REPO / "data/raw/amazon_reviews.csv")["text"].to_pylist())
    lines = ["| windows | withheld | reasons |", "| --- | --- | --- |"]
    for name, rows, draw in (
        ("tweets of test", tweets, lambda rows, rng: rng.permutation(len(rows))[:N_ROWS]),
        ("product reviews", reviews, lambda rows, rng: rng.permutation(len(rows))[:N_ROWS]),
        ("tweets, one label more frequent", tweets, skewed),
    ):
        reasons: Counter[str] = Counter()
        for _ in tqdm(range(n_windows), desc=name, leave=False):
            window = rows.take(draw(rows, rng))
            result, _ = measure_drift(settings, predictor.info, known, Window(window, N_ROWS))
            reasons[result.quality.withheld or ""] += 1
        named = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common() if reason)
        lines.append(f"| {name} | {n_windows - reasons['']} of {n_windows} | {named or '–'} |")
    return lines


def segment_alarms(bundle: Path, known: reference.Reference, tweets: pa.Table, n_windows: int) -> str:
    """How often any of four segments is flagged in windows of tweets of the test split, which have a segment at random."""
    info, rng, flagged = Predictor(bundle).info, np.random.default_rng(0), 0
    info = replace(info, data={**info.data, "slice_columns": ["segment"]})
    for _ in tqdm(range(n_windows), desc="segments", leave=False):
        names = np.array(list("abcd"))[rng.integers(0, 4, (len(known.seen), 1))]
        window = tweets.take(rng.permutation(len(tweets))[: 2 * N_ROWS])
        contexts = pa.array([json.dumps({"segment": "abcd"[i]}) for i in rng.integers(0, 4, len(window))])
        window = window.set_column(window.column_names.index("context"), "context", contexts)
        result, _ = measure_drift(DriftConfig(), info, replace(known, segments=names), Window(window, len(window)))
        flagged += any(segment.drifted for segment in result.segments)
    return f"Any of four random segments flagged, in windows of {2 * N_ROWS} tweets of test: {flagged} of {n_windows}."


def main() -> None:
    """Runs the benchmark, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundles", type=Path, nargs="+", default=[REPO / "artifacts/train/bundle"])
    parser.add_argument("--splits", type=Path, default=REPO / "data/processed/tweets")
    parser.add_argument("--windows", type=int, default=400, help="for the errors, of each bundle")
    parser.add_argument("--checks", type=int, default=100, help="drift checks of each kind of window")
    asked = parser.parse_args()
    print(f"Windows of {N_ROWS} tweets of the test split: accuracy / macro-F1.\n")
    columns = (
        "bundle",
        "test split",
        "estimate",
        "mean error",
        "uncorrected",
        "by chance",
        "constant",
        "in interval",
        "withheld",
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    known: dict[Path, reference.Reference] = {}
    for bundle in asked.bundles:
        predictor = Predictor(bundle)
        val, test = (answers(predictor, asked.splits, split) for split in ("val", "test"))
        name = bundle.parent.name if bundle.name == "bundle" else bundle.name
        known[bundle] = with_val(reference.read_reference(bundle, predictor.info), val)
        print(errors(name, predictor, known[bundle], val, test, asked.windows), flush=True)
    print(f"\nDrift checks of windows of {N_ROWS} requests, default settings.\n")
    first, texts = asked.bundles[0], pq.read_table(asked.splits / "test.parquet")["text"].to_pylist()
    tweets = logged(Predictor(first), texts)
    print("\n".join(checks(first, known[first], tweets, asked.checks)))
    print(f"\n{segment_alarms(first, known[first], tweets, asked.checks)}")


if __name__ == "__main__":
    main()
