import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from sodaops.bundle import layout
from sodaops.bundle.save import load_bundle
from sodaops.cli import main
from sodaops.data.preprocess import read_manifest
from sodaops.errors import BundleError, DataError
from sodaops.inference.predictor import Predictor


@pytest.fixture
def bundle(trained, tmp_path):
    return Path(shutil.copytree(trained / "run/bundle", tmp_path / "bundle"))


def test_it_tells_where_it_came_from(bundle, trained):
    info = layout.read_info(bundle)
    manifest = read_manifest(trained / "splits")
    assert info.labels == ["negative", "neutral", "positive"] and info.cleaning == "minimal" and info.max_tokens == 128
    assert info.data == {"name": "tweets", "fingerprint": manifest["fingerprint"]}
    assert set(info.metrics["val"]) == {"epoch", "loss", "macro_f1", "accuracy"}
    assert {"torch", "transformers", "python"} <= set(info.versions)
    assert json.loads((bundle / "data_manifest.json").read_text()) == manifest
    assert layout.read_config(bundle)["optim"]["lr"] > 0
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*info.files, "bundle.json"])
    assert info.files.keys() == {*layout.FILES, *(layout.ONNX[variant] for variant in info.onnx), layout.DRIFT}


def test_no_pickle_in_it(bundle):
    with safe_open(bundle / layout.WEIGHTS, framework="np") as weights:
        assert "head.weight" in weights.keys()  # noqa: SIM118
    for path in bundle.iterdir():
        if path.suffix == ".onnx":
            onnx.checker.check_model(path)
        elif path.name == layout.DRIFT:
            with np.load(path, allow_pickle=False) as arrays:
                assert all(arrays[name].dtype != object for name in arrays)
        elif path.name != layout.WEIGHTS:
            assert "\0" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("name", [*layout.FILES, "model.onnx"])
@pytest.mark.parametrize("how", ["missing", "changed", "cut"])
def test_damage_is_found_and_named(bundle, capsys, name, how):
    path = bundle / name
    if how == "missing":
        path.unlink()
    elif how == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BundleError, match=f"{name} (is missing|has been changed)"):
        load_bundle(bundle)
    if name in ("tokenizer.json", "model.onnx"):  # what answers reads these, and needs no other
        with pytest.raises(BundleError, match=f"{name} (is missing|has been changed)"):
            Predictor(bundle, "float32")
        assert main(["export", str(bundle)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("BundleError: ") and name in error and "Traceback" not in error
    else:
        assert Predictor(bundle, "float32").predict(["a text"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(format=99), "format=99; this version reads 1"),
        (lambda info: info.pop("labels"), "incomplete"),
        (lambda info: info.update(extra=1), "incomplete"),
        (lambda info: info["labels"].reverse(), "bundle.json has been changed"),
        (lambda info: info.update(labels=None), "incomplete"),
        (lambda info: info.update(files=[1]), "incomplete"),
        (lambda info: info["files"].update({"../x": "0"}), "is no file of a bundle"),
        (lambda info: info["files"].pop("encoder.json"), "encoder.json is not among the files"),
    ],
)
def test_a_bundle_json_that_lies(bundle, change, message):
    info = json.loads((bundle / "bundle.json").read_text())
    change(info)
    (bundle / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(BundleError, match=message):
        layout.read_info(bundle)
    assert main(["predict", str(bundle), "a text"]) == 2


def test_no_bundle_and_a_broken_one(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"no bundle.json here; expected a folder that training wrote"):
        Predictor(tmp_path / "nowhere")
    (bundle / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="bundle.json: damaged"):
        Predictor(bundle)


def test_id_changes_with_what_answers():
    files = {"a": "1"}
    assert layout.compute_bundle_id(files, labels=["x"]) != layout.compute_bundle_id(files, labels=["y"])
    assert layout.compute_bundle_id(files, labels=["x"]) == layout.compute_bundle_id(dict(files), labels=["x"])


def test_order_and_company_do_not_change_an_answer(bundle):
    predictor = Predictor(bundle)
    texts = ["good", "a long and winding text " * 20, "so &amp; so", "bad news today", "x"]
    together = predictor.probs(texts)
    alone = np.concatenate([predictor.probs([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    answer = predictor.predict(texts)[3]
    assert answer.label == max(answer.probs, key=answer.probs.get) and answer.score == max(answer.probs.values())


def test_an_empty_text_is_refused(bundle):
    with pytest.raises(DataError, match="text 2: empty after cleaning"):
        Predictor(bundle).probs(["fine", " \u200b "])


def test_predict_texts(bundle, capsys):
    assert main(["predict", str(bundle), "a good day", "a bad day"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split("\t")[2] == "a good day" and "positive 0." in lines[0]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_predict_a_table(bundle, workdir, capsys, kind):
    Path("in.csv").write_text('id,tweet\n007,"good, very good"\n008,\n009,bad\n')
    assert main(["predict", str(bundle), "--file", "in.csv", "--text-column", "tweet", "--output", f"out.{kind}"]) == 0
    assert capsys.readouterr().out == f"out.{kind}: 3 rows\n"
    if kind == "csv":
        rows = pyarrow.csv.read_csv("out.csv").to_pylist()
    elif kind == "parquet":
        rows = pq.read_table("out.parquet").to_pylist()
        assert [row["id"] for row in rows] == ["007", "008", "009"]
        assert rows[1]["label"] is None and rows[1]["score"] is None
    else:
        return
    expected = Predictor(bundle).predict(["good, very good", "bad"])
    assert rows[0]["label"] == expected[0].label and rows[2]["score"] == pytest.approx(expected[1].score, abs=1e-5)
    assert list(rows[0]) == ["id", "tweet", "label", "score", "prob_negative", "prob_neutral", "prob_positive"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "no.csv", "--output", "o.csv"], "DataError: no.csv: no such file"),
        (["--file", "in.csv", "--output", "o.csv"], "DataError: in.csv: no column text"),
        (["--file", "in.csv", "--text-column", "tweet", "--output", "o.xls"], "DataError: --output o.xls: expected"),
        (["--file", "in.xls", "--output", "o.csv"], "DataError: in.xls: expected a name that ends in"),
    ],
)
def test_predict_faults(bundle, workdir, capsys, arguments, message):
    for name in ("in.csv", "in.xls"):
        Path(name).write_text("id,tweet\n1,x\n")
    assert main(["predict", str(bundle), *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not list(Path().glob("o.*"))
