"""The house rules that a reader relies on: imports go down, and what serves stays light."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPO

LEVELS = {
    0: (
        "errors",
        "sections",
        "alert_config",
        "config",
        "labels",
        "text",
        "storage",
        "redaction",
        "runs",
        "pages",
        "validation",
        "wandb_server",
        "remote",
        "landing",
    ),
    1: ("data", "modeling"),
    2: ("training", "bundle", "evaluation"),
    3: ("search", "registry", "web", "request_log"),
    4: ("compose", "serving", "monitoring", "annotation", "project_report"),
    5: ("cli",),
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}
MODULES = sorted((REPO / "sodaops").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sodaops" else [node.module])


def room(path):
    return path.relative_to(REPO / "sodaops").with_suffix("").parts[0]


def test_every_module_has_a_level():
    assert {room(path) for path in MODULES} - {"__init__"} == set(LEVEL_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_go_down_or_stay_in_the_room(path):
    mine = room(path)
    for name in imports(path):
        if name.startswith("sodaops.") and mine != "__init__":
            other = name.split(".")[1]
            down = LEVEL_OF[other] < LEVEL_OF[mine] or (LEVEL_OF[mine] == 0 == LEVEL_OF[other])
            assert other == mine or down or (mine, other) in SIDEWAYS, f"{path.name} imports {name}"


# evaluation measures what bundle answers; training writes a bundle, and tells its loggers what evaluation found; the predictor
# puts feedback into the annotation store; what is picked to be annotated is what drift finds strange; a run's page tells what
# drift found.
SIDEWAYS = {
    ("evaluation", "bundle"), ("training", "bundle"), ("training", "evaluation"), ("serving", "annotation"),
    ("annotation", "monitoring"), ("project_report", "monitoring"),
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPO)))
def test_no_module_hides_a_fault(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not all(isinstance(line, ast.Pass) for line in node.body)
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize(
    ("light", "heavy"),
    [
        ("sodaops.config, sodaops.text, sodaops.storage, sodaops.labels, sodaops.data.preprocess, sodaops.bundle.layout", ()),
        ("sodaops.serving.app, sodaops.serving.__main__", ("pyarrow", "onnx", "pandas", "fsspec", "omegaconf", "jinja2")),
        ("sodaops.bundle.predictor", ("pyarrow", "onnx", "fastapi")),
        (
            "sodaops.annotation.store, sodaops.annotation.agreement, sodaops.annotation.exchange",
            ("pyarrow", "onnx", "onnxruntime", "fastapi", "numpy"),
        ),
    ],
)
def test_what_serves_or_reads_data_stays_light(light, heavy):
    heavy = {"torch", "transformers", "lightning", "hydra", "wandb", "sklearn", "matplotlib", *heavy}
    code = f"import sys, {light}; found = {heavy} & set(sys.modules); sys.exit(', '.join(found) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
