"""``python -m sodaops.cli``."""

import sys

from sodaops.cli import main

if __name__ == "__main__":
    sys.exit(main())
