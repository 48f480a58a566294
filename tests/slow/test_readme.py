"""Every command of the README, and of the docs those that can run here, run as they stand there, in a clone."""

import contextlib
import gzip
import re
import shutil
import subprocess
import time

import httpx
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.commands import PAGES, blocks
from tests.conftest import REPO, free_port, many, table

pytestmark = pytest.mark.slow
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in blocks(REPO / "README.md") if block.language == "bash" and not block.not_run]
LINES = [line for block in BLOCKS for line in block.text.splitlines() if line.strip()]
COMMANDS = [re.split(r"\s+#", line)[0] for line in LINES]
ENDS = {re.split(r"\s+#", line)[0]: int(code) for line in LINES for code in re.findall(r"# exit code (\d)", line)}
# Of the docs, with what the run of the README has left in place of the names that stand for a reader's own.
DOCS = [
    command
    for page in PAGES if page.parent != REPO
    for block in blocks(page) if block.language == "bash" and not block.not_run
    for command in block.commands
]  # fmt: skip
OURS = {
    "RUN/bundle": "outputs/first/bundle", "request_log=requests": "request_log=outputs/requests", "STORE": "data/annotation",
    "labels.json": "outputs/labels.json",
}  # fmt: skip
INLINE = set(re.findall(r"`(make [a-z-]+)`", README))


def test_the_first_screen_has_the_two_commands_and_a_picture():
    top = "\n".join(README.splitlines()[:40])
    assert "make train" in top and "make test" in top and re.search(r"!\[.+\]\(docs/\S+\.png\)", top)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPO / path).exists(), path


def test_the_first_command_beats_the_baseline(clone):
    assert COMMANDS[:2] == ["make train", "make test"] and len(COMMANDS) > 15 and len(INLINE) > 2
    for command in ("make test", *INLINE):  # this runs the first; the others are known to make
        assert clone(command.replace("make", "make --dry-run"))
    _beats_the_baseline(clone("make train ARGS=trainer.max_epochs=1"))  # a third of the time, and enough for that


def _part(commands, name):
    """The commands that belong together: those of DVC, those that stand alone, and a run with all that is done with it."""
    first = next(i for i, command in enumerate(commands) if "run_dir=outputs/first" in command)
    after = next(i for i, command in enumerate(commands) if "outputs/first/" in command)
    of_dvc = [command for command in commands if command.startswith("dvc ")]
    run = [commands[first], *(command for command in commands[after:] if command not in of_dvc)]
    return {"pipeline": of_dvc, "run": run, "alone": [c for c in commands if c not in of_dvc and c not in run]}[name]


@pytest.mark.timeout(1200)  # the longest run a dozen trainings and forty processes
@pytest.mark.parametrize("part", ["run", "alone", "pipeline"])
def test_commands(clone, part):
    stars = [(f"{text}, said {i}", {"bad": 1, "good": 5}[label]) for i, (text, label) in enumerate(many(200))]
    (clone.folder / "reviews.csv").write_text(table(stars, ("review", "stars")))
    with contextlib.ExitStack() as running:
        _run_all(clone, running, _part(COMMANDS[2:], part))
        if part == "run":  # beside the services that the README began
            _run_docs(clone, running)


def test_every_command_is_in_one_part():
    parts = [command for part in ("run", "alone", "pipeline") for command in _part(COMMANDS[2:], part)]
    assert sorted(parts) == sorted(COMMANDS[2:]) and len(parts) > 30


def _run_all(clone, running, commands):
    for command in commands:
        if command.startswith(("sodaops serve", "sodaops watch", "sodaops annotate serve")):
            running.enter_context(_background(clone, command))
            continue
        if command.startswith("curl"):
            assert '"label":' in (clone(command) if shutil.which("curl") else _get(re.search('"(.+)"', command)[1]))
            continue
        if command.startswith("sodaops drift"):
            _wait_for_a_part(clone.folder / "outputs/requests")
        if "model=distilbert" in command:
            output = clone(command, allowed=(0, 2))
            assert "this model" in output or "or use model=minilm" in output.splitlines()[-1]
        else:
            if command == "dvc repro":  # what DVC runs is params.yaml; here that of a model that takes seconds
                clone("python train.py --cfg job --resolve experiment=smoke > params.yaml")
            clone(command, allowed=(ENDS.get(command, 0),))


def _run_docs(clone, running):
    """Services on ports of their own; each must come to listen."""
    assert len(DOCS) > 10
    body = [(f"{text}, wrote {i}", label) for i, (text, label) in enumerate(many(40, ("negative", "positive")))]
    (clone.folder / "texts.csv").write_text(table(body))
    (clone.folder / "reviews.csv.gz").write_bytes(gzip.compress(table(body, ("body", "label")).encode()))
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(clone.folder / "texts.csv"), clone.folder / "reviews.parquet")
    names = dict(OURS)
    for command in DOCS:
        for theirs, ours in names.items():
            command = command.replace(theirs, ours)
        if command in COMMANDS:  # the README's, which has run, or runs still
            continue
        if port := re.search(r"[. -]port=(\d+)", command):
            free = free_port()
            names[f"http://127.0.0.1:{port[1]}/"] = f"http://127.0.0.1:{free}/"
            running.enter_context(_background(clone, command.replace(port[0], port[0].replace(port[1], str(free)))))
            _get(f"http://127.0.0.1:{free}/healthz")
        else:
            clone(command, allowed=(ENDS.get(command, 0),))


@contextlib.contextmanager
def _background(clone, command):
    program = ["bash", "-c", f"exec env {command}"]  # variables may stand in front
    process = subprocess.Popen(program, cwd=clone.folder, env=clone.env(), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait_for_a_part(log):
    for _ in range(120):
        if list(log.glob("date=*/*.parquet")):
            return
        time.sleep(0.25)
    raise AssertionError(f"{log}: no part")


def _get(url):
    for _ in range(240):
        try:
            return httpx.get(url).text
        except httpx.ConnectError:
            time.sleep(0.25)
    raise AssertionError(f"{url}: no answer")


def _beats_the_baseline(output):
    names = ("this model", r"TF-IDF \+ logistic regression")
    ours, theirs = (re.search(rf"^{name} +(0\.\d+)", output, re.MULTILINE) for name in names)
    assert float(ours[1]) > float(theirs[1]) + 0.05
    assert "report: " in output
