"""Helpers for tests of drift detection: a bundle with a reference of many tweets, and request logs to compare with it."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.csv
from prometheus_client.parser import text_string_to_metric_families

from sodaops.bundle import reference
from sodaops.export.drift_reference import make_reference
from sodaops.inference.predictor import Predictor
from tests.conftest import REPO, TWEETS
from tests.requests import log_rows, write_log_part
from tests.serving import refresh_info

SOURCES = ("app", "web")
RECENTLY = datetime.now(UTC) - timedelta(hours=1)


def tweets() -> list[str]:
    """In random order: the table's first rows are shorter than its last."""
    texts = pyarrow.csv.read_csv(TWEETS)["text"].to_pylist()
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def truth() -> np.ndarray:
    """The label ids of :func:`tweets`."""
    labels = pyarrow.csv.read_csv(TWEETS)["sentiment"].to_numpy(zero_copy_only=False)
    return np.unique(labels, return_inverse=True)[1][np.random.default_rng(0).permutation(len(labels))]


def reviews() -> list[str]:
    """Texts unlike tweets."""
    return pyarrow.csv.read_csv(REPO / "data/raw/amazon_reviews.csv")["text"].to_pylist()


def with_reference(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose reference is of the first 2,000 of :func:`tweets`, in turns of two sources."""
    shutil.copytree(bundle, folder)
    predictor = Predictor(folder)
    cleaned = [predictor.clean(text) for text in tweets()[:2000]]
    segments = np.array(SOURCES)[np.arange(2000) % 2, None]
    known = make_reference(predictor, cleaned[:1500], cleaned[1500:], truth()[1500:2000], (segments[:1500], segments[1500:]))
    reference.write_reference(folder, known)
    refresh_info(folder, data={**predictor.info.data, "slice_columns": ["source"]})
    return folder


class Rows:
    """Rows of a request log of the last hour.

    Attributes:
        fresh: tweets that are not in the reference, from the same source.
        others: reviews, from another source.
    """

    def __init__(self, bundle: Path) -> None:
        predictor = Predictor(bundle)
        self.bundle_id = predictor.info.bundle_id
        self.fresh = log_rows(predictor, tweets()[2000:2200], RECENTLY)
        self.others = log_rows(predictor, reviews()[:200], RECENTLY)


def fill(log: Path, *tables: pa.Table) -> None:
    """Replaces a log by these rows, one part for each table."""
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir(parents=True)
    for n, table in enumerate(tables):
        write_log_part(log, table, f"part{n}")


def replaced(rows: pa.Table, column: str, value: object) -> pa.Table:
    """Rows with one column set to a value."""
    field = rows.schema.field(column)
    return rows.set_column(rows.column_names.index(column), field, pa.array([value] * len(rows), field.type))


def metrics(client: httpx.Client) -> dict[str, float]:
    """The metrics of a service: ``name{label=value}`` -> number."""
    text = client.get("/metrics").raise_for_status().text
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
