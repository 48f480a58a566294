"""Rules of the code that a reader relies on: what serves stays light, and no module hides a failure."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPO


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
    assert not faults


@pytest.mark.parametrize(
    ("light", "heavy"),
    [
        (
            "sodaops.config.schema, sodaops.text.cleaning, sodaops.io.storage, sodaops.text.labels, sodaops.data.preprocess, "
            "sodaops.bundle.layout",
            (),
        ),
        ("sodaops.serving.app, sodaops.serving.__main__", ("pyarrow", "onnx", "pandas", "fsspec", "omegaconf", "jinja2")),
        ("sodaops.inference.predictor", ("pyarrow", "onnx", "fastapi")),
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
