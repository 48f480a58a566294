"""Every command of the README, run as it stands there, in a clone."""

import re

import pytest

from tests.conftest import REPO, many, table

pytestmark = pytest.mark.slow
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")
]
# `make test` is what runs this; the table of results takes three trainings, whose parts are run here one by one.
NOT_RUN = {"make test", "make bench-quality"}


def test_the_first_screen_has_the_two_commands_and_a_picture():
    top = "\n".join(README.splitlines()[:40])
    assert "make train" in top and "make test" in top and re.search(r"!\[.+\]\(docs/\S+\.png\)", top)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPO / path).exists(), path


def test_commands(clone):
    stars = [(f"{text}, said {i}", {"bad": 1, "good": 5}[label]) for i, (text, label) in enumerate(many(200))]
    (clone.folder / "reviews.csv").write_text(table(stars, ("review", "stars")))
    assert {"make train", *NOT_RUN} <= set(COMMANDS) and len(COMMANDS) > 10
    for command in COMMANDS:
        if command in NOT_RUN:
            assert "pytest" in clone(f"make -n {command.split()[1]}") or "quality.py" in clone(f"make -n {command.split()[1]}")
        elif "model=distilbert" in command:
            output = clone(command, allowed=(0, 2))
            assert "this model" in output or "or use model=minilm" in output.splitlines()[-1]
        elif command == "make train":
            _beats_the_baseline(clone(command))
        else:
            if command == "dvc repro":  # what DVC runs is params.yaml; here that of a model that takes seconds
                clone("python train.py --cfg job --resolve experiment=smoke > params.yaml")
            clone(command)


def _beats_the_baseline(output):
    ours, theirs = (
        re.search(rf"^{name} +(0\.\d+)", output, re.MULTILINE) for name in ("this model", r"TF-IDF \+ logistic reg\w+")
    )
    assert float(ours[1]) > float(theirs[1]) + 0.05
    assert "report: " in output
