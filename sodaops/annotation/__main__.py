"""``python -m sodaops.annotation``: the annotation service, configured by environment variables."""

import sys

from sodaops.annotation.app import MAX_BODY_BYTES, create_annotation_app
from sodaops.annotation.settings import AnnotateSettings
from sodaops.errors import SodaOpsError
from sodaops.web.guard import Access
from sodaops.web.log import configure_json_logging
from sodaops.web.server import run


def main() -> int:
    """Runs the service until SIGTERM or Ctrl-C."""
    configure_json_logging()
    try:
        settings = AnnotateSettings.from_environment(sys.argv[1:])
        app = create_annotation_app(settings.store, Access(settings.api_keys, settings.admin_keys, settings.allowed_hosts))
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    run(app, settings, MAX_BODY_BYTES, stop_s=5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
