import csv

import pytest

from sodaops.errors import ConfigError
from sodaops.text.cleaning import POLICIES, clean
from tests.conftest import TWEETS


@pytest.mark.parametrize(("raw", "minimal"), [
    ("  a\t\n b  ", "a b"),
    ("a&amp;b &lt;3 &#39;x&#39;", "a&b <3 'x'"),
    ("nul\x00 bell\x07 del\x7f bom\ufeff zero\u200bwidth", "nul bell del bom zerowidth"),
    ("half \ud800 a pair", "half a pair"),
    ("family 👩\u200d👧 stays", "family 👩\u200d👧 stays"),
    ("no\u00a0break\u2028line", "no break line"),
    ("", ""),
    ("\u200b\n", ""),
    ("&#" + "1" * 5000 + ";&#" + "0" * 5000 + "65; &#0065 &#0; &#1114112; &#12345678x", "\ufffdA A \ufffd \ufffd \ufffdx"),
])  # fmt: skip
def test_minimal(raw, minimal):
    assert clean(raw) == minimal


def test_social_and_letters():
    raw = "RT @Ann_1: see HTTPS://x.co/a?b=1 and www.y.org #So_Happy 100% l'été"
    assert clean(raw, "social") == "RT @user: see http and http #So_Happy 100% l'été"
    assert clean(raw, "letters") == "rt see and l été"
    assert clean("mail me@home.org", "social") == "mail me@home.org"


def test_unknown_policy_names_the_nearest():
    with pytest.raises(ConfigError, match=r"data.cleaning='leters'.*letters\?"):
        clean("x", "leters")


@pytest.mark.parametrize("policy", POLICIES)
def test_real_tweets_come_out_clean(policy):
    with open(TWEETS, encoding="utf-8", newline="") as file:
        texts = [clean(row["text"], policy) for row in csv.DictReader(file)]
    assert len(texts) == 4200
    assert all(text == " ".join(text.split()) for text in texts)
    assert not any("&amp;" in text or "&lt;" in text for text in texts)
    for text in texts:
        text.encode("utf-8")
