"""How well `sodaops labels check` finds flipped labels, beside a random ranking and cleanlab.

    python benchmarks/trust_labels.py [--seeds N] [--folder FOLDER] [KEY=VALUE]...

Of the tweets' train and val rows one in ten gets another label: a random one, or the raters' second choice. Each is checked
twice: without the votes, as in most tables; and with them (they stay what the raters said, so they contradict most flips).
Precision at n is the share of flips among the n rows that rank first, n being the number of flips; AUROC is the ranking's.
cleanlab (`pip install cleanlab==2.9.0`; left out if it is missing) ranks the same out-of-fold probabilities; ours also knows
near duplicates and votes. "Votes alone" ranks by them, which is about the best that a model without votes can reach. KEY=VALUE
goes to all checks: model.layers=3 halves the time. Finished folds are kept in the folder: the same command goes on where it
stopped.
"""

import argparse
import csv
import importlib.util
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from sodaops import pipeline
from sodaops.config.compose import compose
from sodaops.data.preprocess import ensure_splits, read_split
from sodaops.io.progress import shown_log
from sodaops.labels.folds import out_of_fold
from sodaops.labels.ranking import rank_labels
from sodaops.tasks.make import make_task

REPO = Path(__file__).resolve().parents[1]
LABELS = ["negative", "neutral", "positive"]
KINDS = ("random", "second choice")


def flip(path: Path, kind: str, seed: int) -> dict[str, str]:
    """Writes the tweets with flipped labels, and returns row number -> the label before. Test rows stay as they are."""
    config = compose(["data=tweets", f"evaluate.splits_dir={path.parent / 'splits'}"])
    ensure_splits(config.data, config.splits_dir)
    known = [row for split in ("train", "val") for row in read_split(config.splits_dir, split)["row"].to_pylist()]
    generator, flipped = np.random.default_rng(seed), {}
    with open(REPO / "data/raw/tweets.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number in generator.permutation(sorted(known))[: len(known) // 10].tolist():
        row = rows[number - 1]
        others = [label for label in LABELS if label != row["sentiment"]]
        votes = [int(row[f"votes_{label}"]) + generator.random() * 0.5 for label in others]
        flipped[number] = row["sentiment"]
        row["sentiment"] = str(generator.choice(others)) if kind == "random" else others[int(np.argmax(votes))]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return flipped


def measure(folder: Path, kind: str, seed: int, votes: bool, overrides: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Ranking -> precision at n and AUROC."""
    folder.mkdir(parents=True, exist_ok=True)
    flipped = flip(folder / "tweets.csv", kind, seed)
    more = [] if votes else ["data.vote_columns=null"]
    keys = ["data=tweets", f"data.path={folder / 'tweets.csv'}", "data.added=null", f"seed={seed}", *more, *overrides]
    config = compose([*keys, f"evaluate.splits_dir={folder / ('with' if votes else 'without')}"])
    task = make_task(config.task)
    manifest = ensure_splits(config.data, config.splits_dir, task)
    table, probs = out_of_fold(config, manifest, pipeline.train)
    is_known = np.array(table["split"].to_pylist()) != "test"
    truth = task.truth(table)
    is_flipped = np.isin(table["row"].to_numpy(), list(flipped))[is_known]
    scores = {"ours": rank_labels(table, probs, truth, config.labels.near).scores[is_known]}
    scores["random"] = np.random.default_rng(seed).random(len(is_flipped))
    if votes:
        counts = np.array(table["votes"].to_pylist(), float)[is_known]
        given = np.eye(len(LABELS), dtype=bool)[truth[is_known]]
        scores["votes alone"] = (np.where(given, -1, counts).max(1) - counts[given]) / counts.sum(1)
    if importlib.util.find_spec("cleanlab"):
        from cleanlab.rank import get_label_quality_scores

        for method in ("self_confidence", "normalized_margin"):
            scores[f"cleanlab, {method}"] = -get_label_quality_scores(truth[is_known], probs[is_known], method=method)
    found = {}
    for name, of in scores.items():
        first = np.argsort(-of, kind="stable")[: is_flipped.sum()]
        found[name] = (float(is_flipped[first].mean()), float(roc_auc_score(is_flipped, of)))
    return found


def main() -> None:
    """Prints a table of both kinds of flips, without and with votes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=REPO / "outputs/trust_labels")
    parser.add_argument("--flips", action="append", choices=KINDS, help="may be repeated; by default both")
    parser.add_argument("--votes", action="append", choices=("without", "with"), help="likewise")
    args, overrides = parser.parse_known_args()
    print("| flips | votes | ranking | precision at n | AUROC |\n| --- | --- | --- | --- | --- |", flush=True)
    for kind in args.flips or KINDS:
        for votes in args.votes or ("without", "with"):
            began = time.perf_counter()
            with shown_log():
                seeds = range(args.seeds)
                runs = [measure(args.folder / f"{kind}-{seed}", kind, seed, votes == "with", overrides) for seed in seeds]
            for name in runs[0]:
                cells = []
                for i in range(2):
                    values = [run[name][i] for run in runs]
                    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.3f}{spread}")
                print(f"| {kind} | {votes} | {name} | {' | '.join(cells)} |", flush=True)
            print(f"| {kind} | {votes} | seconds | {(time.perf_counter() - began) / args.seeds:.0f} | |", flush=True)


if __name__ == "__main__":
    main()
