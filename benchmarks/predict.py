"""Predicting a table: `sodaops predict` end to end, the transformers pipeline, and the ONNX Runtime call alone.

Each side runs in a process of its own, in turns, on the same texts: tweets with rotated words, so that every text is
distinct and lengths stay what they are. The pipeline and the bare call are timed from when the model is loaded and the texts
are in memory; `sodaops predict` from before the bundle is opened until the output is on disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from serving.bench import write_checkpoint
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
BATCH_SIZES = (8, 16, 32, 64)
# The scripts of the processes; each prints its seconds and its peak memory in kB.
_HEAD = """
import json, sys, time
import pyarrow.parquet as pq
options = json.loads(sys.argv[1])
def done(seconds):
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([seconds, int(peak)]))
"""
_OURS = """
from sodaops.inference.table import bulk_predictor, predict_table
began = time.perf_counter()
predict_table(bulk_predictor(options["bundle"], options["variant"]), options["table"], "text", options["output"])
done(time.perf_counter() - began)
"""
_CALL = """
from concurrent.futures import ThreadPoolExecutor
from sodaops.inference.table import CHUNK_ROWS, bulk_predictor
from sodaops.data.tokens import pad
from sodaops.data.workers import n_cores
predictor = bulk_predictor(options["bundle"], options["variant"])
texts = [predictor.clean(text) for text in pq.read_table(options["table"])["text"].to_pylist()]
feeds = []
for first in range(0, len(texts), CHUNK_ROWS):
    for _, rows in reversed(predictor.plan(texts[first : first + CHUNK_ROWS])):
        feeds.append(dict(zip(("input_ids", "attention_mask"), pad(rows, predictor.info.pad_token_id))))
with ThreadPoolExecutor(n_cores()) as pool:
    run = lambda feed: predictor._session.run(["logits", "embeddings"], feed)
    list(pool.map(run, feeds[:10]))
    began = time.perf_counter()
    list(pool.map(run, feeds))
    done(time.perf_counter() - began)
"""
_PIPELINE = """
from transformers import pipeline
from transformers.utils import logging
logging.set_verbosity_error()
classify = pipeline("text-classification", model=options["checkpoint"])
texts = pq.read_table(options["table"])["text"].to_pylist()
batching = {} if options["batch_size"] is None else {"batch_size": options["batch_size"]}
classify(texts[:32], **batching)
began = time.perf_counter()
answers = classify(texts, **batching)
done(time.perf_counter() - began)
assert len(answers) == len(texts)
"""


def write_texts(path: Path, n_rows: int) -> None:
    """Writes distinct texts to a Parquet table."""
    tweets = pa.csv.read_csv(REPO / "data/raw/tweets.csv")["text"].to_pylist()
    words = [tweet.split() for tweet in tweets]
    texts: dict[str, None] = {}
    for i in range(20 * n_rows):
        tweet, turn = words[i % len(words)], i // len(words)
        if turn < len(tweet) and len(texts) < n_rows:
            texts[" ".join(tweet[turn:] + tweet[:turn])] = None
    if len(texts) < n_rows:
        raise SystemExit(f"--rows {n_rows}: the tweets give only {len(texts)} distinct texts")
    pq.write_table(pa.table({"id": range(n_rows), "text": list(texts)}), path)


def run_side(script: str, options: dict) -> tuple[float, float]:
    """Runs a script in a process; returns its seconds and its peak memory in MB."""
    command = [sys.executable, "-W", "ignore", "-c", _HEAD + script, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak_kb = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak_kb / 1024


def sides(bundle: Path, scratch: Path, n_rows: int, n_slow: int) -> dict[str, tuple[str, dict, int]]:
    """Name -> the script, its options, and how many texts it predicts."""
    shared = {"bundle": str(bundle), "table": str(scratch / "texts.parquet"), "output": str(scratch / "out.parquet")}
    few = {"checkpoint": str(scratch / "hf"), "table": str(scratch / "few.parquet")}
    by_name = {}
    for variant in ("int8", "float32"):
        by_name[f"ONNX Runtime call alone, {variant}"] = (_CALL, {**shared, "variant": variant}, n_rows)
        by_name[f"sodaops predict, {variant}"] = (_OURS, {**shared, "variant": variant}, n_rows)
    by_name["pipeline, defaults"] = (_PIPELINE, {**few, "batch_size": None}, n_slow)
    for size in BATCH_SIZES:
        by_name[f"pipeline, batch_size={size}"] = (_PIPELINE, {**few, "batch_size": size}, n_slow)
    return by_name


def render_table(rates: dict[str, list[float]], peaks: dict[str, list[float]], n_rows: int, n_slow: int, rounds: int) -> str:
    """The results as a Markdown page."""
    rate = {name: statistics.median(values) for name, values in rates.items()}
    ours = {variant: rate[f"sodaops predict, {variant}"] for variant in ("int8", "float32")}
    best = max((name for name in rate if "batch_size" in name), key=rate.__getitem__)
    lines = [
        "# Predicting a table",
        "",
        f"{n_rows:,} tweets in Parquet (the pipeline: the first {n_slow:,} of them), medians of {rounds} rounds in which the "
        f"sides take turns, each in a process of its own. {len(os.sched_getaffinity(0))} cores ({platform.machine()}), "
        f"onnxruntime {version('onnxruntime')}, torch {version('torch')}, transformers {version('transformers')}. "
        "`sodaops predict` is timed from opening the bundle to the output on disk; the others with the model loaded and warm, "
        "and the texts (the bare call: the padded batches) in memory. The pipeline runs the bundle's encoder in its default, "
        "float32.",
        "",
        "| | texts/s | fastest and slowest round | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for name, value in rate.items():
        span = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        lines.append(f"| {name} | {value:.0f} | {span} | {statistics.median(peaks[name]):.0f} MB |")
    lines += [
        "",
        *(
            f"- {variant}: {ours[variant] / rate[f'ONNX Runtime call alone, {variant}']:.0%} of the bare call's speed; "
            f"{ours[variant] / rate[best]:.1f} times the pipeline's best ({best}); "
            f"{ours[variant] / rate['pipeline, defaults']:.1f} times the pipeline with its defaults."
            for variant in ours
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the results, and writes them to --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=REPO / "artifacts/train/bundle")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--pipeline-rows", type=int, default=1_000, help="how many of them the pipeline predicts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a Markdown file for the results")
    arguments = parser.parse_args()
    if not arguments.bundle.exists():
        raise SystemExit(f"{arguments.bundle}: no such folder; train it with `make repro`.")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        n_slow = min(arguments.rows, arguments.pipeline_rows)
        write_texts(scratch / "texts.parquet", arguments.rows)
        pq.write_table(pq.read_table(scratch / "texts.parquet").slice(0, n_slow), scratch / "few.parquet")
        write_checkpoint(arguments.bundle, scratch / "hf")
        compared = sides(arguments.bundle.resolve(), scratch, arguments.rows, n_slow)
        rates: dict[str, list[float]] = {name: [] for name in compared}
        peaks: dict[str, list[float]] = {name: [] for name in compared}
        with tqdm(total=arguments.rounds * len(compared), desc="measuring", unit="side") as bar:
            for _ in range(arguments.rounds):
                for name, (script, options, n_texts) in compared.items():
                    seconds, peak_mb = run_side(script, options)
                    rates[name].append(n_texts / seconds)
                    peaks[name].append(peak_mb)
                    bar.update()
    text = render_table(rates, peaks, arguments.rows, n_slow, arguments.rounds)
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
