"""``python -m sodaops.annotation``: the annotation service, configured by environment variables."""

import sys

import uvicorn

from sodaops.annotation.app import create_annotation_app
from sodaops.annotation.settings import AnnotateSettings
from sodaops.errors import SodaOpsError
from sodaops.web.log import configure_json_logging


def main() -> int:
    """Runs the service until SIGTERM or Ctrl-C."""
    configure_json_logging()
    try:
        settings = AnnotateSettings.from_environment(sys.argv[1:])
        app = create_annotation_app(settings.store, settings.api_keys, settings.admin_keys)
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    uvicorn.run(
        app, host=settings.host, port=settings.port, loop="uvloop", http="httptools", log_config=None, access_log=False,
        server_header=False, ws="none", timeout_graceful_shutdown=5,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
