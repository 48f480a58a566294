"""A table of texts, answered: ours end to end, the transformers pipeline, and the ONNX Runtime call alone.

Every side runs in a process of its own, in turns, on the same texts: tweets whose words are rotated, so that each text is
there once and lengths stay what they are. The pipeline's clock and the bare call's begin when the model is loaded and the
texts are in memory; ours begins before the bundle is opened and ends when the output is on the disk.
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
# What each process begins with, and what it runs; it prints seconds, and the peak of its own memory in kB.
_HEAD = """
import json, sys, time
import pyarrow.parquet as pq
asked = json.loads(sys.argv[1])
def done(seconds):
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([seconds, int(peak)]))
"""
_OURS = """
from sodaops.inference.table import bulk_predictor, predict_table
began = time.perf_counter()
predict_table(bulk_predictor(asked["bundle"], asked["variant"]), asked["table"], "text", asked["output"])
done(time.perf_counter() - began)
"""
_CALL = """
from concurrent.futures import ThreadPoolExecutor
from sodaops.inference.table import CHUNK_ROWS, bulk_predictor
from sodaops.data.tokens import pad
from sodaops.data.workers import n_cores
predictor = bulk_predictor(asked["bundle"], asked["variant"])
texts = [predictor.clean(text) for text in pq.read_table(asked["table"])["text"].to_pylist()]
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
classify = pipeline("text-classification", model=asked["checkpoint"])
texts = pq.read_table(asked["table"])["text"].to_pylist()
options = {} if asked["batch_size"] is None else {"batch_size": asked["batch_size"]}
classify(texts[:32], **options)
began = time.perf_counter()
answers = classify(texts, **options)
done(time.perf_counter() - began)
assert len(answers) == len(texts)
"""


def write_texts(path: Path, n_rows: int) -> None:
    """Writes texts that are different from each other."""
    tweets = pa.csv.read_csv(REPO / "data/raw/tweets.csv")["text"].to_pylist()
    words = [tweet.split() for tweet in tweets]
    texts: dict[str, None] = {}
    for i in range(20 * n_rows):
        mine, turn = words[i % len(words)], i // len(words)
        if turn < len(mine) and len(texts) < n_rows:
            texts[" ".join(mine[turn:] + mine[:turn])] = None
    if len(texts) < n_rows:
        raise SystemExit(f"--rows {n_rows}: the tweets give {len(texts)} different texts only")
    pq.write_table(pa.table({"id": range(n_rows), "text": list(texts)}), path)


def measured(script: str, asked: dict) -> tuple[float, float]:
    """Seconds and megabytes of a process."""
    command = [sys.executable, "-W", "ignore", "-c", _HEAD + script, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak_kb = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak_kb / 1024


def sides(bundle: Path, scratch: Path, n_rows: int, n_slow: int) -> dict[str, tuple[str, dict, int]]:
    """Name -> the script, what it is asked, and how many texts it answers."""
    shared = {"bundle": str(bundle), "table": str(scratch / "texts.parquet"), "output": str(scratch / "out.parquet")}
    few = {"checkpoint": str(scratch / "hf"), "table": str(scratch / "few.parquet")}
    found = {}
    for variant in ("int8", "float32"):
        found[f"ONNX Runtime call alone, {variant}"] = (_CALL, {**shared, "variant": variant}, n_rows)
        found[f"sodaops predict, {variant}"] = (_OURS, {**shared, "variant": variant}, n_rows)
    found["pipeline, defaults"] = (_PIPELINE, {**few, "batch_size": None}, n_slow)
    for size in BATCH_SIZES:
        found[f"pipeline, batch_size={size}"] = (_PIPELINE, {**few, "batch_size": size}, n_slow)
    return found


def render(rates: dict[str, list[float]], peaks: dict[str, list[float]], n_rows: int, n_slow: int, rounds: int) -> str:
    """The page."""
    rate = {name: statistics.median(values) for name, values in rates.items()}
    ours = {variant: rate[f"sodaops predict, {variant}"] for variant in ("int8", "float32")}
    best = max((name for name in rate if "batch_size" in name), key=rate.__getitem__)
    lines = [
        "# Answering a table, measured",
        "",
        f"{n_rows:,} tweets in Parquet (the pipeline: the first {n_slow:,} of them), medians of {rounds} rounds in which the "
        f"sides take turns, each in a process of its own. {len(os.sched_getaffinity(0))} cores ({platform.machine()}), "
        f"onnxruntime {version('onnxruntime')}, torch {version('torch')}, transformers {version('transformers')}. Ours: from "
        "opening the bundle to the output on the disk. The others: the model loaded and warm, the texts, or for the bare call "
        "the padded token batches, in memory. The pipeline's encoder is the bundle's; in float32, as it is by default.",
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
            f"{ours[variant] / rate[best]:.1f} times the {best}, its best; "
            f"{ours[variant] / rate['pipeline, defaults']:.1f} times the pipeline with its defaults."
            for variant in ours
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes where told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=REPO / "artifacts/train/bundle")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--pipeline-rows", type=int, default=1_000, help="the pipeline answers so many of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    asked = parser.parse_args()
    if not asked.bundle.exists():
        raise SystemExit(f"{asked.bundle}: not there; train it with `make repro`.")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        n_slow = min(asked.rows, asked.pipeline_rows)
        write_texts(scratch / "texts.parquet", asked.rows)
        pq.write_table(pq.read_table(scratch / "texts.parquet").slice(0, n_slow), scratch / "few.parquet")
        write_checkpoint(asked.bundle, scratch / "hf")
        compared = sides(asked.bundle.resolve(), scratch, asked.rows, n_slow)
        rates: dict[str, list[float]] = {name: [] for name in compared}
        peaks: dict[str, list[float]] = {name: [] for name in compared}
        with tqdm(total=asked.rounds * len(compared), desc="measuring", unit="side") as bar:
            for _ in range(asked.rounds):
                for name, (script, question, n_texts) in compared.items():
                    seconds, peak_mb = measured(script, question)
                    rates[name].append(n_texts / seconds)
                    peaks[name].append(peak_mb)
                    bar.update()
    text = render(rates, peaks, asked.rows, n_slow, asked.rounds)
    print(text)
    if asked.write:
        asked.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
