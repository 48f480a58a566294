"""Hydra as its users know it: folders of their own groups, a primary configuration of their own, and their own applications."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from sodaops.cli import main
from tests.conftest import configured, lazy

compose = lazy("sodaops.config.compose")
EXPERIMENT = "# @package _global_\ndefaults:\n  - override /model: tiny\nseed: 7\n"


@pytest.fixture
def mine(workdir):
    """A folder with an experiment, a search, and primary configurations."""
    for name, text in {
        "experiment/quick": EXPERIMENT,
        "start": "defaults: [sodaops, override model: tiny, _self_]\nseed: 7\n",
        "own/config": "defaults: [sodaops, override model: tiny, _self_]\nseed: 7\n",
        "loop/config": "defaults: [config]\n",
    }.items():
        path = workdir / f"mine/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return workdir / "mine"


def composed(capsys, *words):
    capsys.readouterr()
    assert main(["train", "--cfg", "job", "--resolve", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("words", [
    "--config-dir mine experiment=quick",
    "hydra.searchpath=[file://mine] experiment=quick",
    "--config-path mine experiment=quick",
    "--config-path=mine --config-name=start",
    "--config-dir mine -cn start",
    "-cp mine/own",
    "-cp=mine/own",
])  # fmt: skip
def test_users_own_files(mine, capsys, words):
    tree = composed(capsys, *words.replace("file://mine", f"file://{mine}").split())
    assert compose.build_config(tree) == configured("model=tiny", "seed=7")


@pytest.mark.parametrize(
    "words", ["train --cfg job --config-dir mine", "train --cfg job --config-dir=mine", "preprocess --config-dir mine"]
)
def test_an_option_with_the_name_of_a_built_in_one(mine, capsys, words):
    (mine / "head").mkdir()
    (mine / "head/linear.yaml").write_text("_target_: sodaops.modeling.heads.MLPHead\n")
    assert main(words.split()) == 2 and "mine/head/linear.yaml" in capsys.readouterr().err


def test_two_folders(mine, workdir):
    (workdir / "more/data").mkdir(parents=True)
    (workdir / "more/data/mine.yaml").write_text("defaults: [base]\npath: a.csv\n")
    more = f"hydra.searchpath=[file://{workdir / 'more'}]"
    config = compose.compose([more, "experiment=quick", "data=mine"], str(mine))
    assert config.seed == 7 and config.data.name == "a"
    assert compose.compose(["hydra.searchpath=[]", "experiment=quick"], str(mine)).seed == 7


@pytest.mark.parametrize("command", ["train", "preprocess"])
def test_an_option_that_a_users_folder_lacks(mine, run, command):
    code, _, error = run(command, "--config-dir", "mine", "experiment=quik")
    assert code == 2 and "experiment=quik" in error and "did you mean quick?" in error and "smoke" in error


def test_faults_of_a_users_folder(mine, run):
    for words, named in [
        (["--config-path", "none"], "none"), (["--config-dir", "none"], "none"), (["-cp", "mine/loop"], "`sodaops`"),
        (["-cp", "mine", "-cn", "strat"], "strat"), (["logger=[csv,wandbb]"], "did you mean wandb?"),
        (["--params", "p.yaml", "-cp", "mine"], "--config-path"), (["--cfg", "job", "-m"], "--multirun"),
        (["--resolve"], "--cfg"),
    ]:  # fmt: skip
        code, _, error = run("train", *words)
        assert code == 2 and named in error.splitlines()[-1], words


def test_a_folder_beside_a_composed_configuration(mine, run):
    code, _, error = run("preprocess", "--params", "p.yaml", "--config-dir", "mine")
    assert code == 2 and "--params" in error and "--config-dir" in error and "p.yaml" not in error


def test_agents_of_a_sweep_on_wandb_find_a_users_folder(mine, run):
    assert run("sweep", "wandb", "--write", "--config-dir", "mine", "search=smoke", "experiment=quick")[0] == 0
    command = yaml.safe_load((mine.parent / "multirun/smoke/wandb_sweep.yaml").read_text())["command"]
    assert {f"--config-dir={mine}", "experiment=quick"} < set(command)


APP = """
import json
import hydra
from sodaops.config.compose import to_config

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def app(tree):
    print(json.dumps(to_config(tree).model_dump(mode="json")))

app()
"""
PLUGIN = """
from hydra.plugins.search_path_plugin import SearchPathPlugin

class Lab(SearchPathPlugin):
    def manipulate_search_path(self, search_path):
        search_path.append("lab", "pkg://lab.conf")
"""


def test_a_users_own_application(workdir):
    """It composes this configuration, with options of a package whose plugin extends the search path."""
    for name, text in {
        "app.py": APP,
        "hydra_plugins/lab.py": PLUGIN,
        "lab/__init__.py": "",
        "lab/conf/__init__.py": "",
        "lab/conf/experiment/quick.yaml": EXPERIMENT,
        "conf/config.yaml": "defaults: [sodaops, {override experiment: quick}, _self_]\nrun_dir: ${hydra:runtime.output_dir}\n",
    }.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(text)
    command = [sys.executable, "app.py", "optim.lr=0.5", "hydra.run.dir=here"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    run_dir = f"run_dir={workdir / 'here'}"
    assert json.loads(done.stdout) == configured("model=tiny", "seed=7", "optim.lr=0.5", run_dir).model_dump(mode="json")
