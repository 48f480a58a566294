"""Bundles in the Hugging Face ecosystem: AutoModel, AutoTokenizer, pipelines, sentence-transformers and the hub."""

import numpy as np
import pytest

from sodaops.inference.predictor import Predictor
from tests.conftest import lazy

torch = lazy("torch")
transformers = lazy("transformers")

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
