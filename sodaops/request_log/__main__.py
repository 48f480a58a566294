"""Work on the request log that needs pyarrow, in a process of its own.

``python -m sodaops.request_log JOURNAL DESTINATION [KEEP_DAYS]`` writes Parquet parts and prints how many;
``--find DESTINATION REQUEST_ID PLACE`` prints whether the parts have this text: True or False.
"""

import sys

from sodaops.errors import SodaOpsError
from sodaops.request_log.parts import find_in_parts, write_parts
from sodaops.request_log.retention import prune

if __name__ == "__main__":
    try:
        if sys.argv[1] == "--find":
            print(find_in_parts(sys.argv[2], sys.argv[3], int(sys.argv[4])))
            sys.exit()
        n_written = write_parts(*sys.argv[1:3])
        print(n_written, flush=True)  # before pruning: the parts are written, even if deleting old ones fails
        if n_written and sys.argv[3:]:
            prune(sys.argv[2], int(sys.argv[3]))
    except SodaOpsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
