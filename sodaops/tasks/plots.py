"""The plots of an evaluation, as PNG files."""

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from sodaops.errors import some
from sodaops.tasks import metrics

log = logging.getLogger(__name__)

_MAX_LABELS, _MAX_CURVES = 12, 7  # shown in one picture; of more labels those that matter most, as the caption says
_MAX_CHARS = 24  # of a name in a picture
_MAX_SHARES = 5  # labels for whose cells of the confusion matrix there is room for shares as well as counts
_MAX_INSIDE = 4  # curves whose legend is inside the axes
# Fonts with Chinese, Japanese and Korean, Arabic or Indic letters, as systems name them; used where they are installed.
_FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAGothic",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Noto Sans Arabic",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Hebrew", "Unifont",
)  # fmt: skip
_STYLE = {
    "figure.dpi": 160, "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.edgecolor": "#8a94a6", "axes.labelcolor": "#3a4454", "xtick.color": "#3a4454", "ytick.color": "#3a4454",
    # Okabe & Ito's palette, which colour-blind readers can tell apart.
    "axes.prop_cycle": matplotlib.cycler(color=["#D55E00", "#8a94a6", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
}  # fmt: skip


Wanted = tuple[str, str, str, Callable[[Axes], None]]  # file name, title, caption, and what draws it


class Picture(NamedTuple):
    """A plot in a file."""

    title: str
    caption: str
    path: Path


def draw_plots(folder: Path, wanted: Sequence[Wanted]) -> list[Picture]:
    """Draws plots into ``folder``, which is made if missing.

    Figures are made without pyplot, so that neither its backend nor its global state is touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing: set[str] = set()
    pictures = [_save(folder / f"{name}.png", title, caption, fill, missing) for name, title, caption, fill in wanted]
    if missing:
        log.warning(
            "the plots show boxes for characters that no installed font has: %s; install one, for example fonts-noto-cjk or "
            "fonts-noto-core, and delete ~/.cache/matplotlib", some(sorted(missing), shown=10),
        )  # fmt: skip
    return pictures


def of_labels(
    probs: np.ndarray, label_ids: np.ndarray, predicted: np.ndarray, labels: Sequence[str], n_bins: int
) -> list[Wanted]:
    """Confusion matrix, reliability, ROC and precision-recall curves of probabilities, float [n_rows, n_labels]."""
    matrix = metrics.confusion(label_ids, predicted, len(labels))
    confused = most_confused(matrix, _MAX_LABELS)
    return [
        ("confusion", "Confusion matrix", "Rows are the true labels, columns the predicted ones; colours are shares of a row."
         + _chosen(confused, labels, "labels that are most often confused"), partial(_confusion, matrix, labels, confused)),
        ("reliability", "Reliability", "Accuracy at each confidence. Bars below the diagonal are overconfident.",
         partial(_reliability, metrics.reliability(probs, label_ids, n_bins), n_bins, ("confidence", "accuracy"))),
        *_of_curves(metrics.curves(probs, label_ids, labels)),
    ]  # fmt: skip


def _of_curves(curves: dict[str, dict]) -> list[Wanted]:
    roc, precision_recall = (_lowest(curves, area) for area in ("roc_auc", "average_precision"))
    return [
        ("roc", "ROC, one label against the rest", "True positive rate at each false positive rate."
         + _chosen(roc, curves, "labels with the smallest areas"),
         partial(_curves, roc, ("fpr", "tpr"), "roc_auc", ("false positive rate", "true positive rate"))),
        ("precision_recall", "Precision and recall, one label against the rest", "Precision at each recall."
         + _chosen(precision_recall, curves, "labels with the smallest areas"),
         partial(_curves, precision_recall, ("recall", "precision"), "average_precision", ("recall", "precision"))),
    ]  # fmt: skip


def of_label_sets(
    probs: np.ndarray, truth: np.ndarray, decided: np.ndarray, labels: Sequence[str], n_bins: int
) -> list[Wanted]:
    """Labels per text, reliability, ROC and precision-recall curves; all arrays are [n_rows, n_labels]."""
    bins = metrics.reliability_of(probs.ravel(), truth.ravel(), n_bins)
    return [
        ("n_labels", "Labels per text", "How many texts have so many labels, in the table and in the predictions.",
         partial(_label_numbers, truth.sum(1), decided.sum(1))),
        ("reliability", "Reliability", "The share of texts that have a label at each of its probabilities, over all labels.",
         partial(_reliability, bins, n_bins, ("probability", "share with the label"))),
        *_of_curves(metrics.curves(probs, truth, labels)),
    ]  # fmt: skip


def of_ranks(label_ids: np.ndarray, predicted: np.ndarray) -> Wanted:
    """How many ranks the predictions of ordered labels are off."""
    gaps, n_rows = np.unique(predicted - label_ids, return_counts=True)
    share = n_rows[np.abs(gaps) <= 1].sum() / len(label_ids)
    caption = f"Predicted minus true rank; {share:.0%} of the rows are at most one rank off."

    def fill(axes: Axes) -> None:
        axes.bar(gaps, n_rows, color=["#0072B2" if abs(gap) <= 1 else "#D55E00" for gap in gaps], width=0.8)
        for gap, n in zip(gaps, n_rows, strict=True):
            axes.text(gap, n, str(n), ha="center", va="bottom", color="#3a4454")
        axes.set(xlabel="ranks above the true label (below: negative)", ylabel="rows", xticks=gaps)

    return "ranks", "Errors in ranks", caption, fill


def of_confidence(probs: np.ndarray, predicted: np.ndarray, table: pa.Table, labels: Sequence[str]) -> Iterator[Wanted]:
    """The probability of the predicted label, by this label and by each slice column."""
    confidence = probs[np.arange(len(probs)), predicted]
    groups = {"predicted": ("predicted label", np.array(labels)[predicted], list(labels))}
    for column in table.column_names:
        if column.startswith("slice_"):
            values = np.array([value or "(no value)" for value in table[column].to_pylist()])
            groups[column] = (column.removeprefix("slice_"), values, sorted(set(values)))
    for column, (title, values, names) in groups.items():
        n_rows = {name: n for name in names if (n := int((values == name).sum()))}
        largest = sorted(n_rows, key=lambda name: -n_rows[name])[:_MAX_LABELS]
        shown = [name for name in n_rows if name in largest]
        caption = "The probability of the predicted label." + _chosen(shown, n_rows, "groups with the most rows")
        file_name = f"confidence_by_{re.sub(r'[^A-Za-z0-9_-]', '-', column)}"
        yield file_name, f"Confidence by {title}", caption, partial(_confidence, confidence, values, shown)


def of_values(values: np.ndarray, truth: np.ndarray, name: str, radius: float) -> list[Wanted]:
    """Answers against the truth, errors against the answers, and the distribution of the errors, of numbers, float [n_rows]."""
    within = "Dashed lines: the interval of an answer."
    return [
        ("predicted", f"Predicted and true {name}", f"A point is a row; the diagonal is the truth. {within}",
         partial(_points, truth, values, 1, radius, (f"{name} in the table", "predicted"))),
        ("residuals", "Errors", f"The prediction minus the truth; a trend shows answers that are too cautious. {within}",
         partial(_points, values, values - truth, 0, radius, ("predicted", "predicted minus true"))),
        ("errors", "Distribution of the errors", f"The number of rows with each error. {within}",
         partial(_error_histogram, values - truth, radius)),
    ]  # fmt: skip


def most_confused(matrix: np.ndarray, n: int) -> list[int]:
    """The ids of at most ``n`` labels with the largest numbers of confusions, in the labels' order.

    >>> most_confused(np.array([[5, 0, 1], [0, 5, 0], [3, 0, 5]]), 2)
    [0, 2]
    """
    errors = matrix - np.diag(np.diag(matrix))
    cells = zip(*np.unravel_index(np.argsort(-errors, axis=None, kind="stable"), matrix.shape), strict=True)
    chosen: dict[int, None] = {}
    for cell in cells:
        for label in cell:
            if len(chosen) < n:
                chosen[int(label)] = None
        if len(chosen) >= min(n, len(matrix)):
            break
    return sorted(chosen)


def _lowest(curves: dict[str, dict], area: str) -> dict[str, dict]:
    names = sorted(curves, key=lambda label: curves[label][area])[:_MAX_CURVES]
    return {label: values for label, values in curves.items() if label in names}


def _chosen(shown: Sized, every: Sized, which: str) -> str:
    """A sentence for the caption if a picture does not show all."""
    return f" Of {len(every)} only the {len(shown)} {which}." if len(shown) < len(every) else ""


def _save(path: Path, title: str, caption: str, fill: Callable[[Axes], None], missing: set[str]) -> Picture:
    """Draws a picture, and adds the characters that no font has to ``missing``."""
    fonts = ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in font_manager.get_font_names())]
    with matplotlib.rc_context({**_STYLE, "font.family": fonts}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        fill(axes)
        axes.set_title(title)
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)  # a user's label may hold a dollar sign
        figure.savefig(path, metadata={"Software": None})  # without Matplotlib's version: equal plots make equal files
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .*missing", str(warning.message))
        if glyph:
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return Picture(title, caption, path)


def _short(names: Sequence[str]) -> list[str]:
    """Names for a picture: of long ones without what they all begin and end with, then without their middle."""
    if not names or max(map(len, names)) <= _MAX_CHARS:
        return list(names)
    reversed_names = [name[::-1] for name in names]
    start, end = (len(os.path.commonprefix(of)) for of in (list(names), reversed_names))  # noqa: RUF071  # by characters
    if min(map(len, names)) > start + end and len(names) > 1:
        names = [f"{'…' if start else ''}{name[start : len(name) - end]}{'…' if end else ''}" for name in names]
    half = _MAX_CHARS // 2
    return [name if len(name) <= _MAX_CHARS else f"{name[: half - 1]}…{name[-half:]}" for name in names]


def _name_ticks(axis: Axis, places: Sequence[int], names: Sequence[str]) -> None:
    """Names on an axis; slanted on the horizontal one if they would overlap."""
    slanted = axis.axis_name == "x" and max(len(line) for name in names for line in name.split("\n")) * len(names) > 40
    axis.set_ticks(places, names, **({"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}))


def _confusion(matrix: np.ndarray, labels: Sequence[str], chosen: Sequence[int], axes: Axes) -> None:
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # of the rows of each true label; 0 where it has none
    matrix, shares = matrix[np.ix_(chosen, chosen)], shares[np.ix_(chosen, chosen)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        _name_ticks(axis, range(len(chosen)), _short([labels[i] for i in chosen]))
    for row, column in np.ndindex(matrix.shape):
        colour = "white" if shares[row, column] > 0.55 else "#1b2430"  # readable on dark and light cells
        if len(chosen) <= _MAX_SHARES:
            text = f"{shares[row, column]:.0%}\n{matrix[row, column]}"
        else:
            text = str(matrix[row, column] or "")
        axes.text(column, row, text, ha="center", va="center", color=colour)


def _label_numbers(true: np.ndarray, predicted: np.ndarray, axes: Axes) -> None:
    numbers = np.arange(int(max(true.max(), predicted.max())) + 1)
    for shift, values, name in ((-0.2, true, "table"), (0.2, predicted, "predicted")):
        axes.bar(numbers + shift, np.bincount(values, minlength=len(numbers)), width=0.4, label=name)
    axes.legend(frameon=False)
    axes.set(xlabel="labels", ylabel="texts")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _reliability(bins: dict[str, np.ndarray], n_bins: int, names: tuple[str, str], axes: Axes) -> None:
    centres = (np.arange(n_bins) + 0.5) / n_bins
    axes.plot([0, 1], [0, 1], color="#8a94a6", linestyle="--", linewidth=1)
    axes.bar(centres, np.nan_to_num(bins["accuracy"]), width=0.9 / n_bins, color="#0072B2", alpha=0.85)
    for centre, accuracy, n_rows in zip(centres, bins["accuracy"], bins["n_rows"], strict=True):
        if n_rows:
            axes.text(centre, accuracy + 0.015, str(n_rows), ha="center", fontsize=6.5, color="#3a4454")
    axes.set(xlim=(0, 1), ylim=(0, 1.08), xlabel=names[0], ylabel=f"{names[1]} (number of rows above)")


def _curves(curves: dict[str, dict], keys: tuple[str, str], area: str, names: tuple[str, str], axes: Axes) -> None:
    lines = [axes.plot(values[keys[0]], values[keys[1]], linewidth=1.8)[0] for values in curves.values()]
    axes.set(xlabel=names[0], ylabel=names[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    unnamed, title = [""] * len(lines), "area under the curve"
    if len(lines) <= _MAX_INSIDE:
        legend = axes.legend(
            lines, unnamed, title=title, frameon=False, loc="lower right" if keys[0] == "fpr" else "lower left"
        )
    else:
        axes.figure.set_size_inches(5.2, 4.2 + 0.2 * len(lines))
        legend = axes.figure.legend(lines, unnamed, title=title, frameon=False, loc="outside lower center")
    # Matplotlib leaves out names that begin with an underscore, so they are set afterwards.
    for text, name, values in zip(legend.get_texts(), _short(list(curves)), curves.values(), strict=True):
        text.set_text(f"{name} ({values[area]:.2f})")


def _points(x: np.ndarray, y: np.ndarray, slope: float, radius: float, names: tuple[str, str], axes: Axes) -> None:
    ends = np.array([x.min(), x.max()])
    axes.scatter(x, y, s=9, alpha=max(0.08, min(0.6, 150 / len(x))), color="#0072B2", linewidths=0)
    axes.plot(ends, slope * ends, color="#3a4454", linewidth=1)
    for sign in (-1, 1):
        axes.plot(ends, slope * ends + sign * radius, color="#8a94a6", linestyle="--", linewidth=1)
    axes.set(xlabel=names[0], ylabel=names[1])


def _error_histogram(errors: np.ndarray, radius: float, axes: Axes) -> None:
    axes.hist(errors, bins=30, color="#0072B2", alpha=0.85)
    for edge in (-radius, radius):
        axes.axvline(edge, color="#8a94a6", linestyle="--", linewidth=1)
    axes.set(xlabel="predicted minus true", ylabel="rows")


def _confidence(confidence: np.ndarray, groups: np.ndarray, names: Sequence[str], axes: Axes) -> None:
    parts = axes.violinplot([confidence[groups == name] for name in names], showmedians=True, widths=0.8)
    for body in parts["bodies"]:
        body.set(facecolor="#56B4E9", alpha=0.7)
    for key in ("cmedians", "cmins", "cmaxes", "cbars"):
        parts[key].set(color="#0072B2", linewidth=1.2)
    break_or_comma = "\n" if len(names) <= _MAX_SHARES else ", "
    counted = [f"{short}{break_or_comma}n = {(groups == name).sum()}" for short, name in zip(_short(names), names, strict=True)]
    _name_ticks(axes.xaxis, range(1, len(names) + 1), counted)
    axes.set(ylim=(0, 1.02), ylabel="confidence")
