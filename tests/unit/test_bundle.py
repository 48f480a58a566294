"""The bundle: what it holds, damage, and predictions from it."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sodaops.bundle import layout
from sodaops.data.preprocess import read_manifest
from sodaops.errors import BundleError, DataError
from sodaops.inference.predictor import Predictor
from tests.conftest import REPO, lazy

onnx = lazy("onnx")


def test_it_names_its_origin(bundle, trained):
    info = layout.read_info(bundle)
    manifest = read_manifest(trained / "splits")
    assert info.labels == ["negative", "neutral", "positive"] and info.cleaning == "minimal" and info.max_tokens == 128
    assert info.data == {"name": "tweets", "fingerprint": manifest["fingerprint"], "text_column": "text"}
    assert set(info.metrics["val"]) == {"epoch", "loss", "macro_f1", "accuracy"}
    assert {"torch", "transformers", "python"} <= set(info.versions)
    assert [source.pop("path") for source in manifest["sources"]] != ["tweets.csv"]
    written = json.loads((bundle / "data_manifest.json").read_text())
    assert [source.pop("path") for source in written["sources"]] == ["tweets.csv"] and written == manifest
    config = layout.read_config(bundle, info)
    assert config["optim"]["lr"] > 0 and config["data"]["path"] == "tweets.csv" and config["run_dir"] is None
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*info.files, "bundle.json"])
    assert info.files.keys() == {*layout.FILES, *(layout.ONNX[variant] for variant in info.onnx), layout.DRIFT}


def test_it_holds_no_pickle(bundle):
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


def test_it_names_no_folder_of_this_machine(bundle):
    for path in bundle.iterdir():
        for folder in ("shared_trained", str(REPO), sys.prefix, tempfile.gettempdir()):  # of the run, of code
            assert folder.encode() not in path.read_bytes(), path.name


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*layout.FILES, "model.onnx"])
@pytest.mark.parametrize("damage", [Path.unlink, change, cut])
def test_damage_is_found_and_named(bundle, run, name, damage):
    from sodaops.bundle.save import load_bundle

    damage(bundle / name)
    with pytest.raises(BundleError, match=name):
        load_bundle(bundle)
    if name not in ("tokenizer.json", "model.onnx"):  # a predictor reads no other file
        assert Predictor(bundle, "float32").predict(["a text"])
        return
    with pytest.raises(BundleError, match=name):
        Predictor(bundle, "float32")
    code, _, error = run("export", bundle)
    assert code == 2 and error.startswith("BundleError: ") and name in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda info: info.update(format=99), "format=99"),
        (lambda info: info.pop("labels"), "labels"),
        (lambda info: info.update(extra=1), "extra"),
        (lambda info: info["labels"].reverse(), "bundle.json"),
        (lambda info: info.update(labels=None), "labels"),
        (lambda info: info.update(files=[1]), "files"),
        (lambda info: info["files"].update({"../x": "0"}), "../x"),
        (lambda info: info["files"].pop("encoder.json"), "encoder.json"),
    ],
)
def test_an_inconsistent_bundle_json(bundle, run, change, named):
    info = json.loads((bundle / "bundle.json").read_text())
    change(info)
    (bundle / "bundle.json").write_text(json.dumps(info))
    code, _, error = run("predict", bundle, "a text")
    assert code == 2 and error.startswith(f"BundleError: {bundle}") and named in error


def test_no_bundle_and_a_broken_one(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"nowhere.*bundle\.json"):
        Predictor(tmp_path / "nowhere")
    (bundle / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Predictor(bundle)


def test_the_id_changes_with_a_setting():
    files = {"a": "1"}
    assert layout.compute_bundle_id(files, labels=["x"]) != layout.compute_bundle_id(files, labels=["y"])
    assert layout.compute_bundle_id(files, labels=["x"]) == layout.compute_bundle_id(dict(files), labels=["x"])


def test_neither_order_nor_neighbours_change_a_prediction(bundle):
    predictor = Predictor(bundle)
    texts = ["good", "a long and winding text " * 20, "so &amp; so", "bad news today", "x"]
    together = predictor.probs(texts)
    alone = np.concatenate([predictor.probs([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    answer = predictor.predict(texts)[3]
    assert answer.label == max(answer.probs, key=answer.probs.get) and answer.score == max(answer.probs.values())


def test_an_empty_text_is_refused(bundle):
    with pytest.raises(DataError, match="text 2"):
        Predictor(bundle).probs(["fine", " \u200b "])


def test_the_command_predicts_texts(bundle, run):
    code, out, _ = run("predict", bundle, "a good day", "a bad day")
    lines = [line.split("\t") for line in out.splitlines()]
    expected = Predictor(bundle).predict(["a good day", "a bad day"])
    assert code == 0 and [line[2] for line in lines] == ["a good day", "a bad day"] and "positive 0." in lines[0][3]
    assert [line[:2] for line in lines] == [[answer.label, f"{answer.score:.3f}"] for answer in expected]
