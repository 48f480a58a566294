"""``python -m sodaops.drift``: the drift service, configured by environment variables."""

import sys

import uvicorn

from sodaops.drift.app import create_drift_app
from sodaops.drift.settings import WatchSettings
from sodaops.errors import SodaOpsError


def main() -> int:
    """Runs the service until SIGTERM or Ctrl-C."""
    try:
        settings = WatchSettings.from_environment(sys.argv[1:])
        app = create_drift_app(settings)
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    uvicorn.run(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False, ws="none",
        timeout_graceful_shutdown=2,  # a request for a check that is still running gets no answer
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
