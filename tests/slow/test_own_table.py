"""The README's commands for a reader's own table, up to a promoted champion that serves."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sodaops.cli import main
from tests.conftest import TINY, make_rows, table
from tests.serving import Server
from tests.slow.test_readme import OWN_TABLE

pytestmark = pytest.mark.slow


def test_from_an_own_table_to_a_champion_that_serves(write, capsys):
    """The model is random, so the gate refuses it at first; with the limits that the refusal names it is promoted."""
    train, register, promote = (shlex.split(command) for command in OWN_TABLE)
    write(
        "reviews.csv",
        table([(f"{text}!", {"bad": 1, "good": 5}[label]) for text, label in make_rows(240)], ("review", "stars")),
    )
    assert main(["train", *train[2:], *TINY[:1], *TINY[2:], "export.variants=[float32]"]) == 0
    assert main(register[1:]) == 0
    capsys.readouterr()
    assert main(promote[1:]) == 3
    shown = capsys.readouterr()
    limits = re.search("adding to the command: (.+)", shown.err)[1].split()
    assert re.search(r"behaviour +– +skipped: .*1, 5", shown.out) and len(limits) > 1
    (gate,) = Path("outputs/gate").glob("*/gate.json")
    verdicts = {verdict["rule"]: verdict["value"] for verdict in json.loads(gate.read_text())["verdicts"]}
    assert verdicts["behaviour"] is None
    assert main([*promote[1:], *limits]) == 0
    with Server("outputs/registry@champion") as server, server.client() as client:
        assert client.get("/predict", params={"text": "text number 3 is good!"}).json()["label"] in ("1", "5")
