"""Trains the default configuration with three seeds and prints the README's table of results.

    python benchmarks/quality.py [KEY=VALUE ...]

Each seed is a `python train.py` of its own. The test split is measured once for each seed, and nothing is chosen by it.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SEEDS = (0, 1, 2)
METRICS = ("macro_f1", "accuracy", "weighted_f1", "ece")
REPO = Path(__file__).resolve().parents[1]


def main(overrides: list[str]) -> None:
    """Trains, reads each run's metrics.json, and prints a Markdown table."""
    folder = REPO / "outputs" / time.strftime("quality-%Y%m%d-%H%M%S")
    results, baselines = {}, {}
    for seed in SEEDS:
        run_dir = folder / f"seed-{seed}"
        start_s = time.perf_counter()
        command = [sys.executable, "train.py", f"seed={seed}", f"run_dir={run_dir}", *overrides]
        subprocess.run(command, cwd=REPO, check=True)
        metrics = json.loads((run_dir / "evaluation/metrics.json").read_text(encoding="utf-8"))["test"]
        baselines = metrics["baselines"]
        val = json.loads((run_dir / "bundle/bundle.json").read_text(encoding="utf-8"))["metrics"]["val"]["macro_f1"]
        results[seed] = {
            **{name: metrics[name] for name in METRICS},
            "val": val,
            "interval": metrics["interval_95"]["macro_f1"],
        }
        results[seed]["seconds"] = time.perf_counter() - start_s
    print_table(results, baselines)


def print_table(results: dict[int, dict], baselines: dict[str, dict[str, float]]) -> None:
    """Prints a row for each seed, their mean and standard deviation, and the baselines."""
    print("\n| seed | val macro-F1 | test macro-F1 (95 % interval) | accuracy | weighted F1 | ECE | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seed, m in results.items():
        interval = f"({m['interval']['low']:.3f} to {m['interval']['high']:.3f})"
        rest = f"{m['accuracy']:.3f} | {m['weighted_f1']:.3f} | {m['ece']:.3f} | {m['seconds']:.0f}"
        print(f"| {seed} | {m['val']:.3f} | {m['macro_f1']:.3f} {interval} | {rest} |")
    columns = {name: [m[name] for m in results.values()] for name in ("val", *METRICS)}
    shown = {name: f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for name, v in columns.items()}
    order = [shown[name] for name in ("val", "macro_f1", "accuracy", "weighted_f1", "ece")]
    print(f"| **mean ± sd** | {order[0]} | **{order[1]}** | {' | '.join(order[2:])} | |")
    for name, key in (("TF-IDF + logistic regression", "tfidf"), ("most frequent label", "majority")):
        m = baselines[key]
        print(f"| {name} | | {m['macro_f1']:.3f} | {m['accuracy']:.3f} | {m['weighted_f1']:.3f} | | |")


if __name__ == "__main__":
    main(sys.argv[1:])
