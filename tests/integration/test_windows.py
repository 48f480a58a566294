"""A model that reads long texts in windows, from its training to the service."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from sodaops.bundle import layout
from sodaops.data.preprocess import read_split
from sodaops.data.tokens import batch_inputs
from sodaops.inference.predictor import Predictor
from sodaops.pipeline import train
from sodaops.text.limit import Limit
from tests.conftest import configured, lazy, made_once, run_overrides

torch = lazy("torch")

WINDOWS = ("model.long_texts=windows", "model.max_tokens=16", "model.stride=4", "model.max_windows=2")
LONG, CUT = "a good film " * 8, "a good film " * 30


@pytest.fixture(scope="module")
def windowed(small_tweets, tmp_path_factory):
    """The folder of a run that reads two windows of 16 tokens."""

    def make(folder):
        train(configured(*run_overrides(folder, small_tweets, *WINDOWS, "trainer.max_epochs=1")))

    return made_once(tmp_path_factory, "windowed", make)


def test_texts_that_fit_are_trained_and_answered_as_if_truncated(trained, small_tweets, tmp_path):
    overrides = ("model.long_texts=windows", "export.variants=[]", "evaluate.split=none")
    train(configured(*run_overrides(tmp_path, small_tweets, *overrides)))
    for name in (layout.WEIGHTS, layout.HEAD):
        assert (tmp_path / "run/bundle" / name).read_bytes() == (trained / "run/bundle" / name).read_bytes()


def test_the_graph_gives_torchs_answers_and_those_of_truncate_for_texts_that_fit(windowed, tmp_path):
    from sodaops.bundle.save import load_bundle
    from sodaops.export.onnx_export import _write_float32

    bundle = windowed / "run/bundle"
    loaded, predictor = load_bundle(bundle), Predictor(bundle, "float32")
    assert predictor.info.onnx["float32"]["max_gap"] < 1e-5
    rows = [predictor.encode(text) for text in ("a film", LONG, CUT, "a film " * 4, "a film " * 6)]
    assert [len(row) for row in rows] == [4, 32, 32, 10, 14]
    with torch.inference_mode():
        alone = [{name: torch.from_numpy(x) for name, x in batch_inputs([row], 0, Limit(16, 4, 2)).items()} for row in rows]
        expected = np.concatenate([torch.softmax(loaded.model(**inputs).logits, -1).numpy() for inputs in alone])
    np.testing.assert_allclose(predictor.run(rows).probs, expected, atol=1e-6)
    np.testing.assert_allclose(Predictor(bundle, "int8").run(rows).probs, expected, atol=0.05)
    # the same weights, with a graph of truncated texts
    _write_float32(SimpleNamespace(model=loaded.model, info=replace(loaded.info, max_windows=None)), tmp_path / "model.onnx")
    other = Predictor(bundle, "float32")
    other.limit, other._session = Limit(16), onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in ([rows[0]], [rows[3], rows[0], rows[4]]):
        assert all(np.array_equal(a, b) for a, b in zip(predictor.run(batch), other.run(batch), strict=True))
    assert not np.allclose(predictor.run([rows[1]]).probs, other.run([rows[1][:16]]).probs, atol=1e-6)


def test_what_a_run_records(windowed, run):
    bundle = windowed / "run/bundle"
    predictor = Predictor(bundle)
    assert predictor.limit == predictor.info.limit == Limit(16, 4, 2)
    # 14 tokens besides the special ones, of which the second window shares 4 with the first: 24 in all
    predictor._tokenizer.no_truncation()
    texts = {split: read_split(windowed / "splits", split)["text"].to_pylist() for split in ("train", "test")}
    shares = {split: np.mean([len(predictor._tokenizer.encode(text).ids) > 26 for text in of]) for split, of in texts.items()}
    recorded = json.loads((bundle / layout.DATA).read_text())["cut_share"]
    assert recorded.keys() == {"max_tokens", "stride", "max_windows", "train", "val"} and 0 < shares["train"] < 1
    assert recorded["train"] == pytest.approx(shares["train"])
    measured = json.loads((windowed / "run/evaluation/metrics.json").read_text())
    assert measured["test"]["cut_share"] == pytest.approx(shares["test"])
    report = (windowed / "run/evaluation/report.html").read_text()
    assert f"{100 * shares['test']:.1f} % of them cut at 2 windows of 16 tokens" in report
    fields = {**asdict(predictor.info), "max_windows": 3}
    assert layout.compute_bundle_id(fields["files"], **layout._settings(fields)) != predictor.info.bundle_id
    code, _, error = run("export", bundle, "--format=transformers", "--output=folder")
    assert code == 2 and error.startswith("ConfigError") and "model.long_texts=truncate" in error


def test_the_gate_compares_the_graph_with_torch_in_windows(windowed):
    from sodaops.registry.checks import check_parity

    verdict = check_parity(windowed / "run/bundle", ["a film", LONG, CUT], 1e-5)
    assert verdict.passed and verdict.value > 0


def test_the_service_answers_explains_and_logs_long_texts(windowed, serve, tmp_path):
    predictor = Predictor(windowed / "run/bundle")
    client = serve(windowed / "run/bundle", request_log=str(tmp_path / "log"))
    card = client.get("/info").json()
    assert (card["max_tokens"], card["stride"], card["max_windows"]) == (16, 4, 2)
    texts = ["a film", LONG, CUT, "\U00012000 " * 30]
    expected = predictor.probs(texts)
    answers = client.post("/predict/batch", json={"texts": texts}).json()["predictions"]
    for answer, probs in zip(answers, expected, strict=True):
        assert list(answer["probs"].values()) == pytest.approx(probs.tolist(), abs=1e-5)
    explained = client.post("/explain", json={"text": LONG}).json()
    column = predictor.info.labels.index(explained["label"])
    with_it, without = predictor.probs([LONG, LONG[: -len("film ")]])[:, column]
    assert explained["spans"][-1] == {"text": "film", "effect": pytest.approx(with_it - without, abs=1e-5)}
    lines = [line for path in (tmp_path / "log/journal").iterdir() for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines][:4]
    assert [row["n_tokens"] for row in rows] == [4, 32, 32, 32]
    assert [row["pieces_per_word"] for row in rows] == [1.0] * 4 and [row["unknown"] for row in rows] == [0, 0, 0, 1]
