"""The HTML report of an evaluation, in one file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sodaops import pages
from sodaops.bundle.layout import BundleInfo
from sodaops.evaluation.result import BASELINES, Evaluated, describe_rows, own_metrics
from sodaops.tasks.plots import Picture


def render_report(
    result: Evaluated,
    info: BundleInfo,
    manifest: dict[str, Any],
    pictures: Sequence[Picture],
) -> str:
    """The report as HTML that loads nothing from outside.

    Args:
        result: the metrics and the worst errors.
        info: of the bundle that was evaluated.
        manifest: of the splits.
        pictures: to embed.
    """
    rows = [(BASELINES[name], values, False) for name, values in result.baselines.items()]
    rows.append(("this model", result.metrics, True))
    return pages.render_page(
        "evaluation", result=result, m=result.metrics, bundle=info, manifest=manifest, pictures=pictures, rows=rows,
        own=own_metrics(result.metrics), which=describe_rows(result.split, result.same_data),
    )  # fmt: skip


def worst_errors(table: pa.Table, probs: np.ndarray, labels: Sequence[str], n_worst: int) -> list[dict[str, Any]]:
    """The wrong answers with the highest confidence, highest first; rows of equal confidence in the table's order."""
    label_ids = table["label_id"].to_numpy()
    predicted, confidence = probs.argmax(1), probs.max(1)
    wrong = np.flatnonzero(predicted != label_ids)
    return [
        {
            "text": table["text"][int(i)].as_py(),
            "label": labels[label_ids[i]],
            "predicted": labels[predicted[i]],
            "confidence": float(confidence[i]),
            "votes": table["votes"][int(i)].as_py() or [],
            "row": table["row"][int(i)].as_py(),
        }
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")][:n_worst]
    ]
