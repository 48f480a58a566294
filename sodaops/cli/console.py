"""The log on a terminal: messages on standard error."""

import logging
import os
import sysconfig

from sodaops.io.progress import ConsoleHandler

_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", sysconfig.get_path("stdlib") + os.sep)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a message is a warning, or is not by a library: by this package, Hydra's launchers, or the user's own code."""
    own = record.name.partition(".")[0] in ("sodaops", "hydra", "hydra_plugins")
    return own or record.levelno >= logging.WARNING or not any(part in record.pathname for part in _LIBRARIES)


def configure_logging() -> None:
    """Shows messages on standard error; of several processes that train together, those of the first one.

    May be called again, and replaces what a service configured.
    """
    from sodaops.io import ranks

    package = logging.getLogger("sodaops")
    package.handlers, package.propagate = [], True
    logging.root.setLevel(logging.INFO if ranks.is_rank_zero(os.environ) else logging.WARNING)
    if not any(isinstance(handler, ConsoleHandler) for handler in logging.root.handlers):
        handler = ConsoleHandler()
        handler.addFilter(_is_shown)
        logging.root.addHandler(handler)
