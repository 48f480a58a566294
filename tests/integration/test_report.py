"""The report and the pictures, as far as a test can look."""

import base64
import html.parser
import json
import re

import matplotlib.image
import numpy as np
import pyarrow as pa

from sodaops.evaluation.plots import draw
from sodaops.evaluation.report import worst


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_it_is_one_whole_page_that_loads_nothing(trained):
    source = (trained / "run/evaluation/report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == [] and len(page.addresses) == 5
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", source)
    metrics = json.loads((trained / "run/evaluation/metrics.json").read_text())["test"]
    for value in (metrics["macro_f1"], metrics["ece"], metrics["interval_95"]["accuracy"]["low"]):
        assert f"{value:.3f}" in page.text
    embedded = base64.b64decode(page.addresses[0].partition(",")[2])
    assert embedded == (trained / "run/evaluation/plots/confusion.png").read_bytes()


def test_texts_are_escaped(trained):
    source = (trained / "run/evaluation/report.html").read_text(encoding="utf-8")
    assert "&lt;" in source or "&#39;" in source or "&amp;" in source


def split(n, labels):
    ids = np.arange(n) % len(labels)
    return pa.table(
        {
            "row": np.arange(n), "text": [f"text {i}" for i in range(n)], "label_id": ids,
            "label": [labels[i] for i in ids], "votes": pa.array([None] * n, pa.list_(pa.int32())),
            "slice_party": ["A", "", "$\\frac$"] * (n // 3),
        }
    )  # fmt: skip


def test_pictures_of_many_labels_and_of_a_label_without_rows(tmp_path):
    for n_labels in (2, 3, 40):
        labels = [f"$^$ {i}" for i in range(n_labels)] + ["never seen"]
        rng = np.random.default_rng(0)
        probs = rng.dirichlet(np.ones(len(labels)), 120)
        pictures = draw(tmp_path / str(n_labels), probs, split(120, labels[:-1]), labels, 15)
        assert len(pictures) == 6
        for picture in pictures:
            pixels = matplotlib.image.imread(picture.path)
            assert pixels.shape[0] > 500 and pixels.std() > 0.02, picture.path


def test_worst_are_wrong_and_surest_first():
    labels = ["a", "b"]
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.01, 0.99], [0.6, 0.4], [0.2, 0.8]])
    found = worst(split(6, labels), probs, labels, 3)
    assert [(entry["row"], entry["label"], entry["predicted"]) for entry in found] == [(1, "b", "a"), (2, "a", "b")]
