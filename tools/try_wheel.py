"""Trains and predicts with an installed wheel, outside the repository: ``python tools/try_wheel.py dist/NAME.whl``."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DATA = [
    "data=csv", f"data.path={REPO / 'data/raw/tweets.csv'}", "data.label_column=sentiment", "data.max_rows=600",
    "model=tiny", "trainer.max_epochs=2", "evaluate.n_bootstrap=200", "evaluate.baselines=false", "logger=none",
]  # fmt: skip


def main(wheel: str) -> int:
    """Returns 1, and prints why, when the wheel does not do what the repository does."""
    with tempfile.TemporaryDirectory() as folder:
        problems = check(Path(wheel).resolve(), Path(folder))
    print(*problems or [f"{Path(wheel).name} trains and predicts"], sep="\n")
    return 1 if problems else 0


def check(wheel: Path, folder: Path) -> list[str]:
    """Installs the wheel into one folder and uses it in another; returns what went wrong."""
    site, work = folder / "site", folder / "work"
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=300)
    (work / "conf/optim").mkdir(parents=True)
    (work / "conf/optim/slow.yaml").write_text("defaults: [adamw]\nlr: 1.0e-5\n")
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    imported = run("-c", "import sodaops; print(sodaops.__file__)").stdout.strip()
    if not imported.startswith(str(site)) or not (site / "bin/sodaops").is_file():
        return [f"imported from {imported}, and not from the wheel"]
    done = run("-m", "sodaops.cli", "train", "--config-dir", "conf", "optim=slow", *DATA, "run_dir=run")
    if done.returncode:
        return [f"sodaops train: exit code {done.returncode}", done.stdout]
    files = ("run/evaluation/report.html", "data/processed/csv/train.parquet", "run/bundle/config.yaml")
    problems = [f"{name} was not written" for name in files if not (work / name).is_file()]
    if not problems and "lr: 1.0e-05" not in (work / "run/bundle/config.yaml").read_text(encoding="utf-8"):
        problems.append("--config-dir was not read")
    answer = run("-m", "sodaops.cli", "predict", "run/bundle", "what a day")
    if answer.returncode or "what a day" not in answer.stdout:
        problems.append(f"sodaops predict: exit code {answer.returncode}\n{answer.stdout}")
    return problems


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
