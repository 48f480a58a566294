"""Every command of the README, and of the docs those that can run here, run as they stand there, in a clone with small tables.

Commands of `sodaops` and `python train.py` run in this process, except one of each; the others in a shell. Trainings whose
bundle no later command reads write none, and a search has two trials. DVC's commands are run by test_dvc.py, those for a
reader's own table by test_own_table.py.
"""

import contextlib
import gzip
import os
import re
import shlex
import shutil
import subprocess
import time

import httpx
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.commands import PAGES, blocks
from tests.conftest import REPO, free_port, make_rows, table

pytestmark = pytest.mark.slow
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in blocks(REPO / "README.md") if block.language == "bash" and not block.not_run]
LINES = [line for block in BLOCKS for line in block.text.splitlines() if line.strip()]
COMMANDS = [re.split(r"\s+#", line)[0] for line in LINES]
EXIT_CODES = {re.split(r"\s+#", line)[0]: int(code) for line in LINES for code in re.findall(r"# exit code (\d)", line)}
DVC = [command for command in COMMANDS if command.startswith("dvc ")]
OWN_TABLE = next(block.commands for block in BLOCKS if "data=csv" in block.text)
IN_A_SHELL = ("python train.py --cfg job", "sodaops resolve champion")
SMALLER = {  # part of a command -> what is added to it
    **dict.fromkeys(("--multirun ", "logger=wandb", "ckpt_path=", " data=csv "), "export.variants=[] evaluate.split=none"),
    "search=smoke": "search.n_trials=2",
    "run_dir=outputs/start": "export.variants=[] evaluate.split=none",  # as in outputs/first, which is read in its place
    "experiment=distill": "model=tiny model.layers=1 trainer.max_epochs=1",
}
# Commands of the docs, with what the README's commands have made in place of the names that stand for a reader's own.
DOCS = [
    command
    for page in PAGES if page.parent != REPO
    for block in blocks(page) if block.language == "bash" and not block.not_run
    for command in block.commands
]  # fmt: skip
REPLACED = {
    "RUN/bundle": "outputs/first/bundle", " RUN ": " outputs/first ", "request_log=requests": "request_log=outputs/requests",
    "outputs/start/bundle": "outputs/first/bundle",
    "STORE": "data/annotation", "labels.json": "outputs/labels.json", "--wait=5": "--wait=0.1",
}  # fmt: skip
INLINE = set(re.findall(r"`(make [a-z-]+)`", README))
_DEADLINE_S = 180


@pytest.fixture
def shell(clone, monkeypatch, capfd):
    """Runs a command in the clone, and returns what it printed."""
    monkeypatch.chdir(clone.folder)
    monkeypatch.setenv("PATH", clone.env()["PATH"])

    def run(command, allowed=(0,)):
        from sodaops.cli import main

        is_training = command.startswith("python train.py ")
        if command in IN_A_SHELL or not (is_training or command.startswith("sodaops ")) or re.search(r"[|;&$<>`(]", command):
            return clone(command, allowed)
        more = next((more for part, more in SMALLER.items() if is_training and part in command), "")
        capfd.readouterr()
        words = shlex.split(f"{command} {more}")
        code = main(["train", *words[2:]] if is_training else words[1:])
        output = "".join(capfd.readouterr())
        assert code in allowed, f"{command}\nexit code {code}\n{output[-3000:]}"
        return output

    return run


def test_the_first_screen_has_the_two_commands_and_a_picture():
    top = "\n".join(README.splitlines()[:40])
    assert "make train" in top and "make test" in top and re.search(r"!\[.+\]\(docs/\S+\.png\)", top)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPO / path).exists(), path


def test_the_first_command_beats_the_baseline(clone):
    """The only training of the default model in the suite, on a fifth of the rows for one epoch of three."""
    assert COMMANDS[:2] == ["make train", "make test"] and len(INLINE) > 2
    assert len(clone(f"make --dry-run test {' '.join(target.removeprefix('make ') for target in INLINE)}").splitlines()) > 3
    small = "trainer.max_epochs=1 data.max_rows=900 optim.batch_tokens=512 evaluate.n_bootstrap=200 export.variants=[float32]"
    output = clone(f"make train ARGS='{small}'")
    rows = ("this model", r"TF-IDF \+ logistic regression")
    model, baseline = (float(re.search(rf"^{row} +(0\.\d+)", output, re.MULTILINE)[1]) for row in rows)
    assert model > baseline + 0.05
    report = next(line for line in output.splitlines() if line.startswith("report: ")).removeprefix("report: ")
    assert (clone.folder / report).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "Traceback" not in output and "initializer" not in output  # nor what libraries say to each other


@pytest.mark.timeout(900)
def test_the_commands_run(clone, shell):
    assert len(COMMANDS) > 30 and len(DOCS) > 10
    for name in ("tweets", "amazon_reviews"):
        path = clone.folder / f"data/raw/{name}.csv"
        pyarrow.csv.write_csv(pyarrow.csv.read_csv(path).slice(0, 500), path)
    with contextlib.ExitStack() as services:
        for command in COMMANDS[2:]:
            if command not in DVC and command not in OWN_TABLE:
                _run(command, clone, shell, services)
        _run_docs(clone, shell, services)  # beside the services that the README started


def _run(command, clone, shell, services):
    if command.startswith(("sodaops serve", "sodaops watch", "sodaops annotate serve")):
        services.enter_context(_background(clone, command))
        _get(f"http://127.0.0.1:{re.search(r'port=([0-9]+)', command)[1]}/healthz")
    elif command.startswith("curl"):
        url = re.search('"(.+)"', command)[1]
        assert '"label":' in (shell(command) if shutil.which("curl") else _get(url))
    elif "model=distilbert" in command:  # from the hub, which a machine without a network cannot reach
        output = shell(command, allowed=(0, 2))
        assert "this model" in output or "model=minilm" in output.splitlines()[-1]
    else:
        if command.startswith("sodaops drift"):
            _wait_for_a_part(clone.folder / "outputs/requests")
        shell(command, allowed=(EXIT_CODES.get(command, 0),))


def _run_docs(clone, shell, services):
    """Runs the docs' commands; services get ports of their own, and each must answer."""
    body = [(f"{text}, wrote {i}", label) for i, (text, label) in enumerate(make_rows(40, ("negative", "positive")))]
    (clone.folder / "texts.csv").write_text(table(body))
    (clone.folder / "reviews.csv").write_text(table(body, ("review", "stars")))
    (clone.folder / "reviews.csv.gz").write_bytes(gzip.compress(table(body, ("body", "label")).encode()))
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(clone.folder / "texts.csv"), clone.folder / "reviews.parquet")
    names = dict(REPLACED)
    for command in DOCS:
        for name, replacement in names.items():
            command = command.replace(name, replacement)
        if command in COMMANDS:  # it has run already, or still runs
            continue
        command = re.sub('^make train ARGS="(.+)"', r"python train.py \1", command)  # another test runs `make train`
        if port := re.search(r"[._ -]port=(\d+)", command, re.IGNORECASE):
            free = free_port()
            names[f"http://127.0.0.1:{port[1]}/"] = f"http://127.0.0.1:{free}/"
            services.enter_context(_background(clone, command.replace(port[0], port[0].replace(port[1], str(free)))))
            _get(f"http://127.0.0.1:{free}/healthz")
        else:
            shell(command, allowed=(EXIT_CODES.get(command, 0),))


@contextlib.contextmanager
def _background(clone, command):
    program = ["bash", "-c", f"exec env {command}"]  # variables may stand in front
    process = subprocess.Popen(program, cwd=clone.folder, env=clone.env(), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def _wait_for_a_part(log):
    deadline = time.monotonic() + _DEADLINE_S
    while not list(log.glob("date=*/*.parquet")):
        assert time.monotonic() < deadline, f"{log}: no part within {_DEADLINE_S} s; it has {os.listdir(log)}"
        time.sleep(0.25)


def _get(url):
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        try:
            return httpx.get(url, timeout=30).text
        except httpx.TransportError:
            assert time.monotonic() < deadline, f"{url}: no answer within {_DEADLINE_S} s"
            time.sleep(0.25)
