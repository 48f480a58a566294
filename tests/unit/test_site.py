"""All pages are in the site's navigation; the generated page, the incidents and the coverage table match the code."""

import re
import tomllib
from collections import Counter

import yaml

from tests.commands import faults as command_faults
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


def test_the_configuration_page_is_up_to_date():
    from tools.config_page import PAGE, page

    made = page()
    assert PAGE.read_text(encoding="utf-8") == made, "make params"
    for row in (
        "| `optim.lr` | `0.0003` | number above 0 |",
        "| `serve.deadline_s` | `10.0` | number above 0 |",
        "| `model.pooling` | `mean` | `mean`, `cls` |",
        "| `drift.max_rows` | `100000` | whole number from 1,000 |",
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


def test_the_checklist_of_coverage_names_what_exists():
    rows = [
        (section.split("\n")[0], " ".join(item.split()))
        for section in re.split("^## ", (DOCS / "coverage.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        for item in re.findall(r"^- (.+?)(?=^- |\n\n|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    ]
    assert Counter(section for section, _ in rows) == {
        "Week 1": 16, "Week 2": 17, "Week 3": 8, "Extra": 2, "Outside the list": 7,
    }  # fmt: skip
    faults = []
    for _, row in rows:
        name, files, command = re.fullmatch("(.+?): (`.+`.*); run `(.+)`", row).groups()
        paths = re.findall("`([^`]+)`", files)
        faults += [f"{name}: {path} does not exist" for path in paths if not (REPO / path).exists()]
        faults += [] if paths else [f"{name}: names no file"]
        faults += [f"{name}: {fault}" for fault in command_faults(command)]
        known = ("make ", "sodaops ", "python train.py", "git log")
        faults += [] if command.startswith(known) else [f"{name}: {command}"]
    assert faults == []
