"""Log of the services: one JSON object per line on standard output, with request ids and without users' texts."""

import json
import logging
import sys
import time
import traceback

_encode = json.JSONEncoder(default=str).encode  # made once: json.dumps with options makes one per call


def configure_json_logging() -> None:
    """Sends log records of this package and of uvicorn to standard output, as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    for name in ("sodaops", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # its lines hold query strings, and so users' texts


def format_trace(error: BaseException) -> str:
    """Traceback and error without users' texts: pydantic's messages quote values, so only their class is shown."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    summary = type(error).__name__ if type(error).__module__.startswith("pydantic") else repr(error)[:500]
    return f"{frames}{summary}"


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: time, level, message, and the fields passed as ``extra``."""

    _STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        fields = {key: value for key, value in vars(record).items() if key not in self._STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            fields["trace"] = format_trace(record.exc_info[1])
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        return _encode({"time": when, "level": record.levelname.lower(), "message": record.getMessage(), **fields})
