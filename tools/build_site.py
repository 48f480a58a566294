"""Builds the site into site/ and exits with 1 when anything is wrong with it: ``make docs``.

Zensical's strict mode fails on broken links and headings only. Warnings from the docstring reader fail here too.
"""

import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def main(repo: Path = REPO) -> int:
    """Builds the site of a repository and prints what is wrong with it."""
    code, output, errors = build(repo)
    print(output)
    if code == 0:
        print(f"site: {repo / 'site/index.html'}")
    else:
        print(errors, file=sys.stderr)
    return code


def build(repo: Path) -> tuple[int, str, str]:
    """Runs Zensical; returns 0 or 1, what it printed, and its complaints."""
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    errors, output = (re.sub(r"\x1b\[[0-9;]*m", "", text).strip() for text in (done.stderr, done.stdout))
    if done.returncode == 0 and errors == "No issues found":
        return 0, output, ""
    if "Aborted because --strict" in errors:  # the complaints stand above the traceback
        errors = errors.partition("Traceback (most recent call last)")[0]
    return 1, output, errors


if __name__ == "__main__":
    sys.exit(main())
