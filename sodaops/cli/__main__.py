"""``python -m sodaops.cli``."""

from sodaops.cli import run

if __name__ == "__main__":
    run()
