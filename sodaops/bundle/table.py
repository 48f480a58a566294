"""Answers for a whole table."""

import numpy as np
import pyarrow as pa

from sodaops.bundle.predictor import Predictor
from sodaops.config import FORMATS, table_format
from sodaops.data.sources import column_names, read_table, write_table
from sodaops.errors import DataError
from sodaops.storage import atomic_path


def predict_table(predictor: Predictor, path: str, text_column: str, output: str) -> int:
    """Answers a table: its columns, cells as text, and label, score and prob_LABEL beside them.

    Rows whose text is empty after cleaning get empty answers.

    Args:
        predictor: the bundle that answers.
        path: .csv, .tsv, .jsonl or .parquet.
        text_column: the column with the raw texts.
        output: .csv, .tsv, .jsonl or .parquet; written whole or not at all.

    Returns:
        How many rows were written.

    Raises:
        DataError: a table that cannot be read, or an output format that is not known.
    """
    if table_format(output) is None or output.endswith(".gz"):
        raise DataError(f"--output {output}: expected a name that ends in {', '.join(FORMATS)}.")
    table = read_table(path, column_names(path, [text_column], "Set --text-column."))
    cleaned = [predictor.clean(text) for text in table[text_column].to_pylist()]
    full = [i for i, text in enumerate(cleaned) if text]
    probs = predictor.probs_of_cleaned([cleaned[i] for i in full]) if full else np.empty((0, len(predictor.info.labels)))
    answers: dict[str, list] = {name: [None] * len(cleaned) for name in ("label", "score")}
    answers |= {f"prob_{label}": [None] * len(cleaned) for label in predictor.info.labels}
    for i, row in zip(full, probs, strict=True):
        answers["label"][i] = predictor.info.labels[int(row.argmax())]
        answers["score"][i] = float(row.max())
        for label, prob in zip(predictor.info.labels, row, strict=True):
            answers[f"prob_{label}"][i] = float(prob)
    for name, values in answers.items():
        shown = name if name not in table.column_names else f"predicted_{name}"
        table = table.append_column(shown, pa.array(values, pa.string() if name == "label" else pa.float64()))
    with atomic_path(output) as temporary:
        write_table(table, temporary, table_format(output))
    return table.num_rows
