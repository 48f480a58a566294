"""The services' log: a JSON object a line on standard output, with request ids and without texts."""

import json
import logging
import sys
import time
import traceback

_encode = json.JSONEncoder(default=str).encode  # made once: json.dumps would make one for each line


def configure_json_logging() -> None:
    """Sends this package's and uvicorn's log records to standard output, a JSON object a line."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    for name in ("sodaops", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # its lines hold queries, and so texts


def format_trace(error: BaseException) -> str:
    """Where it happened. What pydantic says of a value quotes it, and may be a user's text; so it is left out."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    said = type(error).__name__ if type(error).__module__.startswith("pydantic") else repr(error)[:500]
    return f"{frames}{said}"


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and what the call gave as ``extra``."""

    _PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        """A record as JSON."""
        facts = {key: value for key, value in vars(record).items() if key not in self._PLAIN}
        if record.exc_info and record.exc_info[1] is not None:
            facts["trace"] = format_trace(record.exc_info[1])
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        return _encode({"time": when, "level": record.levelname.lower(), "message": record.getMessage(), **facts})
