"""The plots of an evaluation, as PNG files."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sodaops.evaluation import metrics

_MAX_NAMED = 12  # with more labels than this, ticks and curves have no names; more groups than this are left out
_STYLE = {
    "figure.dpi": 160, "font.size": 10, "font.family": "sans-serif", "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.edgecolor": "#8a94a6", "axes.labelcolor": "#3a4454", "xtick.color": "#3a4454", "ytick.color": "#3a4454",
    # Okabe & Ito's palette, which colour-blind readers can tell apart.
    "axes.prop_cycle": matplotlib.cycler(color=["#D55E00", "#8a94a6", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
}  # fmt: skip


class Picture(NamedTuple):
    """A plot in a file."""

    title: str
    caption: str
    path: Path


def draw_plots(folder: Path, probs: np.ndarray, table: pa.Table, labels: Sequence[str], n_bins: int) -> list[Picture]:
    """Draws every plot of a split into ``folder``.

    Figures are made without pyplot, so that neither its backend nor its global state is touched.

    Args:
        folder: made if missing.
        probs: float [n_examples, n_labels].
        table: the split, of which label_id and the slice columns are read.
        labels: in the order of the columns of ``probs``.
        n_bins: bins of the reliability diagram.
    """
    folder.mkdir(parents=True, exist_ok=True)
    label_ids = table["label_id"].to_numpy().astype(np.int64)
    curves = metrics.curves(probs, label_ids, labels)
    by_confidence = "The probability of the predicted label."
    wanted: list[tuple[str, str, str, Callable[[Axes], None]]] = [
        ("confusion", "Confusion matrix", "Rows are the true labels, columns the predicted ones; shares of each row.",
         partial(_confusion, metrics.confusion(label_ids, probs.argmax(1), len(labels)), labels)),
        ("reliability", "Reliability", "Accuracy at each confidence. Bars below the diagonal are overconfident.",
         partial(_reliability, metrics.reliability(probs, label_ids, n_bins), n_bins)),
        ("roc", "ROC, one label against the rest", "True positive rate at each false positive rate.",
         partial(_curves, curves, ("fpr", "tpr"), "roc_auc", ("false positive rate", "true positive rate"))),
        ("precision_recall", "Precision and recall, one label against the rest", "Precision at each recall.",
         partial(_curves, curves, ("recall", "precision"), "average_precision", ("recall", "precision"))),
        ("confidence_by_predicted", "Confidence by predicted label", by_confidence,
         partial(_confidence, probs, np.array(labels)[probs.argmax(1)], labels)),
    ]  # fmt: skip
    for name in table.column_names:
        if name.startswith("slice_"):
            values = np.array([value or "(no value)" for value in table[name].to_pylist()])
            file_name = f"confidence_by_{re.sub(r'[^A-Za-z0-9_-]', '-', name)}"
            title = f"Confidence by {name.removeprefix('slice_')}"
            wanted.append((file_name, title, by_confidence, partial(_confidence, probs, values, sorted(set(values)))))
    return [_save(folder / f"{name}.png", title, caption, fill) for name, title, caption, fill in wanted]


def _save(path: Path, title: str, caption: str, fill: Callable[[Axes], None]) -> Picture:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        fill(axes)
        axes.set_title(title)
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)  # a user's label may hold a dollar sign
        figure.savefig(path, metadata={"Software": None})  # without Matplotlib's version: equal plots make equal files
    return Picture(title, caption, path)


def _confusion(matrix: np.ndarray, labels: Sequence[str], axes: Axes) -> None:
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # of the rows of each true label; 0 where it has none
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(labels) > _MAX_NAMED:
        return
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    for row in ticks:
        for column in ticks:
            colour = "white" if shares[row, column] > 0.55 else "#1b2430"  # readable on dark and light cells
            text = f"{shares[row, column]:.0%}\n{matrix[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=colour)


def _reliability(bins: dict[str, np.ndarray], n_bins: int, axes: Axes) -> None:
    centres = (np.arange(n_bins) + 0.5) / n_bins
    axes.plot([0, 1], [0, 1], color="#8a94a6", linestyle="--", linewidth=1)
    axes.bar(centres, np.nan_to_num(bins["accuracy"]), width=0.9 / n_bins, color="#0072B2", alpha=0.85)
    for centre, accuracy, n_rows in zip(centres, bins["accuracy"], bins["n_rows"], strict=True):
        if n_rows:
            axes.text(centre, accuracy + 0.015, str(n_rows), ha="center", fontsize=6.5, color="#3a4454")
    axes.set(xlim=(0, 1), ylim=(0, 1.08), xlabel="confidence", ylabel="accuracy (number of rows above)")


def _curves(curves: dict[str, dict], keys: tuple[str, str], area: str, names: tuple[str, str], axes: Axes) -> None:
    for label, values in curves.items():
        name = f"{label} ({values[area]:.2f})" if len(curves) <= _MAX_NAMED else None
        axes.plot(values[keys[0]], values[keys[1]], label=name, linewidth=1.8)
    axes.set(xlabel=names[0], ylabel=names[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    if len(curves) <= _MAX_NAMED:
        axes.legend(frameon=False, title="area under the curve", loc="lower right" if keys[0] == "fpr" else "lower left")


def _confidence(probs: np.ndarray, groups: np.ndarray, names: Sequence[str], axes: Axes) -> None:
    names = [name for name in names if (groups == name).any()][:_MAX_NAMED]
    top = probs.max(1)
    parts = axes.violinplot([top[groups == name] for name in names], showmedians=True, widths=0.8)
    for body in parts["bodies"]:
        body.set(facecolor="#56B4E9", alpha=0.7)
    for key in ("cmedians", "cmins", "cmaxes", "cbars"):
        parts[key].set(color="#0072B2", linewidth=1.2)
    counts = [f"{name}\nn = {(groups == name).sum()}" for name in names]
    axes.set_xticks(range(1, len(names) + 1), counts)
    axes.set(ylim=(0, 1.02), ylabel="confidence")
