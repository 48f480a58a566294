"""How often drift is detected with and without drift, and how long a check takes.

Random windows of 200 requests: tweets of the test split, which neither the model nor its reference has seen, and a growing
share of product reviews. Then the time for up to 100,000 requests, compared with evidently's report on a raw text column.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from sodaops.bundle import reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.measure import measure_drift
from sodaops.inference.predictor import Predictor
from sodaops.request_log.parts import SCHEMA
from sodaops.request_log.window import Window
from sodaops.serving.batcher import ModelOutput
from sodaops.serving.log_rows import prediction_fields

REPO = Path(__file__).resolve().parents[1]
N_WINDOWS, N_ROWS = 100, 200
MIXES = (0.0, 0.1, 0.25, 0.5, 1.0)
_PART = SCHEMA.set(0, pa.field("time", pa.timestamp("us", "UTC")))
# Run in a process of its own, which measures itself without the imports.
_EVIDENTLY = """
import json, sys, time
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset
frames = [pd.read_parquet(path, columns=["text"]) for path in sys.argv[1:3]]
definition = DataDefinition(text_columns=["text"])
began = time.perf_counter()
Report([DataDriftPreset(columns=["text"])]).run(*(Dataset.from_pandas(frame, definition) for frame in reversed(frames))).json()
print(json.dumps(time.perf_counter() - began))
"""
_OURS = """
import json, sys, time
import evidently, evidently.metrics
from sodaops.config.schema import DriftConfig
from sodaops.drift.check import check_drift
began = time.perf_counter()
check_drift(DriftConfig(last=10**6, max_rows=10**6, output_dir=sys.argv[3]), sys.argv[1], sys.argv[2])
print(json.dumps(time.perf_counter() - began))
"""


def logged(predictor: Predictor, texts: list[str]) -> pa.Table:
    """The rows that the service would log."""
    cleaned = [predictor.clean(text) for text in texts]
    cleaned = [text for text in cleaned if text]
    rows: dict[int, dict] = {}
    for places, output in predictor.batches(cleaned):
        sketches = predictor.sketch(output.embeddings)
        for i, place in enumerate(places.tolist()):
            ids, own = predictor.encode(cleaned[place]), ModelOutput(output.probs[i], sketches[i])
            answer = predictor.prediction(own.probs)
            rows[place] = prediction_fields(predictor, cleaned[place], ids, answer, own) | {"text": cleaned[place]}
    when = datetime(2026, 11, 20, tzinfo=UTC)
    shared = {"bundle_id": predictor.info.bundle_id, "place": 0}
    every = [{**shared, "time": when + timedelta(seconds=i), "request_id": str(i), **rows[i]} for i in range(len(cleaned))]
    return pa.Table.from_pylist(every, schema=_PART)


def power(bundle: Path, tweets: pa.Table, reviews: pa.Table) -> list[str]:
    """How many of the windows are flagged, by the share of reviews in them."""
    info = Predictor(bundle).info
    known, settings, rng = reference.read_reference(bundle, info), DriftConfig(), np.random.default_rng(0)
    lines = [
        "| reviews in the window | called drifted | by the embeddings | by single features | named |",
        "| --- | --- | --- | --- | --- |",
    ]
    for mix in MIXES:
        calls, features, names = 0, Counter(), Counter()
        for _ in tqdm(range(N_WINDOWS), desc=f"{mix:.0%} reviews", leave=False):
            n_reviews = round(N_ROWS * mix)
            sides = [(tweets, N_ROWS - n_reviews), (reviews, n_reviews)]
            rows = pa.concat_tables([side.take(rng.permutation(len(side))[:n]) for side, n in sides])
            result, _ = measure_drift(settings, info, known, Window(rows, len(rows)))
            calls += result.drifted
            drifted = {feature.name for feature in result.features if feature.drifted}
            features["embedding"] += "embedding" in drifted
            features["single"] += bool(drifted - {"embedding"})
            names.update(cause.name for cause in result.causes)
        causes = ", ".join(f"{name} {n}" for name, n in names.most_common()) or "–"
        lines.append(f"| {mix:.0%} | {calls} % | {features['embedding']} % | {features['single']} % | {causes} |")
    return lines


def seconds(script: str, *arguments: str) -> float:
    """The time that a script measures in its own process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def speed(bundle: Path, tweets: pa.Table, reviews: pa.Table, rounds: int) -> list[str]:
    """Seconds for a window, beside evidently's report on the text column of as many rows; the sides take turns."""
    train = pq.read_table(REPO / "data/processed/tweets/train.parquet", columns=["text"])
    lines = ["| requests | ours, everything | evidently's report on a text column | |", "| --- | --- | --- | --- |"]
    every, rng = pa.concat_tables([tweets, reviews]), np.random.default_rng(0)
    for n in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            rows = every.take(rng.integers(0, len(every), n))
            digests = pc.binary_join_element_wise(rows["text_sha256"], pa.array([f"{i:08}" for i in range(n)]), "-")
            rows = rows.set_column(rows.column_names.index("text_sha256"), "text_sha256", digests)  # each a text of its own
            log = Path(folder) / "log/date=2026-11-20"
            log.mkdir(parents=True)
            for part in range(0, n, 2000):
                pq.write_table(rows.slice(part, 2000), log / f"{part:08}.parquet", compression="zstd")
            pq.write_table(rows.select(["text"]), f"{folder}/current.parquet")
            pq.write_table(train.take(rng.integers(0, len(train), n)), f"{folder}/reference.parquet")
            ours, evidently = [], []
            for _ in range(rounds):
                ours.append(seconds(_OURS, str(bundle), f"{folder}/log", f"{folder}/out"))
                evidently.append(seconds(_EVIDENTLY, f"{folder}/reference.parquet", f"{folder}/current.parquet"))
        own_s, evidently_s = float(np.median(ours)), float(np.median(evidently))
        lines.append(f"| {n:,} | {own_s:.2f} s | {evidently_s:.2f} s | {evidently_s / own_s:.1f} times |")
    return lines


def main() -> None:
    """Runs the benchmark, prints the results, and writes the page that `--write` names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=REPO / "artifacts/train/bundle")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    asked = parser.parse_args()
    if not asked.bundle.exists():
        raise SystemExit(f"{asked.bundle}: not there; train it with `make repro`.")
    predictor = Predictor(asked.bundle)
    tweets = logged(predictor, pq.read_table(REPO / "data/processed/tweets/test.parquet")["text"].to_pylist())
    reviews = logged(predictor, pyarrow.csv.read_csv(REPO / "data/raw/amazon_reviews.csv")["text"].to_pylist())
    began = time.perf_counter()
    text = "\n".join(
        [
            "# Drift, measured",
            "",
            f"Default settings, {N_WINDOWS} windows of {N_ROWS} requests per row, drawn at random from {len(tweets)} tweets of "
            f"the test split and {len(reviews)} product reviews. The windows of a row overlap.",
            "",
            *power(asked.bundle, tweets, reviews),
            "",
            f"Time without evidently's import, medians of {asked.rounds} interleaved runs. Ours includes reading the log and "
            "writing all reports; evidently's is its drift preset on the raw texts, without writing.",
            "",
            *speed(asked.bundle, tweets, reviews, asked.rounds),
            "",
        ]
    )
    print(text)
    print(f"({time.perf_counter() - began:.0f} s)")
    if asked.write:
        asked.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
