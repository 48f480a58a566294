"""A head, a loss and an encoder of an installed package (tests/extensions_package), from the configuration to the service."""

import json

import pytest

from sodaops.bundle import layout
from sodaops.data.preprocess import read_split
from sodaops.inference.predictor import Predictor
from tests.conftest import lazy, run_overrides
from tests.extensions import forget

np = lazy("numpy")
torch = lazy("torch")
pytestmark = pytest.mark.slow
SHORT = ("trainer.max_epochs=1", "evaluate.split=none", "export.variants=[float32]")
RESUMED = ("ckpt_path=last", "trainer.max_epochs=2", "export.variants=[]")


@pytest.fixture
def train(run, workdir, small_tweets, extensions):
    """Trains for one epoch with the options of the package, and returns exit code, standard error and bundle."""

    def command(*overrides):
        settings = run_overrides(workdir, small_tweets, *SHORT)
        code, _, err = run("train", "--config-dir", extensions, *settings, *overrides)
        return code, err, workdir / "run/bundle"

    return command


def test_a_head(train, run, workdir, monkeypatch):
    code, err, bundle = train("head=attention", "head.temperature=0.25")
    assert code == 0, err
    section = {"_target_": "textlab.attention.AttentionHead", "temperature": 0.25}
    assert json.loads((bundle / layout.ENCODER).read_text())["head"] == section
    assert layout.read_info(bundle).onnx["float32"]["max_gap"] < 1e-5
    probs = Predictor(bundle, "float32").predict(["one text", "a much longer text " * 9])
    code, err, _ = train("head=attention", "head.temperature=0.5", *RESUMED)
    assert code == 2 and "head=" in err and "0.25" in err
    monkeypatch.undo()  # the package is no longer on the path
    monkeypatch.chdir(workdir)
    forget()
    assert Predictor(bundle, "float32").predict(["one text", "a much longer text " * 9]) == probs
    assert run("predict", bundle, "a text")[0] == 0
    code, _, err = run("export", bundle, f"evaluate.splits_dir={workdir / 'splits'}")
    assert code == 2 and err.startswith("BundleError") and "textlab.attention.AttentionHead" in err
    code, err, _ = train("head=attention", *RESUMED)
    assert code == 2 and "head._target_=textlab.attention.AttentionHead" in err


def test_a_loss(train, workdir):
    code, err, bundle = train("loss=brier", "optim.vote_weight=0.0", "checkpoint.monitor=val/loss")
    assert code == 0, err
    counts, rows = np.bincount(read_split(workdir / "splits", "train")["label_id"]), read_split(workdir / "splits", "val")
    label_ids, answers = rows["label_id"].to_numpy(), Predictor(bundle, "float32").predict(rows["text"].to_pylist())
    probs = np.array([[answer.probs[label] for label in layout.read_info(bundle).labels] for answer in answers])
    weights = counts.sum() / (len(counts) * counts)
    expected = 2.0 * (weights * (probs - np.eye(len(counts))[label_ids]) ** 2).sum(1).mean()
    assert layout.read_info(bundle).metrics["val"]["loss"] == pytest.approx(expected, rel=1e-3)
    code, err, _ = train("loss=brier", "loss.scale=1.0", "optim.vote_weight=0.0", *RESUMED)
    assert code == 2 and "loss=" in err


def test_an_encoder(train, run):
    code, err, bundle = train("model=convolution", "head=mlp", "head.width=8")
    assert code == 0, err
    settings = json.loads((bundle / layout.ENCODER).read_text())
    assert settings["_target_"] == "textlab.convolution.ConvolutionEncoder" and settings["vocab_size"] > 30_000
    assert layout.read_info(bundle).onnx["float32"]["max_gap"] < 1e-5
    from sodaops.bundle.save import load_bundle

    loaded = load_bundle(bundle)
    ids = torch.tensor([loaded.tokenizer.encode("one text").ids])
    probs = loaded.model(ids, torch.ones_like(ids)).logits.softmax(-1)[0].tolist()
    (answer,) = Predictor(bundle, "float32").predict(["one text"])
    assert [answer.probs[label] for label in loaded.info.labels] == pytest.approx(probs, abs=1e-5)
