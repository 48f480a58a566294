"""``python -m sodaops.drift``: the drift service, configured by environment variables."""

import sys

from sodaops.drift.app import MAX_BODY_BYTES, create_drift_app
from sodaops.drift.settings import WatchSettings
from sodaops.errors import SodaOpsError
from sodaops.web.server import run


def main() -> int:
    """Runs the service until SIGTERM or Ctrl-C."""
    try:
        settings = WatchSettings.from_environment(sys.argv[1:])
        app = create_drift_app(settings)
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    run(app, settings, MAX_BODY_BYTES, stop_s=2)  # a request for a check that is still running gets no answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
