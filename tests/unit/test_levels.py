"""Rules for the code that import-linter cannot check: light imports, no hidden failures, no long modules."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPO

# Modules -> packages that importing them must not load, besides HEAVY.
HEAVY = {"torch", "transformers", "lightning", "hydra", "wandb", "sklearn", "matplotlib"}
LIGHT = {
    "sodaops.drift.app, sodaops.alerting.check": ("evidently", "pandas", "onnxruntime"),
    (
        "sodaops.config.schema, sodaops.text.cleaning, sodaops.io.storage, sodaops.text.labels, sodaops.data.preprocess, "
        "sodaops.bundle.layout"
    ): (),
    "sodaops.serving.app, sodaops.serving.__main__": ("pyarrow", "onnx", "pandas", "fsspec", "omegaconf", "jinja2"),
    "sodaops.inference.predictor": ("pyarrow", "onnx", "fastapi"),
    "sodaops.annotation.store, sodaops.annotation.exchange": (
        "pyarrow", "onnx", "onnxruntime", "fastapi",
    ),
}  # fmt: skip


def test_no_module_hides_a_failure():
    faults = []
    for path in sorted((REPO / "sodaops").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assert):
                faults.append(f"{path}:{node.lineno}: assert")
            if isinstance(node, ast.ExceptHandler) and (node.type is None or all(isinstance(x, ast.Pass) for x in node.body)):
                faults.append(f"{path}:{node.lineno}: except without a type or a body")
        if len(source.splitlines()) > 350:
            faults.append(f"{path}: more than 350 lines")
    assert faults == []


@pytest.mark.slow
def test_serving_and_reading_stay_light():
    faults = []
    for modules, more in LIGHT.items():
        code = f"import sys, {modules}; print(*sorted({HEAVY | {*more}} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
        if done.returncode or done.stdout.strip():
            faults.append(f"{modules}: {done.stdout}{done.stderr}")
    assert faults == []
