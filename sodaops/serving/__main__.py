"""``python -m sodaops.serving``: runs the predictor with settings from environment variables."""

import gc
import math
import sys


def main() -> int:
    """Serves until SIGTERM or Ctrl-C; requests received before that are still answered."""
    gc.disable()  # imports and the bundle stay for good: nothing to collect until both are loaded
    from sodaops.errors import SodaOpsError
    from sodaops.serving.app import create_app
    from sodaops.serving.settings import ServeSettings
    from sodaops.web.server import run

    try:
        settings = ServeSettings.from_environment(sys.argv[1:])
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    app = create_app(settings)
    gc.freeze()
    gc.enable()
    run(app, settings, settings.max_body_bytes, math.ceil(settings.deadline_s) + 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
