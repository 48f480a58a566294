"""Bundles of the predictor: reload, rollback, watching the source, and refusal of broken ones."""

import json
import shutil

import pytest

from sodaops.bundle import layout
from sodaops.registry.registry import Registry
from tests.gcs import forget_clients
from tests.serving import copy_bundle, detail, refresh_info, swap_bundle, wait_until

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


def external_weights(folder):
    """A model whose weights would lie outside the bundle."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../outside.bin")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["a", "b"]) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "embeddings")]
    nodes = [helper.make_node("Identity", ["w"], [name]) for name in ("logits", "embeddings")]
    (folder.parent.parent / "outside.bin").write_bytes(b"\0" * 8)
    save_model(folder, helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, [tensor])))


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


def edit(**changes):
    def change(folder):
        info = json.loads((folder / layout.INFO).read_text())
        (folder / layout.INFO).write_text(json.dumps({**info, **changes}))

    return change


def listed(name):
    def change(folder):
        (folder / "evil.pkl").write_bytes(b"\x80\x04.")
        info = json.loads((folder / layout.INFO).read_text())
        info["files"][name] = "0" * 64
        info["bundle_id"] = layout.compute_bundle_id(info["files"], **layout._settings(info))
        (folder / layout.INFO).write_text(json.dumps(info))

    return change


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
    "other labels": (edit(labels=["a", "b", "c"]), "bundle.json"),
    "path that escapes": (listed("../../etc/passwd"), "../../etc/passwd"),
    "pickle": (listed("evil.pkl"), "evil.pkl"),
    "weights that escape": (external_weights, "ONNX Runtime"),
    "another model": (other_outputs, "scores"),
    "another cleaning": (lambda folder: refresh_info(folder, cleaning="tweets_v2"), "tweets_v2"),
    "a graph that fails": (failing_graph, "Gather"),
    "no model": (lambda folder: refresh_info(folder, onnx={}), "ONNX"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_bundle_is_refused_and_the_old_one_goes_on(client, trained, tmp_path, how):
    change, named = BROKEN[how]
    first = version(client)
    broken = copy_bundle(trained / "run/bundle", tmp_path / "deep/down/broken")
    change(broken)
    models = client.app.state.service.models
    models.source = str(broken)
    try:
        assert named in detail(client.post("/admin/reload", headers=KEY), 409)
    finally:
        models.source = str(trained / "run/bundle")
    assert version(client) == first


@pytest.mark.parametrize("how", ["corrupt model", "no bundle.json", "a graph that fails"])
def test_a_broken_bundle_is_not_served(serve, bundle, capsys, how):
    change, named = BROKEN[how]
    change(bundle)
    with pytest.raises(SystemExit, match="2"):
        serve()
    printed = capsys.readouterr().err
    assert printed.startswith("BundleError: ") and named in printed and "SODAOPS_BUNDLE" in printed


def test_a_bucket_that_cannot_be_reached(serve, monkeypatch, capsys):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)  # no waiting between the tries
    with pytest.raises(SystemExit, match="2"):
        serve("gs://bucket/models")
    forget_clients()
    assert "StorageError: gs://bucket/models/bundle.json: " in capsys.readouterr().err
