"""Compares recipes for few rows with the tuned TF-IDF baseline, by cross-validation on train and val; test is not read.

    python benchmarks/small_data.py [--folds N] [--table NAME]... [--recipe NAME]... [KEY=VALUE]...

Each recipe is a `python train.py` for each fold, whose held-out rows stand in for test. A seventh of the other rows is its val.
The table of 50 labels has the sections of Debian's packages with their descriptions, read from `apt-cache dumpavail`.
"""

import argparse
import csv
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RECIPES = {
    "default": [],
    "epochs-3": ["trainer.max_epochs=3"],
    "epochs-10": ["trainer.max_epochs=10", "early_stopping.patience=null"],
    "epochs-30": ["trainer.max_epochs=30", "early_stopping.patience=null"],
    "epochs-30-balanced": ["trainer.max_epochs=30", "early_stopping.patience=null", "loss.class_weights=balanced"],
    "epochs-30-lr-1e-4": ["trainer.max_epochs=30", "early_stopping.patience=null", "optim.lr=1e-4"],
}
Rows = list[tuple[str, str]]  # text, label


def order(text: str) -> str:
    """A number that decides about a row; another one than that of the project's splits."""
    return hashlib.sha256(f"small data {text}".encode()).hexdigest()


def raw_table(name: str, n_rows: int) -> Rows:
    """Rows of train and val of a table in data/raw, without those of its test split."""
    from sodaops.config.compose import compose
    from sodaops.data.preprocess import ensure_splits, read_split

    config = compose([f"data={name}"])
    ensure_splits(config.data, config.splits_dir)
    splits = [read_split(config.splits_dir, split) for split in ("train", "val")]
    rows = [(row["text"], row["label"]) for split in splits for row in split.select(["text", "label"]).to_pylist()]
    return sorted(rows, key=lambda row: order(row[0]))[:n_rows]


def debian_sections(n_rows: int, n_labels: int) -> Rows:
    """Short descriptions of packages with their sections, of the most frequent sections."""
    output = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    packages = [
        dict(re.findall(r"^(Section|Description(?:-en)?): (.+)$", block, re.MULTILINE)) for block in output.split("\n\n")
    ]
    rows = {one.get("Description-en", one.get("Description")): one["Section"] for one in packages if len(one) > 1}
    frequent = {section for section, _ in Counter(sorted(rows.values())).most_common(n_labels)}
    return sorted((row for row in rows.items() if row[1] in frequent), key=lambda row: order(row[0]))[:n_rows]


TABLES = {
    "tweets-100": lambda: raw_table("tweets", 100),
    "tweets-500": lambda: raw_table("tweets", 500),
    "reviews-300": lambda: raw_table("amazon", 300),
    "sections-539": lambda: debian_sections(539, 50),
}


def write_fold(folder: Path, rows: Rows, fold: int, n_folds: int) -> list[str]:
    """Writes a fold's three tables, and returns the keys that name them. Labels that train lacks are left out."""
    test = rows[fold::n_folds]
    rest = [row for i, row in enumerate(rows) if i % n_folds != fold]
    splits = {"train": [row for i, row in enumerate(rest) if i % 7], "val": rest[::7], "test": test}
    labels = {label for _, label in splits["train"]}
    for name, of in splits.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *(row for row in of if row[1] in labels)])
    files = [f"data.files.{name}={folder}/{name}.csv" for name in splits]
    return ["data=csv", "data.path=null", *files, "data.conflicts=drop", f"evaluate.splits_dir={folder}/splits"]


def scores(name: str, recipes: Sequence[str], n_folds: int, overrides: Sequence[str]) -> dict[str, list[float]]:
    """Recipe or baseline -> macro-F1 of each fold."""
    rows, result = TABLES[name](), {}
    for fold in range(n_folds):
        with tempfile.TemporaryDirectory() as temporary:
            data = write_fold(Path(temporary), rows, fold, n_folds)
            for recipe in recipes:
                run_dir = f"{temporary}/{recipe}"
                keys = [*data, f"run_dir={run_dir}", "logger=none", "export.variants=[float32]", *RECIPES[recipe], *overrides]
                subprocess.run([sys.executable, "train.py", *keys], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
                measured = json.loads(Path(run_dir, "evaluation/metrics.json").read_text(encoding="utf-8"))["test"]
                result.setdefault(recipe, []).append(measured["macro_f1"])
            for baseline, values in measured["baselines"].items():
                result.setdefault(baseline, []).append(values["macro_f1"])
    return result


def main() -> None:
    """Prints a Markdown table: a row for each table, the mean macro-F1 of each recipe and baseline, and its spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--table", action="append", choices=TABLES, help="may be repeated; by default all")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="may be repeated; by default all")
    args, overrides = parser.parse_known_args()
    recipes = args.recipe or list(RECIPES)
    columns = [*recipes, "tfidf", "majority"]
    print(f"| table | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name in args.table or TABLES:
        of = scores(name, recipes, args.folds, overrides)
        cells = [f"{statistics.mean(of[key]):.3f} ± {statistics.pstdev(of[key]):.3f}" for key in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
