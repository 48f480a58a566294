import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from sodaops.bundle import layout
from sodaops.bundle.save import load_bundle
from sodaops.cli import main
from sodaops.data.preprocess import read_split
from sodaops.data.tokens import pad
from sodaops.errors import BundleError, ConfigError, ModelError
from sodaops.export import onnx_export as exporting
from sodaops.export.onnx_export import Gate, export_onnx
from sodaops.export.packing import pack
from sodaops.export.quantization import quantise
from sodaops.inference.predictor import Predictor
from sodaops.modeling.encoder import TextEncoder
from tests.conftest import configured

RNG = np.random.default_rng(0)


@pytest.fixture
def bundle(trained, tmp_path):
    return Path(shutil.copytree(trained / "run/bundle", tmp_path / "bundle"))


def product(weight):
    tensors = [numpy_helper.from_array(weight, "w")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b", "c"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def run(model, **inputs):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def test_an_8_bit_product_is_what_its_formula_says():
    weight = RNG.normal(size=(48, 20)).astype(np.float32)
    weight[:, 3] = 0
    x = RNG.normal(size=(2, 5, 48)).astype(np.float32) * np.array([1, 100, 0.01, 1, 5], np.float32)[:, None]
    x[1, 2] = 0
    step = np.abs(x).max(-1, keepdims=True) / 127
    scale = np.where(np.abs(weight).max(0) > 0, np.abs(weight).max(0) / 63, 1)
    whole = np.rint(x / np.where(step > 0, step, 1)) @ np.rint(weight / scale)
    found = run(quantise(product(weight)), x=x)
    np.testing.assert_allclose(found, whole * step * scale, rtol=1e-4, atol=1e-4)
    assert np.abs(found - x @ weight).max() < 0.03 * np.abs(x @ weight).max()
    assert (found[1, 2] == 0).all() and (found[..., 3] == 0).all()


def test_a_token_is_answered_alike_beside_any_other():
    weight = RNG.normal(size=(48, 20)).astype(np.float32)
    model = quantise(product(weight))
    one = RNG.normal(size=(1, 3, 48)).astype(np.float32)
    loud = np.concatenate([one, 1000 * RNG.normal(size=(1, 3, 48)).astype(np.float32)])
    np.testing.assert_array_equal(run(model, x=loud)[:1], run(model, x=one))


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


def test_what_works_token_by_token_computes_no_padding():
    model = onnx.parser.parse_model(GRAPH)
    weights = {"w": RNG.normal(size=(8, 8)), "bias": RNG.normal(size=8)}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])  # left and right, and a hole
    x = RNG.normal(size=(3, 4, 8)).astype(np.float32) * mask[..., None].astype(np.float32)  # as attention weighs it
    inputs = {"attention_mask": mask, "x": x, "position": RNG.normal(size=(1, 4, 8)).astype(np.float32)}
    expected = run(model, **inputs)
    packed = pack(model)
    onnx.checker.check_model(packed, full_check=True)
    found = run(packed, **inputs)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
    reads = {node.output[0].removesuffix("/packed"): node.input[0] for node in packed.graph.node}
    assert [name for name in "hpbrnsc" if reads[name].endswith("/packed")] == list("pbrn")


def test_a_graph_without_tokens_is_left_alone():
    model = product(np.eye(4, dtype=np.float32))
    nodes = [node.SerializeToString() for node in model.graph.node]
    assert [node.SerializeToString() for node in pack(model).graph.node] == nodes


def test_a_weight_that_others_read_too_stays():
    model = product(np.eye(4, dtype=np.float32))
    model.graph.node.append(helper.make_node("Identity", ["w"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 4]))
    assert "w" in [tensor.name for tensor in quantise(model).graph.initializer]


def test_a_bundle_that_is_exchanged_while_it_is_read(bundle, monkeypatch):
    checked = layout.verify

    def exchange(path, info, names):
        checked(path, info, names)
        for name in names:
            shutil.copyfile(bundle / layout.ONNX["float32"], bundle / "other")
            (bundle / "other").rename(bundle / name)

    monkeypatch.setattr(layout, "verify", exchange)
    with pytest.raises(BundleError, match="exchanged while it was read"):
        Predictor(bundle, "int8")


def test_the_bundle_says_what_its_gates_measured(bundle):
    info = layout.read_info(bundle)
    assert list(info.onnx) == ["float32", "int8"] and info.default_variant == "int8"
    assert info.onnx["float32"]["max_gap"] <= exporting.MAX_GAP and info.onnx["float32"]["opset"] == 20
    assert info.onnx["int8"]["macro_f1_change"] >= -exporting.MAX_F1_LOSS
    sizes = {variant: (bundle / name).stat().st_size for variant, name in layout.ONNX.items()}
    assert sizes["int8"] < 0.5 * sizes["float32"]


@pytest.mark.parametrize(("variant", "atol"), [("float32", 1e-5), ("int8", 0.05)])
def test_onnx_answers_as_torch_at_every_length_alone_and_padded(bundle, variant, atol):
    loaded, predictor = load_bundle(bundle), Predictor(bundle, variant)
    lengths = [3, 4, 5, 17, 64, 127, 128]
    rows = [RNG.integers(1000, 20_000, size=n) for n in lengths]
    expected = []
    for row in rows:
        ids, mask = pad([row], 0)
        expected.append(loaded.model(*map(torch.from_numpy, (ids, mask))))
    probs = np.concatenate([torch.softmax(one.logits, -1).detach().numpy() for one in expected])
    embeddings = np.concatenate([one.embeddings.detach().numpy() for one in expected])
    together, alone = predictor.run(rows), [predictor.run([row]) for row in rows]
    for found in (together.probs, np.concatenate([one.probs for one in alone])):
        np.testing.assert_allclose(found, probs, atol=atol)
    np.testing.assert_allclose(together.embeddings, embeddings, atol=10 * atol)
    np.testing.assert_allclose(together.probs, np.concatenate([one.probs for one in alone]), atol=1e-5)


def encoder(kind):
    size = {"vocab_size": 900, "max_position_embeddings": 80, "pad_token_id": 0}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **size}
    if kind == "distilbert":
        return transformers.DistilBertModel(transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **size))
    if kind == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**usual))
    ids = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**usual, **ids, local_attention=16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert"])
def test_other_encoders_are_packed_and_answer_as_torch_does(kind, tmp_path):
    torch.manual_seed(0)
    model = TextEncoder(encoder(kind), 3, "mean", 0.0).eval()
    info = SimpleNamespace(pad_token_id=0, max_tokens=64)
    exporting._write_float32(SimpleNamespace(model=model, info=info), tmp_path / "float32.onnx")
    exported = onnx.load(tmp_path / "float32.onnx")
    assert sum(node.op_type == "MatMul" and node.input[0].endswith("/packed") for node in exported.graph.node) >= 8
    rows = [RNG.integers(3, 900, n) for n in (3, 4, 17, 40, 64)]
    expected = np.concatenate([model(*map(torch.from_numpy, pad([row], 0))).logits.detach().numpy() for row in rows])
    ids, mask = pad(rows, 0)
    for graph, atol in ((exported, 1e-5), (quantise(onnx.load(tmp_path / "float32.onnx")), 0.05)):
        np.testing.assert_allclose(run(graph, input_ids=ids, attention_mask=mask), expected, atol=atol)


@pytest.mark.slow
def test_the_gate_sees_a_graph_without_its_mask(bundle, trained, monkeypatch):
    """The trap: a graph that takes every token for a word, and answers almost the same for every padded text."""
    write = exporting._write_float32

    def forgetful(loaded, file):
        write(loaded, file)
        model = onnx.load(file)
        for node in model.graph.node:
            node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
        one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
        model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=one))
        model.graph.node.insert(0, helper.make_node("Shape", ["input_ids"], ["shape"]))
        onnx.save(model, file)

    monkeypatch.setattr(exporting, "_write_float32", forgetful)
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(ModelError, match="does not answer as torch does"):
        export_onnx(bundle, trained / "splits", ["float32"])
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


@pytest.mark.slow
def test_a_variant_that_fails_its_gate_is_not_written(bundle, trained, monkeypatch, capsys):
    def coarse(model):
        model = quantise(model)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("/bytes"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))
        return model

    monkeypatch.setattr(exporting, "quantise", coarse)
    old = layout.read_info(bundle)
    assert main(["export", str(bundle), f"evaluate.splits_dir={trained / 'splits'}"]) == 0
    printed = capsys.readouterr()
    assert "float32 written" in printed.out and "int8    NOT WRITTEN" in printed.err
    info = layout.read_info(bundle)
    assert list(info.onnx) == ["float32"] and not (bundle / "model.int8.onnx").exists() and info.default_variant == "float32"
    assert info.bundle_id != old.bundle_id and info.metrics == old.metrics and info.created == old.created
    assert Predictor(bundle).variant == "float32"
    with pytest.raises(BundleError, match="has no variant int8; it has float32"):
        Predictor(bundle, "int8")


def test_a_bundle_without_models_says_how_to_make_one(bundle, capsys):
    info = json.loads((bundle / "bundle.json").read_text())
    fields = {key: value for key, value in info.items() if key not in ("files", "bundle_id", "format")}
    layout.write_info(bundle, **{**fields, "onnx": {}})
    assert main(["predict", str(bundle), "x"]) == 2
    assert f"holds no ONNX model; make one with `sodaops export {bundle}`" in capsys.readouterr().err


def test_faults_of_the_configuration(capsys):
    assert main(["export"]) == 2
    assert "give it as `sodaops export RUN/bundle`" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="int8 is measured against float32"):
        configured("export.variants=[int8]")
    with pytest.raises(ConfigError, match=r"export.variants=\[\]: evaluation answers"):
        configured("export.variants=[]")
    assert configured("export.variants=[]", "evaluate.split=none").export.variants == []


@pytest.mark.slow
@pytest.mark.parametrize(("change", "written"), [(0.02, True), (-0.0049, True), (-0.0051, False)])
def test_int8_may_gain_but_not_lose(bundle, trained, monkeypatch, change, written):
    measure = exporting._measure

    def measured(variant, *arguments):
        found = measure(variant, *arguments)
        return replace(found, macro_f1_change=change) if variant == "int8" else found

    monkeypatch.setattr(exporting, "_measure", measured)
    assert ("int8" in export_onnx(bundle, trained / "splits", ["float32", "int8"]).info.onnx) is written


def test_other_splits_are_refused(bundle, trained, tmp_path):
    splits = Path(shutil.copytree(trained / "splits", tmp_path / "splits"))
    manifest = json.loads((splits / "manifest.json").read_text())
    (splits / "manifest.json").write_text(json.dumps({**manifest, "cleaning": "letters"}))
    with pytest.raises(ConfigError, match="cleaning=letters; the bundle has minimal"):
        export_onnx(bundle, splits, ["float32"])


def test_what_a_gate_says():
    gate = Gate(macro_f1=0.8, macro_f1_change=-0.001, agreement=0.99, mean_gap=0.001, max_gap=0.02, n_texts=10)
    assert gate.as_text().startswith("macro-F1 on val 0.8000 (-0.0010), 99.0% of labels equal")


def test_texts_of_every_length_take_part(bundle, trained):
    texts = exporting._read_texts(load_bundle(bundle), trained / "splits")
    lengths = [len(row) for row in texts.every_length]
    assert len(lengths) == len(set(lengths)) > 20 and len(texts.val) == read_split(trained / "splits", "val").num_rows
    assert onnx.load(bundle / "model.onnx").graph.input[0].name == "input_ids"
