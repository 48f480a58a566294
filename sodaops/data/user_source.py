"""The stream of Arrow batches that a user's function gives (``data.source``), read as a table is."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.config.extensions import build
from sodaops.data.sources import texts_of
from sodaops.data.streams import MAX_BATCH_ROWS, check_columns
from sodaops.errors import DataError, SodaOpsError, reason_of


def read_source(
    name: str, section: Mapping[str, Any], keys: Mapping[str, str], digests: dict[str, str], lists: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Calls the function of ``data.source`` and reads columns of what it gives as strings, see :func:`texts_of`.

    Args:
        name: of the source, for messages.
        section: ``data.source``.
        keys: column -> the configuration's key that names it.
        digests: name -> SHA-256 of all cells, which does not depend on the batches. It is set, or compared if it is there.
        lists: columns whose cells may be lists.

    Raises:
        ConfigError: the function cannot be imported or called.
        DataError: it raises, gives no rows, other rows than before, something else than batches, or a column is missing.
    """
    lengths, content = hashlib.sha256(), hashlib.sha256()
    for batch in texts_of(name, _batches(name, section, keys), list(keys), lists):
        # Row by row: the lengths say where each cell of the content ends.
        lengths.update(np.stack([pc.binary_length(column) for column in batch.columns], axis=1).tobytes())
        content.update("".join(pc.binary_join_element_wise(*batch.columns, "").to_pylist()).encode())
        yield batch
    digest = hashlib.sha256(lengths.digest() + content.digest()).hexdigest()
    if digests.setdefault(name, digest) != digest:
        raise DataError(f"{name}: gave other rows when it was called again; give the same rows in the same order (ORDER BY).")


def _batches(name: str, section: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    given, n_rows = build("data.source", section), 0
    try:
        # A Table, a RecordBatchReader or a DataFrame is a stream itself; anything else is to yield such objects.
        for item in [given] if hasattr(given, "__arrow_c_stream__") or not isinstance(given, Iterable) else given:
            if not hasattr(item, "__arrow_c_stream__"):
                kind = type(item).__name__ if item is given else f"{type(given).__name__} of {type(item).__name__}"
                raise DataError(f"{name}: gave {kind}; expected a stream of pyarrow.RecordBatch, or a pyarrow.Table.")
            for batch in pa.RecordBatchReader.from_stream(item):
                check_columns(name, list(keys), batch.schema.names, keys)
                yield from (batch.slice(start, MAX_BATCH_ROWS) for start in range(0, batch.num_rows, MAX_BATCH_ROWS))
                n_rows += batch.num_rows
    except SodaOpsError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise DataError(f"{name}: raised {type(error).__name__} after row {n_rows:,}: {reason_of(error)}") from error
    if not n_rows:
        raise DataError(f"{name}: gave no rows; expected at least one at each call, so not a generator that was read before.")
