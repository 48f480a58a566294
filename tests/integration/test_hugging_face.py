"""Bundles in the Hugging Face ecosystem: AutoModel, AutoTokenizer, pipelines, sentence-transformers and the hub."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sodaops.bundle import layout
from sodaops.inference.predictor import Predictor
from tests import extensions, hub as fake_hub
from tests.conftest import configured, free_port, lazy

torch = lazy("torch")
transformers = lazy("transformers")
huggingface_hub = lazy("huggingface_hub")

TEXTS = ["I love &lt;3 this", "so\tbad   @ann http://t.co/x #win!", "x", "a long winding text " * 90, "Ünïcode \u200b 東京 😀"]


def test_automodel_and_autotokenizer_load_the_encoder_of_a_bundle(trained):
    from sodaops.bundle.save import load_bundle

    bundle = trained / "run/bundle"
    encoder, loading = transformers.AutoModel.from_pretrained(bundle, output_loading_info=True)
    assert {key for keys in loading.values() for key in keys} == {"pooler.dense.weight", "pooler.dense.bias"}  # not ours
    predictor = Predictor(bundle, "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    cleaned = [predictor.clean(text) for text in TEXTS]
    batch = tokenizer(cleaned, padding=True, truncation=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    for text, ids, n in zip(cleaned, batch["input_ids"], lengths, strict=True):
        assert ids[:n].tolist() == predictor.encode(text).tolist()
    with torch.inference_mode():
        hidden = encoder.eval()(**batch).last_hidden_state
        ours = load_bundle(bundle).model.transformer(**batch).last_hidden_state
    assert torch.equal(hidden, ours) and batch.keys() == {"input_ids", "attention_mask"}


def test_sentence_transformers_loads_a_bundle(trained):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    bundle = trained / "run/bundle"
    predictor = Predictor(bundle, "float32")
    cleaned = [predictor.clean(text) for text in TEXTS]
    embeddings = sentence_transformers.SentenceTransformer(str(bundle)).encode(cleaned)
    expected = [predictor.run([predictor.encode(text)]).embeddings[0] for text in cleaned]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


@pytest.fixture
def classify(tmp_path, monkeypatch):
    """Returns a function that gives the probabilities, in the order of the labels, that a pipeline computes for texts."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def probs(folder, texts, labels, **options):
        answers = transformers.pipeline("text-classification", model=str(folder), top_k=None, **options)(texts, batch_size=3)
        scores = [{answer["label"]: answer["score"] for answer in one} for one in answers]
        return np.array([[of[label] for label in labels] for of in scores])

    return probs


def test_a_pipeline_loads_an_export_and_answers_as_the_service(trained, run, classify):
    predictor = Predictor(trained / "run/bundle", "float32")
    for _ in range(2):  # the second export replaces the first one
        code, out, _ = run("export", trained / "run", "--format=transformers", "--output", "exported")
        assert code == 0 and "trust_remote_code" in out
    probs = classify("exported", TEXTS, predictor.info.labels, trust_remote_code=True)
    np.testing.assert_allclose(probs, predictor.probs(TEXTS), atol=1e-5)
    assert len(np.unique(probs.round(4), axis=0)) == len(TEXTS)
    with pytest.raises(ValueError, match="trust_remote_code"):
        classify("exported", TEXTS, predictor.info.labels, trust_remote_code=False)
    for path in Path("exported").glob("*.py"):
        assert not re.search(r"^\s*(from|import) sodaops", path.read_text(), flags=re.MULTILINE)
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    tokenizer.save_pretrained("saved")
    again = transformers.AutoTokenizer.from_pretrained("saved", trust_remote_code=True)
    assert (
        again(TEXTS)["input_ids"]
        == tokenizer(TEXTS)["input_ids"]
        == [[*map(int, predictor.encode(predictor.clean(t)))] for t in TEXTS]
    )


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES = {
    "bert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "electra": {**SMALL, "embedding_size": 32},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}


@pytest.fixture
def save(trained, tmp_path):
    """Returns a function that writes a bundle with random weights in place of a training."""

    def save(kind, *overrides):
        from sodaops.bundle.save import load_bundle, save_bundle
        from sodaops.modeling.encoder import TextEncoder, from_settings, random_encoder

        torch.manual_seed(0)
        config = configured("model=tiny", *overrides)
        if kind in ARCHITECTURES:
            spread = {"vocab_size": 30522, "initializer_range": 0.5}  # so that texts differ in their first token's vector
            encoder = random_encoder(transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind], **spread))
        else:
            encoder = from_settings({"_target_": kind, "vocab_size": 30522})
        model = TextEncoder(encoder, 3, config.model.pooling, head=config.head)
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        like = load_bundle(trained / "run/bundle")
        manifest = json.loads((trained / "run/bundle" / layout.DATA).read_text())
        save_bundle(tmp_path / "saved", model, like.tokenizer, like.info.pad_token_id, config, manifest, {})
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize(("kind", "is_plain", "head"), [
    ("distilbert", True, "linear"), ("electra", True, "linear"), ("deberta-v2", True, "linear"), ("bert", False, "linear"),
    ("electra", False, "mlp"),
])  # fmt: skip
def test_cls_pooling_is_exported_without_code_where_possible(kind, is_plain, head, save, run, classify):
    from sodaops.bundle.save import load_bundle
    from sodaops.text.cleaning import clean

    bundle = save(kind, "model.pooling=cls", "data.cleaning=social", f"head={head}")
    code, out, _ = run("export", bundle, "--format=transformers", "--output", "exported")
    assert code == 0 and ("trust_remote_code" in out) != is_plain
    assert bool(list(Path("exported").glob("*.py"))) != is_plain
    assert ("trust_remote_code" in Path("exported/README.md").read_text()) != is_plain
    info, model, tokenizer, _ = load_bundle(bundle)
    options = {"truncation": True} if is_plain else {"trust_remote_code": True}
    cleaned = [clean(text, "social") for text in TEXTS]
    tokenizer.enable_truncation(info.max_tokens)
    rows = [torch.tensor([tokenizer.encode(text).ids]) for text in cleaned]
    with torch.inference_mode():
        expected = torch.cat([torch.softmax(model(row, torch.ones_like(row)).logits, dim=-1) for row in rows])
    probs = classify("exported", cleaned if is_plain else TEXTS, info.labels, **options)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert probs.std(axis=0).max() > 0.01


@pytest.mark.parametrize(("kind", "head", "named"), [
    ("bert", "textlab.attention.AttentionHead", "textlab.attention.AttentionHead"),
    ("textlab.convolution.ConvolutionEncoder", "sodaops.modeling.heads.LinearHead", "textlab.convolution"),
])  # fmt: skip
def test_classes_of_ones_own_are_not_exported(kind, head, named, save, run, monkeypatch):
    monkeypatch.syspath_prepend(extensions.PACKAGE)
    bundle = save(kind, f"head._target_={head}")
    code, _, error = run("export", bundle, "--format=transformers", "--output", "exported")
    assert code == 2 and error.startswith(f"ConfigError: {bundle}: ") and named in error and not Path("exported").exists()
    extensions.forget()


def test_arguments_that_do_not_fit_an_export(trained, run, write):
    bundle = trained / "run"
    for arguments in (("--format=transformers",), ("--output", "x"), ("--format=onnx", "--output", "x"), ("--format=flax",)):
        code, _, error = run("export", bundle, *arguments)
        assert code == 2 and "--format" in error and not Path("x").exists()
    Path("mine").mkdir()
    write("mine/thesis.tex", "")
    code, _, error = run("export", bundle, "--format=transformers", "--output", "mine")
    assert code == 2 and "thesis.tex" in error and Path("mine/thesis.tex").exists()


@pytest.fixture
def hub():
    with fake_hub.running() as hub:
        yield hub


def test_push(trained, run, hub):
    run_dir = trained / "run"
    code, out, _ = run("push", run_dir, "me/tweets", "--dry-run")
    assert code == 0 and hub.requests == []
    listed = [line.split()[-1] for line in out.splitlines()]
    code, out, error = run("push", run_dir, "me/tweets")
    assert code == 0 and out.splitlines()[-1].startswith(f"{hub.url}/me/tweets/") and fake_hub.TOKEN not in out + error
    files = hub.repos["me/tweets"]
    assert sorted(files) == sorted(listed) and hub.private == {"me/tweets": True} and len(hub.commits) == 1
    assert {"README.md", "config.json", "plots/confusion.png"} <= files.keys()
    for path in (run_dir / "bundle").iterdir():
        assert files[f"bundle/{path.name}"] == path.read_bytes()
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    measured = json.loads((run_dir / "run.json").read_text())["metrics"]
    results = {(result.dataset_split, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert results["test", "macro-F1"] == measured["test"]["macro_f1"] and card.data.pipeline_tag == "text-classification"
    assert results["val", "accuracy"] == measured["val"]["accuracy"] and "plots/confusion.png" in card.text
    # A second push deletes what the bundle no longer has, and nothing else.
    files |= {"bundle/older.onnx": b"", "notes.txt": b""}
    code, _, _ = run("push", run_dir, "me/tweets", "--public")
    assert code == 0 and set(files) == {*listed, "notes.txt"} and hub.private == {"me/tweets": True}


def test_push_of_a_registrys_champion(trained, run, hub):
    assert run("register", trained / "run")[0] == 0
    assert run("push", "registry@challenger", "me/tweets", "--public")[0] == 0
    card = huggingface_hub.ModelCard(hub.repos["me/tweets"]["README.md"].decode())
    assert "test" in {result.dataset_split for result in card.data.eval_results} and hub.private == {"me/tweets": False}


@pytest.mark.parametrize(("repo", "refused"), [
    ("me/tweets", {"/api/repos/create": 403}), ("me/tweets", {"/api/repos/create": 401}), ("me/tweets", {"/commit/": 403}),
    ("me/tweets", {"/preupload/": 404}), ("me/tweets", None), ("a b/c/d", {}),
])  # fmt: skip
def test_push_without_rights(trained, run, hub, monkeypatch, repo, refused):
    if refused is None:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    hub.refused = refused or {}
    code, out, error = run("push", trained / "run", repo)
    assert code == 2 and error.splitlines()[-1].startswith(f"StorageError: {repo}: ") and "HF_TOKEN" in error
    assert fake_hub.TOKEN not in out + error and not any(hub.repos.values()) and hub.commits == []
    for status in hub.refused.values():
        assert str(status) in error
