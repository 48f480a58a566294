"""Heads, losses and encoders of users' own: what is refused, and what the built-in ones compute."""

import json
import math
import sys
import textwrap

import pytest

from sodaops.bundle import layout
from sodaops.config.validation import build_config
from sodaops.errors import BundleError, ConfigError
from sodaops.pipeline import train
from sodaops.tasks import SINGLE_LABEL
from tests.conftest import configured, lazy, run_overrides, tiny_pretrained
from tests.unit.test_bundle import rewrite_info
from tests.unit.test_config import tree

classifier = lazy("sodaops.modeling.classifier")
encoder_module = lazy("sodaops.modeling.encoder")
fit = lazy("sodaops.training.fit")
losses = lazy("sodaops.modeling.losses")
pretrained_module = lazy("sodaops.modeling.pretrained")
preflight = lazy("sodaops.training.preflight")
probe = lazy("sodaops.modeling.probe")
torch = lazy("torch")

OWN = """
    from types import SimpleNamespace
    import torch
    from torch import nn

    class Head(nn.Linear):
        def __init__(self, hidden_size, n_labels, fault=None):
            if fault == "raises":
                raise ValueError("on purpose")
            super().__init__(hidden_size, n_labels + (fault == "shape"))
            self.fault = fault
        def forward(self, embeddings):
            logits = super().forward(embeddings)
            faults = {"vector": logits[0], "tuple": (logits,), "nan": logits / 0, "integers": logits.long()}
            return faults.get(self.fault, logits)

    class Loss:
        def __init__(self, fault=None):
            if fault == "raises":
                raise ValueError("on purpose")
            self.fault = fault
        def __call__(self, logits, targets):
            losses = -(targets * logits.log_softmax(-1)).sum(-1)
            if self.fault == "call":
                raise KeyError("on purpose")
            values = {"vector": losses, "nan": (targets * targets.log()).sum() + losses.mean(), "number": losses.mean().item(),
                      "detached": losses.mean().detach()}
            return values.get(self.fault, losses.mean())

    def loss(logits, targets, scale):
        return scale * (logits.softmax(-1) - targets).square().mean()

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    class Encoder(nn.Module):
        def __init__(self, vocab_size, hidden_size=8, fault=None):
            super().__init__()
            self.fault, self.embeddings = fault, nn.Embedding(vocab_size - (fault == "vocabulary"), hidden_size)
            if fault != "size":
                self.hidden_size = hidden_size
        def forward(self, input_ids, attention_mask):
            hidden = self.embeddings(input_ids)
            if self.fault == "padding":
                hidden = hidden + hidden.mean(1, keepdim=True)
            return hidden if self.fault == "tensor" else SimpleNamespace(last_hidden_state=hidden)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes the module ``own`` importable."""
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own", None)


def checked(n_labels, head=None, loss=None):
    """Builds model and loss, and checks them as a training does."""
    transformer = tiny_pretrained().transformer
    model = encoder_module.TextEncoder(transformer, n_labels, **({"head": head} if head else {}))
    made = losses.make_loss(loss or configured().loss, lambda: torch.ones(n_labels))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    probe.check_head_and_loss(model, made, SINGLE_LABEL.example_targets(n_labels), SINGLE_LABEL.any_truth(2, n_labels))
    assert torch.equal(state, torch.get_rng_state()) and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return model, made


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fault": "raises"}, r"head: own\.Head .*ValueError: on purpose"),
        ({"fault": "shape"}, r"head\._target_=own\.Head: .*\[2, 3\].*\[2, 4\]"),
        ({"fault": "vector"}, r"head\._target_=own\.Head: .*\[2, 3\].*\[3\]"),
        ({"fault": "tuple"}, r"head\._target_=own\.Head: .*tuple"),
        ({"fault": "nan"}, r"head\._target_=own\.Head: .*finite"),
        ({"fault": "integers"}, r"head\._target_=own\.Head: .*int64"),
        ({"n_labels": 3}, r"head\.n_labels"),
        ({"falt": 1}, r"head\.falt .*did you mean fault"),
        ({"_target_": "own.Haed"}, r"head\._target_=own\.Haed: .*did you mean Head"),
        ({"_target_": "own.Loss"}, r"head\._target_=own\.Loss: .*torch\.nn\.Module"),
        ({"_target_": "os.system", "command": "touch run_by_head"}, r"head\._target_=os\.system: .*torch\.nn\.Module"),
        ({"fault": {"_target_": "os.system", "command": "touch run_by_head"}}, r"head\.fault\._target_=os\.system"),
        ({"fault": [{"a": {"_target_": "os.system"}}]}, r"head\.fault\.0\.a\._target_=os\.system"),
        ({"fault": "${oc.create:{_target_: os.system}}"}, r"head: .*\$\{"),
    ],
)
def test_heads_that_are_refused(own, workdir, section, message):
    with pytest.raises(ConfigError, match=message):
        checked(3, head={"_target_": "own.Head", **section})
    assert not (workdir / "run_by_head").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fault": "raises"}, r"loss: own\.Loss .*ValueError: on purpose"),
        ({"fault": "call"}, "loss: .*KeyError.*on purpose"),
        ({"fault": "vector"}, r"loss: .*scalar.*\[2\]"),
        ({"fault": "nan"}, "loss: .*nan"),
        ({"fault": "number"}, "loss: .*float"),
        ({"fault": "detached"}, "loss: .*gradient"),
        ({"_target_": "sodaops.modeling.losses.BinaryCrossEntropyLoss"}, "loss: BinaryCrossEntropyLoss .*task"),
        ({"_target_": "own.Loos"}, r"loss\._target_=own\.Loos: .*did you mean Loss"),
        ({"_target_": "own.Trained"}, r"loss\._target_=own\.Trained: .*parameters"),
        ({"_target_": "fractions.Fraction"}, r"loss\._target_=fractions\.Fraction: .*callable.*Fraction"),
        ({"class_weights": "none"}, r"loss\.class_weights is not an argument of own\.Loss|class_weights"),
        ({"_target_": "sodaops.modeling.losses.CrossEntropyLoss", "class_weights": "equal"}, r"loss\.class_weights='equal'"),
        ({"_target_": "sodaops.modeling.losses.CrossEntropyLoss", "label_smoothing": 1.5}, "loss: .*label_smoothing"),
        ({"_target_": "sodaops.modeling.losses.FocalLoss", "gamma": -1}, "gamma=-1"),
    ],
)
def test_losses_that_are_refused(own, section, message):
    with pytest.raises(ConfigError, match=message):
        checked(3, loss={"_target_": "own.Loss", **section})


def test_a_function_is_a_loss(own):
    _, loss = checked(2, loss={"_target_": "own.loss", "_partial_": True, "scale": 3.0})
    assert loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(3 * 0.25)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fault": "size"}, r"model\.encoder: Encoder .*hidden_size"),
        ({"fault": "vocabulary"}, r"model\.encoder\._target_=own\.Encoder: "),
        ({"fault": "padding"}, r"model\.encoder\._target_=own\.Encoder: .*padding"),
        ({"fault": "tensor"}, r"model\.encoder\._target_=own\.Encoder: .*last_hidden_state"),
        ({"_target_": "own.Loss"}, r"model\.encoder\._target_=own\.Loss: .*torch\.nn\.Module"),
        ({"_target_": "own.Encodr"}, r"model\.encoder\._target_=own\.Encodr: .*did you mean Encoder"),
    ],
)
def test_encoders_that_are_refused(own, section, message):
    text = json.dumps({"_target_": "own.Encoder", **section}).replace('"', "")
    with pytest.raises(Exception, match=message) as raised:
        pretrained_module.load_pretrained(configured("model=tiny", "model.overrides=null", f"model.encoder={text}").model)
    assert raised.value.__class__.__name__ in ("ConfigError", "ModelError")


def test_keys_of_earlier_versions_and_contradictions():
    for key in ("class_weights", "label_smoothing"):
        with pytest.raises(ConfigError, match=rf"optim\.{key} .*loss\.{key}"):
            build_config(tree(**{f"optim__{key}": "balanced"}))
    with pytest.raises(ConfigError, match=r"model\.overrides=null"):
        configured("model=tiny", "model.encoder={_target_: own.Encoder}")


def test_a_key_of_an_earlier_version_on_the_command_line(run):
    code, _, err = run("train", "optim.class_weights=balanced")
    assert code == 2 and err.startswith("ConfigError: optim.class_weights") and "loss.class_weights" in err


@pytest.mark.parametrize("overrides", [["head._target_=no.such.Head"], ["loss._target_=no.such.Loss"],
                                       ["model.encoder={_target_: no.such.Encoder}"]])  # fmt: skip
def test_what_cannot_be_imported_is_found_before_anything_is_read(tmp_path, overrides):
    missing = [*run_overrides(tmp_path, tmp_path / "none.csv"), "model=minilm", *overrides]
    with pytest.raises(ConfigError, match=r"no\.such\.\w+: cannot be imported"):
        preflight.check_targets(configured(*missing))


def test_a_head_for_another_number_of_labels_is_found_before_the_first_epoch(own, small_tweets, tmp_path):
    unexported = ("export.variants=[]", "evaluate.split=none")
    overrides = run_overrides(tmp_path, small_tweets, *unexported, "head._target_=own.Head", "+head.fault=shape")
    for more in ((), ("trainer.enable_checkpointing=false",), ("data.labels=null", "data.vote_columns=null")):
        with pytest.raises(ConfigError, match=r"head\._target_=own\.Head: .*\[2, 3\]"):
            train(configured(*overrides, *more))
    assert not (tmp_path / "run/bundle").exists()


def test_a_loss_that_is_nan_at_the_first_step(own, small_tweets, tmp_path, monkeypatch):
    monkeypatch.setattr("sodaops.training.fit.check_head_and_loss", lambda *_: None)  # as if its made-up texts had not shown it
    unexported = ("export.variants=[]", "evaluate.split=none", "trainer.enable_checkpointing=false")
    loss = ("loss._target_=own.Loss", '+loss.fault="nan"', "~loss.class_weights", "~loss.label_smoothing")
    with pytest.raises(ConfigError, match="loss: .*nan"):
        train(configured(*run_overrides(tmp_path, small_tweets, *unexported, *loss)))


@pytest.mark.parametrize(
    "head", [None, [], 1, {}, {"_target_": 5}, {"_target_": "os.system", "command": "touch run_by_head"},
             {"_target_": "no.such.Head"}, {"_target_": "sodaops.modeling.heads.MLPHead"},
             {"_target_": "sodaops.modeling.heads.MLPHead", "n_layers": 10**12}]
)  # fmt: skip
def test_a_bundle_with_another_head_is_refused(bundle, workdir, head):
    from sodaops.bundle.save import load_bundle

    settings = json.loads((bundle / layout.ENCODER).read_text())
    assert settings["head"] == {"_target_": "sodaops.modeling.heads.LinearHead"}
    (bundle / layout.ENCODER).write_text(json.dumps({**settings, "head": head}))
    rewrite_info(bundle)
    with pytest.raises(BundleError, match=str(bundle)) as raised:
        load_bundle(bundle)
    assert not (workdir / "run_by_head").exists() and ("no.such.Head" in str(raised.value)) == ("no.such" in str(head))


def test_cross_entropy_and_focal_loss():
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    logs, weights = torch.log_softmax(logits, -1), torch.tensor([3.0, 0.5])
    for factor in (1, weights):
        given = weights if factor is weights else None
        expected = -(factor * targets * logs).sum(1).mean().item()
        assert losses.CrossEntropyLoss(given)(logits, targets).item() == pytest.approx(expected, abs=1e-6)
        assert losses.FocalLoss(given, gamma=0.0)(logits, targets).item() == pytest.approx(expected, abs=1e-6)
        expected = -(factor * targets * (1 - logs.exp()) ** 1.5 * logs).sum(1).mean().item()
        assert losses.FocalLoss(given, gamma=1.5)(logits, targets).item() == pytest.approx(expected, abs=1e-6)
    smoothed = losses.CrossEntropyLoss(label_smoothing=0.2)(logits, targets)
    assert smoothed.item() == pytest.approx(-((0.8 * targets + 0.1) * logs).sum(1).mean().item(), abs=1e-6)
    assert losses.CrossEntropyLoss(weights, 0.2).state_dict() == {}  # so that older checkpoints load
    sure = torch.tensor([[200.0, -200.0]], requires_grad=True)
    losses.FocalLoss(gamma=0.5)(sure, torch.tensor([[1.0, 0.0]])).backward()
    assert torch.isfinite(sure.grad).all()


def test_the_default_head_is_a_linear_layer_with_the_same_random_numbers():
    transformer = tiny_pretrained().transformer
    torch.manual_seed(3)
    model = encoder_module.TextEncoder(transformer, 3)
    torch.manual_seed(3)
    plain = torch.nn.Linear(32, 3)
    names = [name for name in model.state_dict() if not name.startswith("transformer.")]
    assert names == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, plain.weight) and torch.equal(model.head.bias, plain.bias)
    assert math.isclose(torch.rand(()).item(), (torch.manual_seed(3), torch.nn.Linear(32, 3), torch.rand(()).item())[2])
