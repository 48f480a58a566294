"""Compares small models with the default one: quality over seeds, and requests per second.

    python benchmarks/students.py [--seeds N] [--data NAME]... [--folder FOLDER] [KEY=VALUE]...
    python benchmarks/students.py --serve TEACHER STUDENT [--rounds N]

- the default model; the same with `model.layers=3`; and a student of three layers (`experiment=distill`) that learns from all
  seeds of the default, and from the other data set's texts without their labels (tweets, levels: reviews; reviews: tweets)
- with --serve: requests per second of both bundles and of a transformers pipeline at 16 connections, in turns; and the texts
  per second of `sodaops predict`

Nothing is chosen by the test rows: each side predicts them once for each seed. The intervals are those of a paired bootstrap
over the test rows, of the mean over the seeds. KEY=VALUE goes to all sides. The same command with the same ``--folder`` goes on
where it stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

REPO = Path(__file__).resolve().parents[1]
REVIEWS, TWEETS = "data/raw/amazon_reviews.csv", "data/raw/tweets.csv"
DATA = {"tweets": ([], REVIEWS), "amazon": (["amazon"], TWEETS), "levels": (["ordinal"], REVIEWS)}  # experiments, other texts
N_RESAMPLES = 2_000


def train(folder: Path, keys: Sequence[str]) -> dict:
    """Trains, unless it was done; returns metrics.json of the test split, with the seconds and the predicted labels."""
    began = time.perf_counter()
    command = [sys.executable, "train.py", f"run_dir={folder}", "logger=none", "evaluate.baselines=false", *keys]
    if not (took := folder / "seconds.txt").exists():
        subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
        took.write_text(str(time.perf_counter() - began))
    seconds = float(took.read_text())
    measured = json.loads((folder / "evaluation/metrics.json").read_bytes())["test"]
    rows = pq.read_table(folder / "evaluation/predictions.parquet", columns=["label", "predicted"]).to_pydict()
    val = json.loads((folder / "bundle/bundle.json").read_bytes())["metrics"]["val"]["macro_f1"]
    return {**measured, "seconds": seconds, "val": val, "rows": (np.array(rows["label"]), np.array(rows["predicted"]))}


def compare(name: str, seeds: int, overrides: Sequence[str], folder: Path) -> None:
    """Trains all sides on a data set, and prints the table."""
    experiments, unlabelled = DATA[name]
    sides: dict[str, list[dict]] = {"six layers (default)": [], "three layers": [], "three layers, distilled": []}
    default, shallow, student = sides.values()
    for seed in range(seeds):
        keys = [f"experiment=[{','.join(experiments)}]", f"seed={seed}", *overrides]
        default.append(train(folder / f"{name}-default-{seed}", keys))
        shallow.append(train(folder / f"{name}-shallow-{seed}", [*keys, "model.layers=3"]))
    teachers = ",".join(str(folder / f"{name}-default-{seed}/bundle") for seed in range(seeds))
    for seed in range(seeds):
        keys = [
            f"experiment=[{','.join([*experiments, 'distill'])}]",
            f"teacher=[{teachers}]",
            f"data.unlabelled={unlabelled}",
            f"seed={seed}",
            *overrides,
        ]
        student.append(train(folder / f"{name}-student-{seed}", keys))
    print(f"\n## {name}: {len(default[0]['rows'][0])} test rows, {seeds} seeds\n")
    print(f"| | macro-F1 on test | minus the default's (95 % interval) | on val | ECE | seconds |\n{'| --- ' * 6}|")
    for side, runs in sides.items():
        mean = {
            key: statistics.mean(one.get(key, float("nan")) for one in runs) for key in ("macro_f1", "val", "ece", "seconds")
        }
        spread = statistics.stdev(one["macro_f1"] for one in runs) if seeds > 1 else 0.0
        low, high = paired_interval([one["rows"] for one in runs], [one["rows"] for one in default])
        gain = mean["macro_f1"] - statistics.mean(one["macro_f1"] for one in default)
        cell = "" if runs is default else f"{gain:+.4f} ({low:+.4f} to {high:+.4f})"
        print(
            f"| {side} | {mean['macro_f1']:.4f} ± {spread:.4f} | {cell} | {mean['val']:.4f} | {mean['ece']:.3f} | "
            f"{mean['seconds']:.0f} |", flush=True,
        )  # fmt: skip


def paired_interval(own: Sequence[tuple], other: Sequence[tuple]) -> tuple[float, float]:
    """The 95 % interval of the difference of mean macro-F1, over resamples of the rows that both sides share."""
    generator, drawn = np.random.default_rng(0), []
    names = np.unique(own[0][0])
    for _ in range(N_RESAMPLES):
        rows = generator.integers(len(own[0][0]), size=len(own[0][0]))
        means = [statistics.mean(macro_f1(t[rows], p[rows], names) for t, p in side) for side in (own, other)]
        drawn.append(means[0] - means[1])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, names: np.ndarray) -> float:
    """The mean F1 of the labels."""
    hits = [(2 * ((truth == n) & (predicted == n)).sum(), (truth == n).sum() + (predicted == n).sum()) for n in names]
    return float(np.mean([hit / max(both, 1) for hit, both in hits]))


def serve(teacher: Path, student: Path, rounds: int) -> None:
    """Prints the requests per second of both and of the pipeline, and the texts per second of `sodaops predict`."""
    import predict
    from serving import bench

    scratch = bench.ENVS / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    texts = pq.read_table(REPO / "data/processed/tweets/train.parquet")["text"].to_pylist()
    bench.write_scripts(scratch, texts)
    bench.write_checkpoint(teacher, scratch / "hf")
    predict.write_texts(scratch / "texts.parquet", 20_000)
    for env in ("serve", "pipeline"):
        bench.install(env)
    listed = {path: bench.list_servers(path.resolve(), scratch) for path in (teacher, student)}
    servers = {"teacher": listed[teacher][0], "student": listed[student][0], "pipeline": listed[teacher][3]}
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, server in servers.items():
            measured = bench.measure(server, scratch, texts[0], 6)
            for key in ("rps_1", "rps_16", "rps_64", "cold_s", "memory_mb"):
                rates.setdefault(f"{name} {key}", []).append(measured[key])
        for name, bundle in (("teacher", teacher), ("student", student)):
            options = {"bundle": str(bundle), "table": str(scratch / "texts.parquet"), "output": str(scratch / "out.parquet")}
            seconds, _ = predict.run_side(predict._OURS, {**options, "variant": "int8"})
            rates.setdefault(f"{name} predict", []).append(20_000 / seconds)
    for key, values in rates.items():
        print(f"{key}: median {statistics.median(values):.4g}, of {', '.join(f'{value:.4g}' for value in values)}")
    median = {key: statistics.median(values) for key, values in rates.items()}
    for key in ("rps_1", "rps_16", "rps_64", "predict"):
        print(f"student / teacher, {key}: {median[f'student {key}'] / median[f'teacher {key}']:.2f}")
    print(f"student / pipeline, rps_16: {median['student rps_16'] / median['pipeline rps_16']:.1f}")


def main() -> None:
    """Compares the data sets one after the other, or two bundles as services."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", choices=DATA, help="may be repeated; by default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, type=Path, metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=REPO / "outputs" / time.strftime("students-%Y%m%d-%H%M%S"))
    args, overrides = parser.parse_known_args()
    if args.serve:
        serve(*args.serve, args.rounds)
        return
    for name in args.data or DATA:
        compare(name, args.seeds, overrides, args.folder)


if __name__ == "__main__":
    main()
