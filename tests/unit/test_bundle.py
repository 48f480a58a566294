"""The bundle: what it holds, damage, and predictions from it."""

import json
import os
import socket
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sodaops.bundle import layout
from sodaops.data.preprocess import read_manifest
from sodaops.errors import BundleError, DataError
from sodaops.inference.predictor import Predictor
from tests.conftest import REPO, lazy
from tests.serving import rewrite_info

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
    assert [source.pop("path") for source in written["sources"]] == ["tweets.csv"]
    assert written.pop("cut_share")["max_tokens"] == 128 and written == manifest
    config = layout.read_config(bundle, info)
    assert config["optim"]["lr"] > 0 and config["data"]["path"] == "tweets.csv" and config["run_dir"] is None
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*info.files, "bundle.json"])
    assert info.files.keys() == {*layout.FILES_OF[2], *(layout.ONNX[variant] for variant in info.onnx), layout.DRIFT}


def test_it_holds_no_pickle(bundle):
    for name, key in ((layout.WEIGHTS, "embeddings.word_embeddings.weight"), (layout.HEAD, "weight")):
        with safe_open(bundle / name, framework="np") as weights:
            assert key in weights.keys()  # noqa: SIM118
    for path in bundle.iterdir():
        if path.suffix == ".onnx":
            onnx.checker.check_model(path)
        elif path.name == layout.DRIFT:
            with np.load(path, allow_pickle=False) as arrays:
                assert all(arrays[name].dtype != object for name in arrays)
        elif path.suffix != ".safetensors":
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


@pytest.mark.parametrize("name", [*layout.FILES_OF[2], "model.onnx"])
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


DEEP = "[" * 10**5
FIELDS = {  # of bundle.json -> values that it must not have; as JSON text, since some are not JSON
    "format": ["99", "true", "null", "[]", "1"],
    "labels": ["[]", '["a", "b", "a"]', '["", "b", "c"]', "null", '"abc"', "[1, 2, 3]", '["a", ["b"]]', '["\\ud800", "b"]'],
    "max_tokens": ["-1", "0", "2", "1" + "0" * 30, "1e400", "NaN", "1.5", "true", '"64"', "9" * 5000],
    "max_windows": ["0", "-1", "1.5", '"8"', "[8]", "9999999"],
    "stride": ["-1", "null", "0.5"],
    "pad_token_id": ["-1", "9223372036854775808", "null"],
    "pooling": ['"max"', "[]"],
    "cleaning": ['"tweets_v2"', "{}"],
    "metrics": ['{"val": {"loss": NaN}}', '{"val": {"loss": -Infinity}}', '{"val": {"loss": 1e999}}', '{"val": 1}', "[]", DEEP],
    "data": ["{}", '{"name": "../../x", "fingerprint": ""}', '{"name": "tweets", "fingerprint": 1}'],
    "onnx": ['{"float32": {"opset": NaN}}', '{"float16": {}}', '{"float32": []}'],
    "files": ["[1]", "{}", '{"../x": "0"}'],
    "bundle_id": ['"0123456789ab"', "1"],
    "extra": ["1"],
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in FIELDS.items() for text in texts])
def test_an_inconsistent_bundle_json(bundle, key, text):
    rewrite_info(bundle, **({key: "VALUE"} if key not in ("files", "format", "bundle_id") else {}))
    path = bundle / "bundle.json"
    fields = {**json.loads(path.read_text()), key: "VALUE"}
    path.write_text(json.dumps(fields).replace('"VALUE"', text))
    with pytest.raises(BundleError) as raised:
        layout.read_info(bundle)
    message = str(raised.value)
    assert message.startswith(str(bundle)) and len(message) < 1500
    assert "has been changed" not in message or key in ("files", "bundle_id"), "the value itself is refused"


def test_the_command_names_a_fault(bundle, run):
    rewrite_info(bundle, labels=["a\x1b[31m"] * 2, max_tokens=-1)
    code, _, error = run("predict", bundle, "a text")
    assert code == 2 and error.startswith(f"BundleError: {bundle}") and "labels" in error and "max_tokens" in error
    assert "\x1b" not in error


CONTENTS = [
    b"",
    b"{",
    b"[]",
    b"1",
    b"\xff\xfe{",
    b"\xef\xbb\xbf{}",
    DEEP.encode(),
    b'{"a": ' * 10**5,
    b"9" * 5000,
    b'{"n": NaN}',
    b'{"n": 1e999}',
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
@pytest.mark.parametrize("name", ["bundle.json", "data_manifest.json", "config.json", "config.yaml"])
def test_damaged_json_and_yaml(bundle, name, content):
    (bundle / name).write_bytes(content)
    if name != "bundle.json":
        rewrite_info(bundle)
    if name == "config.yaml" and content.endswith((b"NaN}", b"1e999}", b"\xbf{}", b"[" * 99)):  # valid, and the last one slow
        return
    with pytest.raises(BundleError, match=name):
        info = layout.read_info(bundle)
        layout.read_config(bundle, info) if name == "config.yaml" else layout.read_json(bundle, info, name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**30), ("hidden_size", 2**40), ("hidden_size", -1), ("hidden_size", None),
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**30), ("num_attention_heads", 0),
        ("vocab_size", 2**62), ("vocab_size", "many"),
        ("model_type", "no_such"), ("model_type", None), ("hidden_act", "no_such"), ("max_position_embeddings", 10**12),
    ],
)  # fmt: skip
def test_an_encoder_that_does_not_fit_its_weights(bundle, key, value):
    from sodaops.bundle.save import load_bundle

    path = bundle / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    rewrite_info(bundle)
    with pytest.raises(BundleError, match=r"config\.json"):
        load_bundle(bundle)


def link(path):
    path.rename(path.with_name("target"))
    path.symlink_to(path.parent.parent / "bundle" / "target")


def replace_by(make):
    def change(path):
        path.unlink(missing_ok=True)
        make(path)

    return change


def bind(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


ODD = {
    "symbolic link": link,
    "dangling link": replace_by(lambda path: path.symlink_to("nowhere")),
    "link to itself": replace_by(lambda path: path.symlink_to(path.name)),
    "link to a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "FIFO": replace_by(os.mkfifo),
    "folder": replace_by(Path.mkdir),
    "socket": replace_by(bind),
    "sparse file of 1 TiB": lambda path: os.truncate(path, 2**40),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("name", ["bundle.json", "tokenizer.json", "model.onnx", "drift.npz"])
@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_read(bundle, monkeypatch, kind, name):
    monkeypatch.chdir(bundle)  # a socket's path is limited to 108 bytes
    ODD[kind](bundle / name)
    with pytest.raises(BundleError, match=f"{name}|target"):
        Predictor(bundle, "float32")


@pytest.mark.parametrize("name", ["weights.bin", "evil.pkl", ".hidden", "model.onnx.data", "a\x1b[31m", "sub/file"])
def test_a_file_that_is_not_hashed(bundle, run, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    code, _, error = run("predict", bundle, "a text")
    assert code == 2 and error.startswith("BundleError: ") and repr(name.partition("/")[0]) in error and "\x1b" not in error


def arrays(**changes):
    def change(path):
        with np.load(path) as file:
            np.savez_compressed(path, **{**file, **changes})

    return change


def bomb(path):
    """256 MiB and more of zeros in some kilobytes, announced as an array of 2^60 numbers."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("format.npy", np.lib.format.MAGIC_PREFIX + b"\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(
    "change",
    [
        cut, bomb, arrays(format=np.array(9)), arrays(format=np.array([1, 1])), arrays(axes=np.zeros(3, np.float32)),
        arrays(axes=np.full((64, 2), np.nan, np.float32)), arrays(center=np.array(["a"])), arrays(center=np.array([None])),
        lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\x80\x04."),
    ],
)  # fmt: skip
def test_a_damaged_drift_reference(bundle, change):
    change(bundle / "drift.npz")
    rewrite_info(bundle)
    with pytest.raises(BundleError, match=r"drift\.npz"):
        Predictor(bundle, "float32")


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


def test_a_runs_folder_stands_for_its_bundle(trained, run, workdir):
    from sodaops.registry.bundles import bundle_at

    bundle = trained / "run/bundle"
    for source in (bundle, trained / "run"):
        with bundle_at(source) as folder:
            assert folder == bundle
    with bundle_at("nowhere") as folder:
        assert folder == Path("nowhere")
    assert run("register", trained / "run")[0] == 0
    assert layout.read_info(bundle).bundle_id in run("registry", "list", "--json")[1]
