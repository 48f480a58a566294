"""The stream of Arrow batches that a user's function gives (``data.source``), read as a table is."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sodaops.config.extensions import build
from sodaops.data.sources import texts_of
from sodaops.data.streams import MAX_BATCH_ROWS, check_columns
from sodaops.errors import DataError, SodaOpsError, reason_of


class CellsHash:
    """A hash of columns of strings, which does not depend on how they are divided into batches.

    >>> whole, parts = CellsHash(["text"]), CellsHash(["text"])
    >>> whole.add(pa.record_batch({"text": ["a", "bc"]}))
    >>> for cell in ("a", "bc"):
    ...     parts.add(pa.record_batch({"text": [cell]}))
    >>> whole.hexdigest() == parts.hexdigest()
    True
    """

    def __init__(self, columns: Collection[str]) -> None:
        self._hashes = {name: (hashlib.sha256(), hashlib.sha256()) for name in columns}

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds rows, whose columns are strings without nulls."""
        for name, (lengths, content) in self._hashes.items():
            lengths.update(pc.binary_length(batch[name]).to_numpy().tobytes())
            content.update(b"".join(batch[name].cast(pa.binary()).to_pylist()))

    def hexdigest(self) -> str:
        """SHA-256 of the rows added so far, 64 hexadecimal digits."""
        return hashlib.sha256(b"".join(part.digest() for pair in self._hashes.values() for part in pair)).hexdigest()


def read_source(
    name: str, section: Mapping[str, Any], keys: Mapping[str, str], expected: str | None = None
) -> Iterator[pa.RecordBatch]:
    """Calls the function of ``data.source`` and reads columns of what it gives as strings, see :func:`texts_of`.

    Args:
        name: of the source, for messages.
        section: ``data.source``.
        keys: column -> the configuration's key that names it.
        expected: hash of all rows; None: any.

    Raises:
        ConfigError: the function cannot be imported or called.
        DataError: it raises, gives no rows, other rows than expected, something else than batches, or a column is missing.
    """
    cells = CellsHash(keys)
    for batch in texts_of(name, _batches(name, section, keys), list(keys)):
        cells.add(batch)
        yield batch
    if expected not in (None, cells.hexdigest()):
        raise DataError(
            f"{name}: gave other rows when it was called again; give the same rows in the same order at each call, in SQL with "
            "ORDER BY."
        )


def hash_source(name: str, section: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """SHA-256 of all rows of a source, as :class:`CellsHash` computes it."""
    cells = CellsHash(keys)
    for batch in texts_of(name, _batches(name, section, keys), list(keys)):
        cells.add(batch)
    return cells.hexdigest()


def _batches(name: str, section: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    given = build("data.source", section)
    n_rows = 0
    try:
        # A Table, a RecordBatchReader or a DataFrame is a stream itself; anything else is to yield such objects.
        for item in [given] if hasattr(given, "__arrow_c_stream__") or not isinstance(given, Iterable) else given:
            if not hasattr(item, "__arrow_c_stream__"):
                kind = type(item).__name__ if item is given else f"{type(given).__name__} of {type(item).__name__}"
                raise DataError(f"{name}: gave {kind}; expected a stream of pyarrow.RecordBatch, or a pyarrow.Table.")
            for batch in pa.RecordBatchReader.from_stream(item):
                check_columns(name, list(keys), batch.schema.names, keys)
                for start in range(0, batch.num_rows, MAX_BATCH_ROWS):
                    yield batch.slice(start, MAX_BATCH_ROWS)
                n_rows += batch.num_rows
    except SodaOpsError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise DataError(f"{name}: raised {type(error).__name__} after row {n_rows:,}: {reason_of(error)}") from error
    if not n_rows:
        raise DataError(f"{name}: gave no rows; expected at least one at each call, so not a generator that was read before.")
