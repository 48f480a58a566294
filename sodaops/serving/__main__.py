"""``python -m sodaops.serving``: runs the predictor with settings from environment variables."""

import gc
import math
import os
import sys
import threading


def main() -> int:
    """Serves until SIGTERM or Ctrl-C; requests received before that are still answered."""
    gc.disable()  # imports and the bundle stay for good: nothing to collect until both are loaded
    from sodaops.errors import SodaOpsError
    from sodaops.serving.app import create_app
    from sodaops.serving.settings import ServeSettings
    from sodaops.serving.trial import LIMIT_S
    from sodaops.web.server import run

    try:
        settings = ServeSettings.from_environment(sys.argv[1:])
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    watchdog = threading.Timer(LIMIT_S, _give_up, [settings.bundle])
    watchdog.daemon = True
    watchdog.start()
    try:
        app = create_app(settings)
    finally:
        watchdog.cancel()
    gc.freeze()
    gc.enable()
    run(app, settings, settings.max_body_bytes, math.ceil(settings.deadline_s) + 1)
    return 0


def _give_up(bundle: str) -> None:
    print(f"BundleError: {bundle}: not loaded in time; copy the bundle again or train again.", file=sys.stderr, flush=True)
    os._exit(2)  # the thread that loads it cannot be stopped


if __name__ == "__main__":
    sys.exit(main())
