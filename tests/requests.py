"""Request logs for tests: rows as the service writes them, without the service."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sodaops.inference.predictor import Predictor
from sodaops.request_log.parts import SCHEMA
from sodaops.serving.batcher import ModelOutput
from sodaops.serving.log_rows import prediction_fields

START = datetime(2026, 11, 20, 6, tzinfo=UTC)
PART_SCHEMA = SCHEMA.set(0, pa.field("time", pa.timestamp("us", "UTC")))


def log_rows(predictor: Predictor, texts: Sequence[str], start: datetime = START, **changes: Any) -> pa.Table:
    """A row for each text, a second apart; ``changes`` are columns of the same value in every row."""
    cleaned = [predictor.clean(text) for text in texts]
    answers: dict[int, ModelOutput] = {}
    for places, output in predictor.batches(cleaned):
        sketches = predictor.sketch(output.embeddings)
        answers |= {int(place): ModelOutput(output.probs[i], sketches[i]) for i, place in enumerate(places)}
    rows = [
        {
            "time": start + timedelta(seconds=i), "request_id": f"r{i}", "place": 0, "bundle_id": predictor.info.bundle_id,
            "variant": predictor.variant, "labels": predictor.info.labels, "latency_ms": 1.0, "text": texts[i],
            **prediction_fields(
                predictor, cleaned[i], predictor.encode(cleaned[i]), predictor.prediction(answers[i].probs), answers[i]
            ),
            **changes,
        }
        for i in range(len(texts))
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=PART_SCHEMA)


def refused_rows(n: int, bundle_id: str, start: datetime = START) -> pa.Table:
    """Rows of texts that were refused as empty."""
    rows = [
        {"time": start + timedelta(seconds=i), "request_id": f"e{i}", "place": 0, "bundle_id": bundle_id, "n_chars": 0,
         "text_sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
        for i in range(n)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=PART_SCHEMA)


def write_log_part(log: Path, rows: pa.Table, name: str = "a") -> Path:
    """Writes rows as a part, and returns its path."""
    folder = log / f"date={rows['time'][0].as_py().date()}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / f"{name}.parquet", compression="zstd")
    return folder / f"{name}.parquet"
