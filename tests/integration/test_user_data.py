"""A user's data source and cleaning, from one Python and one YAML file outside the package, in every part of the pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sodaops.bundle import layout
from sodaops.data.preprocess import read_manifest
from sodaops.text import cleaning, trust
from tests.conftest import TINY, make_rows, table
from tests.serving import detail, refresh_info

PLUGIN = """
import pyarrow.csv
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Mine(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("mine", "file://FOLDER")


def rows(file):
    with pyarrow.csv.open_csv(file) as reader:
        yield from reader


def quiet(text):
    return text.lower()
"""
OPTION = """
defaults: [base]
name: mine
source: {_target_: hydra_plugins.mine.rows, file: t.csv}
cleaning: hydra_plugins.mine.quiet
"""


def test_a_search_path_plugin_brings_a_source_and_a_cleaning(write, tmp_path):
    """Installed beside the package, with no word about it on the command line."""
    for folder in ("site/hydra_plugins", "site/options/data"):
        Path(folder).mkdir(parents=True)
    write("site/hydra_plugins/mine.py", PLUGIN.replace("FOLDER", str(tmp_path / "site/options")))
    write("site/options/data/mine.yaml", OPTION)
    write("t.csv", table([(text.upper(), label) for text, label in make_rows()]))
    command = [sys.executable, "-m", "sodaops.cli", "preprocess", "data=mine"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "site"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest("data/processed/mine")
    assert manifest["source"]["_target_"] == "hydra_plugins.mine.rows" and manifest["cleaning"] == "hydra_plugins.mine.quiet"
    assert manifest["n_kept"] == 120


def test_a_training_from_a_source_with_a_cleaning(run, extensions, write, monkeypatch):
    """One run after the other: preprocess, train, evaluate, resume the evaluation elsewhere, predict."""
    monkeypatch.setattr(trust, "configured", set())
    write("rows.py", "import pyarrow as pa\ndef rows(n):\n    for i in range(n):\n        yield pa.record_batch("
                     "{'text': [f'good {i} http://t.co/{i}', f'bad {i}'], 'label': ['good', 'bad']})\n")  # fmt: skip
    monkeypatch.syspath_prepend(".")
    own = ["data=base", "data.source={_target_: rows.rows, n: 60}", "data.cleaning=textlab.cleaning.without_links"]
    code, _, error = run("train", *own, *TINY, "trainer.max_epochs=1", "run_dir=run")
    assert code == 0, error
    info = layout.read_info("run/bundle")
    assert info.cleaning == "textlab.cleaning.without_links" and info.cleaning in info.versions
    assert json.loads(Path("run/bundle/data_manifest.json").read_text())["source"] == {"_target_": "rows.rows", "n": 60}
    assert json.loads(Path("run/evaluation/metrics.json").read_text())["test"]["macro_f1"] > 0
    code, out, error = run("predict", "run/bundle", "so good http://t.co/x")
    assert code == 0, error
    assert run("predict", "run/bundle", "so good")[1].split("\t")[:2] == out.split("\t")[:2]
    monkeypatch.setattr("sodaops.text.cleaning.GROUP", "none")
    monkeypatch.setattr(trust, "configured", set())
    code, _, error = run("predict", "run/bundle", "so good")
    assert code == 2 and error.startswith("BundleError: ") and "SODAOPS_CLEANING=textlab.cleaning.without_links" in error


def test_a_service_cleans_with_a_users_function(serve, bundle, extensions, monkeypatch, capsys):
    plain = serve().post("/predict", json={"text": "so good"}).json()
    name = "textlab.cleaning.without_links"
    refresh_info(bundle, cleaning=name, versions=cleaning.code_of(name))
    monkeypatch.setenv("SODAOPS_CLEANING", name)
    client = serve()
    text = {"text": "so http://t.co/x good"}
    assert client.post("/predict", json=text).json()["probs"] == pytest.approx(plain["probs"], abs=1e-5)
    assert "".join(span["text"] for span in client.post("/explain", json=text).json()["spans"]) == "so good"
    assert "text 1" in detail(client.post("/explain", json={"text": "http://t.co/x"}), 422)
    monkeypatch.setattr("textlab.cleaning.re", None)  # the function fails on every text
    for path in ("/predict", "/explain"):
        assert "good" not in detail(client.post(path, json=text), 500)
    assert "AttributeError" in capsys.readouterr().out
    refresh_info(bundle, cleaning="os.system")
    with pytest.raises(SystemExit, match="2"):
        serve()
    assert "SODAOPS_CLEANING=os.system" in capsys.readouterr().err
