"""Bundles of the predictor: reload, rollback, watching the source, and refusal of broken ones."""

import contextlib
import json
import shutil

import numpy as np
import pytest

from sodaops.bundle import layout
from sodaops.registry.registry import Registry
from sodaops.serving import trial
from tests.conftest import wait_until
from tests.gcs import forget_clients
from tests.serving import copy_bundle, detail, refresh_info, rewrite_info, swap_bundle

KEY = {"x-api-key": "root"}


def version(client):
    return client.get("/predict", params={"text": "x"}).json()["bundle_version"]


def test_reload_and_roll_back(serve, bundle, tmp_path):
    client = serve(admin_keys=["root"])
    first = version(client)
    assert detail(client.post("/admin/rollback", headers=KEY), 409)
    swap_bundle(bundle, copy_bundle(bundle, tmp_path / "second"))
    assert version(client) == first
    assert client.post("/admin/reload", headers=KEY).json()["changed"] is True
    second = version(client)
    assert second != first and client.get("/info").json()["previous"] == first
    assert client.post("/admin/rollback", headers=KEY).json() == {"changed": True, "bundle_version": first}
    assert detail(client.post("/admin/rollback", headers=KEY), 409)
    assert version(client) == first
    assert client.portal.call(client.app.state.service.models.reload) is False, "the watch would load it again"
    assert client.post("/admin/reload", headers=KEY).json()["changed"] is True
    assert version(client) == second


def test_a_new_bundle_is_found_and_one_that_is_being_copied_is_tried_again(serve, bundle, tmp_path):
    second, third = (copy_bundle(bundle, tmp_path / name, name) for name in ("second", "third"))
    client = serve(reload_s=0.05)
    first = version(client)
    swap_bundle(bundle, second)
    wait_until(lambda: version(client) != first)
    current = version(client)
    (bundle / "tokenizer.json").write_text("half")
    shutil.copy(third / "bundle.json", bundle / "bundle.json")
    wait_until(lambda: 'outcome="refused"' in client.get("/metrics").text)
    assert version(client) == current
    shutil.copytree(third, bundle, dirs_exist_ok=True)
    wait_until(lambda: version(client) == layout.read_info(third).bundle_id)


def test_a_champion_takes_over_and_is_taken_back(serve, bundle, tmp_path):
    registry = Registry(str(tmp_path / "registry"))
    first, second = (registry.register(folder) for folder in (bundle, copy_bundle(bundle, tmp_path / "second")))
    source = f"{registry.root}@champion"
    with pytest.raises(SystemExit, match="2"):
        serve(source)  # there is no champion yet
    registry.move("champion", first, None, "")
    client = serve(source, reload_s=0.05)
    assert version(client) == first
    registry.move("champion", second, first, "")
    wait_until(lambda: version(client) == second)
    registry.roll_back("worse")
    wait_until(lambda: version(client) == first)


def save_model(folder, model):
    for name in json.loads((folder / layout.INFO).read_text())["onnx"]:
        (folder / layout.ONNX[name]).write_bytes(model.SerializeToString())
    refresh_info(folder)


def external_weights(location):
    """A model whose weights lie in another file."""

    def change(folder):
        from onnx import TensorProto, helper

        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["a", "b"]) for name in ("input_ids", "attention_mask")
        ]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "embeddings")]
        nodes = [helper.make_node("Identity", ["w"], [name]) for name in ("logits", "embeddings")]
        (folder.parent.parent / "outside.bin").write_bytes(b"\0" * 8)
        save_model(folder, helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, [tensor])))

    return change


def other_outputs(folder):
    import onnx

    model = onnx.load(folder / layout.ONNX["float32"])
    model.graph.output[0].name = "scores"
    model.graph.node[[node.output[0] for node in model.graph.node].index("logits")].output[0] = "scores"
    save_model(folder, model)


def failing_graph(folder):
    """Reads the 200th column of a text that has none."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(folder / layout.ONNX["float32"])
    model.graph.initializer.append(numpy_helper.from_array(np.array([200]), "far"))
    model.graph.node.insert(0, helper.make_node("Gather", ["input_ids", "far"], ["nothing"], axis=1))
    model.graph.node.insert(1, helper.make_node("Add", ["input_ids", "nothing"], ["ids"]))
    for node in list(model.graph.node)[2:]:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    save_model(folder, model)


def endless_graph(folder):
    """Counts to 2^62 before it answers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def scalar(name, kind):
        return helper.make_tensor_value_info(name, kind, [])

    model = onnx.load(folder / layout.ONNX["float32"])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go_out"]), helper.make_node("Identity", ["x_in"], ["x_out"])], "body",
        [scalar("i", TensorProto.INT64), scalar("go_in", TensorProto.BOOL), scalar("x_in", TensorProto.INT64)],
        [scalar("go_out", TensorProto.BOOL), scalar("x_out", TensorProto.INT64)],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "n"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "go"))
    model.graph.node.insert(0, helper.make_node("Size", ["input_ids"], ["size"]))
    model.graph.node.insert(1, helper.make_node("Loop", ["n", "go", "size"], ["end"], body=body))
    model.graph.node.insert(2, helper.make_node("Sub", ["end", "size"], ["zero"]))
    model.graph.node.insert(3, helper.make_node("Add", ["input_ids", "zero"], ["ids"]))
    for node in list(model.graph.node)[4:]:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    save_model(folder, model)


def edit(**changes):
    return lambda folder: rewrite_info(folder, **changes)


def listed(name):
    def change(folder):
        (folder / "evil.pkl").write_bytes(b"\x80\x04.")
        rewrite_info(folder, files={**layout.read_info(folder.parents[2] / "good").files, name: "0" * 64})

    return change


def content(name, text):
    """Another content of a file, with its right hash."""

    def change(folder):
        for file in layout.ONNX.values() if name == "model" else [name]:
            (folder / file).write_bytes(text)
        rewrite_info(folder)

    return change


def tokenizer(**parts):
    """A tokenizer with other parts."""

    def change(folder):
        path = folder / layout.TOKENIZER
        path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
        rewrite_info(folder)

    return change


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def cut(name):
    def change(folder):
        path = folder / (name or layout.ONNX[layout.read_info(folder).default_variant])
        path.write_bytes(path.read_bytes()[:-100])

    return change


BROKEN = {  # how -> the change, and what the message names
    "corrupt model": (cut(None), ".onnx"),
    "corrupt tokenizer": (cut("tokenizer.json"), "tokenizer.json"),
    "half copied": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "half a bundle.json": (cut("bundle.json"), "bundle.json"),
    "no bundle.json": (lambda folder: (folder / "bundle.json").unlink(), "bundle.json"),
    "wrong types": (edit(max_tokens="many"), "max_tokens"),
    "path that escapes": (listed("../../etc/passwd"), "../../etc/passwd"),
    "pickle": (listed("evil.pkl"), "evil.pkl"),
    "weights that escape": (external_weights("../../outside.bin"), ".onnx"),
    "weights in the tokenizer": (external_weights("tokenizer.json"), ".onnx"),
    "weights anywhere in memory": (external_weights("*/_ORT_MEM_ADDR_/*"), ".onnx"),
    "no protobuf": (content("model", b"\xff" * 99), ".onnx"),
    "empty model": (content("model", b""), ".onnx"),
    "a model in another format": (content("model", b"\x18\0\0\0ORTM" + b"\0" * 99), ".onnx"),
    "another model": (other_outputs, "scores"),
    "another cleaning": (edit(cleaning="tweets_v2"), "cleaning"),
    "other labels": (edit(labels=["a", "b"]), "(2, 2)"),
    "a graph that fails": (failing_graph, "Gather"),
    "no model": (edit(onnx={}), "ONNX"),
    "nested tokenizer": (content("tokenizer.json", b"[" * 10**5), "tokenizer.json"),
    "a panic at load": (tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "tokenizer.json"),
    "a panic on any text": (tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}), "tokenizer.json"),
    "a panic on hard texts": (tokenizer(pre_tokenizer=split_by(r"(a+)+$")), "tokenizer.json"),
    "no drift reference": (content("drift.npz", b"PK"), "drift.npz"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_bundle_is_refused_and_the_old_one_goes_on(client, serve, trained, tmp_path, capsys, how):
    change, named = BROKEN[how]
    first = version(client)
    broken = copy_bundle(trained / "run/bundle", tmp_path / "deep/down/broken")
    (tmp_path / "good").symlink_to(trained / "run/bundle")
    change(broken)
    with pytest.raises(SystemExit, match="2"):
        serve(broken)
    printed = capsys.readouterr().err
    assert printed.startswith("BundleError: ") and named in printed and "SODAOPS_BUNDLE" in printed
    with source(client, broken):
        assert named in detail(client.post("/admin/reload", headers=KEY), 409)
    assert version(client) == first and client.get("/readyz").json()["ready"]
    assert 'sodaops_bundle_loads_total{outcome="refused"}' in client.get("/metrics").text


@contextlib.contextmanager
def source(client, folder):
    """Lets a service load another bundle."""
    models = client.app.state.service.models
    before, models.source = models.source, str(folder)
    try:
        yield models
    finally:
        models.source = before


def test_a_bundle_that_never_answers_is_given_up(client, trained, tmp_path, monkeypatch):
    broken = copy_bundle(trained / "run/bundle", tmp_path / "broken")
    endless_graph(broken)
    monkeypatch.setattr(trial, "LIMIT_S", 2)
    with source(client, broken):
        assert "2 s" in detail(client.post("/admin/reload", headers=KEY), 409)


def test_the_watch_goes_on_after_a_panic(serve, bundle, tmp_path, monkeypatch):
    class Panic(BaseException):
        """Stands for that of a library in Rust, after the trial has passed."""

    client = serve(reload_s=0.05)
    first, second = version(client), copy_bundle(bundle, tmp_path / "second")

    def panic(*_):
        raise Panic("in Rust")

    monkeypatch.setattr(trial, "load", panic)
    swap_bundle(bundle, second)
    wait_until(lambda: 'outcome="refused"' in client.get("/metrics").text)
    assert version(client) == first
    monkeypatch.undo()
    wait_until(lambda: version(client) != first)


def test_a_regular_expression_that_explodes_ends_one_request_only(serve, bundle):
    """Each run of "b" takes some 2^21 steps: less than the limit of the library, and all of them more than the deadline."""
    tokenizer(pre_tokenizer=split_by(r"(b+)+c"))(bundle)
    client = serve(deadline_s=0.2)
    text = ("b" * 20 + " ") * 60
    assert detail(client.post("/predict", json={"text": text}), 504)
    assert client.get("/healthz").status_code == 200 and client.get("/readyz").json()["ready"]
    client.app.state.service.settings.__dict__["deadline_s"] = 60
    assert client.post("/predict", json={"text": "a good day"}).status_code == 200


def test_a_text_on_which_the_tokenizer_fails(serve, bundle):
    tokenizer(pre_tokenizer=split_by(r"(b+)+$"))(bundle)
    client = serve()
    assert detail(client.post("/predict", json={"text": "b" * 30 + "!"}), 500)
    assert client.post("/predict", json={"text": "a good day"}).status_code == 200 and client.get("/readyz").json()["ready"]


def test_a_bucket_that_cannot_be_reached(serve, monkeypatch, capsys):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)  # no waiting between the tries
    with pytest.raises(SystemExit, match="2"):
        serve("gs://bucket/models")
    forget_clients()
    assert "StorageError: gs://bucket/models/bundle.json: " in capsys.readouterr().err
