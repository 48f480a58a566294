"""The evaluation report and its plots."""

import base64
import html.parser
import importlib
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import lazy

image = lazy("matplotlib.image")
plots = lazy("sodaops.evaluation.plots")
report = lazy("sodaops.evaluation.report")


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


def test_the_report_is_one_page_that_loads_nothing_from_outside(trained):
    folder = trained / "run/evaluation"
    source, metrics = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "metrics.json"))
    page, metrics = Page(source), json.loads(metrics)
    assert page.open == [] and not re.search(r"url\(|@import|<script", source)
    assert re.search("&lt;|&#39;|&amp;", source)  # the tweets among the worst errors are escaped
    measured = metrics["test"]
    for value in (measured["macro_f1"], measured["ece"], measured["interval_95"]["accuracy"]["low"]):
        assert f"{value:.3f}" in page.text
    assert metrics["bundle_id"] in page.text
    embedded = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in page.addresses]
    assert embedded == [(folder / plot["file"]).read_bytes() for plot in metrics["plots"]] and len(embedded) == 5
    assert all(plot["caption"] in page.text for plot in metrics["plots"])


def split(n, labels):
    ids = np.arange(n) % len(labels)
    return pa.table(
        {
            "row": np.arange(n), "text": [f"text {i}" for i in range(n)], "label_id": ids,
            "label": [labels[i] for i in ids], "votes": pa.array([None] * n, pa.list_(pa.int32())),
            "slice_party": ["A", "", "$\\frac$"] * (n // 3),
        }
    )  # fmt: skip


def test_importing_the_plots_leaves_the_backend_alone(monkeypatch):
    monkeypatch.setattr("matplotlib.use", lambda *_: pytest.fail("matplotlib.use was called"))
    importlib.reload(importlib.import_module(plots.module))


def test_plots_of_many_labels_and_of_a_label_without_rows(tmp_path):
    for n_labels in (2, 40):
        labels = [f"$^$ {i}" for i in range(n_labels)] + ["never seen"]
        rng = np.random.default_rng(0)
        probs = rng.dirichlet(np.ones(len(labels)), 120)
        pictures = plots.draw_plots(tmp_path / str(n_labels), probs, split(120, labels[:-1]), labels, 15)
        assert len(pictures) == 6
        for picture in pictures:
            pixels = image.imread(picture.path)
            assert pixels.shape[0] > 500 and pixels.std() > 0.02, picture.path


def test_the_worst_errors_are_wrong_and_most_confident_first():
    labels = ["a", "b"]
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.01, 0.99], [0.6, 0.4], [0.2, 0.8]])
    result = report.worst_errors(split(6, labels), probs, labels, 3)
    assert [(entry["row"], entry["label"], entry["predicted"]) for entry in result] == [(1, "b", "a"), (2, "a", "b")]
