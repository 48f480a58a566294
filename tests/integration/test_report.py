"""The evaluation report and its plots."""

import base64
import html.parser
import importlib
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from sodaops.bundle import layout
from sodaops.data.preprocess import read_manifest
from sodaops.evaluation.quality_warnings import quality_warnings
from sodaops.evaluation.result import Evaluated
from sodaops.tasks import SINGLE_LABEL
from tests.conftest import lazy

image = lazy("matplotlib.image")
plots = lazy("sodaops.tasks.plots")
report = lazy("sodaops.evaluation.report")
metrics = lazy("sodaops.tasks.metrics")
mpl = lazy("matplotlib.figure")


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
        pictures = plots.draw_plots(tmp_path / str(n_labels), SINGLE_LABEL.plots(probs, split(120, labels[:-1]), labels, 15))
        assert len(pictures) == 6
        for picture in pictures:
            pixels = image.imread(picture.path)
            assert pixels.shape[0] > 500 and pixels.std() > 0.02, picture.path


def test_the_labels_in_a_picture_are_the_ones_that_matter():
    matrix = np.diag([50] * 300)
    matrix[7, 3], matrix[200, 7], matrix[1, 2] = 9, 8, 1
    assert plots.most_confused(matrix, 3) == [3, 7, 200] and plots.most_confused(np.eye(2, dtype=int), 12) == [0, 1]
    figure = mpl.Figure()
    plots._confusion(matrix, [f"the label {i}" for i in range(300)], [3, 7, 200], figure.subplots())
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {"the label 3", "the label 7", "the label 200"} <= set(texts) and "15%\n9" in texts


def test_every_curve_has_its_label_in_the_legend():
    """Matplotlib leaves out those that begin with an underscore; long ones keep the part in which they differ."""
    curve = {"fpr": [0, 1], "tpr": [0, 1], "roc_auc": 0.5}
    for labels, shown in [(["_x", "$5-$10", ""], ["_x", "$5-$10", ""]), ([f"{'a' * 30} {i}" for i in range(7)], "0123456")]:
        figure = mpl.Figure()
        plots._curves(dict.fromkeys(labels, curve), ("fpr", "tpr"), "roc_auc", ("x", "y"), axes := figure.subplots())
        (legend,) = [*figure.legends, *filter(None, [axes.get_legend()])]
        names = [text.get_text().removesuffix(" (0.50)") for text in legend.get_texts()]
        assert [name.removeprefix("…") for name in names] == list(shown)


def test_characters_that_no_font_has_are_named_once(tmp_path, caplog):
    labels = ["a\ue000", "b\ue001"]
    plots.draw_plots(tmp_path, SINGLE_LABEL.plots(np.full((12, 2), 0.5), split(12, labels), labels, 15))
    (message,) = caplog.messages
    assert "\ue000, \ue001" in message and "fonts" in message


def test_many_labels_are_listed_from_the_worst(trained):
    """The labels with the lowest F1 are in sight, the others in a part that opens."""
    measured = json.loads((trained / "run/evaluation/metrics.json").read_text(encoding="utf-8"))["test"]
    measured["labels"] = {f"label-{i}": {"f1": i / 300, "precision": 0, "recall": 0, "n_rows": 3} for i in reversed(range(300))}
    result = Evaluated(SINGLE_LABEL, "test", measured, {}, [], "", True, list(measured["labels"]), {}, [])
    source = report.render_report(result, layout.read_info(trained / "run/bundle"), read_manifest(trained / "splits"), [])
    order = [int(number) for number in re.findall(r"label-(\d+)<", source)]
    assert order == list(range(300)) and source.index("label-19<") < source.index("<details>") < source.index("label-20<")


@pytest.mark.parametrize(
    ("matrix", "baselines", "named"),
    [
        ([[60, 0, 0], [0, 40, 0], [0, 0, 30]], {"majority": 0.2, "tfidf": 0.9}, []),
        ([[60, 10, 0], [10, 30, 0], [0, 0, 30]], {"majority": 0.2, "tfidf": 0.88}, [("not better", "0.880")]),
        ([[60, 10, 0], [10, 30, 0], [0, 0, 30]], {"majority": 0.2, "tfidf": 0.82}, [("not clearly better", "TF-IDF")]),
        ([[90, 0, 0], [40, 0, 0], [30, 0, 0]], {"majority": 0.24, "tfidf": 0.3},
         [("most frequent", "TF-IDF"), ("b (40), c (30)", "loss.class_weights")]),
        ([[90, 0, 0], [0, 40, 0], [0, 0, 9]], {}, [("fewer than 10", "c (9)")]),
        ([[60, 0, 0], [0, 39, 0], [0, 0, 0]], {}, [("99 rows", "data.fractions"), ("fewer than 10", "c (0)")]),
    ],
)  # fmt: skip
def test_warnings_in_words(matrix, baselines, named):
    matrix, labels = np.array(matrix), ["a", "b", "c"]
    low, high = metrics.bootstrap(matrix, 500)["macro_f1"]
    measured = {**metrics.summary(matrix), "interval_95": {"macro_f1": {"low": low, "high": high}}, "cut_share": 0.05}
    measured["n_rows"], support = matrix.sum(), np.stack([matrix.sum(1), matrix.sum(0)])
    others = {name: {"macro_f1": score} for name, score in baselines.items()}
    warnings = quality_warnings(SINGLE_LABEL, measured, others, support, labels, "test")
    assert len(warnings) == len(named) and all(
        part in text for text, parts in zip(warnings, named, strict=True) for part in parts
    )
    cut_more = quality_warnings(SINGLE_LABEL, {**measured, "cut_share": 0.051}, others, support, labels, "test")
    (cut,) = set(cut_more) - set(warnings)
    assert "5.1%" in cut and "model.max_tokens" in cut and "model.long_texts=windows" in cut
    on_train = quality_warnings(SINGLE_LABEL, measured, others, support, labels, "train")
    assert "better" not in "".join(on_train), "baselines were fitted on it"


def test_warnings_are_in_the_terminal_the_report_and_the_metrics(trained, capsys):
    from sodaops.cli import main

    folder = trained / "warned"
    settings = [f"evaluate.splits_dir={trained / 'splits'}", f"evaluate.output_dir={folder}", "evaluate.n_bootstrap=100"]
    assert main(["evaluate", str(trained / "run/bundle"), *settings]) == 0
    shown, warnings = capsys.readouterr().out, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["warnings"]
    page = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert any("TF-IDF" in text for text in warnings), "a tiny random model"
    for text in warnings:
        assert f"warning: {text}" in shown and text in page and page.index(text) < page.index("By label")


def test_the_worst_errors_are_wrong_and_most_confident_first():
    labels = ["a", "b"]
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.01, 0.99], [0.6, 0.4], [0.2, 0.8]])
    result = SINGLE_LABEL.errors(split(6, labels), probs, labels, 3)
    assert [(entry["row"], entry["label"], entry["predicted"]) for entry in result] == [(1, "b", "a"), (2, "a", "b")]
