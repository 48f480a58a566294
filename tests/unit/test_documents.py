"""The commands of README and docs name what there is; tests/slow/test_readme.py runs those that can run here."""

import subprocess

import pytest

from tests.commands import PAGES, blocks, faults
from tests.conftest import REPO

BLOCKS = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in BLOCKS if block.language == "bash"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_commands_are_marked_as_such(page):
    unmarked = [str(block) for block in blocks(page) if block.is_ours and block.language != "bash"]
    assert not unmarked, f"{unmarked}: write ```bash, and above it <!-- not run: REASON --> where it cannot run here"


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_are_bash(block):
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("block", [block for block in BASH if block.not_run], ids=str)
def test_what_is_not_run_names_what_there_is(block):
    assert [fault for command in block.commands for fault in faults(command)] == []


def test_what_a_fault_is():
    assert len(BASH) > 15 and any(block.not_run for block in BASH)
    right = [
        "make lint",
        "sodaops serve X serve.port=1",
        "python train.py -m optim.lr=1e-4,1e-3",
        "sodaops serve X serve.port=$PORT",
    ]
    assert [faults(command) for command in right] == [[], [], [], []]
    wrong = [
        "make lintt",
        "sodaops servee X",
        "sodaops serve X serve.prot=1",
        "python trian.py",
        "sodaops drift X drift.last=a",
    ]
    assert [len(faults(command)) for command in wrong] == [1, 1, 1, 1, 1]
