"""The log of the package and of Hydra on a terminal: messages on standard error."""

import logging
import os
import sys

from tqdm import tqdm


class ConsoleHandler(logging.Handler):
    """Writes each message as a line on standard error, above any progress bar; warnings and errors name their level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            tqdm.write(f"{level}{record.getMessage()}", file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):  # the terminal is gone
            self.handleError(record)


def configure_logging() -> None:
    """Shows the package's messages on standard error; of several processes that train together, those of the first one.

    May be called again.
    """
    from sodaops.io import ranks

    for name in ("sodaops", "hydra", "hydra_plugins"):  # Hydra's launchers log which jobs they start
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if ranks.is_rank_zero(os.environ) else logging.WARNING)
        if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
            logger.addHandler(ConsoleHandler())
