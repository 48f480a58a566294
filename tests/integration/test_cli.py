"""The command line as a person uses it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sodaops.cli import main
from sodaops.errors import ConfigError
from tests.conftest import REPO, run_overrides


def python(*arguments, cwd=REPO):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_train_py_on_a_terminal_shows_a_bar_until_ctrl_c(small_tweets, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    bare = ("export.variants=[]", "evaluate.split=none", "early_stopping.patience=null", "trainer.max_epochs=1000")
    command = [sys.executable, "train.py", *run_overrides(tmp_path, small_tweets, *bare), f"hydra.run.dir={tmp_path / 'hydra'}"]
    running = subprocess.Popen(command, stdout=terminal, stderr=terminal, cwd=REPO)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(reader, 65536):
            is_third, shown = b"epoch 3" not in shown, shown + part
            if is_third and b"epoch 3" in shown:
                running.send_signal(signal.SIGINT)
    os.close(reader)
    text = shown.decode()
    assert running.wait(300) == 130, text
    assert re.search(r"epoch 2: 100%\|█+\| \d+/\d+ .*loss=", text) and "epoch 2/1000  train loss" in text
    assert f"run_dir={tmp_path / 'run'} ckpt_path=last" in text.strip().splitlines()[-1]
    assert "Traceback" not in text and not (tmp_path / "run/bundle").exists()


def test_cfg_job_prints_the_tree(capsys):
    assert main(["train", "--cfg", "job", "model=distilbert", "trainer.max_epochs=7"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["model"]["name_or_path"] == "distilbert/distilbert-base-uncased" and tree["trainer"]["max_epochs"] == 7


@pytest.mark.parametrize(("arguments", "error", "named"), [
    (["+optim.lrr=1"], "ConfigError", ["optim.lrr", "did you mean lr?"]),
    (["++optim.lrr=1"], "ConfigError", ["optim.lrr", "did you mean lr?"]),
    (["optm.lr=1"], "ConfigError", ["optm.lr", "did you mean optim?"]),
    (["lr=1"], "ConfigError", ["lr", "did you mean optim.lr?"]),
    (["sed=1"], "ConfigError", ["sed", "did you mean seed?"]),
    (["+sed=1"], "ConfigError", ["sed", "did you mean seed?"]),
    (["modle=tiny"], "ConfigError", ["modle", "did you mean model?"]),
    (["experiment=smok"], "ConfigError", ["experiment=smok", "did you mean smoke?"]),
    (["seed=null"], "ConfigError", ["seed=None"]),
    (["trainer.max_epoch=1"], "ConfigError", ["trainer.max_epoch", "did you mean max_epochs?"]),
    (["+trainer.max_epoch=1"], "ConfigError", ["trainer.max_epoch", "lightning.Trainer"]),
    (["trainer.max_epochs=many"], "ConfigError", ["trainer.max_epochs='many'"]),
    (["optim.lr=[1"], "ConfigError", []),
    (["data=csv"], "ConfigError", ["data.path", "data.files"]),
    (["data=csv", "data.path=no.csv"], "DataError", ["no.csv"]),
    (["data=csv", "data.files.train=a.csv", "data.files.val=b.csv"], "ConfigError", ["data.path", "data.files"]),
    (["--params", "no.yaml"], "ConfigError", ["--params no.yaml"]),
])  # fmt: skip
def test_a_users_mistake(workdir, capsys, arguments, error, named):
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err  # with other faults too: there is no data/raw here
    assert f"{error}: " in message and all(text in message for text in named)
    assert not Path("data").exists() or not list(Path("data").rglob("*.parquet"))


def test_no_traceback_from_the_shell(tmp_path):
    done = python("train.py", "+optim.lrr=1", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ConfigError: optim.lrr")


def test_a_sweep_into_one_folder_is_refused(tmp_path, capsys):
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    assert main(["train", "--multirun", "seed=0,1", "experiment=smoke", f"run_dir={tmp_path / 'one'}", sweep]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("ConfigError: run_dir=") and "hydra.sweep.dir" in error


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("SODAOPS_TRACEBACK", "1")
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        main(["preprocess", "optim.lr=-1"])


def test_jobs_of_a_launcher_are_logged_once(tmp_path, capsys):
    jobs = ["--multirun", "seed=3,4", "evaluate.n_bootstrap=1", f"hydra.sweep.dir={tmp_path}"]
    assert main(["train", *jobs]) == 2
    error = capsys.readouterr().err
    assert [error.count(f"#{i} : seed={seed}") for i, seed in enumerate((3, 4))] == [1, 1]


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sodaops.data.preprocess.preprocess", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["preprocess"])


def test_an_extra_that_is_not_installed():
    code = "import sys; sys.modules['hydra'] = None; from sodaops.cli import main; sys.exit(main(['preprocess']))"
    done = python("-c", code)
    assert done.returncode == 2 and "sodaops[train]" in done.stderr
    assert "Traceback" not in done.stderr
