"""``python -m sodaops.request_log JOURNAL DESTINATION [KEEP_DAYS]``: writes Parquet parts and prints how many."""

import sys

from sodaops.errors import SodaOpsError
from sodaops.request_log.parts import write_parts
from sodaops.request_log.retention import prune

if __name__ == "__main__":
    try:
        n_written = write_parts(*sys.argv[1:3])
        print(n_written, flush=True)  # before pruning: the parts are written, even if deleting old ones fails
        if n_written and sys.argv[3:]:
            prune(sys.argv[2], int(sys.argv[3]))
    except SodaOpsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
