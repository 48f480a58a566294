"""All pages are in the site's navigation; the generated page, the incidents and the coverage table match the code."""

import json
import re
import tomllib
from collections import Counter

import pytest
import yaml

from tests.commands import faults as command_faults
from tests.conftest import REPO

DOCS = REPO / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"


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


@pytest.mark.slow
def test_the_examples_in_python_run(workdir, capsys):
    examples = re.findall("```python\n(.+?)```", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec("\n".join(examples).replace('"minilm"', '"tiny"'), {})
    printed = capsys.readouterr().out
    assert printed.count("{'1': ") == 2 and "is refused" in printed
    assert (workdir / "out.parquet").exists() and list((workdir / "outputs/evaluation").glob("*/report.html"))


def test_the_notebook_is_stored_without_outputs_and_its_cells_compile():
    code = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert all(compile("".join(cell["source"]), NOTEBOOK.name, "exec") for cell in code)


@pytest.mark.deep
def test_the_notebook_runs(tmp_path, monkeypatch):
    """In a kernel as Jupyter starts it: the log and the bar are shown, and a run as its report."""
    import nbclient
    import nbformat

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, shown = code[1].outputs, [output.data for cell in code for output in cell.outputs if "data" in output]
    assert len(code[1].source.splitlines()) == 2 and len(code) <= 6
    messages = "".join(output.text for output in trained if output.output_type == "stream")
    assert "epoch 1/1" in messages and "it/s" in messages
    assert shown[0]["text/html"].startswith("<iframe") and "Confusion matrix" in shown[0]["text/html"]
    assert 0 <= float(shown[1]["text/plain"]) <= 1 and shown[2]["text/plain"].startswith("[Prediction(label=")
    assert "prob_5" in shown[3]["text/html"]


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
