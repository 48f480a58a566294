"""Tokens of texts of several columns, and the codec that joins them."""

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sodaops.data.cells import join_texts
from sodaops.data.pairs import PartsTokenizer, template_of
from sodaops.data.tokens import tokenise
from sodaops.errors import ConfigError, ModelError
from sodaops.text.cleaning import POLICIES
from sodaops.text.columns import SEPARATOR, clean_parts, join, split
from sodaops.text.limit import Limit
from tests.conftest import configured

WORDS = ["a", "b", "c", "d"]
TEMPLATES = {
    "bert": processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 5), ("[SEP]", 6)]),
    "roberta": processors.RobertaProcessing(("[SEP]", 6), ("[CLS]", 5)),
    "xlnet": processors.TemplateProcessing("$A [SEP] [CLS]:2", "$A [SEP] $B:1 [SEP]:1 [CLS]:2", [("[CLS]", 5), ("[SEP]", 6)]),
    "none": None,
}
texts = st.text(alphabet=[*"ab &;#30x", SEPARATOR, "\u200b", "\ud800"], max_size=12)


def tokenizer(template, words=("[UNK]", *WORDS, "[CLS]", "[SEP]")):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([word for word in words if word in ("[CLS]", "[SEP]")])
    if TEMPLATES[template] is not None:
        made.post_processor = TEMPLATES[template]
    return made


@pytest.mark.parametrize("template", ["bert", "roberta", "xlnet"])
@pytest.mark.parametrize("max_tokens", [6, 9, 10, 30])
def test_a_pair_has_the_ids_that_the_tokenizer_gives_it(template, max_tokens):
    pairs = [(" ".join("a" * n), " ".join("b" * m)) for n in (0, 1, 4, 5, 12) for m in (0, 1, 5, 6, 12, 13)]
    ours = list(PartsTokenizer(tokenizer(template), 2, max_tokens).encode([SEPARATOR.join(pair) for pair in pairs]))
    theirs = tokenizer(template)
    theirs.enable_truncation(max_tokens, strategy="longest_first")
    assert [ids for ids, _ in ours] == [encoding.ids for encoding in theirs.encode_batch(pairs)]
    theirs.no_truncation()
    assert [is_cut for _, is_cut in ours] == [len(encoding.ids) > max_tokens for encoding in theirs.encode_batch(pairs)]


def test_more_parts_and_tokenizers_without_a_pair_are_joined_by_the_separator():
    assert next(PartsTokenizer(tokenizer("bert"), 3, 20).encode([SEPARATOR.join("abc")]))[0] == [5, 1, 6, 2, 6, 3, 6]
    assert next(PartsTokenizer(tokenizer("none"), 2, 20).encode([SEPARATOR.join("ab")]))[0] == [1, 6, 2]
    assert [template_of(tokenizer(name)).separator for name in TEMPLATES] == [6, None, None, None]
    with pytest.raises(ModelError, match="separator"):
        PartsTokenizer(tokenizer("none", ("[UNK]", *WORDS)), 2, 20)
    with pytest.raises(ConfigError, match="model.max_tokens=4"):
        PartsTokenizer(tokenizer("bert"), 2, 4)


def test_special_tokens_in_a_text_are_words():
    ids = next(PartsTokenizer(tokenizer("bert"), 2, 20).encode([f"a [CLS]b{SEPARATOR}c"]))[0]
    assert ids == [5, 1, 0, 6, 3, 6]


def test_what_is_within_the_limit():
    assert PartsTokenizer(tokenizer("bert"), 2, 7).within_limit(f"a b c d{SEPARATOR}a b c") == f"a b{SEPARATOR}a b"


def test_tokenise_tells_empty_and_cut_texts():
    tokens = tokenise(tokenizer("bert"), ["", f"{SEPARATOR}a", "a " * 9 + SEPARATOR], Limit(8))
    assert tokens.is_empty.tolist() == [True, False, False] and tokens.is_cut.tolist() == [False, False, True]


@given(st.lists(texts, min_size=2, max_size=4))
def test_no_text_can_end_its_part(parts):
    n = len(parts)
    raw = join(parts)
    assert split(raw, n) == [part.replace(SEPARATOR, "") for part in parts]
    for policy, clean in POLICIES.items():
        cleaned = clean_parts(raw, n, clean)
        assert split(cleaned, n) == [clean(part.replace(SEPARATOR, "")) for part in parts], policy
        assert (cleaned == "") == (not any(split(cleaned, n)))


def test_columns_are_joined_as_texts_are():
    columns = [pa.array([f"a{SEPARATOR}", None, ""]), pa.array(["b", "c", None])]
    assert join_texts(columns).to_pylist() == [join(pair) for pair in (("a", "b"), ("", "c"), ("", ""))]


@pytest.mark.parametrize("columns", ["[title,title]", "[]", "[1,2,3,4,5,6,7,8,9]", "[[a]]"])
def test_a_wrong_list_of_columns_is_named(columns):
    with pytest.raises(ConfigError, match="data.text_column"):
        configured(f"data.text_column={columns}")


def test_windows_are_of_one_column():
    with pytest.raises(ConfigError, match="model.long_texts"):
        configured("data.text_column=[a,b]", "model.long_texts=windows")


def test_names_and_the_order_of_columns_stay():
    assert configured("data.text_column=[01,no]").data.text_column == ["01", "no"]
    assert configured("data.text_column=[review]").data.text_column == "review"
