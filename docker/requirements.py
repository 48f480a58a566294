"""Prints the requirements of some extras, one per line, so that an image installs them in a layer without the code.

python docker/requirements.py serve gs > requirements.txt
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str], pyproject: str) -> list[str]:
    """The project's dependencies and those of extras, including extras within extras.

    Args:
        extras: names in ``[project.optional-dependencies]``.
        pyproject: text of pyproject.toml.

    Raises:
        KeyError: no such extra.
    """
    project = tomllib.loads(pyproject)["project"]
    needed, pending = list(project["dependencies"]), list(extras)
    for extra in pending:  # grows while it is read
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            if own:
                pending += own[1].split(",")
            else:
                needed.append(requirement)
    return sorted(set(needed))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:], Path("pyproject.toml").read_text(encoding="utf-8"))))
