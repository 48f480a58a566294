"""``python -m sodaops.serving``: runs the predictor with settings from environment variables."""

import gc
import math
import sys


def main() -> int:
    """Serves until SIGTERM or Ctrl-C; requests received before that are still answered."""
    gc.disable()  # imports and the bundle stay for good: nothing to collect until both are loaded
    import uvicorn

    from sodaops.errors import SodaOpsError
    from sodaops.serving.app import create_app
    from sodaops.serving.settings import ServeSettings

    try:
        settings = ServeSettings.from_environment(sys.argv[1:])
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    app = create_app(settings)
    gc.freeze()
    gc.enable()
    uvicorn.run(
        app, host=settings.host, port=settings.port, loop="uvloop", http="httptools", log_config=None, access_log=False,
        server_header=False, ws="none", timeout_graceful_shutdown=math.ceil(settings.deadline_s) + 1,
        timeout_keep_alive=620,  # longer than that of load balancers, which might otherwise send on a closed connection
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
