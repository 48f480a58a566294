"""Installed from a built wheel, outside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.slow


def test_the_wheel_works_alone(clone, small_tweets, tmp_path):
    clone(f"python -m build --wheel --outdir {tmp_path / 'dist'}")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    work = tmp_path / "elsewhere"
    (work / "mine/optim").mkdir(parents=True)
    (work / "mine/optim/slow.yaml").write_text("defaults: [adamw]\nlr: 1.0e-5\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )

    assert Path(run("-c", "import sodaops; print(sodaops.__file__)").stdout.strip()).is_relative_to(site)
    data = ["data=csv", f"data.path={small_tweets}", "data.label_column=sentiment"]
    done = run("-m", "sodaops.cli", "train", "--config-dir", "mine", "optim=slow", *data, *TINY, "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert (work / "run/evaluation/report.html").is_file() and (work / "data/processed/csv/train.parquet").is_file()
    assert "lr: 1.0e-05" in (work / "run/bundle/config.yaml").read_text()
    answer = run("-m", "sodaops.cli", "predict", "run/bundle", "what a day")
    assert answer.returncode == 0 and "what a day" in answer.stdout
    assert (site / "bin/sodaops").is_file()
