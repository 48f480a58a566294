"""Prints what some extras of the project need, a line each, so that an image holds it in a layer without the code.

python docker/requirements.py serve gs > requirements.txt
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str], pyproject: str) -> list[str]:
    """The project's dependencies and those of extras, an extra within an extra included.

    Args:
        extras: names in ``[project.optional-dependencies]``.
        pyproject: text of pyproject.toml.

    Raises:
        KeyError: no such extra.
    """
    project = tomllib.loads(pyproject)["project"]
    found, asked = list(project["dependencies"]), list(extras)
    for extra in asked:  # which grows
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            if own:
                asked += own[1].split(",")
            else:
                found.append(requirement)
    return sorted(set(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:], Path("pyproject.toml").read_text(encoding="utf-8"))))
