"""Cleaning by the column is the same as cleaning text by text."""

import random
import sys
from functools import cache

import pyarrow as pa
import pyarrow.csv
import pytest

from sodaops.data.parts import hash_many
from sodaops.data.splits import assign_split, text_hash
from sodaops.errors import ConfigError
from sodaops.text.bulk_cleaning import clean_many
from sodaops.text.cleaning import POLICIES, clean
from tests.conftest import REPO, TWEETS

PIECES = [
    "&amp;", "&lt", "&#64;", "&#x40;x", "&nbsp;", "&ampamp;", "&amp;amp;", "& ", "&", "&;", "&T", "&notit;", "&#0065",
    "&#1114112;", "&#", "&gt;", "&quot;", "&#39;", "amp;", "lt;", "&Lt;", "&Gt;", "&Amp;", "&AMP;", "&Quot;", "&lT;",
    "@", "@ann", "@@b", "x@y.org", "@é", "@_", "#", "#win", "#@ann", "#é1", "http://", "https://t.co/x", "HTTPS://X", "httpſ://t.co",
    "www.", "WWW.a", "wWw.é", "wwww.b", "http:/", "://", "//", "hhttp://c", "s://", ".", ":",
    "\u017f", "\u212a", "İ", "ß", "ǅ", "٣", "²", "_", "1", "9a", "don't", "a", "B",
    "é", "👩\u200d👧",
    " ", "  ", "\t", "\n", "\r\n", "\x00", "\x0b", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\xad", "\u1680", "\u180e",
    "\u2003", "\u200b",
    "\u2028", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff", "\U000e0020",
]  # fmt: skip


def random_texts(n):
    """Texts of up to 12 pieces and other characters; a surrogate is no character."""
    draw, characters = random.Random(0), [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    return ["".join(draw.choice(draw.choice((PIECES, characters))) for _ in range(draw.randrange(13))) for _ in range(n)]


@pytest.mark.parametrize("policy", POLICIES)
def test_many_are_cleaned_as_each(policy):
    texts = random_texts(10_000)
    assert clean_many(pa.array(texts, pa.string()), policy).to_pylist() == [clean(text, policy) for text in texts]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("whole", ["&amp;lt;", "&#39;s", "a @ann", "b#win", "https://t.co/x y", "WWW.a", "c  d"])
def test_neighbours_are_not_read_together(policy, whole):
    texts = [part for i in range(1, len(whole)) for part in (whole[:i], whole[i:])]
    assert clean_many(pa.array(texts), policy).to_pylist() == [clean(text, policy) for text in texts]


@cache
def unclean_characters():
    """Every character of Unicode that the first step of a policy changes or takes out."""
    every = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    found = [character for character in every if clean(f"a{character}b") != f"a{character}b"]
    assert len(found) > 80
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_every_character_is_cleaned_as_alone(policy):
    # The pattern that finds unclean texts must know every character that Python's does.
    texts = [f"a{character}b" for character in [*map(chr, range(0x3100)), *unclean_characters()]]
    assert clean_many(pa.array(texts), policy).to_pylist() == [clean(text, policy) for text in texts]


@pytest.mark.parametrize("policy", POLICIES)
def test_real_texts(policy):
    for path in (TWEETS, REPO / "data/raw/amazon_reviews.csv"):
        texts = pyarrow.csv.read_csv(path)["text"].combine_chunks()
        assert clean_many(texts, policy).to_pylist() == [clean(text, policy) for text in texts.to_pylist()]
        part = texts.slice(1000, 77)
        assert clean_many(part, policy).to_pylist() == [clean(text, policy) for text in part.to_pylist()]


def test_an_unknown_policy():
    with pytest.raises(ConfigError, match="data.cleaning='leters'"):
        clean_many(pa.array(["x"]), "leters")


@pytest.mark.parametrize("skip", [0, 3])
def test_hashes_of_many_are_those_of_each_text(skip):
    texts = random_texts(1000)
    hashes = hash_many(pa.array(texts, pa.string()).slice(skip)).tolist()
    assert [f"{hi:016x}{lo:016x}" for hi, lo in hashes] == [text_hash(text)[:32] for text in texts[skip:]]


def test_an_array_without_texts():
    empty = pa.array([], pa.string())
    assert hash_many(empty).shape == (0, 2) and clean_many(empty, "letters").to_pylist() == []
    assert hash_many(pa.array(["", ""]))[0, 0] == int(text_hash("")[:16], 16)
    assert assign_split("") in ("train", "val", "test")
