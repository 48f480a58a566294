"""On Windows, what needs Linux or macOS is skipped: the modules that import what Windows lacks. Bytecode is kept everywhere."""

import os
import re
import sys
from collections.abc import Generator

import pytest

# Without it pytest rewrites every assertion again in each of its processes, and each process of a test compiles the package.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_POSIX = r"No module named '(fcntl|resource|termios|uvloop)'"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Makes a skip of a module that cannot be imported there."""
    report = yield
    lacks = re.search(_POSIX, str(report.longrepr)) if report.failed and sys.platform == "win32" else None
    if lacks:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs Linux or macOS ({lacks[1]})")
    return report
