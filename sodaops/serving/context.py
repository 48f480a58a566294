"""The context of requests: values of the bundle's slice columns, by which drift is judged."""

import contextvars
import json
from collections.abc import Mapping, Sequence

from prometheus_client import Counter
from starlette.exceptions import HTTPException

from sodaops.errors import nearest, some

MAX_VALUES = 50  # of a column, in the life of a process
OTHER = "other"


class Contexts:
    """Checks contexts, and bounds what the request log keeps of them; ``others`` counts what it does not keep, by column."""

    def __init__(self, others: Counter) -> None:
        self._others = others
        self._values: dict[str, set[str]] = {}
        self._columns = contextvars.ContextVar[dict[str, str]]("context")  # each request has its own

    def logged(self) -> dict[str, str]:
        """Of the current request, the columns of the request log; none without a context."""
        return self._columns.get({})

    def keep(self, context: Mapping[str, str] | None, columns: Sequence[str]) -> None:
        """Keeps the context of the current request, column -> value.

        Raises:
            HTTPException: 422 for a column that is not among the bundle's slice columns.
        """
        if not context:
            return
        if unknown := [f"{name[:40]}{nearest(name, columns)}" for name in context if name not in columns]:
            expected = ", ".join(columns) or "none, since the bundle was trained without data.slice_columns"
            raise HTTPException(422, f"context: {some(unknown)}; expected {expected}")
        self._columns.set({"context": json.dumps({name: self._bounded(name, context[name]) for name in sorted(context)})})

    def _bounded(self, column: str, value: str) -> str:
        known = self._values.setdefault(column, set())
        if value not in known and len(known) >= MAX_VALUES:
            self._others.labels(column).inc()
            return OTHER
        known.add(value)
        return value
