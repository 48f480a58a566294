import csv
from collections import Counter

from sodaops.data.splits import assign_split
from sodaops.text.cleaning import clean
from tests.conftest import TWEETS

PLACES = ["train", "train", "test", "train", "test", "train"]


def test_shares_are_the_fractions():
    with open(TWEETS, encoding="utf-8", newline="") as file:
        counts = Counter(assign_split(clean(row["text"])) for row in csv.DictReader(file))
    assert sum(counts.values()) == 4200
    for split, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert abs(counts[split] / 4200 - share) < 0.02


def test_known_places_never_move():
    # A change here moves rows of every user from test to train.
    assert [assign_split(text) for text in ("good", "bad", "so so", "é", "\U0001f600", "x" * 1000)] == PLACES


def test_fractions_cut_where_they_say():
    assert assign_split("anything", (1.0, 0.0, 0.0)) == "train"
    assert assign_split("anything", (0.0, 1.0, 0.0)) == "val"
    assert assign_split("anything", (0.0, 0.0, 1.0)) == "test"
