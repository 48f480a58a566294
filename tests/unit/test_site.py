"""The site's pages are all in its navigation, and those that speak of code and configuration speak of what there is."""

import re
import tomllib

import pytest
import yaml

from sodaops.cli import _ROOM_OF
from tests.conftest import REPO

DOCS = REPO / "docs"


def pages_of(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values():
                yield from pages_of(inner if isinstance(inner, list) else [inner])


def test_every_page_is_in_the_navigation_once():
    named = list(pages_of(tomllib.loads((REPO / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_page_of_keys_is_that_of_the_schema():
    from tools.config_page import PAGE, page

    made = page()
    assert PAGE.read_text(encoding="utf-8") == made, "make params"
    for row in (
        "| `optim.lr` | `0.0003` | number above 0 | of the top encoder layer |",
        "| `serve.deadline_s` | `10.0` | number above 0 | past it the answer is 504 |",
        "| `model.pooling` | `mean` | `mean`, `cls` |  |",
        "| `drift.max_rows` | `100000` | whole number from 1,000 | of a longer span, this many at random |",
    ):
        assert row in made


def test_every_rule_has_its_incident():
    rules = yaml.safe_load((REPO / "conf/alerts/default.yaml").read_text(encoding="utf-8"))["rules"]
    sections = re.split(r"^## ", (DOCS / "incidents.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert sorted(section.split("\n")[0] for section in sections) == sorted(rules)
    for section in sections:
        name = section.split("\n")[0]
        assert f"(`{rules[name]['severity']}`)" in section
        assert all(f"- **{part}" in section for part in ("First look", "What to do")) and "**Wake " in section


def test_the_example_in_python_runs(trained, capsys):
    (example,) = re.findall("```python\n(.+?)```", (DOCS / "api/index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(example.replace("outputs/start/bundle", str(trained / "run/bundle")), {})
    assert capsys.readouterr().out.count("{'negative': ") == 2


COVERAGE = [
    (section.split("\n")[0], [cell.strip() for cell in line.strip("|").split("|")])
    for section in re.split("^## ", (DOCS / "coverage.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for line in section.splitlines()
    if line.startswith("|") and "`" in line
]


def test_all_of_the_checklist_is_covered():
    sections = [section for section, _ in COVERAGE]
    assert {section: sections.count(section) for section in sections} == {
        "Week 1": 16, "Week 2": 17, "Week 3": 8, "Extra": 2, "Outside the list": 7,
    }  # fmt: skip


@pytest.mark.parametrize(("section", "row"), COVERAGE, ids=[row[0] for _, row in COVERAGE])
def test_what_covers_it_is_there(section, row):
    _, here, shown, *_ = row
    paths = re.findall("`([^`]+)`", here)
    assert paths and [path for path in paths if not (REPO / path).exists()] == []
    targets = set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for command in re.findall("`([^`]+)`", shown):
        program, *words = command.split()
        if program == "make":
            assert words[0] in targets
        elif program == "sodaops":
            assert words[0] == "--help" or words[0] in _ROOM_OF
        else:
            assert (program, words[0]) in (("python", "train.py"), ("git", "log"))
