"""Reviews in a database, through ADBC."""

from collections.abc import Iterator

import pyarrow as pa
from adbc_driver_sqlite import dbapi


def query(database: str, sql: str) -> Iterator[pa.RecordBatch]:
    with dbapi.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        yield from cursor.fetch_record_batch()
