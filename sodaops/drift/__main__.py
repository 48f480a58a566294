"""``python -m sodaops.drift``: the drift service as the environment says."""

import sys

import uvicorn

from sodaops.drift.app import create_drift_app
from sodaops.drift.settings import WatchSettings
from sodaops.errors import SodaOpsError


def main() -> int:
    """Watches until SIGTERM or Ctrl-C."""
    try:
        settings = WatchSettings.from_environment(sys.argv[1:])
        app = create_drift_app(settings)
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    uvicorn.run(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False, ws="none",
        timeout_graceful_shutdown=2,  # who asked for a look that is still going on gets no answer
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
