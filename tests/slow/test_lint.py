"""`make lint` passes on what is here, and each of its parts fails on a fault of its kind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import TARGETS
from tests.conftest import REPO

pytestmark = pytest.mark.slow
LINTS = sorted(target for target in TARGETS if target.startswith("lint-"))
TOOLS = {"lint-docker": "hadolint", "lint-shell": "shellcheck", "lint-workflows": "actionlint"}  # wheels with a program inside
BIN = Path(sys.executable).parent
# A file with a fault, and what tells of it.
FAULTS = {
    "lint-python": ("train.py", "import os, sys\n", "E401"),
    "lint-types": ("sodaops/text/labels.py", "def broken() -> int:\n    return 'a'\n", "Incompatible return value type"),
    "lint-yaml": ("conf/optim/wrong.yaml", "a: 1\na: 2\n", "duplication of key"),
    "lint-workflows": (
        ".github/workflows/wrong.yml",
        "on: push\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps:\n"
        "      - run: echo ${{ github.event.head_commit.message }}\n",
        "template-injection|untrusted",
    ),
    "lint-cloudbuild": ("cloudbuild/wrong.yaml", "steps: 1\n", "is not of type 'array'"),
    "lint-docker": ("docker/wrong.Dockerfile", "FROM debian\nRUN cd /x && apt-get install y\n", "DL3"),
    "lint-shell": ("wrong.sh", "#!/bin/sh\nrm -r $1/x\n", "SC2"),
    "lint-links": ("docs/wrong.md", "# A\n\n[there](nowhere.md)\n", "nowhere.md"),
}


def make(target, folder):
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")}
    path = f"{BIN}{os.pathsep}{environment['PATH']}"
    environment |= {"PYTHONPATH": str(folder), "PATH": path, "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    command = ["make", "-k", "-o", ".venv/.installed", f"BIN={BIN}", target]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def missing(target):
    tool = TOOLS.get(target)
    return tool if tool and not (BIN / tool).exists() and shutil.which(tool) is None else None


@pytest.mark.parametrize("target", LINTS)
def test_what_is_here_passes(target):
    if missing(target):
        pytest.skip(f"no {missing(target)} for this platform; pip install -c constraints.txt '.[lint]' brings it elsewhere")
    code, said = make(target, REPO)
    assert code == 0, said


def test_each_part_tells_of_a_fault(clone):
    assert {*LINTS} == {*FAULTS}
    for name, text, _ in FAULTS.values():
        path = clone.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.read_text() + text if path.is_file() else text)
    code, said = make("lint", clone.folder)
    assert code == 2
    for target, (_, _, sign) in FAULTS.items():
        if not missing(target):
            assert f"{target}] Error" in said and any(part in said for part in sign.split("|")), f"{target}: {said}"


def test_a_commit_with_a_fault_is_refused(clone):
    clone("make hooks")
    (clone.folder / "train.py").write_text("import os, sys\n")
    commit = "git -c user.name=t -c user.email=t@t commit -qam fault"
    assert "E401" in clone(commit, allowed=(1,))
    clone("git checkout -q HEAD -- train.py && echo >> README.md")
    clone(commit)
