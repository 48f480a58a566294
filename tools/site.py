"""Builds the site into site/, and ends with 1 when anything was amiss: ``make docs``.

Zensical's strict mode fails on links and anchors alone; what the readers of docstrings say goes by it, and is failed on here.
"""

import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def main() -> int:
    """Builds, and shows what was said."""
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    said, told = (re.sub(r"\x1b\[[0-9;]*m", "", text).strip() for text in (done.stderr, done.stdout))
    print(told)
    if done.returncode == 0 and said == "No issues found":
        print(f"site: {REPO / 'site/index.html'}")
        return 0
    if "Aborted because --strict" in said:  # the faults are told above the traceback
        said = said.partition("Traceback (most recent call last)")[0]
    print(said, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
