"""The commands in README and docs name what exists; tests/slow/test_readme.py runs those that can run here."""

import subprocess

import pytest

from tests.commands import PAGES, blocks, faults

BLOCKS = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in BLOCKS if block.language == "bash"]


def test_commands_stand_in_bash_blocks():
    """A block with commands needs ```bash, and <!-- not run: REASON --> above it where it cannot run here."""
    assert [str(block) for block in BLOCKS if block.has_command and block.language != "bash"] == []


def test_commands_are_bash():
    faults_found = []
    for block in BASH:
        done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
        if done.returncode or done.stderr:
            faults_found.append(f"{block}: {done.stderr}")
    assert faults_found == []


@pytest.mark.slow
def test_commands_that_are_not_run_name_what_exists():
    not_run = [block for block in BASH if block.not_run]
    assert len(BASH) > 15 and not_run
    assert [f"{block}: {fault}" for block in not_run for command in block.commands for fault in faults(command)] == []


def test_faults_are_recognised():
    valid = "make lint", "sodaops serve X serve.port=1", "python train.py -m optim.lr=1,2", "sodaops serve X serve.port=$PORT"
    assert [faults(command) for command in valid] == [[], [], [], []]
    invalid = (
        "make lintt", "sodaops servee X", "sodaops serve X serve.prot=1", "python trian.py", "sodaops drift X drift.last=a",
    )  # fmt: skip
    assert [len(faults(command)) for command in invalid] == [1, 1, 1, 1, 1]
