"""All measurements of answers that can be trusted: abstention, label errors, quality without labels, shadow and canary.

    python benchmarks/trust.py [--seeds N] [--part NAME]... [--folder FOLDER]

It trains the default model with each seed on the tweets, and one with three layers as the challenger, then runs
benchmarks/trust_abstention.py, trust_labels.py, trust_quality.py and trust_shadow.py (which needs wrk and a quiet machine).
Trainings and folds that the folder has are not repeated.
"""

import argparse
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def run(*command: object) -> None:
    """Runs Python in the repository."""
    subprocess.run([sys.executable, *map(str, command)], cwd=REPO, check=True)


def train(folder: Path, *keys: str) -> Path:
    """The bundle of a training, which may exist already."""
    if not (folder / "evaluation/metrics.json").exists():
        run("train.py", f"run_dir={folder}", "logger=none", "evaluate.baselines=false", *keys)
    return folder / "bundle"


def main() -> None:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--part", action="append", choices=("abstention", "labels", "quality", "shadow"), help="may be repeated"
    )
    parser.add_argument("--folder", type=Path, default=REPO / "outputs/trust")
    args = parser.parse_args()
    bundles = [train(args.folder / f"seed-{seed}", f"seed={seed}") for seed in range(args.seeds)]
    student = train(args.folder / "student", "model.layers=3")
    parts = {
        "abstention": [bundles[0], "--splits", REPO / "data/processed/tweets"],
        "labels": ["--seeds", args.seeds, "--folder", args.folder / "labels", "model.layers=3"],
        "quality": ["--bundles", *bundles],
        "shadow": [bundles[0], student],
    }
    for name in args.part or parts:
        print(f"\n# {name}\n", flush=True)
        run(REPO / f"benchmarks/trust_{name}.py", *parts[name])


if __name__ == "__main__":
    main()
