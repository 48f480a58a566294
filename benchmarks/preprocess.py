"""Speed and memory of preprocessing, from ten thousand rows to ten million.

The table holds the texts of data/raw, each made distinct by a number; every hundredth row repeats the one before. `sodaops
preprocess` is compared with the same steps in pandas: read, clean, drop repeats, split by hash, write. Each runs in a process
of its own, start-up included. Memory is the sampled resident memory of that process and its children. Cleaning alone is
compared with pandas.Series.apply, on the original texts. The runs alternate.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
from matplotlib import pyplot as plt
from tqdm import tqdm

from sodaops.data.parts import PART_ROWS
from sodaops.text.bulk_cleaning import clean_many
from sodaops.text.cleaning import POLICIES, clean

matplotlib.use("Agg")
REPO = Path(__file__).resolve().parents[1]
TABLES = {"tweets": REPO / "data/raw/tweets.csv", "reviews": REPO / "data/raw/amazon_reviews.csv"}
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
N_CLEANED = 200_000  # texts cleaned in a round
SAMPLED_S = 0.02
OURS = "import sys; from sodaops.cli import main; sys.exit(main(sys.argv[1:]))"
PANDAS = """
import sys
from pathlib import Path
import pandas as pd
from sodaops.data.splits import assign_split
from sodaops.text.cleaning import clean
rows = pd.read_csv(sys.argv[1], dtype=str, keep_default_na=False)
rows["text"] = rows["text"].apply(clean)
rows = rows[rows["text"] != ""].drop_duplicates("text")
rows["label_id"] = rows["label"].map({label: i for i, label in enumerate(sorted(rows["label"].unique()))})
for name, part in rows.groupby(rows["text"].apply(assign_split)):
    Path(sys.argv[2]).mkdir(exist_ok=True)
    part.to_parquet(f"{sys.argv[2]}/{name}.parquet", compression="zstd")
"""


@dataclass
class Measured:
    """One run."""

    seconds: float
    peak_mb: float


def texts_of(path: Path) -> list[tuple[str, str]]:
    """Texts and labels of a table."""
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]


def generate(path: Path, n_rows: int) -> None:
    """Writes a table of texts that are distinct except for one in a hundred."""
    rows = [row for table in TABLES.values() for row in texts_of(table)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in tqdm(range(n_rows), desc=f"{n_rows:,} rows", unit="row", leave=False, delay=2):
            i -= i % 100 == 99
            text, label = rows[i % len(rows)]
            writer.writerow([f"{text} {i}", label])


def measured(command: Sequence[str]) -> Measured:
    """Runs a command and samples its memory."""
    began, peak = time.perf_counter(), 0
    running = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    parent = psutil.Process(running.pid)
    while running.poll() is None:
        try:
            peak = max(peak, sum(one.memory_info().rss for one in [parent, *parent.children(recursive=True)]))
        except psutil.NoSuchProcess:  # a child that has ended
            continue
        time.sleep(SAMPLED_S)
    seconds = time.perf_counter() - began
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}: {running.stderr.read()}")
    return Measured(seconds, peak / 2**20)


def pipelines(sizes: Sequence[int], pandas_rows: int, rounds: int) -> dict[str, dict[int, Measured]]:
    """Implementation -> rows -> medians; prints the hashes of the splits."""
    medians: dict[str, dict[int, Measured]] = {"sodaops": {}, "pandas": {}}
    for n_rows in sizes:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            table = Path(folder) / "t.csv"
            generate(table, n_rows)
            keys = ["data=csv", f"data.path={table}", f"evaluate.splits_dir={folder}/splits"]
            commands = {"sodaops": [sys.executable, "-c", OURS, "preprocess", *keys]}
            if n_rows <= pandas_rows:
                commands["pandas"] = [sys.executable, "-c", PANDAS, str(table), f"{folder}/pandas"]
            runs: dict[str, list[Measured]] = {side: [] for side in commands}
            for _ in range(rounds):
                for side, command in commands.items():
                    runs[side].append(measured(command))
            manifest = json.loads((Path(folder) / "splits/manifest.json").read_text())
        for side, each in runs.items():
            median = Measured(float(np.median([r.seconds for r in each])), float(np.median([r.peak_mb for r in each])))
            medians[side][n_rows] = median
            print(f"{n_rows:,} rows, {side}: {median.seconds:.1f} s, {median.peak_mb:.0f} MB", flush=True)
        print({split: entry["sha256"] for split, entry in manifest["splits"].items()}, flush=True)
    return medians


def seconds(call: Callable[[], object]) -> float:
    """The duration of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cleaned_by(parts: Sequence[pa.StringArray], policy: str) -> None:
    """Cleans parts."""
    for part in parts:
        clean_many(part, policy=policy)


def cleaning(rounds: int) -> list[str]:
    """A Markdown table of the speed of cleaning, by texts and policy."""
    lines = [
        "| texts | policy | one core | pandas apply | one core is |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, path in TABLES.items():
        texts = [text for text, _ in texts_of(path)]
        texts *= N_CLEANED // len(texts)
        array, series = pa.array(texts), pd.Series(texts)
        parts = [array.slice(start, PART_ROWS) for start in range(0, len(array), PART_ROWS)]
        for policy in POLICIES:
            sides = partial(cleaned_by, parts, policy), partial(series.apply, clean, policy=policy)
            rates = [[len(texts) / seconds(side) for side in sides] for _ in range(rounds)]
            one, other = np.median(rates, axis=0)
            lines.append(f"| {name} | {policy} | {one:,.0f} /s | {other:,.0f} /s | {one / other:.1f} times |")
    return lines


def plot(medians: dict[str, dict[int, Measured]], path: Path) -> None:
    """Plots rows per second and memory by the size of the table."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for side, marker in (("sodaops", "o-"), ("pandas", "s--")):
        sizes = list(medians[side])
        speed.loglog(sizes, [n / medians[side][n].seconds for n in sizes], marker, label=side)
        memory.loglog(sizes, [medians[side][n].peak_mb for n in sizes], marker, label=side)
    for axes, title in ((speed, "rows per second"), (memory, "peak resident memory in MB, all processes")):
        axes.set(title=title, xlabel="rows")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(medians: dict[str, dict[int, Measured]], cleaned: Sequence[str], rounds: int) -> str:
    """The page as Markdown."""
    lines = ["| rows | sodaops | | | pandas | | | |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += ["| | time | rows per second | peak memory | time | rows per second | peak memory | faster |"]
    for n_rows, ours in medians["sodaops"].items():
        other = medians["pandas"].get(n_rows)
        cells = [
            f"{side.seconds:.1f} s | {n_rows / side.seconds:,.0f} | {side.peak_mb:,.0f} MB" for side in (ours, other) if side
        ]
        lines.append(
            f"| {n_rows:,} | {' | '.join(cells)} | " + (f"{other.seconds / ours.seconds:.1f} times |" if other else "| | | |")
        )
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, pyarrow {pa.__version__}, pandas {pd.__version__}"
    about = " ".join(__doc__.split("\n\n")[1].split())
    return "\n".join(
        [
            "# Preprocessing, measured", "", f"{about} Medians of {rounds} rounds; {machine}.", "", *lines, "",
            "![rows per second and memory by the size of the table](preprocessing.png)", "",
            f"Cleaning alone, {N_CLEANED:,} texts in parts of {PART_ROWS:,}:", "", *cleaned, "",
        ]
    )  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-rows", type=int, default=SIZES[-1], help="leave out larger tables")
    parser.add_argument("--pandas-rows", type=int, default=1_000_000, help="largest table for pandas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a Markdown file; preprocessing.png goes beside it")
    args = parser.parse_args()
    cleaned = cleaning(args.rounds)
    print("\n".join(cleaned), flush=True)
    medians = pipelines([n for n in SIZES if n <= args.max_rows], args.pandas_rows, args.rounds)
    text = report(medians, cleaned, args.rounds)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
        plot(medians, args.write.parent / "preprocessing.png")


if __name__ == "__main__":
    main()
