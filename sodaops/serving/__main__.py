"""``python -m sodaops.serving``: the service as the environment says."""

import gc
import math
import sys


def main() -> int:
    """Serves until SIGTERM or Ctrl-C; then what was asked before is answered, and no more is taken."""
    gc.disable()  # there is nothing to collect until all is imported and loaded, and that stays for good
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
        timeout_keep_alive=620,  # longer than load balancers keep a connection, which would else send into a closed one
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
