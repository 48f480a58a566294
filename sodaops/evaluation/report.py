"""The HTML report of an evaluation, in one file."""

from collections.abc import Sequence
from typing import Any

from sodaops import pages
from sodaops.bundle.layout import BundleInfo
from sodaops.evaluation.result import Evaluated, describe_abstention, describe_rows, own_metrics
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
    task = result.task
    rows = [(title, values, False) for title, values in result.others]
    rows.append(("this model", result.metrics, True))
    return pages.render_page(
        "evaluation", result=result, m=result.metrics, bundle=info, manifest=manifest, pictures=pictures, rows=rows,
        metrics=task.metrics, worst=task.worst, own=own_metrics(task, result.metrics),
        which=describe_rows(result.split, result.same_data),
        abstention=[*describe_abstention(result.metrics.get("abstention", {}))],
    )  # fmt: skip
