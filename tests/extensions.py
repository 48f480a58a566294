"""Installs tests/extensions_package, a package outside the repository: each extension is one Python and one YAML file there.

The fixture ``extensions`` (tests/conftest.py) makes it importable and is its folder of YAML files, for ``--config-dir``.
"""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).with_name("extensions_package")
NAME = "textlab"  # the package that it installs
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")


def install(folder: Path) -> None:
    """Installs the package with pip into ``folder/site``."""
    source = shutil.copytree(PACKAGE, folder / "source")  # setuptools writes beside what it builds
    subprocess.run([*PIP, "--no-build-isolation", "--target", folder / "site", source], check=True)


def forget() -> None:
    """Makes the next import read the package again, or fail where it is no longer on the path."""
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
