"""ONNX export: packing, quantization, the checks of each variant, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sodaops.bundle import layout
from sodaops.errors import BundleError, ConfigError, ModelError
from sodaops.inference.predictor import Predictor
from sodaops.tasks import SINGLE_LABEL
from sodaops.text.limit import Limit
from tests.conftest import configured, lazy

helper = lazy("onnx.helper")
numpy_helper = lazy("onnx.numpy_helper")
onnx = lazy("onnx")
onnxruntime = lazy("onnxruntime")

RNG = np.random.default_rng(0)


@pytest.fixture
def exporting(bundle, monkeypatch):
    """The module, with the bundle's float32 graph in place of a new one, which takes torch some seconds."""
    from sodaops.export import onnx_export

    graph = (bundle / layout.ONNX["float32"]).read_bytes()
    monkeypatch.setattr(onnx_export, "_write_float32", lambda loaded, file: file.write_bytes(graph))
    return onnx_export


def product(weight):
    tensors = [numpy_helper.from_array(weight, "w")]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["a", "b", "c"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def output(model, **inputs):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def quantized(model):
    from sodaops.export.quantization import quantize

    return quantize(model)


def packed(model):
    from sodaops.export.packing import pack

    return pack(model)


def test_an_8_bit_product_follows_its_formula():
    weight = RNG.normal(size=(48, 20)).astype(np.float32)
    weight[:, 3] = 0
    x = RNG.normal(size=(2, 5, 48)).astype(np.float32) * np.array([1, 100, 0.01, 1, 5], np.float32)[:, None]
    x[1, 2] = 0
    step = np.abs(x).max(-1, keepdims=True) / 127
    scale = np.where(np.abs(weight).max(0) > 0, np.abs(weight).max(0) / 63, 1)
    whole = np.rint(x / np.where(step > 0, step, 1)) @ np.rint(weight / scale)
    result = output(quantized(product(weight)), x=x)
    np.testing.assert_allclose(result, whole * step * scale, rtol=1e-4, atol=1e-4)
    assert np.abs(result - x @ weight).max() < 0.03 * np.abs(x @ weight).max()
    assert (result[1, 2] == 0).all() and (result[..., 3] == 0).all()


def test_a_token_does_not_depend_on_its_neighbours():
    weight = RNG.normal(size=(48, 20)).astype(np.float32)
    model = quantized(product(weight))
    one = RNG.normal(size=(1, 3, 48)).astype(np.float32)
    loud = np.concatenate([one, 1000 * RNG.normal(size=(1, 3, 48)).astype(np.float32)])
    np.testing.assert_array_equal(output(model, x=loud)[:1], output(model, x=one))


GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch, tokens] attention_mask, float[batch, tokens, 8] x, float[1, tokens, 8] position) => (float[batch, tokens, 8] y)
<float[batch, tokens, 8] h, float[batch, tokens, 8] p, float[batch, tokens, 8] b, float[batch, tokens, 8] r,
 float[batch, tokens, 8] n, float[batch, 8, tokens] t, float[batch, tokens, tokens] s, float[batch, tokens, 8] c>
{
  h = Add (x, position)
  p = MatMul (h, w)
  b = Add (p, bias)
  r = Add (b, h)
  n = LayerNormalization <axis = -1> (r, bias, bias)
  t = Transpose <perm = [0, 2, 1]> (n)
  s = MatMul (n, t)
  c = MatMul (s, x)
  y = Add (c, n)
}"""


def test_packed_nodes_compute_no_padding():
    model = onnx.parser.parse_model(GRAPH)
    weights = {"w": RNG.normal(size=(8, 8)), "bias": RNG.normal(size=8)}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])  # left and right, and a hole
    x = RNG.normal(size=(3, 4, 8)).astype(np.float32) * mask[..., None].astype(np.float32)  # as attention weighs it
    inputs = {"attention_mask": mask, "x": x, "position": RNG.normal(size=(1, 4, 8)).astype(np.float32)}
    expected = output(model, **inputs)
    model = packed(model)
    onnx.checker.check_model(model, full_check=True)
    result = output(model, **inputs)
    np.testing.assert_allclose(result[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
    reads = {node.output[0].removesuffix("/packed"): node.input[0] for node in model.graph.node}
    assert [name for name in "hpbrnsc" if reads[name].endswith("/packed")] == list("pbrn")


def test_a_graph_without_tokens_is_unchanged():
    model = product(np.eye(4, dtype=np.float32))
    nodes = [node.SerializeToString() for node in model.graph.node]
    assert [node.SerializeToString() for node in packed(model).graph.node] == nodes


def test_a_weight_that_another_node_reads_stays():
    model = product(np.eye(4, dtype=np.float32))
    model.graph.node.append(helper.make_node("Identity", ["w"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [4, 4]))
    assert "w" in [tensor.name for tensor in quantized(model).graph.initializer]


def test_a_bundle_that_is_replaced_while_it_is_read(bundle, monkeypatch):
    """What is used is what was hashed, whatever happens to the files meanwhile."""
    expected, read = Predictor(bundle, "int8").probs(["a text"]), layout.read_file

    def exchange(path, info, name):
        content = read(path, info, name)
        (bundle / name).write_bytes(b"other")
        return content

    monkeypatch.setattr(layout, "read_file", exchange)
    np.testing.assert_array_equal(Predictor(bundle, "int8").probs(["a text"]), expected)


def test_bundle_json_holds_the_measurements(bundle, exporting):
    info = layout.read_info(bundle)
    assert list(info.onnx) == ["float32", "int8"] and info.default_variant == "int8"
    assert info.onnx["float32"]["max_gap"] <= exporting.MAX_GAP and info.onnx["float32"]["opset"] == 20
    assert info.onnx["int8"]["macro_f1_change"] >= -exporting.MAX_LOSS
    sizes = {variant: (bundle / name).stat().st_size for variant, name in layout.ONNX.items()}
    assert sizes["int8"] < 0.5 * sizes["float32"]


@pytest.mark.parametrize(("variant", "atol"), [("float32", 1e-5), ("int8", 0.05)])
def test_onnx_gives_torchs_output_at_every_length_alone_and_padded(bundle, variant, atol):
    import torch

    from sodaops.bundle.save import load_bundle
    from sodaops.data.tokens import pad

    loaded, predictor = load_bundle(bundle), Predictor(bundle, variant)
    rows = [RNG.integers(1000, 20_000, size=n) for n in (3, 4, 5, 17, 64, 127, 128)]
    with torch.inference_mode():
        expected = [loaded.model(*map(torch.from_numpy, pad([row], 0))) for row in rows]
    probs = np.concatenate([torch.softmax(one.logits, -1).numpy() for one in expected])
    together, alone = predictor.run(rows), np.concatenate([predictor.run([row]).probs for row in rows])
    np.testing.assert_allclose(together.probs, probs, atol=atol)
    np.testing.assert_allclose(alone, probs, atol=atol)
    np.testing.assert_allclose(together.embeddings, np.concatenate([one.embeddings for one in expected]), atol=10 * atol)
    np.testing.assert_allclose(together.probs, alone, atol=1e-5)


def encoder(kind):
    import transformers

    size = {"vocab_size": 900, "max_position_embeddings": 80, "pad_token_id": 0}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **size}
    if kind == "distilbert":
        return transformers.DistilBertModel(transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **size))
    if kind == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**usual))
    ids = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**usual, **ids, local_attention=16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pooling", "max_windows"),
    [
        ("distilbert", "mean", 4),
        pytest.param("distilbert", "cls", 4, marks=pytest.mark.deep),
        *(pytest.param(kind, "mean", None, marks=pytest.mark.deep) for kind in ("distilbert", "roberta", "modernbert")),
    ],
)
def test_other_encoders_are_packed_and_give_torchs_output(kind, pooling, max_windows, tmp_path):
    import torch

    from sodaops.data.tokens import batch_inputs
    from sodaops.export.onnx_export import _write_float32
    from sodaops.modeling.encoder import TextEncoder

    torch.manual_seed(0)
    model, limit = TextEncoder(encoder(kind), 3, pooling, 0.0).eval(), Limit(64, max_windows=max_windows)
    info = SimpleNamespace(pad_token_id=0, max_tokens=64, limit=limit)
    _write_float32(SimpleNamespace(model=model, info=info), tmp_path / "float32.onnx")
    exported = onnx.load(tmp_path / "float32.onnx")
    assert sum(node.op_type == "MatMul" and node.input[0].endswith("/packed") for node in exported.graph.node) >= 8
    rows = [RNG.integers(3, 900, n) for n in (3, 4, 17, 40, 64, *((65, 250) if max_windows else ()))]
    alone = [{name: torch.from_numpy(x) for name, x in batch_inputs([row], 0, limit).items()} for row in rows]
    expected = np.concatenate([model(**inputs).logits.detach().numpy() for inputs in alone])
    for graph, atol in ((exported, 1e-5), (quantized(onnx.load(tmp_path / "float32.onnx")), 0.05)):
        np.testing.assert_allclose(output(graph, **batch_inputs(rows, 0, limit)), expected, atol=atol)


def test_a_graph_that_ignores_its_mask_is_refused(bundle, exporting, trained, monkeypatch):
    """A graph that takes padding for words, and gives almost the same probabilities for every padded text."""
    write = exporting._write_float32

    def forgetful(loaded, file):
        write(loaded, file)
        model = onnx.load(file)
        for node in model.graph.node:
            node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
        one = helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
        model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=one))
        model.graph.node.insert(0, helper.make_node("Shape", ["input_ids"], ["shape"]))
        onnx.save(model, file)

    monkeypatch.setattr(exporting, "_write_float32", forgetful)
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(ModelError, match="float32"):
        exporting.export_onnx(bundle, trained / "splits", ["float32"])
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


@pytest.mark.slow
def test_an_int8_that_loses_too_much_is_not_written(bundle, exporting, trained, monkeypatch, run):
    def coarse(model):
        model = quantized(model)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("/bytes"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))
        return model

    monkeypatch.setattr(exporting, "quantize", coarse)
    old = layout.read_info(bundle)
    code, out, error = run("export", bundle, f"evaluate.splits_dir={trained / 'splits'}")
    assert code == 0 and "float32" in out and "int8" in error
    info = layout.read_info(bundle)
    assert list(info.onnx) == ["float32"] and not (bundle / "model.int8.onnx").exists()
    assert info.bundle_id != old.bundle_id and info.metrics == old.metrics and info.created == old.created
    assert Predictor(bundle).variant == info.default_variant == "float32"
    with pytest.raises(BundleError, match="int8.*float32"):
        Predictor(bundle, "int8")


def test_a_bundle_without_models_names_the_command_that_makes_one(bundle, run):
    info = json.loads((bundle / "bundle.json").read_text())
    fields = {key: value for key, value in info.items() if key not in ("files", "bundle_id", "format")}
    for name in layout.ONNX.values():
        (bundle / name).unlink()
    layout.write_info(bundle, **{**fields, "onnx": {}})
    code, _, error = run("predict", bundle, "x")
    assert code == 2 and error.startswith("BundleError: ") and f"sodaops export {bundle}" in error


def test_bad_configuration(run):
    code, _, error = run("export")
    assert code == 2 and error.startswith("ConfigError: ") and "BUNDLE" in error
    for variants in ("[int8]", "[]"):
        with pytest.raises(ConfigError, match=r"export\.variants"):
            configured(f"export.variants={variants}")
    assert configured("export.variants=[]", "evaluate.split=none").export.variants == []


@pytest.mark.slow
@pytest.mark.parametrize(("change", "written"), [(0.02, True), (-0.0049, True), (-0.0051, False)])
def test_int8_may_gain_but_not_lose_much(bundle, exporting, trained, monkeypatch, change, written):
    gate = exporting.Gate(
        metric=SINGLE_LABEL.metrics[0], unit="a degree", score=0.8, score_change=change, agreement=0.99, mean_gap=0.001,
        max_gap=1e-5, n_texts=10,
    )  # fmt: skip
    same = replace(gate, score_change=0.0)
    monkeypatch.setattr(exporting, "_measure", lambda variant, *_: gate if variant == "int8" else same)
    exported = exporting.export_onnx(bundle, trained / "splits", ["int8", "float32"])  # in any order
    assert ("int8" in exported.info.onnx) is written and exported.gates["int8"] == gate
    assert "0.8000" in gate.as_text() and f"{change:+.4f}" in gate.as_text() and "99.0%" in gate.as_text()
    assert "a degree" in gate.as_text()


def test_splits_with_another_cleaning_are_refused(bundle, exporting, trained, tmp_path):
    splits = Path(shutil.copytree(trained / "splits", tmp_path / "splits"))
    manifest = json.loads((splits / "manifest.json").read_text())
    (splits / "manifest.json").write_text(json.dumps({**manifest, "cleaning": "letters"}))
    with pytest.raises(ConfigError, match="cleaning=letters.* minimal"):
        exporting.export_onnx(bundle, splits, ["float32"])


def test_texts_of_every_length_are_measured(bundle, exporting, trained):
    from sodaops.bundle.save import load_bundle
    from sodaops.data.preprocess import read_split

    texts = exporting._read_texts(load_bundle(bundle), trained / "splits")
    lengths = [len(row) for row in texts.every_length]
    assert len(lengths) == len(set(lengths)) > 20 and len(texts.val) == read_split(trained / "splits", "val").num_rows
