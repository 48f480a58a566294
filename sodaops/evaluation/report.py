"""One self-contained page about an evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sodaops import pages
from sodaops.bundle.layout import BundleInfo
from sodaops.evaluation.plots import Picture
from sodaops.evaluation.result import Evaluated


def render(
    found: Evaluated,
    info: BundleInfo,
    manifest: dict[str, Any],
    pictures: Sequence[Picture],
) -> str:
    """The report as HTML that loads nothing from outside.

    Args:
        found: the metrics and the worst errors.
        info: of the bundle that was evaluated.
        manifest: of the splits.
        pictures: to embed.
    """
    names = {"majority": "always the most frequent label", "tfidf": "TF-IDF + logistic regression"}
    rows = [(names[name], values, False) for name, values in found.baselines.items()]
    return pages.render(
        "evaluation", split=found.split, same_data=found.same_data, m=found.metrics, baselines=found.baselines, bundle=info,
        manifest=manifest, pictures=pictures, rows=[*rows, ("this model", found.metrics, True)],
        errors=found.errors,
    )  # fmt: skip


def worst(table: pa.Table, probs: np.ndarray, labels: Sequence[str], n_worst: int) -> list[dict[str, Any]]:
    """The wrong answers that the model was surest of, surest first."""
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
